"""Gives torch's flash attention, which only CUDA has, a computation on the CPU, so that its callers can be tested."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

Harm = Callable[[int, int], int]
"""Changes how far a query sees to the left: takes it and the number of keys."""


@contextmanager
def flash_on_cpu(harm: Harm = lambda left, n: left) -> Iterator[list[tuple[int, ...]]]:
    """Registers `aten::_flash_attention_forward` for the CPU. Yields a list of the shapes of its queries, as called."""
    calls: list[tuple[int, ...]] = []

    def flash(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cum_seq_q: torch.Tensor | None,
        cum_seq_k: torch.Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, ...]:
        assert not dropout_p and not is_causal and window_size_left is not None and window_size_right == 0
        calls.append(tuple(query.shape))
        if cum_seq_q is None:
            texts = list(zip(query, key, value, strict=True))
        else:
            ends = cum_seq_q.tolist()
            assert cum_seq_k is not None and cum_seq_k.tolist() == ends and max_q == max_k == ends[1]
            texts = [(query[first:last], key[first:last], value[first:last]) for first, last in pairwise(ends)]
        outputs = [
            _windowed(*one, harm(window_size_left, len(one[0])), one[0].shape[-1] ** -0.5 if scale is None else scale)
            for one in texts
        ]
        attended = torch.stack(outputs) if cum_seq_q is None else torch.cat(outputs)
        return attended, *(torch.empty(0) for _ in range(4))

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash, "CPU")
    try:
        yield calls
    finally:
        library._destroy()


def _windowed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, left: int, scale: float) -> torch.Tensor:
    """Returns (n, H, d) for query (n, H, d), key and value (n, K, d)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1).float() for states in (key, value))
    logits = torch.einsum("qhd,khd->hqk", query.float(), key) * scale
    distance = torch.arange(len(query))[:, None] - torch.arange(len(query))[None]
    logits = logits.masked_fill((distance < 0) | (distance > left), -torch.inf)
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), value).to(query.dtype)
