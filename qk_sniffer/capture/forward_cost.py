"""Estimates the arithmetic of forward passes, which limits a proof and the groups of batches with statistics."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FEW_FLOPS = {"cpu": 6e11, "cuda": 1e15}
"""The arithmetic that a proof may always take, by the type of the device: a slow core needs about half a minute for it,
and so does a GPU, which waits for the starts of its kernels at short texts."""

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerCost:
    """An attention layer: its query heads and the most keys that a query sees; None for all earlier ones."""

    layer: int
    num_heads: int
    head_dim: int
    reach: int | None


@dataclass(frozen=True)
class ForwardCost:
    """The cost of forward passes of a model with `parameters` weights."""

    parameters: int
    layers: tuple[LayerCost, ...]
    few: float = FEW_FLOPS["cpu"]
    """Operations that are always few."""

    @classmethod
    def of(cls, parameters: int, layers: Iterable[Mapping[str, Any]], device: str) -> "ForwardCost":
        """Returns the cost on a type of device. `layers` are all attention layers, in the form of the manifest."""
        reaches = (
            LayerCost(
                one["layer"], one["num_q_heads"], one["head_dim"], one["sliding_window"] or one.get("attention_chunk")
            )
            for one in layers
        )
        return cls(parameters, tuple(reaches), FEW_FLOPS.get(device, FEW_FLOPS["cpu"]))

    @property
    def min_tokens(self) -> int:
        """The fewest tokens of a pass of the proof. States of more tokens than heads have unambiguous shapes.

        One projection may return queries, keys and values, and a gate for each query head.
        """
        return 1 + 4 * max(one.num_heads for one in self.layers)

    def flops(self, tokens: npt.ArrayLike, last_layer: int | None = None) -> Numbers:
        """Returns the floating-point operations of passes over texts of `tokens` tokens.

        Two for each weight and token, and four for each pair of a query and a key that it sees, and component.
        `last_layer` is the last one that runs; None for all.
        """
        n = np.asarray(tokens, np.float64)
        run = [one for one in self.layers if last_layer is None or one.layer <= last_layer]
        share = 1.0 if last_layer is None else (last_layer + 1) / (1 + max(one.layer for one in self.layers))
        total: Numbers = 2 * self.parameters * share * n
        for one in run:
            reach = n if one.reach is None else np.minimum(n, one.reach)
            total = total + 4 * one.num_heads * one.head_dim * reach * (n - reach / 2)
        return total
