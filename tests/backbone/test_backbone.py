"""The inputs of the decoder, and the choice of its family."""

from typing import Any

import pytest
from safetensors import safe_open
from support.backbones import FolderOf, loaded
from support.zoo import CASES, Case, ids
from torch import nn

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import Family, find_family, imported_family
from qk_sniffer.errors import ConfigError

pytestmark = pytest.mark.floor


def test_no_cache_and_no_mask_reach_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = CASES[0].decoder()
    given: dict[str, Any] = {}

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given.update(kwargs, output=output)

    decoder.register_forward_hook(watch, with_kwargs=True)
    Backbone(decoder, Family()).forward(ids(), lambda call: None)
    assert given["use_cache"] is False and "attention_mask" not in given
    assert given["output"].past_key_values is None


def test_a_family_is_found_by_model_type_or_named() -> None:
    assert type(find_family("llama")) is Family
    assert type(imported_family(f"{__name__}:Named")) is Named
    for bad in ("no_such_module:Family", f"{__name__}:Nothing", "support.zoo:Case"):
        with pytest.raises(ConfigError, match=r"model\.family"):
            imported_family(bad)


class Named(Family):
    """A family of a user."""


@pytest.mark.parametrize(
    "case",
    [
        case if case.name in {"llama", "gemma3_multimodal"} else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
    ids=lambda case: case.name,
)
def test_layers_have_the_names_of_their_modules_in_the_checkpoint(case: Case, folder_of: FolderOf) -> None:
    backbone = loaded(folder_of(case))
    inner = {module: name for name, module in backbone.decoder.named_modules()}
    number = {index: inner[module] for module, index in backbone.attention_layers.items()}
    with safe_open(folder_of(case) / "model.safetensors", "pt") as file:
        stored = [*file.keys()]
    for facts in backbone.probe():
        assert facts.module is not None and any(name.startswith(f"{facts.module}.") for name in stored)
        assert facts.module.endswith(number[facts.heads.layer])
