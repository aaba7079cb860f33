"""Writes the section of a dataset card on the segments of the examples, and on those that the sampler keeps."""

from qk_sniffer.dataset.card_facts import CardFacts
from qk_sniffer.markdown import plain, table

_MOST_LINES = 32


def segments(facts: CardFacts) -> str:
    """Returns the section; empty for a dataset without segments."""
    if not facts.config.has_segments:
        return ""
    kept = facts.config.sampler.segments
    counts = sorted(facts.segments.items(), key=lambda each: (-each[1], each[0]))
    lines = [
        (plain(name), f"{tokens:,}", *(() if kept is None else ("yes" if name in kept else "no",)))
        for name, tokens in counts[:_MOST_LINES]
    ]
    text = f"""\
## Segments

A segment is a part of an example, such as a message or its role. The column `segments` of `examples/data.parquet` has
the segments of an example in their order, as JSON: name and first position of each. A segment ends where the next one
begins. The tokens of all examples, by the name of their segments:

{table(("segment", "tokens", *(() if kept is None else ("kept",))), lines)}"""
    if len(counts) > _MOST_LINES:
        text += f"\n{len(counts) - _MOST_LINES:,} more names are in `manifest.json`.\n"
    return text
