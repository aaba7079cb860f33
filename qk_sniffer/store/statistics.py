"""Statistics of heads over all tokens: their parts in the journal, how parts merge, and what they give.

A part describes the heads of one (layer, kind, stage) over the tokens of some examples. With count n and mean m, it has
M = sum of (x - m)(x - m)', or the diagonal of M. Two parts a and b merge as

    n = n_a + n_b,  m = m_a + (m_b - m_a) n_b / n,  M = M_a + M_b + (m_b - m_a)(m_b - m_a)' n_a n_b / n

(Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979). The parts
of a dataset merge in float64 and in the order of the source, so that kills and restarts change no bit.

A segment of the journal has the tensors of a part under names such as `statistics.l00q.post.mean`, with
`Part.covariance` in the place of M. `statistics_file.py` has the files of a dataset.

Both are in float32, which holds no covariance of numbers beyond about 1e19, and no norm or modulus beyond 3.4e38. Such
a number is infinite in a segment, and then in all sums that it goes into, and NaN in a dataset. Means, minima and
maxima have no limit: a vector has float32 numbers.

Shapes: H heads, ascending; d numbers of a vector; f rotary frequencies.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qk_sniffer.config import STAGES
from qk_sniffer.store.layout import KINDS, UNROTATED_KINDS
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.rows import block_name
from qk_sniffer.store.segment import DamageError, Header, Place, Tensor, open_segment, read_array
from qk_sniffer.text import numbered

Floats = npt.NDArray[np.floating[Any]]
Int64 = npt.NDArray[np.int64]
Pairs = Sequence[tuple[int, int]]

PREFIX = "statistics."
"""The start of the names of tensors of statistics in a segment."""


def stages_of(kind: str, stages: Sequence[str]) -> list[str]:
    """Returns those of `stages` that have statistics of a kind: for kinds that are not rotated, `post` alone."""
    return [stage for stage in stages if stage == "post" or kind not in UNROTATED_KINDS]


class PartKey(NamedTuple):
    """The layer, the kind and the stage of a part."""

    layer: int
    kind: str
    stage: str


@dataclass(frozen=True, eq=False)
class Part:
    """Statistics of H heads over some tokens. A vector with NaN or Inf counts in `nonfinite` alone.

    Numbers of a head without a token are 0, and those of `minimum` and `maximum` infinite.
    """

    count: Int64
    """(H,)"""
    nonfinite: Int64
    """(H,): vectors with NaN or Inf."""
    mean: Floats
    """(H, d)"""
    moment: Floats
    """M: (H, d, d), or (H, d) for its diagonal."""
    minimum: Floats
    """(H, d)"""
    maximum: Floats
    """(H, d)"""
    norm: Floats
    """(H, 2): the mean of the norms, and the sum of their squared distances from it."""
    modulus: Floats
    """(H, f): the mean modulus of each pair of components that turns with a rotary frequency; f is 0 without any."""

    @property
    def covariance(self) -> Floats:
        """(H, d, d) or (H, d): M with divisor n, or 1 without a token."""
        return self.moment / np.maximum(self.count, 1).reshape(-1, *(1,) * (self.moment.ndim - 1))

    @np.errstate(invalid="ignore")  # Inf - Inf
    def merged(self, other: "Part") -> "Part":
        """Returns the part of the tokens of both."""
        count = self.count + other.count
        share = (other.count / np.maximum(count, 1))[:, None]
        weight = self.count[:, None] * share
        change = other.mean - self.mean
        if self.moment.ndim == 3:
            between = change[:, :, None] * change[:, None, :] * weight[..., None]
        else:
            between = change**2 * weight
        step = other.norm[:, 0] - self.norm[:, 0]
        norm = np.stack(
            [
                self.norm[:, 0] + step * share[:, 0],
                self.norm[:, 1] + other.norm[:, 1] + step**2 * weight[:, 0],
            ],
            axis=1,
        )
        return Part(
            count,
            self.nonfinite + other.nonfinite,
            self.mean + change * share,
            self.moment + other.moment + between,
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            norm,
            self.modulus + (other.modulus - self.modulus) * share,
        )


_TYPES = {
    "count": "I64",
    "nonfinite": "I64",
    "mean": "F64",
    "covariance": "F32",
    "minimum": "F32",
    "maximum": "F32",
    "norm": "F64",
    "modulus": "F64",
}
"""The types of a part's arrays in a segment. Half the size matters for the covariance alone."""

_NUMPY = {"I64": np.int64, "F64": np.float64, "F32": np.float32}

_NAME = re.compile(rf"{re.escape(PREFIX)}l([0-9]{{2,6}})([{''.join(KINDS)}])\.({'|'.join(STAGES)})\.([a-z]+)")


