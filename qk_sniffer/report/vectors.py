"""Measures the vectors of each head in a bounded sample of its rows: norms, channels, principal directions.

Shapes: n rows of the sample with finite numbers, d numbers of a vector, B bins of positions. Bin b has the positions of
which floor(log2(position + 1)) is b.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qk_sniffer.dataset.head_vectors import HeadVectors
from qk_sniffer.dataset.reader import Dataset, sampler_of
from qk_sniffer.report.unchanged import Unchanged
from qk_sniffer.store.layout import HeadKey, head_file

Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]

READ_BYTES = 2 << 30
"""The bytes of vectors that are read of all heads together, as float32 in memory."""

MOST_BYTES = 32 << 20
"""The bytes that are read of a head."""

DIRECTION_ROWS = 512
"""The rows that the principal directions of a head are computed from."""


@dataclass(frozen=True, eq=False)
class HeadMeasure:
    """The measures of a head. Numbers without rows are NaN."""

    key: HeadKey
    rows: int
    """n"""
    norm: float
    """The mean Euclidean norm."""
    norm_deviation: float
    by_position: Float64
    """(B, 3): rows, mean and standard deviation of the norms in each bin."""
    rms: Float64
    """(d,): the root of the mean square of each channel."""
    largest: Float64
    """(d,): the largest absolute value of each channel."""
    position_share: float
    """The share of the variance of the vectors that a line over log2(position + 1) explains."""
    direction_shares: tuple[float, float]
    """The shares of the variance along the first two principal directions."""
    places: Float64
    """(m, 2): rows of the sample in these directions, less their mean."""
    positions: Int32
    """(m,): their positions."""

    @property
    def outlier_ratio(self) -> float:
        """The largest `rms` of a channel over the median one."""
        middle = float(np.median(self.rms)) if len(self.rms) else 0.0
        return float(self.rms.max()) / middle if middle > 0 else float("nan")


class Sample:
    """Chooses the examples whose rows are read, so that the rows of all heads stay within `READ_BYTES`."""

    def __init__(self, dataset: Dataset, unchanged: Unchanged) -> None:
        self._dataset = dataset
        self._unchanged = unchanged
        self._sampler = sampler_of(dataset.manifest)
        self._examples = dataset.examples
        self._budget = min(MOST_BYTES, READ_BYTES // max(1, len(dataset.heads)))
        self._chosen: dict[tuple[str, int], list[int]] = {}

    def vectors(self, key: HeadKey, width: int) -> HeadVectors:
        """Returns the rows of a head in the chosen examples: all of its rows if they are few.

        A file that is read as a whole must have its sha256. One that is read in part must not change meanwhile.

        Raises:
            StoreError: the file is missing, damaged or of another dataset, or was replaced or written meanwhile.
            HubError: the file cannot be fetched.
        """
        most = max(1, self._budget // (4 * width))
        if self._dataset.manifest["files"][head_file(*key)]["rows"] <= most:
            return self._dataset.vectors(*key, intact=True)
        with self._unchanged.reading(head_file(*key)):
            return self._dataset.vectors(*key, example_id=self.examples(key.kind, most), position=range(most))

    def examples(self, kind: str, most: int) -> list[int]:
        """Returns the ids of examples that are spread over the source, the first one among them.

        They are expected to have about `most` rows, of positions below `most`.
        """
        if (kind, most) not in self._chosen:
            lengths = np.minimum(self._examples["num_tokens"].to_numpy(), most)
            ids = self._examples["example_id"].to_numpy()
            chosen: list[int] = []
            rows = 0.0
            for place in _spread(len(ids)):
                rows += self._sampler.expected_rows(kind, int(lengths[place]))
                if chosen and rows > most:
                    break
                chosen.append(int(ids[place]))
            self._chosen[kind, most] = chosen
        return self._chosen[kind, most]


def measured(key: HeadKey, rows: HeadVectors, bins: int, points: int) -> HeadMeasure:
    """Returns the measures of a head. `points` is the largest number of `places`."""
    is_finite = np.isfinite(rows.vectors).all(axis=1)
    vectors, positions = rows.vectors[is_finite], rows.positions[is_finite]
    width = rows.vectors.shape[1]
    if not len(vectors):
        none, absent = np.full(width, np.nan), float("nan")
        empty = np.full((bins, 3), np.nan)
        empty[:, 0] = 0
        shares = absent, absent
        return HeadMeasure(
            key, 0, absent, absent, empty, none, none, absent, shares, np.empty((0, 2)), np.empty(0, np.int32)
        )
    squares = vectors.astype(np.float64)
    np.multiply(squares, squares, out=squares)  # in float64: squares of float32 numbers may be too large for float32
    norms = np.sqrt(squares.sum(axis=1))
    mean_squares = squares.mean(axis=0)
    chosen = _evenly(len(vectors), DIRECTION_ROWS)
    shares, position_share, places = _directions(vectors[chosen], positions[chosen])
    shown = _evenly(len(chosen), points)
    return HeadMeasure(
        key,
        len(vectors),
        float(norms.mean()),
        float(norms.std()),
        _by_bin(norms, positions, bins),
        np.sqrt(mean_squares),
        np.abs(vectors).max(axis=0).astype(np.float64),
        position_share,
        shares,
        places[shown],
        positions[chosen][shown],
    )


def num_bins(longest: int) -> int:
    """Returns the number of bins of positions in examples of at most `longest` tokens."""
    return max(1, longest.bit_length())


def _by_bin(norms: Float64, positions: Int32, bins: int) -> Float64:
    places = np.clip(np.frexp(positions.astype(np.float64) + 1)[1] - 1, 0, bins - 1)
    counts, sums, squares = (np.bincount(places, weights=each, minlength=bins) for each in (None, norms, norms**2))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / counts
        deviations = np.sqrt(np.maximum(squares / counts - means**2, 0))
    return np.stack([counts, means, deviations], axis=1)


def _directions(vectors: npt.NDArray[np.float32], positions: Int32) -> tuple[tuple[float, float], float, Float64]:
    """Returns the shares of two principal directions, the share that positions explain, and the rows in them (n, 2).

    A direction is an eigenvector of the covariance. Its sign is that of its largest component.
    """
    centered = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    total = float((centered**2).sum())
    if not total > 0 or not np.isfinite(total):
        return (float("nan"), float("nan")), float("nan"), np.zeros((len(vectors), 2))
    values, directions = np.linalg.eigh(centered.T @ centered)
    first, second = directions[:, -1], directions[:, -2] if len(values) > 1 else np.zeros(len(values))
    axes = np.stack([one * (np.sign(one[np.abs(one).argmax()]) or 1) for one in (first, second)], axis=1)
    shares = float(values[-1]) / total, float(values[-2]) / total if len(values) > 1 else 0.0
    time = np.log2(positions + 1.0)
    time -= time.mean()
    spread = float(time @ time)
    explained = float(((time @ centered) ** 2).sum()) / spread / total if spread > 0 else float("nan")
    return shares, explained, centered @ axes


def _evenly(count: int, most: int) -> npt.NDArray[np.int64]:
    """Returns at most `most` of the indices 0 to count - 1, spread over them."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).round().astype(np.int64)


def _spread(count: int) -> Iterator[int]:
    """Yields the indices 0 to count - 1 so that those before any point are spread over all of them; 0 is first."""
    bits = max(1, (count - 1).bit_length())
    order = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
    return (place for place in order if place < count)
