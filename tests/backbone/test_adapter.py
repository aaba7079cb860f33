"""Adapters of peft: loaded as peft loads them, whole or not at all, and never without being asked for."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import reference
from support.adapters import adapted, linear_in_attention, lora, save_adapter
from support.backbones import captured
from support.jobs import QWEN3
from support.zoo import CASES, VOCAB, Case, decoder_of, ids

from qk_sniffer.backbone.adapter import check_adapter
from qk_sniffer.backbone.adapter_files import SETTINGS, WEIGHTS, Adapter
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import find_family
from qk_sniffer.backbone.loading import check_model, load_backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import ConfigError, QkSnifferError, SourceError

pytestmark = pytest.mark.floor

FITTING = QWEN3.config()

merged_or_not = pytest.mark.parametrize("merge", [False, True])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on queries and keys, as saved from a model with its head."""
    return save_adapter(QWEN3, tmp_path_factory.mktemp("adapter"), lora(modules_to_save=["lm_head"]))


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "tuned"))


@pytest.fixture
def model(checkpoint: Path, adapter: Path) -> ModelConfig:
    return ModelConfig(name=str(checkpoint), adapter=str(adapter), dtype="float32", device_map="cpu")


def change_settings(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change_weights(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def error(config: ModelConfig, kind: type[QkSnifferError] = SourceError) -> str:
    """Returns the error of `config` before its weights are loaded, which loading gives too."""
    with pytest.raises(kind) as checked:
        check_model(config)
    with pytest.raises(kind) as loaded:
        load_backbone(config)
    assert str(checked.value) == str(loaded.value)
    return str(checked.value)


@merged_or_not
def test_the_vectors_are_those_of_pefts_own_forward_pass(model: ModelConfig, adapter: Path, merge: bool) -> None:
    decoder = decoder_of(adapted(QWEN3, adapter, merged=merge))
    norms = {(layer, kind): f"layers.{layer}.self_attn.{kind}_norm" for layer in (0, 1, 2) for kind in "qk"}
    expected: dict[tuple[int, str], torch.Tensor] = {}

    def keep(key: tuple[int, str]) -> Any:
        return lambda module, inputs, output: expected.update({key: output.transpose(1, 2)})

    for key, name in norms.items():
        decoder.get_submodule(name).register_forward_hook(keep(key))
    with torch.no_grad():
        decoder(input_ids=ids())
    config = replace(model, merge_adapter=merge)
    before = captured(load_backbone(config, pre_rope=True), ids())
    after = captured(load_backbone(config), ids())
    plain = captured(load_backbone(replace(model, adapter=None), pre_rope=True), ids())
    for (layer, kind), vectors in expected.items():
        assert torch.equal(before[layer, kind], vectors)
        assert (plain[layer, kind] - vectors).abs().max() > 0.5
        sliding = QWEN3.sliding_windows[layer] is not None
        turned = reference.turned(QWEN3, decoder.config, vectors.double(), sliding=sliding)
        assert torch.allclose(after[layer, kind].double(), turned, atol=1e-4)


def test_merging_does_not_write_into_the_checkpoint(model: ModelConfig) -> None:
    weights = Path(str(model.name), "model.safetensors")
    before = weights.read_bytes()
    names = {name for name, _ in load_backbone(replace(model, merge_adapter=True)).decoder.named_parameters()}
    assert names == {name for name, _ in load_backbone(replace(model, adapter=None)).decoder.named_parameters()}
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["k_proj", "embed_tokens"]},
        pytest.param({"modules_to_save": ["embed_tokens", "q_norm"]}, marks=pytest.mark.slow),
        pytest.param({"trainable_token_indices": [*range(2, 90)]}, marks=pytest.mark.slow),
        pytest.param({"target_modules": "all-linear", "use_dora": True}, marks=pytest.mark.slow),
        pytest.param({"layers_to_transform": [1]}, marks=pytest.mark.slow),
        pytest.param({"target_modules": r"model\.layers\.[01]\.self_attn\.(q|k)_proj"}, marks=pytest.mark.slow),
        pytest.param({"init_lora_weights": "pissa"}, marks=pytest.mark.slow),
        pytest.param({"bias": "all"}, marks=pytest.mark.slow),
    ],
)
def test_all_parts_of_an_adapter_count(settings: dict[str, Any], model: ModelConfig, tmp_path: Path) -> None:
    folder = save_adapter(QWEN3, tmp_path / "other", lora(**settings))
    same_as_peft(QWEN3, replace(model, adapter=str(folder)))


