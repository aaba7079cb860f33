"""Compares the numbers of rows by bucket with those that the sampler expects, as a table of the report."""

from collections import Counter
from collections.abc import Sequence

from qk_sniffer.dataset.bucket_ranges import bucket_ranges
from qk_sniffer.dataset.verify_manifest import ManifestFacts
from qk_sniffer.dataset.verify_rows import Examples
from qk_sniffer.store.layout import KIND_NAMES, Head

_MAX_BUCKET_LINES = 12


def bucket_table(
    facts: ManifestFacts, heads: Sequence[Head], examples: Examples, rows_by_bucket: dict[str, Counter[int]]
) -> list[str]:
    """Returns lines with the rows of `heads` by bucket, next to the rows that the sampler expects.

    Returns none for a sampler that keeps no rows.
    """
    if all(map(facts.sampler.keeps_none, rows_by_bucket)) and not any(map(Counter.total, rows_by_bucket.values())):
        return []
    limit, segments = facts.config.sampler.max_rows_per_example, facts.config.sampler.segments
    longest = int(examples.num_tokens.max())
    lines = [("kind", "bucket", "positions", "rows", "expected" if limit is None else "expected at most")]
    for kind, counter in rows_by_bucket.items():
        num_heads = sum(head.kind == kind for head in heads)
        for buckets in bucket_ranges(facts.sampler, kind, longest, _MAX_BUCKET_LINES):
            tokens = examples.count(segments, buckets.first, buckets.last + 1)
            expected = num_heads * buckets.probability * tokens
            rows = f"{buckets.rows(counter):,}"
            lines.append((KIND_NAMES[kind], buckets.label, buckets.positions, rows, f"{expected:,.0f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    alignments = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust)
    return [
        "  " + "  ".join(align(cell, width) for align, cell, width in zip(alignments, line, widths, strict=True))
        for line in lines
    ]
