"""Writes the section of a dataset card on the positions that the sampler keeps."""

from collections.abc import Sequence

from qk_sniffer.capture.sampling import POSITIONS_OF, Sampler
from qk_sniffer.dataset.bucket_ranges import bucket_ranges
from qk_sniffer.dataset.card_facts import CardFacts
from qk_sniffer.markdown import table
from qk_sniffer.resolved import rule
from qk_sniffer.store.layout import KIND_NAMES, KIND_PLURALS, KINDS

_MAX_BUCKET_LINES = 32


def sampling(facts: CardFacts) -> str:
    """Returns the section."""
    config, sampler = facts.config.sampler, Sampler(facts.config.sampler)
    kinds = [kind for kind in KINDS if any(head.kind == kind for head in facts.heads)]
    if all(map(sampler.keeps_none, kinds)):
        return f"## Sampling\n\nSampler: {rule(config)}. It keeps no position: the files of the heads have no rows.\n"
    hashed, sharing = "seed, example_id, layer, kind, position", "All heads of a layer and kind"
    if config.share == "example":
        hashed, sharing = "seed, example_id, position", "All layers and kinds"
    if facts.is_split:
        sharing = (
            "For a later part of a text, hash(example_id of the text, part) takes the\nplace of example_id. " + sharing
        )
    text = f"""\
## Sampling

Sampler: {rule(config)}, min_bucket_size {config.min_bucket_size:,}, seed {config.seed}. A hash of
({hashed}) gives a number u in [0, 1). A position is kept when u is below the
probability p of its bucket. {sharing} share u.{_positions_of_others(kinds)}
To estimate sums over all positions{_of_segments(config.segments)}, weight each row by 1/p.
"""
    if config.max_rows_per_example is not None:
        text += (
            f"If more than {config.max_rows_per_example:,} are kept for an example, layer and kind, only those with\n"
            "the smallest hashes remain, and the true probability is below p.\n"
        )
    if config.segments is not None:
        text += "Of these positions, only those in some segments are kept, see Segments.\n"
    groups = [[kind for kind in kinds if POSITIONS_OF[kind] == positions] for positions in KINDS]
    for group in [kinds] if sampler.same_rule() else filter(None, groups):
        header = ("bucket", "positions", "p", *(f"{KIND_NAMES[kind]} rows" for kind in group))
        text += "\n" + table(header, _bucket_lines(facts, sampler, group))
    return text


def _positions_of_others(kinds: Sequence[str]) -> str:
    others = [
        f"{KIND_PLURALS[kind]} have the positions of the {KIND_PLURALS[POSITIONS_OF[kind]]}"
        for kind in kinds
        if POSITIONS_OF[kind] != kind
    ]
    return f" {' and '.join(others).capitalize()}." if others else ""


def _bucket_lines(facts: CardFacts, sampler: Sampler, kinds: list[str]) -> list[tuple[str, ...]]:
    return [
        (
            buckets.label,
            buckets.positions,
            f"{buckets.probability:.6g}",
            *(f"{buckets.rows(facts.rows_by_bucket[kind]):,}" for kind in kinds),
        )
        for buckets in bucket_ranges(sampler, kinds[0], facts.longest, _MAX_BUCKET_LINES)
    ]


def _of_segments(names: Sequence[str] | None) -> str:
    return "" if names is None else " in these segments"
