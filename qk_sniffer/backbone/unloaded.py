"""Builds decoders without weights, to learn how a config shapes its model."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoModel, PretrainedConfig, dynamic_module_utils

from qk_sniffer.errors import SourceError

_MOST_MODULES = 500_000
"""The most modules of a model. One of 61 layers with 384 experts each has 100,000."""


@contextmanager
def modules_limited() -> Iterator[None]:
    """Ends the building of a model in the block if its config asks for far more modules than any model has.

    Raises:
        SourceError: it does.
    """
    built = 0

    def count(*_: Any) -> None:
        nonlocal built
        built += 1
        if built > _MOST_MODULES:
            raise SourceError(
                f"the model is not built: its config asks for more than {_MOST_MODULES:,} modules, which no model has. "
                "Restore its config, or download the model again (hf download)"
            )

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def nothing_asked() -> Iterator[None]:
    """Has transformers refuse code in the block where it would ask the user on the terminal whether to run it.

    It asks about a part of a config that names code of its own, such as that of images, and does not tell it the
    setting of the whole model.
    """
    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def unloaded(config: PretrainedConfig, auto_class: Any = AutoModel) -> Any:
    """Returns the model of `config` on the meta device; None if transformers cannot build it from the config alone.

    `auto_class` builds it: the default gives the decoder without its head. The error is not reported here, because
    loading the checkpoint raises it again.

    Raises:
        SourceError: the config asks for far more modules than any model has.
    """
    try:
        with torch.device("meta"), modules_limited(), nothing_asked():
            return auto_class.from_config(copy.deepcopy(config), trust_remote_code=False)
    except SourceError:
        raise
    except Exception:  # any error of the model's code
        return None
