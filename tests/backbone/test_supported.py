"""The table of supported models matches the code, and the examination behind it finds wrong captures."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import examine as examine_module
import pytest
import supported
import transformers
from examine import examine
from examine_whole import examine_whole, whole_types
from tiny_configs import tiny_config
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qk_sniffer.backbone import backbone as backbone_module
from qk_sniffer.backbone import loading as loading_module
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import Family, find_family

TABLE = supported.TABLE.read_text()
ROWS = re.findall(r"^\| (\S+) \| (\w+) \| (.*) \|$", TABLE, flags=re.MULTILINE)
CAPTURED = [name for name, _, rest in ROWS if rest.startswith("yes ")]

same_version = pytest.mark.skipif(
    f"transformers {transformers.__version__}" not in TABLE, reason="the table is of another version of transformers"
)


@pytest.mark.slow
@same_version
def test_the_committed_table_is_what_the_code_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, provable = tmp_path / "SUPPORTED.md", tmp_path / "provable_types.py"
    committed = supported.PROVABLE.read_text()
    monkeypatch.setattr(supported, "TABLE", table)
    monkeypatch.setattr(supported, "PROVABLE", provable)
    monkeypatch.setattr(sys, "argv", ["supported.py"])
    assert supported.main() == 0
    assert table.read_text() == TABLE
    assert provable.read_text() == committed


@same_version
def test_the_table_has_every_model_type_once() -> None:
    assert sorted(name for name, _, _ in ROWS) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert all(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] == class_name for name, class_name, _ in ROWS)


def test_nothing_in_the_table_is_wrong_and_its_counts_are_those_of_its_rows() -> None:
    assert "WRONG" not in TABLE and "FAILED" not in TABLE
    assert len(CAPTURED) >= 160
    refused = len(ROWS) - len(CAPTURED)
    assert f"Of {len(ROWS)} model types, **{len(CAPTURED)} are captured** and {refused} refused." in TABLE
    before = sum(rest.startswith("yes | yes ") for _, _, rest in ROWS)
    assert f"{before} are captured before RoPE too" in TABLE


@pytest.mark.few(3)
@same_version
@pytest.mark.parametrize(
    "name",
    ["afmoe", "deepseek_v3", "diffllama", "falcon", "falcon_h1", "gemma4_text", "inkling_text", "mamba", "zamba2"],
)
def test_a_row_is_what_the_examination_finds(name: str) -> None:
    assert supported.row(examine(name)) in TABLE.splitlines()


def test_scalars_that_can_change_attention_do_in_the_configs_of_the_sweep() -> None:
    assert tiny_config("falcon_h1").key_multiplier == 1.3
    assert tiny_config("granite").attention_multiplier == 1.3
    assert tiny_config("gemma3_text").attn_logit_softcapping == 20.0
    assert tiny_config("olmoe").clip_qkv == 4.0
    assert tiny_config("stablelm").qk_layernorm and tiny_config("cohere").use_qk_norm
    assert tiny_config("llama").attention_bias and tiny_config("zamba2").use_mem_rope
    assert tiny_config("deepseek_v3").rope_parameters["mscale_all_dim"] == 0.5
    assert tiny_config("inkling2_text").log_scaling_n_floor == tiny_config("llama4_text").floor_scale == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["falcon_h1", "inkling2_text"])
def test_a_proof_without_the_scale_of_a_type_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = type(find_family(name))
    step = "projected" if "projected" in vars(family) else "after_rotary"
    monkeypatch.setattr(family, step, getattr(Family, step))
    assert "hooks derive other vectors" in examine(name).note


class OneLayerLess(Family):
    def attention_layers(self, decoder: nn.Module) -> dict[nn.Module, int]:
        layers = super().attention_layers(decoder)
        layers.popitem()
        return layers


class LayersFromTheEnd(Family):
    def layer(self, module: nn.Module, index: int, arguments: Any) -> int:
        return 3 - index


class OtherWindow(Family):
    def sliding_window(self, module: nn.Module, arguments: dict[str, Any]) -> int | None:
        return 7


class NoWindow(Family):
    def sliding_window(self, module: nn.Module, arguments: dict[str, Any]) -> int | None:
        return None


class Sparse(Family):
    def sparse_attention(self, module: nn.Module) -> bool:
        return True


class NotSparse(Family):
    def sparse_attention(self, module: nn.Module) -> bool:
        return False


class Biased(Family):
    def position_bias(self, module: nn.Module, arguments: Any) -> bool:
        return True


class NothingRotated(Family):
    def before_rotary(self, module: Any, rotary_calls: Any, query: Any, key: Any) -> Any:
        return query, key


class KeyOfTheQuery(Family):
    def before_rotary(self, module: Any, rotary_calls: Any, query: Any, key: Any) -> Any:
        before, _ = super().before_rotary(module, rotary_calls, query, key)
        return before, before[:, :2]


class OtherHooks(Family):
    def projections(self, module: Any) -> dict[str, nn.Module] | None:
        return {"q": module.q_proj, "k": module.v_proj}


class ChangesTheForward(Family):
    def register_tap(self, module: nn.Module, on_query_key: Callable[..., None]) -> Sequence[Any]:
        return [module.register_forward_hook(lambda _, inputs, output: (output[0] * 2, *output[1:]))]


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("family", "finding"),
    [
        pytest.param(OneLayerLess, "attention of MistralAttention is not captured", marks=pytest.mark.slow),
        (LayersFromTheEnd, "4 calls of attention, 4 layers probed, captured [3, 2, 1, 0]"),
        (OtherWindow, "MistralAttention attends within a window of 8 tokens, but a window of 7 is declared"),
        (NoWindow, "MistralAttention attends within a window of 8 tokens, but no window is declared"),
        pytest.param(Sparse, "layer 0: its facts say that it is sparse, its mask is dense", marks=pytest.mark.slow),
        pytest.param(Biased, "layer 0: its facts name a bias, but its logits have none", marks=pytest.mark.slow),
        (NothingRotated, "layer 0: the vectors are not those that the rotary function receives"),
        (KeyOfTheQuery, "layer 0: the vectors are not those that the rotary function receives"),
        pytest.param(OtherHooks, "hooks derive other vectors", marks=pytest.mark.slow),
        (ChangesTheForward, "capturing changes the forward pass"),
    ],
)
def test_a_wrong_family_is_found_out(family: type[Family], finding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine("mistral").post == "yes"
    monkeypatch.setattr(loading_module, "find_family", lambda *_: family())
    entry = examine("mistral")
    assert entry.post == "WRONG"
    assert finding in entry.note


@pytest.mark.parametrize(
    ("model_type", "family", "finding"),
    [
        ("phimoe", Family, "PhimoeAttention attends within a window of 8 tokens"),
        ("qwen2_moe", NoWindow, "Qwen2MoeAttention attends within a window of 8 tokens"),
        ("deepseek_v32", NotSparse, "layer 0: its mask hides keys that its facts do not exclude"),
    ],
)
def test_a_type_that_needs_its_family_is_found_out_without_it(
    model_type: str, family: type[Family], finding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading_module, "find_family", lambda *_: family())
    entry = examine(model_type)
    assert entry.post == "WRONG"
    assert finding in entry.note


@pytest.mark.parametrize(
    ("window", "finding"),
    [
        (None, "its mask hides keys that its facts do not exclude"),
        (7, "its facts give a window of 7, its mask has another"),
    ],
)
def test_a_mask_that_is_a_band_of_another_window_is_found_out(window: int | None, finding: str) -> None:
    backbone, facts, _ = examine_module._loaded("mistral")
    calls, seen = examine_module._check_post(backbone, facts)
    assert examine_module._reach(calls[0], seen[0]) == ["sliding windows"]
    with pytest.raises(examine_module.WrongError, match=f"layer 0: {finding}"):
        examine_module._reach(calls[0], replace(seen[0], sliding_window=window))


def test_vectors_before_rope_that_depend_on_the_position_are_found_out() -> None:
    backbone, _, _ = examine_module._loaded("mistral")
    examine_module._check_unmoved(Backbone(backbone.decoder, Family(), pre_rope=True))
    with pytest.raises(examine_module.WrongError, match="depend on the position"):
        examine_module._check_unmoved(Backbone(backbone.decoder, NothingRotated(), pre_rope=True))


def test_other_vectors_than_those_of_the_kernel_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = examine_module.captured

    def one_bit(*args: Any) -> Any:
        seen = copied(*args)
        seen[2].key[0, 1, 5, 3] = seen[2].key[0, 1, 5, 3].nextafter(seen[2].key.new_tensor(9.0))
        return seen

    monkeypatch.setattr(examine_module, "captured", one_bit)
    assert examine("mistral").note == "layer 2: the vectors are not those that attention receives"


def test_a_softmax_of_other_logits_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = backbone_module.layer_facts

    def other_scale(call: Any) -> Any:
        return replace(facts(call), softmax_scale=0.3)

    monkeypatch.setattr(backbone_module, "layer_facts", other_scale)
    assert examine("mistral").note == "layer 0: its facts do not explain its attention weights"


def test_a_bias_that_is_not_declared_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(find_family("doge")), "position_bias", Family.position_bias)
    assert examine("doge").note == "layer 0: its facts do not explain its attention weights"


def test_a_type_that_takes_too_long_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supported, "TIMEOUT_S", 0.1)
    entries = list(supported._examined(["llama", "qwen3"]))
    assert [(entry.model_type, entry.post) for entry in entries] == [("llama", "FAILED"), ("qwen3", "FAILED")]
    assert "took more than 0.1 s" in entries[0].note


WHOLE = re.findall(r"^\| (\S+) \| `(\w*)` \| (yes|no) \| (\w*) \| (.*) \|$", TABLE, flags=re.MULTILINE)


@same_version
def test_the_table_of_multimodal_models_has_every_type_once() -> None:
    assert [name for name, *_ in WHOLE] == whole_types()
    captured = {name for name, _, verdict, *_ in WHOLE if verdict == "yes"}
    assert f"Of {len(WHOLE)} model types, **{len(captured)} are captured** and {len(WHOLE) - len(captured)}" in TABLE
    assert {"smolvlm", "idefics2", "idefics3", "qwen3_vl_moe", "glm4v_moe", "kimi_k25", "minimax_m3_vl"} <= captured
    assert {"qianfan_ocr", "qwen2_5_omni", "qwen3_omni_moe", "paddleocr_vl", "kosmos-2", "step3p7"} <= captured


@same_version
@pytest.mark.parametrize("name", ["qwen3_vl_moe", pytest.param("qwen2_5_omni", marks=pytest.mark.slow)])
def test_a_row_of_a_multimodal_model_is_what_the_examination_finds(name: str) -> None:
    assert supported.row(examine_whole(name)) in TABLE.splitlines()


@pytest.mark.parametrize("name", ["qwen3_vl_moe", pytest.param("glm4v_moe", marks=pytest.mark.slow)])
def test_experts_as_they_are_published_need_the_class_of_the_whole_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading_module, "is_wrapper", lambda *_: False)
    entry = examine_whole(name)
    assert entry.post == "no" and "lacks, or has in another shape" in entry.note and "experts" in entry.note