def same_as_peft(case: Case, config: ModelConfig) -> None:
    """Asserts that the vectors are those of the model that peft loads, and others than without the adapter."""
    assert config.adapter is not None
    check_model(config)
    mine, plain = (captured(load_backbone(each), ids()) for each in (config, replace(config, adapter=None)))
    dtype = getattr(torch, config.dtype)
    decoder = decoder_of(adapted(case, Path(config.adapter), merged=config.merge_adapter, dtype=dtype))
    theirs = captured(Backbone(decoder, find_family(decoder.config.model_type)), ids())  # type: ignore[union-attr]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert not all(torch.equal(mine[key], plain[key]) for key in plain)


@pytest.mark.slow
@merged_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_adapters_of_all_families(
    case: Case, dtype: torch.dtype, merge: bool, folder_of: Callable[[Case], Path], tmp_path: Path
) -> None:
    folder = save_adapter(case, tmp_path / "tuned", lora(target_modules=linear_in_attention(case)), dtype)
    name, kind = str(folder_of(case)), str(dtype).removeprefix("torch.")
    same_as_peft(case, ModelConfig(name=name, adapter=str(folder), merge_adapter=merge, dtype=kind, device_map="cpu"))


@pytest.mark.slow
@merged_or_not
@pytest.mark.parametrize("older", [False, True])
def test_adapters_of_experts(older: bool, merge: bool, folder_of: Callable[[Case], Path], tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen3_moe")
    config = lora(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    folder = tmp_path / "tuned"
    if older:  # in transformers 4, each projection of each expert is a module
        config.save_pretrained(folder)
        save_file(weights_of_experts(case), folder / "adapter_model.safetensors")
    else:
        save_adapter(case, folder, config)
    name = str(folder_of(case))
    same_as_peft(
        case, ModelConfig(name=name, adapter=str(folder), merge_adapter=merge, dtype="float32", device_map="cpu")
    )


def weights_of_experts(case: Case) -> dict[str, torch.Tensor]:
    sizes: Any = case.config()
    hidden, inner = sizes.hidden_size, sizes.moe_intermediate_size
    shapes = {"self_attn.q_proj": (hidden, sizes.num_attention_heads * sizes.head_dim)}
    for expert in range(sizes.num_experts):
        shapes |= {f"mlp.experts.{expert}.{name}_proj": (hidden, inner) for name in ("gate", "up")}
        shapes[f"mlp.experts.{expert}.down_proj"] = (inner, hidden)
    torch.manual_seed(5)
    weights = {}
    for layer, (name, (width, out)) in product(case.layers, shapes.items()):
        module = f"base_model.model.model.layers.{layer}.{name}"
        weights |= {f"{module}.lora_A.weight": torch.randn(4, width), f"{module}.lora_B.weight": torch.randn(out, 4)}
    return weights


KINDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "HRA": {},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm", "q_norm"]},
    "LOHA": {},
    "LOKR": {},
    "OFT": {"oft_block_size": 8, "r": 0},
    "RANDLORA": {"r": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [*range(2, 90)]},
    "VBLORA": {"num_vectors": 16, "vector_length": 16, "topk": 2, "r": 2},
    "VERA": {},
}


@pytest.mark.slow
@merged_or_not
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_adapters(kind: str, merge: bool, model: ModelConfig, tmp_path: Path) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as FORMS

    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "k_proj"]} | KINDS[kind]
    folder = save_adapter(QWEN3, tmp_path / "other", FORMS[kind](**settings))  # type: ignore[index]
    same_as_peft(QWEN3, replace(model, adapter=str(folder), merge_adapter=merge))


def test_weights_that_match_no_module_are_an_error_that_names_them(model: ModelConfig, adapter: Path) -> None:
    other = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    change_weights(adapter, lambda weights: weights | {other: torch.ones(4, 32)})
    with pytest.raises(SourceError, match=r"1 weights that match no module .*: model\.layers\.7\.self_attn\.q_proj"):
        load_backbone(model)
    change_weights(adapter, lambda weights: {name.replace("layers", "blocks"): weights[name] for name in weights})
    assert "has no weights of the modules of this decoder, such as base_model.model.model.blocks.0" in error(model)