def part_tensors(parts: Mapping[PartKey, Part]) -> list[Tensor]:
    """Returns the tensors of parts for a segment."""
    return [
        _tensor(f"{PREFIX}{block_name(key.layer, key.kind)}.{key.stage}.{name}", dtype, getattr(part, name))
        for key, part in sorted(parts.items())
        for name, dtype in _TYPES.items()
    ]


@np.errstate(over="ignore")
def _tensor(name: str, dtype: str, values: npt.NDArray[Any]) -> Tensor:
    stored = np.ascontiguousarray(values, _NUMPY[dtype])
    return Tensor(name, dtype, stored.shape, lambda: [stored] if stored.size else [])


def places_of(header: Header) -> dict[PartKey, dict[str, Place]]:
    """Returns the places of the parts in a segment.

    Raises:
        DamageError: the tensors are not those of parts.
    """
    found: dict[PartKey, dict[str, Place]] = {}
    for name, place in header.tensors.items():
        if not name.startswith(PREFIX):
            continue
        match = _NAME.fullmatch(name)
        if match is None or f"{PREFIX}{block_name(int(match[1]), match[2])}.{match[3]}.{match[4]}" != name:
            raise DamageError(f"it has a tensor {name[:100]!r}")
        found.setdefault(PartKey(int(match[1]), match[2], match[3]), {})[match[4]] = place
    for key, places in found.items():
        if not _is_part(places):
            raise DamageError(f"the statistics of layer {key.layer}, kind {key.kind} are not those of a part")
    return found


def _is_part(places: Mapping[str, Place]) -> bool:
    if {name: place.dtype for name, place in places.items()} != _TYPES or len(places["mean"].shape) != 2:
        return False
    heads, d = places["mean"].shape
    if min(heads, d) < 1:  # arrays without numbers may claim any size
        return False
    shapes = {name: place.shape for name, place in places.items()}
    moment, modulus = shapes.pop("covariance"), shapes.pop("modulus")
    expected = {"count": (heads,), "nonfinite": (heads,), "norm": (heads, 2)}
    expected |= dict.fromkeys(("mean", "minimum", "maximum"), (heads, d))
    return shapes == expected and moment in ((heads, d), (heads, d, d)) and len(modulus) == 2 and modulus[0] == heads


def read_parts(
    path: Path, places: Mapping[PartKey, Mapping[str, Place]], access: Access = PLAIN
) -> Iterator[tuple[PartKey, Part]]:
    """Yields the parts of a segment, one at a time."""
    with open_segment(path, access) as file:
        for key, of_part in places.items():
            arrays: dict[str, Any] = {}
            for name, place in of_part.items():
                values = read_array(file, place, _NUMPY[place.dtype])
                arrays[name] = values if place.dtype == "I64" else values.astype(np.float64)
            covariance = arrays.pop("covariance")
            divisor = np.maximum(arrays["count"], 1).reshape(-1, *(1,) * (covariance.ndim - 1))
            yield key, Part(**arrays, moment=covariance * divisor)


def paired(rotation: Any, size: int) -> Pairs | None:
    """Returns the two components of a head that turn with each of `size` frequencies; None if they are not known.

    `rotation` is that of a layer in the manifest: a mapping, the reason why it is not recorded, or None without RoPE.
    """
    if not isinstance(rotation, Mapping) or not size:
        return None
    first = rotation["first"]
    if rotation["pairs"] == "halves":
        return [(first + i, first + size + i) for i in range(size)]
    return [(first + 2 * i, first + 2 * i + 1) for i in range(size)]


LEAST_TOKENS = {
    "mean": 1,
    "minimum": 1,
    "maximum": 1,
    "norm_mean": 1,
    "frequency_modulus": 1,
    "variance": 2,
    "norm_variance": 2,
    "covariance": 2,
}
"""The tokens from which on a head has the numbers of an array of `Statistics`. With fewer they are NaN."""


@dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """Statistics of the captured heads of one layer, kind and stage, over all tokens from `skip_tokens` on.

    Numbers of a head without a token are NaN; so is the covariance of a head with one token, and any number that
    float32 cannot hold (`overflows`).
    """

    heads: Int64
    """(H,): query heads for the kinds "q" and "o", key heads for "k" and "v"."""
    count: Int64
    """(H,): tokens."""
    nonfinite: Int64
    """(H,): further tokens, whose vectors have NaN or Inf and count in nothing else."""
    mean: npt.NDArray[np.float32]
    """(H, d)"""
    variance: npt.NDArray[np.float32]
    """(H, d), with divisor count - 1."""
    covariance: npt.NDArray[np.float32] | None
    """(H, d, d), with divisor count - 1; None if the dataset has variances alone."""
    minimum: npt.NDArray[np.float32]
    """(H, d)"""
    maximum: npt.NDArray[np.float32]
    """(H, d)"""
    norm_mean: npt.NDArray[np.float32]
    """(H,): of the Euclidean norms of the vectors."""
    norm_variance: npt.NDArray[np.float32]
    """(H,), with divisor count - 1."""
    frequency_pairs: Int64 | None
    """(f, 2): the components that turn with each rotary frequency; None after RoPE, and in a layer that is not rotated
    or whose rotation is not recorded."""
    frequency_modulus: npt.NDArray[np.float32] | None
    """(H, f): the mean of sqrt(a^2 + b^2), where a and b are the components of a pair."""

    def __repr__(self) -> str:
        heads, tokens = numbered("head", self.heads.tolist()), int(self.count.max(initial=0))
        arrays = "mean, covariance and ranges" if self.covariance is not None else "mean, variance and ranges"
        moduli = "" if self.frequency_pairs is None else f", {len(self.frequency_pairs)} rotary frequencies"
        return f"<Statistics of {heads}: {arrays} of {self.mean.shape[1]} numbers over {tokens:,} tokens{moduli}>"

    def overflows(self, index: int) -> bool:
        """Whether float32 cannot hold a number of the head at `index`, or could not hold it of some of its tokens."""
        count = self.count[index]
        arrays = ((getattr(self, name), least) for name, least in LEAST_TOKENS.items())
        return any(of is not None and count >= least and not np.isfinite(of[index]).all() for of, least in arrays)

    @property
    def absmax(self) -> npt.NDArray[np.float32]:
        """(H, d): the largest absolute values."""
        return np.maximum(np.abs(self.minimum), np.abs(self.maximum))

    @property
    def frequency_mean(self) -> npt.NDArray[np.complex64] | None:
        """(H, f) complex: the mean of a + ib, where a and b are the components of a pair."""
        if self.frequency_pairs is None:
            return None
        one, other = self.frequency_pairs.T
        found: npt.NDArray[np.complex64] = (self.mean[:, one] + 1j * self.mean[:, other]).astype(np.complex64)
        return found

    @classmethod
    def of(cls, heads: Sequence[int], part: Part, pairs: Pairs | None) -> "Statistics":
        """Returns the statistics that a part holds. `pairs` are those of `part.modulus`; None without any."""
        count = part.count[:, None]

        @np.errstate(over="ignore")
        def of_tokens(values: Floats, least: int = 1) -> npt.NDArray[np.float32]:
            enough = (part.count >= least).reshape(-1, *(1,) * (values.ndim - 1))
            found = np.where(enough, values, np.nan).astype(np.float32)
            return np.where(np.isfinite(found), found, np.float32(np.nan))

        divisor = np.maximum(count - 1, 1)
        whole = part.moment.ndim == 3
        diagonal = np.diagonal(part.moment, axis1=1, axis2=2) if whole else part.moment
        return cls(
            np.asarray(heads, np.int64),
            part.count,
            part.nonfinite,
            of_tokens(part.mean),
            of_tokens(diagonal / divisor, 2),
            of_tokens(part.moment / divisor[..., None], 2) if whole else None,
            of_tokens(part.minimum),
            of_tokens(part.maximum),
            of_tokens(part.norm[:, 0]),
            of_tokens(part.norm[:, 1] / divisor[:, 0], 2),
            None if pairs is None else np.asarray(pairs, np.int64).reshape(-1, 2),
            None if pairs is None else of_tokens(part.modulus),
        )

    def part(self) -> Part:
        """Returns the part that these statistics hold, within rounding."""

        def plain(name: str, empty: float = 0.0) -> Floats:
            values: npt.NDArray[np.float32] = getattr(self, name)
            enough = (self.count >= LEAST_TOKENS[name]).reshape(-1, *(1,) * (values.ndim - 1))
            return np.where(enough, np.where(np.isnan(values), np.inf, values), empty).astype(np.float64)

        divisor = np.maximum(self.count - 1, 0)[:, None]
        moment = plain("variance" if self.covariance is None else "covariance")
        modulus = np.zeros((len(self.heads), 0)) if self.frequency_modulus is None else plain("frequency_modulus")
        return Part(
            self.count,
            self.nonfinite,
            plain("mean"),
            moment * divisor.reshape(-1, *(1,) * (moment.ndim - 1)),
            plain("minimum", np.inf),
            plain("maximum", -np.inf),
            np.stack([plain("norm_mean"), plain("norm_variance") * divisor[:, 0]], axis=1),
            modulus,
        )
