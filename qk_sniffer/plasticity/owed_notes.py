"""Derives the notes on heads that follow from the tables of results, which a received record may have left out.

The others rest on what no table has: the rows that were left out or repeat others, constant components, and the buckets
without queries or pairs of keys, which share their NaN.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qk_sniffer.plasticity import notes
from qk_sniffer.plasticity.intervals import ENOUGH_ROWS, ENOUGH_TEXTS
from qk_sniffer.store.layout import head_name
from qk_sniffer.text import counted

Table = Mapping[str, np.ndarray[Any, Any]]


def are_all_there(found: Mapping[str, list[str]], tables: Mapping[str, Table], settings: Mapping[str, Any]) -> bool:
    """Whether notes have each one that follows from the tables.

    Args:
        found: the notes, with the names of the heads that they are on.
        tables: the columns of the tables by their names.
        settings: those of the measurement.
    """
    owed = [*_of_queries(tables), *_of_samples(tables, settings)]
    return all(any(head in found.get(note, ()) for note in alternatives) for head, alternatives in owed)


def _of_queries(tables: Mapping[str, Table]) -> Iterator[tuple[str, list[str]]]:
    metrics, pairs = tables["head_metrics"], Counter(_heads(tables["head_bucket_plasticity"]))
    for row, head in enumerate(_heads(metrics)):
        numbers = {name: float(metrics[name][row]) for name in ("n_q_tokens", "q_R2_pos", "q_beta_norm")}
        yield from ((head, [note]) for note in notes.of_queries(numbers, pairs[head]))


def _of_samples(tables: Mapping[str, Table], settings: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yields what few texts or queries owe. Without replicates, no table has their numbers."""
    buckets, intervals = tables["head_bucket_intervals"], tables["head_intervals"]
    rows = buckets["n_q_rows"]
    with_few = {head for head, few in zip(_heads(buckets), (rows > 0) & (rows < ENOUGH_ROWS), strict=True) if few}
    for row, head in enumerate(_heads(intervals)):
        if intervals["quantity"][row] != "ap_overall":
            continue
        value, corrected, texts = (intervals[name][row] for name in ("value", "corrected", "n_texts"))
        is_line = settings["estimator"]["alpha"] is None
        bias = notes.bias(float(value), float(corrected), is_line=is_line, has_replicates=bool(settings["replicates"]))
        if texts < ENOUGH_TEXTS:  # of the keys too: those of the queries alone may be fewer
            counts = (counted(number, "text") for number in range(1, texts + 1))
            yield head, [notes.FEW_TEXTS.format(texts=count, enough=ENOUGH_TEXTS, bias=bias) for count in counts]
        if head in with_few:
            yield head, [notes.FEW_QUERIES.format(enough=ENOUGH_ROWS, bias=bias)]


def _heads(table: Table) -> list[str]:
    """Returns the name of the query head of each row."""
    keys = zip(table["layer"].tolist(), table["q_head"].tolist(), strict=True)
    return [head_name(layer, head, "q") for layer, head in keys]