def test_weights_that_are_not_floats_are_an_error_that_names_them(model: ModelConfig, adapter: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        first = min(name for name in weights if "lora_A" in name)
        return weights | {first: (weights[first] * 100).to(torch.int8)}

    change_weights(adapter, change)
    with pytest.raises(SourceError, match=r"has 1 weights that are not stored in floats: \S+ \(int8\)\."):
        load_backbone(model)


def test_an_adapter_that_git_lfs_has_not_fetched_is_named(model: ModelConfig, adapter: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4096\n"
    (adapter / "adapter_model.safetensors").write_text(pointer)
    assert "adapter_model.safetensors cannot be loaded: it is a Git LFS pointer" in error(model)


def test_weights_that_an_adapter_lacks_are_an_error_that_names_them(model: ModelConfig, adapter: Path) -> None:
    name = "layers.1.self_attn.k_proj.lora_B.weight"
    change_weights(adapter, lambda weights: {key: weights[key] for key in weights if not key.endswith(name)})
    with pytest.raises(SourceError, match=rf"lacks 1 weights that its adapter_config\.json asks for: .*{name}"):
        load_backbone(model)


def test_an_adapter_of_another_model_is_refused_before_weights_are_loaded(checkpoint: Path, tmp_path: Path) -> None:
    llama = next(case for case in CASES if case.name == "llama")
    folder = save_adapter(llama, tmp_path / "tuned")
    change_settings(folder, base_model_name_or_path="org/llama")
    text = error(ModelConfig(name=str(checkpoint), adapter=str(folder)))
    assert "q_proj.lora_B.weight ([32, 4] in the adapter, [64, 4] by the model)" in text
    assert "It was trained on org/llama" in text


def test_an_adapter_with_further_tokens_is_refused(model: ModelConfig, tmp_path: Path) -> None:
    from peft import get_peft_model

    whole = QWEN3.model()
    whole.resize_token_embeddings(VOCAB + 2)
    get_peft_model(whole, lora()).save_pretrained(tmp_path / "more", save_embedding_layers=True)
    text = error(replace(model, adapter=str(tmp_path / "more")))
    assert "embed_tokens.weight ([98, 32] in the adapter, [96, 32] by the model)" in text
    assert "If its training has added tokens, merge it with peft" in text


def test_an_adapter_of_a_model_of_another_name_is_a_warning(
    adapter: Path, made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_settings(adapter, base_model_name_or_path="org/Base")
    for name in ("org/other", "ORG/base", str(made)):
        check_adapter(Adapter("tuned", json.loads((adapter / SETTINGS).read_text()), adapter / WEIGHTS), name, FITTING)
    assert caplog.messages == ["the adapter tuned was trained on org/Base, and model.name is org/other"]


@pytest.mark.slow
def test_weights_on_disk_are_refused(model: ModelConfig) -> None:
    places = dict.fromkeys(("embed_tokens", "rotary_emb", "norm", "layers.0", "layers.2"), "cpu")
    with pytest.raises(ConfigError, match=r"kept on disk .*: set model\.device_map to devices that hold the whole"):
        load_backbone(replace(model, device_map=places | {"layers.1": "disk"}))


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", pytest.param("PREFIX_TUNING", marks=pytest.mark.slow)])
def test_virtual_tokens_are_refused(kind: str, model: ModelConfig, adapter: Path) -> None:
    change_settings(adapter, peft_type=kind, num_virtual_tokens=3)
    assert "cannot be captured: it puts virtual tokens before the text" in error(model, ConfigError)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"alora_invocation_tokens": [3]}, "it acts only after some tokens"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "it repeats layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "it has changed the weights of its model"),
        ({"peft_type": "POLY"}, "it changes the forward pass around the decoder"),
        ({"peft_type": "ADAPTION_PROMPT", "adapter_len": 2, "adapter_layers": 1}, "adds a prompt inside attention"),
    ],
)
def test_what_a_decoder_alone_cannot_do_is_refused(
    settings: dict[str, Any], reason: str, model: ModelConfig, adapter: Path
) -> None:
    change_settings(adapter, **settings)
    if "peft_type" in settings:  # its settings are those of another kind
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert reason in error(model, ConfigError)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"peft_type": "FUTURE"}, "of the kind FUTURE, which the installed peft"),
        ({"twist": 3, "none": None}, "does not know: twist"),
        ({"r": "many"}, "is not understood|does not fit this model"),
    ],
)
def test_settings_that_peft_does_not_know_are_an_error(
    settings: dict[str, Any], problem: str, model: ModelConfig, adapter: Path
) -> None:
    change_settings(adapter, **settings)
    with pytest.raises(SourceError, match=problem):
        load_backbone(model)


