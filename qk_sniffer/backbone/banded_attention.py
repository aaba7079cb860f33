"""Sliding-window attention in time and memory n x window, where transformers would build an n x n mask.

With the `sdpa` kernel and no padding mask, a sliding layer gets a boolean (n, n) mask as soon as n exceeds its
window: 17 GB at 131,072 tokens. While `banded()` is open such a mask is replaced by a `Band`, a marker of a few
bytes, and the kernel walks the band in blocks of queries, each with its part of arguments by query and key. Any other
mask or kernel takes the model's own path. The marker is made only for a mask that has been asked about its edges, and
nothing but our kernel can read it: a model that wants to do something else with its mask fails aloud, it is never
attended to wrongly.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

KERNEL = "sdpa"
MIN_BLOCK = 256


@dataclass(frozen=True)
class Band:
    """The mask in which query position i sees key positions i - window + 1 to i."""

    window: int

    def __getitem__(self, index: Any) -> "Band":
        """All of it: what a model asks for that could leave out queries and leaves out none."""
        if index != (slice(None),) * 2 + (slice(0, None), slice(None)):
            raise TypeError(f"a part of a band is no band: {index}")
        return self


@contextmanager
def banded() -> Iterator[None]:
    """Serves the `sdpa` kernel of every transformers model with bands, until it is left."""
    ALL_ATTENTION_FUNCTIONS[KERNEL] = _banded_attention
    ALL_MASK_ATTENTION_FUNCTIONS[KERNEL] = _band_or_mask
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[KERNEL]
        del ALL_MASK_ATTENTION_FUNCTIONS[KERNEL]


def _band_or_mask(*args: Any, **kwargs: Any) -> Band | torch.Tensor | None:
    length: int = kwargs.get("q_length", 0)
    window: int | None = kwargs.get("local_size")
    plain = (
        not args
        and length == kwargs.get("kv_length")
        and not kwargs.get("q_offset")
        and not kwargs.get("kv_offset")
        and kwargs.get("attention_mask") is None
        and kwargs.get("allow_is_causal_skip", True)
        and not kwargs.get("use_vmap")
    )
    if plain and window is not None and length > window + 1 and _is_sliding(kwargs["mask_function"], window):
        return Band(window)
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _is_sliding(mask_function: Callable[..., torch.Tensor], window: int) -> bool:
    """Asks at the edges of two neighbouring queries: a chunked mask, also local, answers otherwise."""

    def sees(query: int, key: int) -> bool:
        return bool(mask_function(*(torch.tensor(index) for index in (0, 0, query, key))))

    return all(
        sees(query, query)
        and sees(query, query - window + 1)
        and not sees(query, query - window)
        and not sees(query, query + 1)
        for query in (window, window + 1)
    )


def _banded_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Shapes: query (B, H, n, d), key and value (B, K, n, d); returns (B, n, H, d) as the plain kernel does."""
    if not isinstance(attention_mask, Band):
        plain: tuple[torch.Tensor, None]
        plain = sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
        return plain
    length, window = query.shape[2], attention_mask.window
    block = max(window, MIN_BLOCK)
    reach = window - 1
    # Queries of every block but the first see its keys through the same band: row i sees columns i to i + reach.
    offset = torch.arange(block + reach, device=query.device)[None] - torch.arange(block, device=query.device)[:, None]
    seen = (offset >= 0) & (offset <= reach)
    attended: torch.Tensor | None = None
    for start in range(0, length, block):
        end, first = min(length, start + block), max(0, start - reach)
        lead = first - (start - reach)  # the columns of the band that lie before the first token
        part = seen[None, None, : end - start, lead : lead + end - first]
        output, _ = sdpa_attention_forward(
            module,
            query[:, :, start:end],
            key[:, :, first:end],
            value[:, :, first:end],
            part,
            *args,
            **{name: _of_block(value, length, slice(start, end), slice(first, end)) for name, value in kwargs.items()},
        )
        if attended is None:  # at once: hundreds of parts that live until the end leave memory in shreds
            attended = output.new_empty(output.shape[0], length, *output.shape[2:])
        attended[:, start:end] = output
    assert attended is not None
    return attended, None


def _of_block(value: Any, length: int, queries: slice, keys: slice) -> Any:
    """The part of an argument by query and key, such as a position bias (..., n, n), that a block of queries needs."""
    by_query_and_key = isinstance(value, torch.Tensor) and value.shape[-2:] == (length, length)
    return value[..., queries, keys] if by_query_and_key else value
