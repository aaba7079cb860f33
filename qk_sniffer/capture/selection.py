"""Selects the heads to capture: the requested or drawn query heads, and the key heads that they attend with.

The order of the rules: `capture.layers`, `capture.full_attention_only` and `capture.heads` decide which query heads are
eligible, and `capture.head_sampling` draws among those. Each key head that a chosen query head attends with is captured
too, once. Queries and outputs are of the chosen query heads, keys and values of those key heads, each if it is asked
for. The draw takes the `count` eligible (layer, head) with the smallest `counter_hash(DRAW, seed, layer, head)`
(defined in `sampling.py`), so a larger count only adds heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qk_sniffer.backbone.layers import LayerHeads
from qk_sniffer.capture.sampling import POSITIONS_OF, counter_hash
from qk_sniffer.config import KIND_SETTINGS, MOST_HEAD_DIM, CaptureConfig
from qk_sniffer.errors import CaptureError, ConfigError
from qk_sniffer.text import compact_ranges, enumerated

# The first word of the hash: the draw of heads is independent of the draw of rows.
DRAW = int.from_bytes(b"heads")


@dataclass(frozen=True)
class LayerSelection:
    """The captured heads of one layer."""

    layer: LayerHeads
    by_kind: Mapping[str, tuple[int, ...]]
    """The heads of each captured kind, in ascending order."""


@dataclass(frozen=True)
class Selection:
    """The captured heads.

    `layers` are the layers with at least one, ascending. `eligible` is the number of query heads to draw from, and
    `drawn` the number of those that were drawn (all of them without a draw). `note` is a line for the user.
    """

    layers: tuple[LayerSelection, ...]
    eligible: int
    drawn: int
    note: str | None

    def __iter__(self) -> Iterator[tuple[int, str, tuple[int, ...]]]:
        """Yields (layer, kind, heads) for each layer and kind with heads to capture, queries first."""
        for chosen in self.layers:
            for kind, heads in chosen.by_kind.items():
                yield chosen.layer.layer, kind, heads

    @property
    def num_heads(self) -> int:
        """The number of heads of all kinds, which is the number of Parquet files."""
        return sum(len(heads) for _, _, heads in self)


def select(layers: Sequence[LayerHeads], capture: CaptureConfig) -> Selection:
    """Returns the heads of `layers` that the settings of `capture` select.

    Raises:
        ConfigError: the settings name a layer or a head that does not exist, or leave nothing to capture.
        CaptureError: the query heads of a layer do not share its key heads evenly, or a vector is too large.
    """
    kinds = capture.kinds()
    if not kinds:
        raise ConfigError([f"{enumerated([*KIND_SETTINGS.values()])} are all false: nothing to capture"])
    for layer in layers:
        if layer.head_dim > MOST_HEAD_DIM:
            raise CaptureError(
                f"layer {layer.layer} has vectors of {layer.head_dim:,} numbers, and those of a dataset have at most "
                f"{MOST_HEAD_DIM:,}: choose a model with smaller heads"
            )
    candidates = _eligible_layers(layers, capture)
    for layer in candidates:
        if layer.num_k_heads < 1 or layer.num_q_heads % layer.num_k_heads:
            raise CaptureError(
                f"layer {layer.layer} has {layer.num_q_heads} query heads and {layer.num_k_heads} key heads, which "
                "do not divide evenly, so a query head has no key head of its own; leave it out with capture.layers"
            )
    eligible = _eligible_heads(candidates, capture)
    count = capture.head_sampling.count
    drawn = eligible if count is None else _draw(eligible, count, capture.head_sampling.seed)
    note = None
    if count is not None and count > len(eligible):
        note = f"capture.head_sampling.count is {count}, but only {len(eligible)} heads are eligible: all are kept"
    chosen = []
    for layer in candidates:
        heads = tuple(sorted(head for number, head in drawn if number == layer.layer))
        if heads:
            key_heads = tuple(sorted({layer.key_head(head) for head in heads}))
            of_positions = {"q": heads, "k": key_heads}
            chosen.append(LayerSelection(layer, {kind: of_positions[POSITIONS_OF[kind]] for kind in kinds}))
    return Selection(tuple(chosen), len(eligible), len(drawn), note)


def _eligible_layers(layers: Sequence[LayerHeads], capture: CaptureConfig) -> list[LayerHeads]:
    known = {layer.layer: layer for layer in sorted(layers, key=lambda layer: layer.layer)}
    wanted = known.keys() if capture.layers is None else set(capture.layers)
    valid = f"the layers with attention are {compact_ranges(known) or 'none'}"
    if not wanted:
        raise ConfigError([f"capture.layers is empty: null captures all; {valid}"])
    if unknown := wanted - known.keys():
        raise ConfigError([f"capture.layers: the model has no layer {compact_ranges(unknown)}; {valid}"])
    candidates = [layer for number, layer in known.items() if number in wanted]
    if not capture.full_attention_only:
        return candidates
    full = [layer for layer in candidates if layer.full_attention]
    if full:
        return full
    elsewhere = compact_ranges(layer.layer for layer in layers if layer.full_attention)
    which = (
        "every layer of the model"
        if capture.layers is None
        else f"every layer of capture.layers ({compact_ranges(wanted)})"
    )
    windows = all(layer.sliding_window is not None for layer in candidates)
    what = "has a sliding window" if windows else "hides earlier keys (sliding windows, chunks or sparse attention)"
    raise ConfigError(
        [
            f"capture.full_attention_only leaves no layer: {which} {what}; full attention: "
            f"{'layers ' + elsewhere if elsewhere else 'none'}"
        ]
    )


def _eligible_heads(layers: Sequence[LayerHeads], capture: CaptureConfig) -> list[tuple[int, int]]:
    known = {head for layer in layers for head in range(layer.num_q_heads)}
    wanted = known if capture.heads is None else set(capture.heads)
    valid = f"the eligible layers have query heads {compact_ranges(known)}"
    if not wanted:
        raise ConfigError([f"capture.heads is empty: null captures all; {valid}"])
    if unknown := wanted - known:
        raise ConfigError([f"capture.heads: no eligible layer has query head {compact_ranges(unknown)}; {valid}"])
    return [(layer.layer, head) for layer in layers for head in range(layer.num_q_heads) if head in wanted]


def _draw(eligible: list[tuple[int, int]], count: int, seed: int) -> list[tuple[int, int]]:
    if count < 1:
        raise ConfigError([f"capture.head_sampling.count is {count}; it must be at least 1, or null for all heads"])
    pairs = np.array(eligible, dtype=np.int64)
    smallest = np.argsort(counter_hash(DRAW, seed, pairs[:, 0], pairs[:, 1]), kind="stable")[:count]
    return [eligible[i] for i in sorted(smallest.tolist())]