def test_the_settings_of_an_adapter_are_data(
    model: ModelConfig, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    foreign = {"parent_library": "hostile_module", "base_model_class": "Own"}
    change_settings(adapter, auto_mapping=foreign, base_model_name_or_path="/nowhere", revision="other")
    load_backbone(model)
    change_settings(adapter, megatron_config={"a": 1}, megatron_core="hostile_module")
    assert "megatron_config: it is of another library, which would be imported" in error(model, ConfigError)
    assert not (tmp_path / "ran").exists() and "hostile_module" not in sys.modules
    (adapter / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(QkSnifferError, match=r"adapter_config\.json is not"):
        load_backbone(model)


def test_pickled_weights_are_refused_unless_asked_for(model: ModelConfig, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    expected = captured(load_backbone(model), ids())
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    assert "model.allow_pickle=true" in error(model, ConfigError)
    same = captured(load_backbone(replace(model, allow_pickle=True)), ids())
    assert all(torch.equal(same[key], expected[key]) for key in expected)
    (adapter / "adapter_model.bin").unlink()
    assert "has no weights: neither adapter_model.safetensors nor adapter_model.bin" in error(model)


def test_a_checkpoint_with_an_adapter_is_refused_unless_it_is_named(
    checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    both = Path(shutil.copytree(checkpoint, tmp_path / "both"))
    for file in adapter.iterdir():
        shutil.copy(file, both)
    config = ModelConfig(name=str(both), dtype="float32", device_map="cpu")
    text = error(config, ConfigError)
    assert f"model.name={both} holds an adapter" in text and f"model.adapter={both}" in text
    mine = captured(load_backbone(replace(config, adapter=str(both))), ids())
    expected = captured(load_backbone(replace(config, name=str(checkpoint), adapter=str(adapter))), ids())
    assert all(torch.equal(mine[key], expected[key]) for key in expected)
    # transformers would load the adapter too, and count its missing weights instead of the checkpoint's.
    weights = load_file(both / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, both / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks.* 1 weights of the decoder: layers\.1\.self_attn\.k_proj\.weight"):
        load_backbone(replace(config, adapter=str(both)))


def test_an_adapter_given_as_a_model_is_answered_with_the_settings(adapter: Path) -> None:
    change_settings(adapter, base_model_name_or_path="org/base")
    text = error(ModelConfig(name=str(adapter)), ConfigError)
    assert f"set model.name=org/base model.adapter={adapter}" in text


def test_a_folder_without_an_adapter_is_an_error_that_names_it(model: ModelConfig, tmp_path: Path) -> None:
    text = error(replace(model, adapter=str(tmp_path)))
    assert re.search(rf"model\.adapter={tmp_path} has no adapter_config\.json", text)


def test_a_missing_package_is_an_error_that_names_it(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package peft: run pip install peft" in error(model, ConfigError)


@pytest.mark.parametrize("kept", [0, 50, -9])
def test_a_damaged_file_of_weights_is_named(kept: int, model: ModelConfig, adapter: Path) -> None:
    file = adapter / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    how = "it ends in its header, after" if kept >= 0 else "it has .* bytes, and its header says"
    for read in (check_model, load_backbone):
        with pytest.raises(SourceError, match=rf"{re.escape(str(file))}: {how} .* download the adapter again"):
            read(model)


@pytest.mark.parametrize("settings", [{"r": 50_000_000}, {"rank_pattern": {"q_proj": 50_000_000}}])
def test_a_rank_beyond_all_weights_is_refused_before_memory_is_taken(
    settings: dict[str, Any], model: ModelConfig, adapter: Path
) -> None:
    change_settings(adapter, **settings)
    for load in (check_model, load_backbone):
        with pytest.raises(
            SourceError, match=r"asks for the rank 50,000,000, and the largest dimension of its weights"
        ):
            load(model)
