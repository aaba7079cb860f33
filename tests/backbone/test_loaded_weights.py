"""Every weight of a checkpoint that the vectors depend on is in the decoder, or the error names it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.tiny import CUT
from support.zoo import CASES, Case

from qk_sniffer.backbone.loading import check_model, load_backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import SourceError

pytestmark = pytest.mark.floor

LLAMA = replace(CASES[0], options=CUT)
"""Two layers."""

Weights = dict[str, torch.Tensor]


def saved(folder: Path, change: Callable[[Weights], Weights], case: Case = LLAMA, **config: object) -> ModelConfig:
    """Saves `case` with changed weights and further keys of its config.json; returns the config that loads it."""
    case.model().save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return ModelConfig(name=str(folder), dtype="float32")


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight_scale_inv",
        "model.layers.1.mlp.down_proj.input_scale",
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.self_attn.sinks",
        "model.layers.0.pre_mlp_norm.weight",
        "model.layers.1.mlp.experts.7.up_proj.weight",
        "model.embed_tokens.weight_scale",
        "model.embed_norm.weight",
        "model.norm.bias",
        "model.input_scale",
        "model.pre_norm.weight",
        "model.layers.x.down_proj.weight",
        "model.layers.1.self_attn.rotary_scale.weight",
    ],
)
def test_a_further_weight_of_what_is_kept_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    config = saved(tmp_path, lambda weights: weights | {name: torch.ones(1)})
    with pytest.raises(SourceError, match=rf"does not ask for 1 weights .*: {re.escape(name)}\."):
        load_backbone(config)


def test_what_no_query_or_key_depends_on_may_be_there(tmp_path: Path) -> None:
    further = [
        "lm_head.weight_scale",
        "score.weight",
        "mtp.layers.0.self_attn.q_proj.weight",
        "model.mtp.embed_norm.weight",
        "model.mtp_emb_norm.0.weight",
        "model.layers.2.self_attn.q_proj.weight_scale_inv",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.masked_bias",
        "rotary_emb.inv_freq",
        "visual.blocks.0.attn.qkv.weight_scale",
    ]
    config = saved(tmp_path, lambda weights: weights | {name: torch.ones(1) for name in further})
    load_backbone(config)
    load_backbone(config, layers=[0])


def with_another(name: str, tensor: torch.Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: tensor}


GPT2 = Case("gpt2", "GPT2Config", {"n_positions": 64}, 8)


@pytest.mark.slow
def test_masks_of_older_checkpoints_may_be_there_and_biases_of_their_name_may_not(tmp_path: Path) -> None:
    mask = torch.ones(1, 1, 8, 8).tril()
    masks: list[tuple[Case, str, torch.Tensor]] = [
        (LLAMA, "model.layers.0.self_attn.bias", mask.bool()),
        (LLAMA, "model.layers.0.self_attn.bias", mask[0, 0]),
        (LLAMA, "model.layers.1.self_attn.masked_bias", torch.tensor(-1e4)),
        (GPT2, "h.0.attn.bias", mask),
        (GPT2, "transformer.h.1.attn.masked_bias", torch.tensor(-1e4)),
        (GPT2, "transformer.h.0.attn.rotary_emb.inv_freq", torch.ones(4)),
    ]
    for case, name, tensor in masks:
        load_backbone(saved(tmp_path, with_another(name, tensor), case))
    real = [
        (LLAMA, "model.layers.0.self_attn.bias"),
        (LLAMA, "layers.1.self_attn.masked_bias"),
        (LLAMA, "model.layers.0.self_attn.q_norm.weight"),
        (GPT2, "transformer.h.0.attn.q_norm.weight"),
        (GPT2, "h.1.attn.rotary_emb.weight"),
        (GPT2, "h.1.attn.masked_bias"),
    ]
    for case, name in real:
        config = saved(tmp_path, with_another(name, torch.ones(16)), case)
        with pytest.raises(SourceError, match=rf"does not ask for 1 weights .*: {re.escape(name)}\."):
            load_backbone(config)


def test_a_bias_of_the_name_of_a_mask_in_a_larger_model_is_refused(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "gemma3_multimodal")
    name = "language_model.model.layers.0.self_attn.bias"
    load_backbone(saved(tmp_path, with_another(name, torch.ones(1, 1, 8, 8).tril()), case))
    config = saved(tmp_path, with_another(name, torch.ones(32)), case)
    with pytest.raises(SourceError, match=r"does not ask for 1 weights .*: layers\.0\.self_attn\.bias\."):
        load_backbone(config)


def test_a_layer_that_transformers_ignores_by_its_number_is_not_ignored_if_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.mlp.down_proj.weight_scale"
    config = saved(tmp_path, lambda weights: weights | {name: torch.ones(1)})
    for pattern, ignored in ((r"model\.layers\.1.*", False), (r"layers.1.mlp.down_proj", True)):
        monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_keys_to_ignore_on_load_unexpected", [pattern])
        if ignored:
            load_backbone(config)
        else:
            with pytest.raises(SourceError, match=re.escape(name)):
                load_backbone(config)


def mlp_as(dtype: torch.dtype) -> Callable[[Weights], Weights]:
    return lambda weights: {name: w.to(dtype) if ".mlp." in name else w for name, w in weights.items()}


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.int32, "I32")]
)
def test_quantized_weights_without_a_quantizer_are_an_error_that_names_them(
    dtype: torch.dtype, stored: str, tmp_path: Path
) -> None:
    config = saved(tmp_path, mlp_as(dtype))
    name = r"model\.layers\.0\.mlp\.down_proj\.weight"
    message = rf"6 of its weights are quantized, and there is no quantization_config .*{name} \({stored}\)"
    with pytest.raises(SourceError, match=message):
        load_backbone(config)
    file = tmp_path / "model.safetensors"
    torch.save(load_file(file), tmp_path / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(SourceError, match="6 of its weights are quantized"):
        load_backbone(replace(config, allow_pickle=True))


def test_quantized_weights_of_what_is_left_out_are_no_error(tmp_path: Path) -> None:
    def change(weights: Weights) -> Weights:
        return weights | {
            "lm_head.weight": weights["lm_head.weight"].to(torch.float8_e4m3fn),
            "model.layers.2.mlp.down_proj.weight": torch.ones(16, 16, dtype=torch.int8),
            "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        }

    load_backbone(saved(tmp_path, change))


def test_a_method_of_quantization_that_transformers_ignores_is_an_error_that_names_it(tmp_path: Path) -> None:
    config = saved(tmp_path, mlp_as(torch.float8_e4m3fn), quantization_config={"quant_method": "modelopt"})
    with pytest.raises(SourceError, match=r"quantized with 'modelopt' .*compressed-tensors, .*fp8"):
        check_model(config)


INTEGERS = (
    "model.layers.1.input_layernorm.weight",
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.bias",
)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_integers_that_would_be_read_as_floats_are_an_error_whatever_their_names(
    quantized: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    further: dict[str, object] = {"attention_bias": True}
    if quantized:
        further["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}

    def change(weights: Weights) -> Weights:
        biases = {f"model.layers.{i}.self_attn.{name}_proj.bias": torch.ones(16) for i in (0, 1) for name in "qkvo"}
        size = {name: weights[name.replace("bias", "weight")].shape[0] for name in biases}
        weights = weights | {name: bias[:1].repeat(size[name]) for name, bias in biases.items()}
        scales = {name.replace("bias", "weight_scale_inv"): torch.ones(1, 1) for name in biases if quantized}
        return weights | scales | {name: (weights[name] * 90).to(dtype) for name in INTEGERS}

    config = saved(tmp_path, change, **further)
    with pytest.raises(SourceError, match="3 of its weights are quantized") as caught:
        load_backbone(config)
    assert all(name in str(caught.value) for name in INTEGERS)


@pytest.mark.few(3)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize(
    ("type", "name"),
    [("qwen3_moe", "model.layers.1.mlp.experts.2.up_proj.weight"), ("gpt_oss", "model.layers.1.mlp.experts.down_proj")],
)
def test_integers_of_experts_without_a_scale_are_an_error_that_names_them(
    type: str, name: str, dtype: torch.dtype, quantized: bool, tmp_path: Path
) -> None:
    case = next(case for case in CASES if case.name == type)
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}
    further: dict[str, object] = {"quantization_config": fp8} if quantized else {}
    config = saved(tmp_path, lambda weights: weights | {name: (weights[name] * 90).to(dtype)}, case, **further)
    lack = "no scale" if quantized else "no quantization_config"
    with pytest.raises(SourceError, match=rf"1 of its weights are quantized, and there is {lack}.*: {name} \("):
        load_backbone(config)


def test_experts_that_are_not_numbered_from_zero_without_a_gap_are_an_error(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen3_moe")

    def renumbered(weights: Weights) -> Weights:
        return {re.sub(r"(layers\.1\..*experts\.)0\.", r"\g<1>27.", name): w for name, w in weights.items()}

    config = saved(tmp_path, renumbered, case)
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.experts\.0\.down_proj\.weight is missing, .*experts\.27\."):
        load_backbone(config)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen3_moe")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    config = saved(tmp_path, lambda weights: {key: w for key, w in weights.items() if key != name}, case)
    with pytest.raises(
        SourceError, match=rf"cannot make 1 weights .*gate_up_proj.*: it lacks {re.escape(name)}\. Check"
    ):
        load_backbone(config)
