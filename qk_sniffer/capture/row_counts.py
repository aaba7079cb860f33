"""Counts what a job captures before it runs: its texts, tokens, batches, and the rows that the sampler keeps."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np
import numpy.typing as npt

from qk_sniffer.capture.sampling import Picks, Sampler, sampling_ids
from qk_sniffer.corpus.tokens import Tokens
from qk_sniffer.store.journal import ExampleRecord
from qk_sniffer.store.sizes import record_bytes
from qk_sniffer.store.text_segments import decode

Key = tuple[int, str]
Bools = npt.NDArray[np.bool_]

_TOGETHER = 16
"""The captured examples whose rows are counted at a time."""

_MOST_RECORDS = 32
"""The records of a batch that are made, nearly, to know how long its records are. Those of short texts take more time
than the sampling of their rows."""


def picks_of(
    sampler: Sampler,
    examples: Sequence[Tokens | ExampleRecord],
    layer_kinds: Sequence[Key],
    in_segments: Sequence[Bools] | None,
) -> dict[Key, Picks]:
    """Returns the tokens of a batch of examples that the sampler keeps, by (layer, kind).

    `in_segments` says of each example which tokens are in `sampler.segments`; None without that setting.
    """
    ids, parts = ([getattr(example, name) for example in examples] for name in ("example_id", "part"))
    return sampler.plan(
        sampling_ids(ids, parts),
        [example.num_tokens for example in examples],
        layer_kinds,
        None if in_segments is None else np.concatenate(in_segments),
    )


@dataclass
class Counts:
    """What was counted so far."""

    texts: int = 0
    """Texts that begin in what was counted."""
    examples: int = 0
    tokens: int = 0
    cut: int = 0
    """Examples that are cut to the longest length."""
    left_out: int = 0
    """The tokens that these lack; fewer if some are not known (`knows_left_out`)."""
    knows_left_out: bool = True
    batches: int = 0
    computed: int = 0
    """The tokens of all batches, padding included."""
    groups: int = 0
    records_bytes: int = 0
    largest: tuple[int, int] = (0, 0)
    """The texts and the length of the batch with the most tokens, padding included."""
    longest: tuple[int, int] = (0, 0)
    """Those of the batch with the longest text."""
    rows: Counter[Key] = field(default_factory=Counter)
    """The rows of each head, by (layer, kind)."""
    runs: Counter[Key] = field(default_factory=Counter)
    """The examples that have rows, by (layer, kind)."""
    done_texts: int = 0
    done_rows: Counter[Key] = field(default_factory=Counter)
    """The rows of each head that are captured already."""
    places: dict[Key, list[npt.NDArray[np.int32]]] = field(default_factory=dict)
    """The example ids, positions and token ids of some rows, for one (layer, kind) of each form of file: (3, rows)
    each."""


class RowCounter:
    """Counts batches of examples."""

    def __init__(self, sampler: Sampler, layer_kinds: Sequence[Key], sampled: Mapping[Key, int]) -> None:
        """`sampled` names (layer, kind) whose places are kept, with the number of rows."""
        self.counts = Counts()
        self._sampler = sampler
        self._layer_kinds = layer_kinds
        self._left = dict(sampled)

    def add(self, batch: Sequence[Tokens], *, ends_group: bool) -> None:
        """Counts a batch, which is to be captured."""
        counts, lengths = self.counts, [example.num_tokens for example in batch]
        texts, length = self.add_shape(batch)
        counts.examples += len(batch)
        counts.tokens += sum(lengths)
        counts.batches += 1
        counts.computed += texts * length
        counts.groups += ends_group
        for example in batch:
            counts.texts += example.part == 0
            counts.cut += example.truncated
            counts.left_out += example.left_out or 0
            counts.knows_left_out &= example.left_out is not None
        some = batch[:: ceil(len(batch) / _MOST_RECORDS)]
        counts.records_bytes += sum(record_bytes(each.record()) for each in some) * len(batch) // len(some)
        names = self._sampler.config.segments
        masks = None if names is None else [example.are_in(names) for example in batch]
        for key, picks in picks_of(self._sampler, batch, self._layer_kinds, masks).items():
            counts.rows[key] += len(picks.row)
            counts.runs[key] += len(np.unique(picks.row))
            self._keep(key, batch, picks)

    def add_shape(self, batch: Sequence[Tokens]) -> tuple[int, int]:
        """Counts the shape of a batch alone, and returns it: its examples, and the tokens of the longest one."""
        shape = len(batch), max(example.num_tokens for example in batch)
        counts = self.counts
        counts.largest = max(counts.largest, shape, key=lambda each: (each[0] * each[1], each[1]))
        counts.longest = max(counts.longest, shape, key=lambda each: (each[1], each[0]))
        return shape

    def add_tokens(self, batch: Sequence[Tokens]) -> int:
        """Counts the shape of a batch alone, and returns the tokens of its examples."""
        self.add_shape(batch)
        return sum(example.num_tokens for example in batch)

    def add_done(self, records: Sequence[ExampleRecord], *, most: int | None = None) -> None:
        """Counts examples that are captured already: their rows by at most `most` of them, in proportion to all."""
        counts, found = self.counts, Counter[Key]()
        counts.done_texts += sum(record.is_last for record in records)
        step = 1 if most is None else max(1, ceil(len(records) / most))
        counted = records[::step]
        for start in range(0, len(counted), _TOGETHER):
            some = counted[start : start + _TOGETHER]
            masks = None if self._sampler.config.segments is None else [*map(self._mask, some)]
            for key, picks in picks_of(self._sampler, some, self._layer_kinds, masks).items():
                found[key] += len(picks.row)
        for key, rows in found.items():
            counts.done_rows[key] += round(rows * len(records) / len(counted))

    def _keep(self, key: Key, batch: Sequence[Tokens], picks: Picks) -> None:
        left = self._left.get(key, 0)
        if left > 0:
            ids = np.array([example.example_id for example in batch], np.int32)
            row, position = picks.row[:left], picks.position[:left]
            starts = np.cumsum([0, *(example.num_tokens for example in batch[:-1])])
            tokens = np.concatenate([example.ids for example in batch])[starts[row] + position]
            self.counts.places.setdefault(key, []).append(np.stack([ids[row], position, tokens]).astype(np.int32))
            self._left[key] = left - len(picks.row)

    def _mask(self, record: ExampleRecord) -> Bools:
        """Returns which tokens of a captured example are in `sampler.segments`."""
        assert record.segments is not None, "an example without segments"
        runs = decode(record.segments, record.num_tokens)
        mask = np.zeros(record.num_tokens, np.bool_)
        for (name, start), stop in zip(runs, [*(start for _, start in runs[1:]), record.num_tokens], strict=True):
            mask[start:stop] = name in (self._sampler.config.segments or ())
        return mask
