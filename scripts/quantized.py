"""Captures a tiny model in each format of quantized weights, and compares its vectors with those of the original.

The weights are quantized here, or by the library of the format where it is installed. A format that is captured has the
vectors of the dequantized weights.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import QkSnifferError

TABLE = Path(__file__).parent.parent / "models" / "SUPPORTED.md"

MOST_DIFFERENCE = 0.2
"""The largest relative difference from the vectors of the original that counts as that of the format."""

NOT_TRIED = "the package was not installed"

HEADER = """\
## Quantized weights

A tiny model was quantized in each format, saved, and captured on a CPU as a job does it. `captured`: yes if its vectors
are those of the original but for the rounding of the format. `weights`: `dequantized`, or `as stored` if the kernels of
the package compute with the packed numbers. A method of transformers that is not listed was not tried. The manifest and
the card name the quantization. A format that needs a package is refused without it, with the command that installs it.

| format | `quant_method` | package | captured | weights |
|---|---|---|---|---|
"""

BLOCK = 32
"""The values that share a scale, in each dimension of a block."""

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Format:
    """A format of quantized weights."""

    name: str
    method: str
    """The `quant_method` of its checkpoints."""
    package: str | None
    """The package that reads it; None for transformers alone."""
    save: Callable[[Path], PreTrainedModel]
    """Saves a quantized model in a folder; returns the original."""


@dataclass(frozen=True)
class Entry:
    """The result for one format."""

    format: Format
    captured: bool | None
    """None if it was not tried."""
    note: str = ""
    """How the weights are computed with, or the reason of a refusal."""


def examine(format: Format) -> Entry:
    """Saves and captures a model in that format.

    Raises:
        AssertionError: it is captured with other vectors.
    """
    with tempfile.TemporaryDirectory() as folder:
        original = format.save(Path(folder))
        try:
            backbone = load_backbone(ModelConfig(name=folder, dtype="float32", device_map="cpu"))
        except QkSnifferError as error:
            reason = str(error).replace(f"model {folder} ", "").split(":")[0]
            return Entry(format, captured=False, note=reason)
        difference = compared(backbone, original)
        quantization = backbone.stored.describe_quantization(backbone.decoder)
        assert quantization is not None and quantization["method"] == format.method
        assert 0 < difference < MOST_DIFFERENCE, f"{format.name}: a relative difference of {difference:.2g}"
        return Entry(format, captured=True, note="dequantized" if quantization["dequantized"] else "as stored")


def row(entry: Entry) -> str:
    """Returns the format's line of the table."""
    package = entry.format.package
    verdict = {True: "yes", False: "no", None: "not tried"}[entry.captured]
    cells = (entry.format.name, entry.format.method, package or "", verdict, entry.note)
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """Returns the section of the table. Formats whose package is not installed keep their lines.

    Raises:
        AssertionError: a format is captured with other vectors.
    """
    before = {line.split(" | ")[0]: line for line in TABLE.read_text().splitlines()}
    lines = [
        row(examine(each)) if is_installed(each) else before.get(f"| {each.name}", row(Entry(each, None, NOT_TRIED)))
        for each in FORMATS
    ]
    return HEADER + "\n".join(lines) + "\n"


def compared(backbone: Backbone, original: PreTrainedModel) -> float:
    """Returns the largest relative difference of a layer's vectors from those of the original decoder."""
    found = captured(backbone)
    expected = captured(Backbone(backbone.family.decoder(original), backbone.family))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def captured(backbone: Backbone) -> list[torch.Tensor]:
    """Returns the queries and keys of each layer, for the same tokens."""
    seen: list[torch.Tensor] = []
    ids = torch.randint(5, 96, (1, 24), generator=torch.Generator().manual_seed(0))
    backbone.forward(ids, lambda call: seen.extend([call.query.float().clone(), call.key.float().clone()]))
    return seen


def llama() -> PreTrainedModel:
    """Returns a random Llama."""
    torch.manual_seed(0)
    model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**_SIZES)).eval()
    return model


