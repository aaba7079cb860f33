"""Builds decoders without weights, to learn how a config shapes its model."""

import copy
from typing import Any

import torch
from transformers import AutoModel, PretrainedConfig


def unloaded(config: PretrainedConfig, auto_class: Any = AutoModel) -> Any:
    """Returns the model of `config` on the meta device; None if transformers cannot build it from the config alone.

    `auto_class` builds it: the default gives the decoder without its head. The error is not reported here, because
    loading the checkpoint raises it again.
    """
    try:
        with torch.device("meta"):
            return auto_class.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception:  # any error of the model's code
        return None
