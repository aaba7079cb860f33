"""Only the settings name an attention kernel: one that a checkpoint names would be code from the Hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.backbones import FolderOf, captured, loaded
from support.zoo import CASES, ids

from qk_sniffer.backbone.loading import check_model
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import SourceError

KERNEL = "kernels-community/nothing"
TEXT_ONLY = next(case for case in CASES if case.vision is None)
MULTIMODAL = next(case for case in CASES if case.vision is not None)


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise AssertionError(f"transformers loads {arguments}")

    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", fail)


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Puts a value into a config and into every config in it."""
    for part in [*config.values()]:
        if isinstance(part, dict) and "model_type" in part:
            put(part, key, value)
    config[key] = value


@pytest.mark.few(3)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("case", [TEXT_ONLY, MULTIMODAL], ids=lambda case: case.name)
@pytest.mark.parametrize("overrides", [{}, {"max_position_embeddings": 200}], ids=str)
def test_a_kernel_that_a_checkpoint_names_is_not_loaded(
    case: Any, key: str, overrides: dict[str, Any], folder_of: FolderOf, tmp_path: Path
) -> None:
    folder = shutil.copytree(folder_of(case), tmp_path / "model")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    put(config, key, KERNEL)
    put(config, "experts_implementation", KERNEL)
    path.write_text(json.dumps(config))
    settings = ModelConfig(name=str(folder), dtype="float32", device_map="cpu", config_overrides=overrides)
    assert check_model(settings)._attn_implementation is None
    backbone = loaded(folder)
    assert KERNEL not in (backbone.config._attn_implementation, backbone.config._experts_implementation)
    expected = captured(loaded(folder_of(case)), ids())
    for name, states in captured(backbone, ids()).items():
        assert torch.equal(states, expected[name])


@pytest.mark.parametrize("case", [TEXT_ONLY, MULTIMODAL], ids=lambda case: case.name)
def test_the_settings_name_a_kernel(case: Any, folder_of: FolderOf) -> None:
    assert loaded(folder_of(case), kernel="eager").config._attn_implementation == "eager"
    with pytest.raises(SourceError, match="transformers loads"):
        loaded(folder_of(case), kernel=KERNEL)
