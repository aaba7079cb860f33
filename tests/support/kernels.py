"""Replaces the attention kernel by wrong ones."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from qk_sniffer.backbone import banded_attention

Harm = Callable[[torch.Tensor], torch.Tensor]
"""Changes the values (B, K, n, width) that a kernel computes with."""


@contextmanager
def wrong_kernel(harm: Harm) -> Iterator[None]:
    """Lets `sdpa` compute with wrong values, in bands too."""

    def wrong(module: Any, query: Any, key: Any, value: torch.Tensor, *args: Any, **arguments: Any) -> Any:
        return sdpa_attention_forward(module, query, key, harm(value), *args, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "sdpa", wrong)
        patch.setattr(banded_attention, "sdpa_attention_forward", wrong)
        yield


def without_keys_from(first: int) -> Harm:
    """Drops the values at positions from `first` on."""
    return lambda value: torch.where(torch.arange(value.shape[2])[:, None] < first, value, 0.0)


def overflowing_from(first: int) -> Harm:
    return lambda value: torch.where(torch.arange(value.shape[2])[:, None] < first, value, torch.nan)


def of_another_head(value: torch.Tensor) -> torch.Tensor:
    return value.roll(1, dims=1)