def save_fp8(folder: Path) -> PreTrainedModel:
    """Saves 8-bit floats with a scale for each block of a matrix, as DeepSeek-V3 does."""

    def quantized(name: str, weight: torch.Tensor) -> Weights:
        rows, columns = (size // BLOCK for size in weight.shape)
        blocks = weight.reshape(rows, BLOCK, columns, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        values = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        return {name: values, f"{name}_scale_inv": scale}

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return _save(folder, llama(), quantized, config)


def save_mxfp4(folder: Path) -> PreTrainedModel:
    """Saves the experts of GPT-OSS in pairs of 4-bit floats, with an exponent for 32 of them."""
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    model = GptOssForCausalLM(GptOssConfig(**_SIZES | experts)).eval()
    weights: Weights = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            with torch.no_grad():
                weight.mul_(5)  # so that a wrong expert shows in the next layer
            rows = weight.transpose(1, 2).unflatten(-1, (-1, BLOCK))
            exponent = (rows.abs().amax(-1, keepdim=True) / 6).log2().ceil().clamp(min=-127)
            scaled = rows / exponent.exp2()
            codes = (scaled.abs()[..., None] - _FP4).abs().argmin(-1) + 8 * (scaled < 0)
            weights[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
            weights[f"{name}_scales"] = (exponent[..., 0] + 127).to(torch.uint8)
        else:
            weights[name] = weight.clone()
    return _write(folder, model, weights, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def _compressed(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def save_float_quantized(folder: Path) -> PreTrainedModel:
    """Saves 8-bit floats with a scale for each row."""

    def quantized(name: str, weight: torch.Tensor) -> Weights:
        scale = weight.abs().amax(1, keepdim=True) / 448
        return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}

    return _save(
        folder, llama(), quantized, _compressed("float-quantized", num_bits=8, type="float", strategy="channel")
    )


def save_pack_quantized(folder: Path) -> PreTrainedModel:
    """Saves eight 4-bit integers in one of 32 bits, with a scale for each group of a row."""

    def quantized(name: str, weight: torch.Tensor) -> Weights:
        codes, scale = _integers(weight)
        return {
            f"{name}_packed": _packed(codes, 1, range(8)),
            f"{name}_scale": scale,
            f"{name}_shape": torch.tensor(weight.shape),
        }

    config = _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=BLOCK)
    return _save(folder, llama(), quantized, config)


def save_torchao(folder: Path) -> PreTrainedModel:
    """Saves 8-bit integers by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from transformers import TorchAoConfig

    return _saved_by_library(folder, lambda: TorchAoConfig(Int8WeightOnlyConfig(version=2)))


def save_bitsandbytes(folder: Path, **settings: Any) -> PreTrainedModel:
    """Saves weights by bitsandbytes."""
    from transformers import BitsAndBytesConfig

    return _saved_by_library(folder, lambda: BitsAndBytesConfig(**settings))


def save_gptq(folder: Path) -> PreTrainedModel:
    """Saves eight 4-bit integers of a column in one of 32 bits, with a scale and a zero for each group of a column."""

    def quantized(name: str, weight: torch.Tensor) -> Weights:
        codes, scale = _integers(weight)
        module = name.removesuffix(".weight")
        zeros = torch.full_like(scale, 7, dtype=torch.int64)  # one less than the zero, as the format has it
        return {
            f"{module}.qweight": _packed(codes.T, 0, range(8)),
            f"{module}.qzeros": _packed(zeros.T, 1, range(8)),
            f"{module}.scales": scale.T.half(),
            f"{module}.g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // BLOCK,
        }

    config = {"bits": 4, "group_size": BLOCK, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
    return _save(folder, llama(), quantized, {"quant_method": "gptq"} | config)


def save_awq(folder: Path) -> PreTrainedModel:
    """Saves eight 4-bit integers of a row in one of 32 bits, in the order of AWQ."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def quantized(name: str, weight: torch.Tensor) -> Weights:
        codes, scale = _integers(weight)
        module = name.removesuffix(".weight")
        zeros = torch.full_like(scale, 8, dtype=torch.int64)
        return {
            f"{module}.qweight": _packed(codes.T, 1, order),
            f"{module}.qzeros": _packed(zeros.T, 1, order),
            f"{module}.scales": scale.T.half(),
        }

    config = {
        "bits": 4,
        "group_size": BLOCK,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    return _save(folder, llama(), quantized, {"quant_method": "awq"} | config)


def _integers(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns 4-bit integers (rows, columns) with a zero of 8, and a scale (rows, groups) for each group of a row."""
    groups = weight.unflatten(1, (-1, BLOCK))
    scale = groups.abs().amax(2) / 7
    return (groups / scale[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int64) + 8, scale


def _packed(codes: torch.Tensor, dim: int, order: Sequence[int]) -> torch.Tensor:
    """Packs 8 integers in one of 32 bits, along `dim`: the one at `order[i]` takes the bits from 4 i on."""
    eights = codes.unflatten(dim, (-1, 8)).movedim(dim + 1, -1)[..., list(order)]
    packed: torch.Tensor = (eights << torch.arange(0, 32, 4)).sum(-1)
    return packed.to(torch.int32)


def save_modelopt(folder: Path) -> PreTrainedModel:
    """Saves 8-bit floats as nvidia-modelopt does: with a scale for each matrix."""

    def quantized(name: str, weight: torch.Tensor) -> Weights:
        scale = weight.abs().amax() / 448
        return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}

    return _save(folder, llama(), quantized, {"quant_method": "modelopt", "quant_algo": "FP8"})


def _saved_by_library(folder: Path, config: Callable[[], Any]) -> PreTrainedModel:
    model = llama()
    model.save_pretrained(folder / "original")
    quantized = LlamaForCausalLM.from_pretrained(
        folder / "original", quantization_config=config(), device_map="cpu", dtype=torch.float32
    )
    quantized.save_pretrained(folder)
    return model


def _save(
    folder: Path, model: PreTrainedModel, quantized: Callable[[str, torch.Tensor], Weights], config: dict[str, Any]
) -> PreTrainedModel:
    weights: Weights = {}
    for name, weight in model.state_dict().items():
        weights |= quantized(name, weight) if "_proj." in name else {name: weight.clone()}
    return _write(folder, model, weights, config)


def _write(folder: Path, model: PreTrainedModel, weights: Weights, config: dict[str, Any]) -> PreTrainedModel:
    folder.mkdir(exist_ok=True)
    contiguous = {name: weight.detach().clone().contiguous() for name, weight in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    values = model.config.to_dict() | {"architectures": [type(model).__name__], "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(values, default=str))
    return model


FORMATS = (
    Format("fine-grained FP8", "fp8", None, save_fp8),
    Format("MXFP4 experts", "mxfp4", None, save_mxfp4),
    Format("compressed-tensors, FP8", "compressed-tensors", "compressed_tensors", save_float_quantized),
    Format("compressed-tensors, packed INT4", "compressed-tensors", "compressed_tensors", save_pack_quantized),
    Format("torchao, INT8", "torchao", "torchao", save_torchao),
    Format(
        "bitsandbytes, NF4",
        "bitsandbytes_4bit",
        "bitsandbytes",
        lambda folder: save_bitsandbytes(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    ),
    Format(
        "bitsandbytes, INT8",
        "bitsandbytes_8bit",
        "bitsandbytes",
        lambda folder: save_bitsandbytes(folder, load_in_8bit=True),
    ),
    Format("GPTQ, INT4", "gptq", "gptqmodel", save_gptq),
    Format("AWQ, INT4", "awq", "gptqmodel", save_awq),
    Format("ModelOpt, FP8", "modelopt", None, save_modelopt),
)


def is_installed(format: Format) -> bool:
    """Whether the package of a format is installed."""
    return format.package is None or find_spec(format.package) is not None
