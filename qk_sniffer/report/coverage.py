"""Compares the rows of each bucket with those that the sampler is expected to keep."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.dataset.bucket_ranges import bucket_ranges
from qk_sniffer.dataset.reader import Dataset, sampler_of
from qk_sniffer.report.packed import Json, number
from qk_sniffer.store.layout import KIND_NAMES, KINDS

MOST_LINES = 48
"""The most lines of a kind where neighbouring buckets can be joined."""

FEWEST_DRAWS = 10
"""Below so many expected draws, a bucket's deviation says little: a single row may be many standard deviations off."""

Int64 = npt.NDArray[np.int64]


def coverage(dataset: Dataset) -> list[Json]:
    """Returns the buckets of each kind with `rows`, the `expected` number of them, and its standard deviation `sd`.

    All heads of a layer and kind have the same positions, so their rows are one draw. `is_telling` says whether the
    deviation can be held against `sd`: at least `FEWEST_DRAWS` are expected, or none is left to chance. `limit` says
    why the expected number is an upper bound; it is missing if it is none.

    Raises:
        StoreError: the list of examples is damaged.
        HubError: it cannot be fetched.
    """
    manifest, sampler = dataset.manifest, sampler_of(dataset.manifest)
    lengths = dataset.examples["num_tokens"].to_numpy().astype(np.int64)
    starts = np.zeros_like(lengths)
    if "first_position" in dataset.examples.column_names:
        starts = dataset.examples["first_position"].to_numpy().astype(np.int64)
    found = []
    for kind in KINDS:
        heads = [sum(key.kind == kind and key.layer == layer for key in dataset.heads) for layer in _layers(dataset)]
        if any(heads) and not sampler.keeps_none(kind):
            rows = {int(bucket): count for bucket, count in manifest["rows_by_bucket"].get(kind, {}).items()}
            lines = _lines(sampler, kind, heads, (starts, lengths), rows)
            found.append({"kind": kind, "name": KIND_NAMES[kind], "buckets": lines} | _limit(sampler))
    return found


def expected_rows(sampler: Sampler, heads: Sequence[int], tokens: int, probability: float) -> tuple[float, float]:
    """Returns the expected number of rows of `tokens` positions of all examples, and its standard deviation.

    `heads` are the numbers of heads of each layer.
    """
    spread = tokens * probability * (1 - probability)
    draws = [sum(heads)] if sampler.config.share == "example" else heads
    return sum(heads) * tokens * probability, float(np.sqrt(sum(number**2 for number in draws) * spread))


def _lines(
    sampler: Sampler, kind: str, heads: Sequence[int], examples: tuple[Int64, Int64], rows: Mapping[int, int]
) -> list[Json]:
    starts, lengths = examples
    lines = []
    for buckets in bucket_ranges(sampler, kind, int(lengths.max(initial=0)), MOST_LINES):
        stop = np.minimum(lengths, buckets.last + 1)
        tokens = int(np.maximum(stop - np.maximum(starts, buckets.first), 0).sum())
        expected, deviation = expected_rows(sampler, heads, tokens, buckets.probability)
        lines.append(
            {
                "bucket": buckets.label,
                "positions": buckets.positions,
                "p": number(buckets.probability),
                "rows": buckets.rows(rows),
                "expected": number(expected),
                "sd": number(deviation),
                "is_telling": deviation == 0 or (expected / deviation) ** 2 >= FEWEST_DRAWS,
            }
        )
    return lines


def _limit(sampler: Sampler) -> dict[str, Any]:
    config = sampler.config
    if config.segments is not None:
        return {"limit": "tokens outside of sampler.segments have no rows"}
    if config.max_rows_per_example is not None:
        return {"limit": f"an example has at most {config.max_rows_per_example:,} rows of a layer and kind"}
    return {}


def _layers(dataset: Dataset) -> list[int]:
    return sorted({key.layer for key in dataset.heads})
