"""Tests that no pattern of a checkpoint runs for ever on the names of modules."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.adapters import save_adapter
from support.jobs import QWEN3

from qk_sniffer.backbone.loading import check_model, load_backbone
from qk_sniffer.backbone.patterns import refuse_runaway_patterns
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import SourceError

ENDLESS = r"(\w+\.?)+(\w+\.?)+X"


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_bytes()) | settings), encoding="utf-8")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qk_sniffer.backbone.patterns._CPU_S", 0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 4}},
        {"layers_to_transform": [0], "layers_pattern": [ENDLESS]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_an_adapter_names_its_modules_by_patterns_that_end(
    settings: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(QWEN3, tmp_path / "adapter")
    change(adapter / "adapter_config.json", **settings)
    model = ModelConfig(name=str(checkpoint), adapter=str(adapter), dtype="float32", device_map="cpu")
    for load in (check_model, load_backbone):
        with pytest.raises(SourceError, match=r"adapter_config\.json of .* has a pattern .* does not end: .*X"):
            load(model)


def test_a_pattern_that_does_not_end_is_named() -> None:
    with pytest.raises(SourceError, match=r"it has a pattern .* does not end: .*X"):
        refuse_runaway_patterns("it", {"a": [{f"re:{ENDLESS}": 1}], "b": ".*_proj"}, ["model.layers.0.mlp.gate_proj"])


def test_a_usual_pattern_costs_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("a process is started"))
    usual = ["re:.*lm_head", r".*\.mlp\.gate", "re:.*visual.*", "model.layers.0"]
    refuse_runaway_patterns("it", usual, ["model.layers.0.self_attn.q_proj"])
    for risky in (ENDLESS, r"(\w+)+", r"a?" * 30 + "a" * 30, ".*.*.*.*X", r"(a|a){9}", "(\n)*", "(?x)(a|a) +"):
        with pytest.raises(pytest.fail.Exception, match="a process is started"):
            refuse_runaway_patterns("it", [risky], ["a"])


# The form that unsloth writes.
ENDS = r"(?:.*?(?:language|text|model).*?(?:self_attn|attn|mlp).*?(?:q_proj|k_proj).*?)"


def test_a_pattern_that_ends_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qk_sniffer.backbone.patterns._CPU_S", 10)
    refuse_runaway_patterns("it", {"target_modules": ENDS}, [f"model.layers.{n}.self_attn.q_proj" for n in range(99)])


@pytest.mark.slow
def test_a_pattern_that_ends_is_matched(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qk_sniffer.backbone.patterns._CPU_S", 10)
    adapter = save_adapter(QWEN3, tmp_path / "adapter")
    change(adapter / "adapter_config.json", target_modules=ENDS)
    load_backbone(ModelConfig(name=str(checkpoint), adapter=str(adapter), dtype="float32", device_map="cpu"))


@pytest.mark.slow
def test_a_quantized_checkpoint_names_its_modules_by_patterns_that_end(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    targets = {"g": {"targets": [f"re:{ENDLESS}"], "weights": {"num_bits": 8}}}
    for quantization in (
        {"quant_method": "fp8", "modules_to_not_convert": [ENDLESS]},
        {"quant_method": "compressed-tensors", "config_groups": targets, "format": "int-quantized"},
    ):
        change(folder / "config.json", quantization_config=quantization)
        with pytest.raises(SourceError, match=r"quantization_config of .* has a pattern .* does not end: .*X"):
            check_model(ModelConfig(name=str(folder), dtype="float32"))
