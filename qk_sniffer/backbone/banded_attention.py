"""Computes sliding-window attention in n x window time and memory, without transformers' n x n mask.

With the `sdpa` kernel and no padding mask, a sliding layer has a boolean (n, n) mask if n exceeds its window: 17 GB at
131,072 tokens. Inside `banded()`, a `Band`, a marker of a few bytes, replaces this mask, and the kernel processes the
band in blocks of queries, or calls a kernel that has windows. Any other mask or kernel takes the model's own path.

A block of r queries computes r + window - 1 scores for each query, which sees `window` of them: blocks are smaller than
the window. On CUDA, the number of keys is a multiple of `ALIGNED`, keys are contiguous, and cuDNN does not attend:
torch's memory-efficient kernel otherwise copies each mask to align its rows, was wrong for keys that all heads share
and whose number is 1 more than a multiple of 32 (pytorch issue 191937), and cuDNN plans each new shape.

A marker replaces only a mask whose edges have been checked. Only the kernel of this module accepts it: a model that
uses its mask in another way raises an error and never attends wrongly.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import CellType
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qk_sniffer.backbone.cuda_attention import SDPA, without_cudnn

MIN_BLOCK, MAX_BLOCK = 256, 2048
"""The bounds of the number of queries in a block, which is a quarter of the window between them."""

ALIGNED = 64
"""The number of keys in a block is a multiple of this on CUDA."""

_WITHOUT_GROUPS = nn.Module()
"""For the plain kernel, a module whose keys are one for each query head."""


@dataclass(frozen=True)
class Band:
    """The mask in which query position i sees key positions i - window + 1 to i."""

    window: int

    def __getitem__(self, index: Any) -> "Band":
        """Returns the whole band for a slice that selects all queries and keys; a part of a band is an error."""
        if index != (slice(None),) * 2 + (slice(0, None), slice(None)):
            raise TypeError(f"a part of a band is not a band: {index}")
        return self


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, Mapping[str, Any]], torch.Tensor | None]
"""Takes query (B, H, n, d), key and value (B, K, n, d), the window, and the other arguments of the plain kernel.

Returns the output (B, n, H, d); None for a call that it does not serve.
"""


@contextmanager
def banded(kernel: Kernel | None = None) -> Iterator[None]:
    """Gives bands to the `sdpa` kernel of every transformers model, until the context ends.

    `kernel` computes the bands that it serves, and blocks the others.
    """
    ALL_ATTENTION_FUNCTIONS[SDPA] = functools.partial(_banded_attention, kernel)
    ALL_MASK_ATTENTION_FUNCTIONS[SDPA] = _band_or_mask
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[SDPA]
        del ALL_MASK_ATTENTION_FUNCTIONS[SDPA]


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
    if plain and window is not None and length > window + 1:
        function = kwargs["mask_function"]
        # Questions to a tensor on a GPU wait for it. The functions of windows hold none, those of chunks do.
        if not _holds_device_tensors(function) and _is_sliding(function, window):
            return Band(window)
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _holds_device_tensors(value: Any) -> bool:
    """Whether a mask function, or one that it calls, holds a tensor outside of the host's memory."""
    if isinstance(value, torch.Tensor):
        return value.device.type != "cpu"
    held = value if isinstance(value, tuple | list) else [cell.cell_contents for cell in _cells(value)]
    return any(map(_holds_device_tensors, held))


def _cells(value: Any) -> tuple[CellType, ...]:
    return getattr(value, "__closure__", None) or ()


def _is_sliding(mask_function: Callable[..., torch.Tensor], window: int) -> bool:
    """Checks the mask at the edges of two adjacent queries, which tell it from the mask of chunked attention."""

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
    kernel: Kernel | None,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Takes query (B, H, n, d), key and value (B, K, n, d); returns (B, n, H, d), as the plain kernel does."""
    if not isinstance(attention_mask, Band):
        plain: tuple[torch.Tensor, None]
        plain = sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
        return plain
    attended = None if kernel is None or args else kernel(query, key, value, attention_mask.window, kwargs)
    if attended is not None:
        return attended, None
    if query.device.type != "cuda":
        return _in_blocks(module, query, key, value, attention_mask.window, *args, **kwargs), None
    with without_cudnn():
        return _in_blocks(module, query, key, value, attention_mask.window, *args, aligned=ALIGNED, **kwargs), None


def _in_blocks(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    *args: Any,
    aligned: int = 1,
    **kwargs: Any,
) -> torch.Tensor:
    """Returns (B, n, H, d). Each block has a multiple of `aligned` keys, some of which no query sees."""
    length, reach = query.shape[2], window - 1
    block = min(max(window // 4, MIN_BLOCK), MAX_BLOCK)
    shares_one = aligned > 1 and key.shape[1] == 1 < query.shape[1]
    # Row i of a block sees columns i to i + reach, and the first column is the key `reach` before the first query.
    columns = -(-(block + reach) // aligned) * aligned
    seen = torch.ones(block, columns, dtype=torch.bool, device=query.device).tril_(reach).triu_()
    attended: torch.Tensor | None = None
    for start in range(0, length, block):
        rows = min(block, length - start)
        before = max(0, reach - start)  # the columns before the first key
        dropped = before // aligned * aligned
        width = -(-(rows + reach) // aligned) * aligned - dropped
        first = start - reach + dropped
        queries, keys = slice(start, start + rows), slice(max(0, first), min(length, first + width))
        filled = before - dropped, first + width - keys.stop  # zeros on the left and on the right
        part = seen[:rows, dropped : dropped + width]
        if filled[0]:
            part = part.clone()
            part[:, : filled[0]] = False
        block_key, block_value = (_padded(states[:, :, keys], (0, 0, *filled)) for states in (key, value))
        if shares_one:
            block_key, block_value = (
                states.expand(-1, query.shape[1], -1, -1).contiguous() for states in (block_key, block_value)
            )
        output, _ = sdpa_attention_forward(
            _WITHOUT_GROUPS if shares_one else module,
            query[:, :, queries],
            block_key,
            block_value,
            part[None, None],
            *args,
            **{name: _of_block(value, length, queries, keys, filled) for name, value in kwargs.items()},
        )
        if attended is None:  # one allocation: hundreds of parts that live until the end fragment the memory
            attended = output.new_empty(output.shape[0], length, *output.shape[2:])
        attended[:, queries] = output
    assert attended is not None
    return attended


def _of_block(value: Any, length: int, queries: slice, keys: slice, filled: tuple[int, int]) -> Any:
    """Returns the part for a block of queries of an argument by query and key, such as a position bias (..., n, n)."""
    by_query_and_key = isinstance(value, torch.Tensor) and value.shape[-2:] == (length, length)
    return _padded(value[..., queries, keys], filled) if by_query_and_key else value


def _padded(states: torch.Tensor, filled: tuple[int, ...]) -> torch.Tensor:
    return nn.functional.pad(states, filled) if any(filled) else states  # without this, a copy
