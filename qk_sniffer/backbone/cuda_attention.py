"""Knows what torch's attention on CUDA computes wrongly without an error, and what it takes long to prepare.

Shapes: B batch, H query heads, K key heads, n queries, m keys, d head_dim.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from qk_sniffer.errors import CaptureError

SDPA = "sdpa"
"""The implementation of transformers that calls torch's kernels."""

MOST_SCORES = 1 << 32
"""Torch's memory-efficient kernel finds the place of a row in its mask with 32 bits: the rows beyond so many scores
have the mask of other rows (pytorch issue 187227)."""

CUDNN_TOKENS = 16_384
"""Passes over shorter texts run without cuDNN's kernels. These are planned for every new shape of a batch, in 40 to 400
ms as others have measured, and attention in a layer of so few tokens takes less."""


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Keeps torch from cuDNN's attention kernels in the block.

    The setting is that of the whole process. It is restored, and a process that has turned it off keeps it so.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def cudnn_limited(num_tokens: int, device: torch.device) -> AbstractContextManager[None]:
    """Returns the context of a pass over texts of `num_tokens`: `without_cudnn`, if it needs it, or an empty one."""
    return without_cudnn() if device.type == "cuda" and num_tokens < CUDNN_TOKENS else nullcontext()


def refuse_wrong_kernel(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, arguments: Mapping[str, Any]
) -> None:
    """Refuses a call of `sdpa` on CUDA whose result is known to be wrong.

    `query` (B, H, n, d), `key` (B, K, m, d) and the other `arguments`, by name, are those of the kernel.

    Raises:
        CaptureError: the mask or the bias has more than `MOST_SCORES` scores a head, or the bias has another dtype than
            queries in half precision.
    """
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if query.device.type != "cuda" or implementation != SDPA:
        return
    given = [arguments.get(name) for name in ("attention_mask", "position_bias")]
    masks = [mask for mask in given if isinstance(mask, torch.Tensor)]
    name, n, m = type(module).__name__, query.shape[2], max([key.shape[2], *(mask.shape[-1] for mask in masks)])
    if masks and n * m > MOST_SCORES:
        raise CaptureError(
            f"{name} attends with a mask of {n:,} x {m:,} scores, and torch's sdpa on CUDA reads the wrong rows of a "
            f"mask of more than {MOST_SCORES:,}: give it texts of at most {int(MOST_SCORES**0.5):,} tokens, or set "
            "model.attn_implementation=flex_attention. A sliding window has no mask with "
            "inference.banded_attention=true"
        )
    for mask in masks:
        # The dtype that a mask of cuDNN has is taken to be the query's (pytorch pull request 191612).
        if mask.is_floating_point() and query.dtype.itemsize < 4 and mask.dtype != query.dtype:
            dtypes = [str(one.dtype).removeprefix("torch.") for one in (mask, query)]
            raise CaptureError(
                f"{name} adds a bias in {dtypes[0]} to the logits of queries in {dtypes[1]}, and torch's sdpa on CUDA "
                f"may read it as {dtypes[1]}: set model.attn_implementation=eager, or model.dtype={dtypes[0]}"
            )
