"""Builds decoders without weights, to learn how a config shapes its model."""

import copy

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig


def unloaded(config: PretrainedConfig) -> nn.Module | None:
    """Returns the decoder of `config` on the meta device; None if transformers cannot build it from the config alone.

    The error is not reported here, because loading the checkpoint raises it again.
    """
    try:
        with torch.device("meta"):
            decoder: nn.Module = AutoModel.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception:  # any error of the model's code
        return None
    return decoder
