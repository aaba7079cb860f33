"""Groups the buckets of a sampler into the lines of a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.text import compact_ranges


@dataclass(frozen=True)
class BucketRange:
    """Neighbouring buckets with the same inclusion probability, and their positions from `first` to `last`."""

    buckets: Sequence[int]
    first: int
    last: int
    probability: float

    @property
    def label(self) -> str:
        """`0-3`."""
        return compact_ranges(self.buckets)

    @property
    def positions(self) -> str:
        """`0 to 511`."""
        return f"{self.first:,} to {self.last:,}"

    def rows(self, rows_by_bucket: Mapping[int, int]) -> int:
        """The rows in these buckets."""
        return sum(rows_by_bucket.get(bucket, 0) for bucket in self.buckets)


def bucket_ranges(sampler: Sampler, kind: str, longest: int, most: int) -> list[BucketRange]:
    """Returns the buckets of positions below `longest`, in at most `most` ranges if all have the same probability.

    Buckets of different probabilities are never joined, whatever `most` is.

    Args:
        sampler: of the dataset.
        kind: of the rows.
        longest: tokens of the longest example.
        most: the number of ranges.
    """
    inclusion = sampler.inclusion(kind, longest)
    buckets = list(inclusion)
    step = -(-len(buckets) // most) if len(set(inclusion.values())) == 1 else 1
    ranges = []
    for start in range(0, len(buckets), step):
        some = buckets[start : start + step]
        first, last = sampler.span(kind, some[0])[0], sampler.span(kind, some[-1])[1]
        ranges.append(BucketRange(some, first, min(last, longest - 1), inclusion[some[0]]))
    return ranges
