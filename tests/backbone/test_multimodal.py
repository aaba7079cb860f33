"""Of a multimodal checkpoint, only the text decoder is read and run; test_attention checks its vectors."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.backbones import FolderOf, captured, loaded
from support.zoo import CASES, Case, ids
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_pre_hook,
    register_module_module_registration_hook,
)

pytestmark = pytest.mark.floor

multimodal_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.vision is not None], ids=lambda case: case.name
)
BESIDE_TEXT = ("vision", "projector")
"""Parts of the names of weights outside of the text decoder."""


def _is_of_vision(module: nn.Module) -> bool:
    marks = ("vision", "siglip", "pixtral", "projector")
    return any(mark in f"{type(module).__module__}.{type(module).__name__}".lower() for mark in marks)


@multimodal_cases
def test_no_vision_tower_is_in_memory_or_run(case: Case, folder_of: FolderOf) -> None:
    folder = folder_of(case)
    built: list[nn.Module] = []
    ran: list[nn.Module] = []
    hook = register_module_module_registration_hook(lambda owner, name, part: built.append(part))
    try:
        backbone = loaded(folder)
    finally:
        hook.remove()
    hook = register_module_forward_pre_hook(lambda module, inputs: ran.append(module))
    try:
        captured(backbone, ids())
    finally:
        hook.remove()
    assert len(built) > 20 and len(ran) > 20
    assert not [type(module).__name__ for module in (*backbone.decoder.modules(), *ran) if _is_of_vision(module)]
    # The class of the whole model names the weights of the decoder. Its other parts are built without memory.
    tensors = [
        tensor for module in built if _is_of_vision(module) for tensor in (*module.parameters(), *module.buffers())
    ]
    assert tensors and all(tensor.is_meta for tensor in tensors)
    assert not [name for name, _ in backbone.decoder.named_parameters() if any(mark in name for mark in BESIDE_TEXT)]


@multimodal_cases
def test_weights_of_the_vision_tower_are_not_needed(case: Case, folder_of: FolderOf, tmp_path: Path) -> None:
    folder = shutil.copytree(folder_of(case), tmp_path / "text_only")
    weights = load_file(folder / "model.safetensors")
    text = {name: weight for name, weight in weights.items() if not any(mark in name for mark in BESIDE_TEXT)}
    assert len(weights) - len(text) > 5
    save_file(text, folder / "model.safetensors", metadata={"format": "pt"})
    expected = captured(loaded(folder_of(case)), ids())
    for key, states in captured(loaded(folder), ids()).items():
        assert torch.equal(states, expected[key])


def test_layers_of_cross_attention_are_run_by_no_capture(folder_of: FolderOf) -> None:
    mllama = next(case for case in CASES if case.name == "mllama")
    backbone = loaded(folder_of(mllama))
    layers = backbone.config.num_hidden_layers
    assert [layer for layer in range(layers) if layer not in backbone.attention_layers.values()] == [1]
    assert not any("Cross" in type(module).__name__ for module in backbone.attention_layers)
