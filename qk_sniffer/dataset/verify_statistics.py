"""Compares the statistics of a dataset with its manifest, its examples and, where every row is there, its rows.

The statistics are read head by head, and the rows of a head in batches. The memory of a thread is at most about seven
times that of the covariance of one head, which has at most `MOST_HEAD_DIM` rows.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.config import STAGE_NAMES
from qk_sniffer.dataset.verify_manifest import ManifestFacts
from qk_sniffer.dataset.verify_report import Problem, Report
from qk_sniffer.dataset.verify_rows import BATCH_BYTES, Examples, batches
from qk_sniffer.store.layout import UNROTATED_KINDS, Head, statistics_file
from qk_sniffer.store.parquet_files import open_parquet
from qk_sniffer.store.parquet_tables import UNREADABLE, values
from qk_sniffer.store.statistics import LEAST_TOKENS, PartKey, Statistics, stages_of
from qk_sniffer.store.statistics_file import Heads, arrays_in, heads_in, read_statistics
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.text import counted

MEAN_ROUNDING, COVARIANCE_ROUNDING = 1e-6, 1e-5
"""The rounding of a mean and of a covariance, relative to the largest number of the head."""

NORM_ROUNDING = 1e-4
"""The rounding of a mean square, relative to itself."""

_SURELY_HELD = 1e12
"""The largest number of vectors whose covariances and norms float32 surely holds."""

_LEAST_SQUARED = 1e-15
"""The smallest number whose square surely has a place in float32. Norms of smaller ones may be 0."""

_LEAST = float(np.finfo(np.float32).tiny)
"""The rounding of a number that float32 holds with fewer digits, or as 0, because it is small."""

_CHECK = "statistics"

Float64 = npt.NDArray[np.float64]


def check_statistics(
    facts: ManifestFacts,
    intact: Collection[str],
    whole: Collection[str],
    examples: Examples | None,
    report: Report,
    each: Callable[[Callable[[int], Sequence[Problem]], Sequence[int]], Iterator[Sequence[Problem]]],
) -> None:
    """Reports on the statistics of a dataset; nothing if it has none.

    Args:
        facts: of the manifest.
        intact: the names of the files that are those of the manifest.
        whole: the names of the heads' files whose rows are those that the sampler chooses.
        examples: None if they are damaged.
        report: the report.
        each: runs a function for several layers, and yields its results in their order.
    """
    config = facts.config.capture.statistics
    if not config.enabled:
        return
    of_layer: dict[int, list[Head]] = {}
    for head in facts.heads.values():
        of_layer.setdefault(head.layer, []).append(head)
    layers = sorted(of_layer)
    there = [layer for layer in layers if statistics_file(layer) in intact]
    num_tokens, all_rows = None, -1
    if examples is not None:
        names = facts.config.sampler.segments
        num_tokens, all_rows = examples.count(names, config.skip_tokens), examples.count(names)
        if facts.statistics is not None and facts.statistics["tokens"] != num_tokens:
            what = "statistics.tokens in manifest.json is not the number of tokens of the examples"
            report.add([Problem(_CHECK, what, f"{facts.statistics['tokens']:,} instead of {num_tokens:,}")])
    row_stage = "pre" if facts.config.capture.capture_pre_rope else "post"

    def is_comparable(head: Head) -> bool:
        has_statistics = _row_stage(head, row_stage) in stages_of(head.kind, config.stages)
        return has_statistics and head.file in whole and facts.files[head.file].rows == all_rows

    checks = [
        _LayerCheck(facts, of_layer[layer], num_tokens, row_stage, {*filter(is_comparable, of_layer[layer])})
        for layer in there
    ]

    def check(index: int) -> list[Problem]:
        return list(checks[index].problems())

    for problems in each(check, range(len(checks))):
        report.add(problems)
    some = counted(len(layers), "layer") if len(there) == len(layers) else f"{len(there)} of {len(layers)} layers"
    compared = sum(len(each.comparable) for each in checks)
    tokens = "" if num_tokens is None else f", {counted(num_tokens, 'token')} a head"
    stages = " and ".join(words for stage, words in STAGE_NAMES.items() if stage in config.stages)
    report.passed(_CHECK, f"{some}, {stages}{tokens}")
    if compared:
        report.passed(_CHECK, f"{counted(compared, 'head')}: all numbers are those of the rows")
    if facts.statistics is not None and (beyond := facts.statistics.get("overflow")):
        what = f"float32 cannot hold all numbers of {len(beyond):,} of the heads and stages"
        report.note(_CHECK, f"{what}, such as {beyond[0]}: those numbers are NaN")


def _row_stage(head: Head, row_stage: str) -> str:
    """Returns the stage whose statistics are of the rows of a head; `row_stage` is that of queries and keys."""
    return "post" if head.kind in UNROTATED_KINDS else row_stage


class _LayerCheck:
    """Checks the file of a layer."""

    def __init__(
        self, facts: ManifestFacts, heads: Sequence[Head], num_tokens: int | None, row_stage: str, comparable: set[Head]
    ) -> None:
        """`comparable` are the heads with a row for every token, of a stage that has statistics."""
        self._facts, self._num_tokens = facts, num_tokens
        self._row_stage, self.comparable = row_stage, comparable
        self._config = facts.config.capture.statistics
        self._layer = heads[0].layer
        self._heads: dict[str, list[Head]] = {}
        for head in sorted(heads, key=lambda head: head.row):
            self._heads.setdefault(head.kind, []).append(head)

    def problems(self) -> Iterator[Problem]:
        name = statistics_file(self._layer)
        path = self._facts.root / name
        keys = [
            PartKey(self._layer, kind, stage) for kind in self._heads for stage in stages_of(kind, self._config.stages)
        ]
        try:
            starts = {array.rpartition(".")[0] for array in arrays_in(path, way_out="")}
            expected = {f"{key.kind}.{key.stage}" for key in keys}
            if starts != expected:
                listed = f"{name}: {_names(starts)} instead of {_names(expected)}"
                yield Problem(_CHECK, "other kinds and stages than manifest.json says", listed)
            for key in keys:
                found = heads_in(path, key.kind, key.stage, way_out="")
                if found is not None:
                    yield from self._of_key(path, key, found)
        except UnreadableError as error:
            yield Problem(_CHECK, "a file cannot be read", f"{name}: {error.problem}")

    def _of_key(self, path: Path, key: PartKey, there: Heads) -> Iterator[Problem]:
        heads, start = self._heads[key.kind], f"{statistics_file(self._layer)}, {key.kind}.{key.stage}"
        numbers, d = [head.head for head in heads], heads[0].head_dim
        if there.numbers != numbers:
            what = f"{start}: {_names(there.numbers)} instead of {_names(numbers)}"
            yield Problem(_CHECK, "statistics of other heads than the captured ones", what)
            return
        if there.head_dim != d:
            yield Problem(_CHECK, "vectors of another size than manifest.json says", f"{start}: {there.head_dim}")
            return
        if there.has_covariance != self._config.covariance:
            has = "has a covariance" if there.has_covariance else "has no covariance"
            yield Problem(_CHECK, "capture.statistics.covariance in manifest.json says otherwise", f"{start} {has}")
        for row, head in enumerate(heads):
            found = read_statistics(path, key.kind, key.stage, way_out="", row=row)
            assert found is not None
            if row == 0 and not self._has_pairs_of(key.stage, found):
                yield Problem(_CHECK, "frequency_pairs differ from the layer's rotation in manifest.json", start)
            for what, instance in self._of_head(found, f"{head.name}.{key.stage}"):
                yield Problem.of(head, _CHECK, what, f"{key.stage} RoPE: {instance}" if instance else key.stage)
            if key.stage == _row_stage(head, self._row_stage) and head in self.comparable:
                for what in self._unlike_rows(found, head):
                    yield Problem.of(head, _CHECK, what, f"{key.stage} RoPE")

    def _has_pairs_of(self, stage: str, found: Statistics) -> bool:
        pairs = self._facts.frequency_pairs[self._layer] if stage == "pre" else None
        listed = None if found.frequency_pairs is None else [tuple(pair) for pair in found.frequency_pairs.tolist()]
        return listed == (None if pairs is None else [*pairs])

    def _of_head(self, found: Statistics, name: str) -> Iterator[tuple[str, str]]:
        """Yields the problems of one head, with an instance."""
        count, nonfinite = int(found.count[0]), int(found.nonfinite[0])
        if min(count, nonfinite) < 0 or (self._num_tokens is not None and count + nonfinite != self._num_tokens):
            numbers = f"{count:,} and {nonfinite:,} of {self._num_tokens or 0:,}"
            yield "count and nonfinite do not sum to the tokens of the examples", numbers
        facts = self._facts.statistics or {"nonfinite": {}}
        listed = facts["nonfinite"].get(name, 0)
        if listed != nonfinite:
            yield "nonfinite differs from manifest.json", f"{nonfinite:,} instead of {listed:,}"
        if (is_listed := name in facts.get("overflow", ())) != found.overflows(0):
            what = "has" if is_listed else "does not have"
            yield "NaN differs from overflow in manifest.json", f"which {what} {name}"
        yield from ((what, "") for what in number_problems(found))

    def _unlike_rows(self, found: Statistics, head: Head) -> Iterator[str]:
        """Yields the differences between the statistics of a head and its rows."""
        rows = _Rows(head.head_dim, found.frequency_pairs, covariance=found.covariance is not None)
        try:
            with open_parquet(self._facts.root / head.file) as file:
                batch_rows = max(1, BATCH_BYTES // (4 * head.head_dim))
                for batch in batches(file, batch_rows, ["position", "vector"]):
                    numbers = values(batch.column("vector").flatten()).reshape(-1, head.head_dim)
                    rows.add(numbers[values(batch.column("position")) >= self._config.skip_tokens])
        except UNREADABLE:
            return  # `check_file` has reported it
        if int(found.count[0]) != rows.count:
            yield "count is not that of the rows without NaN and Inf"
        elif rows.count:
            yield from rows.differences(found)


class _Rows:
    """Moments of the rows of a head in float64, batch by batch."""

    def __init__(self, d: int, pairs: npt.NDArray[np.int64] | None, *, covariance: bool) -> None:
        """`pairs` are the components by rotary frequency; None after RoPE, and without any."""
        self.count = 0
        self._covariance = covariance
        self._pairs = np.zeros((0, 2), np.int64) if pairs is None else pairs
        self._modulus = np.zeros(len(self._pairs))
        self._norm, self._norm_moment = 0.0, 0.0
        self._mean = np.zeros(d)
        self._moment = np.zeros((d, d) if covariance else d)
        self._minimum, self._maximum = np.full(d, np.inf), np.full(d, -np.inf)

    def add(self, vectors: npt.NDArray[np.float32]) -> None:
        """Adds vectors (rows, d). Leaves out those with NaN or Inf."""
        finite = vectors[np.isfinite(vectors).all(axis=1)].astype(np.float64)
        if not len(finite):
            return
        mean = finite.mean(axis=0)
        centered = finite - mean
        total = self.count + len(finite)
        change = mean - self._mean
        weight = self.count * len(finite) / total
        if self._covariance:
            self._moment += centered.T @ centered + np.outer(change * weight, change)
        else:
            self._moment += np.square(centered).sum(axis=0) + change**2 * weight
        share = len(finite) / total
        self._mean += change * share
        norms = np.linalg.norm(finite, axis=1)
        step = float(norms.mean()) - self._norm
        self._norm_moment += float(np.square(norms - norms.mean()).sum()) + step**2 * weight
        self._norm += step * share
        a, b = self._pairs.T
        self._modulus += (np.hypot(finite[:, a], finite[:, b]).mean(axis=0) - self._modulus) * share
        self._minimum = np.minimum(self._minimum, finite.min(axis=0))
        self._maximum = np.maximum(self._maximum, finite.max(axis=0))
        self.count = total

    def differences(self, found: Statistics) -> Iterator[str]:
        """Yields the names of the statistics of one head that are not those of the rows."""
        largest = max(np.abs(self._minimum).max(), np.abs(self._maximum).max())
        if not np.abs(found.mean[0] - self._mean).max() <= MEAN_ROUNDING * largest + _LEAST:
            yield "mean is not that of the rows"
        if not (np.array_equal(found.minimum[0], self._minimum) and np.array_equal(found.maximum[0], self._maximum)):
            yield "minimum or maximum is not that of the rows"
        if _differs(found.norm_mean, np.array([self._norm]), COVARIANCE_ROUNDING * self._norm + _LEAST):
            yield "norm_mean is not that of the rows"
        if found.frequency_modulus is not None:
            bar = 2 * MEAN_ROUNDING * largest + _LEAST
            if len(self._modulus) and _differs(found.frequency_modulus[0], self._modulus, bar):
                yield "frequency_modulus is not that of the rows"
        if self.count < 2:
            return
        norm_variance = np.array([self._norm_moment / (self.count - 1)])
        rounding = MEAN_ROUNDING * self._norm  # of each norm
        bar = COVARIANCE_ROUNDING * norm_variance[0] + 2 * rounding * norm_variance[0] ** 0.5 + rounding**2 + _LEAST
        if _differs(found.norm_variance, norm_variance, bar):
            yield "norm_variance is not that of the rows"
        moment = self._moment / (self.count - 1)
        bar = COVARIANCE_ROUNDING * _largest(moment) + (MEAN_ROUNDING * largest) ** 2 + _LEAST
        if _differs(found.variance[0], np.diagonal(moment) if self._covariance else moment, bar):
            yield "variance is not that of the rows"
        if found.covariance is not None and _differs(found.covariance[0], moment, bar):
            yield "covariance is not that of the rows"


def _differs(found: npt.NDArray[np.float32], expected: Float64, bar: float) -> bool:
    """Whether numbers are not the expected ones. NaN stands for one that float32 cannot hold, of some tokens or all."""
    return not _largest(np.where(np.isfinite(found), found - expected, 0.0)) <= bar


def number_problems(found: Statistics) -> Iterator[str]:
    """Yields the impossible numbers in the statistics of one head."""
    count = int(found.count[0])
    one = {name: of_heads[0] for name in LEAST_TOKENS if (of_heads := getattr(found, name)) is not None}
    for name, least in LEAST_TOKENS.items():
        if name in one and count < least and not np.isnan(one[name]).all():
            yield f"{name} has numbers, although count is below {least}"
    if count < 1:
        return
    largest = float(found.absmax[0].max())
    for name, least in LEAST_TOKENS.items():
        is_held = largest <= _SURELY_HELD or name in ("mean", "minimum", "maximum")
        if name in one and count >= least and is_held and not np.isfinite(one[name]).all():
            yield f"{name} has NaN or Inf"
            return  # which no comparison below is for
    mean, minimum, maximum = (one[name].astype(np.float64) for name in ("mean", "minimum", "maximum"))
    rounding = MEAN_ROUNDING * np.maximum(np.abs(minimum), np.abs(maximum))
    if (minimum > maximum).any() or (mean < minimum - rounding).any() or (mean > maximum + rounding).any():
        yield "mean is not between minimum and maximum"
    if found.overflows(0) or 0 < largest < _LEAST_SQUARED:
        return
    if one["norm_mean"] < np.linalg.norm(mean) - MEAN_ROUNDING * len(mean) * largest:
        yield "norm_mean is below the norm of the mean"
    if found.frequency_pairs is not None:
        a, b = mean[found.frequency_pairs].T
        if (one["frequency_modulus"] < np.hypot(a, b) - 2 * MEAN_ROUNDING * largest).any():
            yield "frequency_modulus is below the modulus of the mean"
    variance = one["variance"].astype(np.float64) if count > 1 else np.zeros(len(mean))
    norm_variance = float(one["norm_variance"]) if count > 1 else 0.0
    if min(variance.min(), norm_variance) < 0:
        yield "a variance is negative"
        return  # no comparison below is for it
    spread = variance * ((count - 1) / count)
    if (spread > (maximum - mean) * (mean - minimum) + COVARIANCE_ROUNDING * largest**2).any():
        yield "variance is above that of any numbers between minimum and maximum with this mean"
    squared = mean**2 + spread  # the mean of the squares
    of_norm = float(one["norm_mean"]) ** 2 + norm_variance * ((count - 1) / count)
    if abs(of_norm - squared.sum()) > NORM_ROUNDING * squared.sum():
        yield "norm_mean and norm_variance are not those of vectors with this mean and variance"
    if found.frequency_pairs is not None:
        a, b = squared[found.frequency_pairs].T
        most = np.sqrt(a + b) * (1 + NORM_ROUNDING) + 2 * MEAN_ROUNDING * largest
        if (one["frequency_modulus"] > most).any():
            yield "frequency_modulus is above the root of the mean square"
    if count > 1 and "covariance" in one:
        yield from _covariance_problems(one["covariance"].astype(np.float64), variance)


def _covariance_problems(covariance: Float64, variance: Float64) -> Iterator[str]:
    """Yields the impossible numbers in the covariance of a head. All numbers are finite."""
    rounding = COVARIANCE_ROUNDING * _largest(covariance)
    if _largest(covariance - covariance.T) > rounding:
        yield "covariance is not symmetric"
    elif np.linalg.eigvalsh(covariance)[0] < -COVARIANCE_ROUNDING * np.trace(covariance):
        yield "covariance is not positive semidefinite"
    if np.abs(np.diagonal(covariance) - variance).max() > rounding:
        yield "variance is not the diagonal of covariance"


def _largest(values: Float64) -> float:
    """Returns the largest absolute value, without a copy of the array; NaN if there is one."""
    return max(float(values.max()), -float(values.min()))


def _names(names: Collection[Any]) -> str:
    return ", ".join(map(str, sorted(names)))[:200] or "none"
