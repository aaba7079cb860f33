"""Compares the list of examples with the contract and with the manifest."""

import numpy as np
import pyarrow as pa

from qk_sniffer.capture.sampling import sampling_ids
from qk_sniffer.dataset.verify_manifest import ManifestFacts
from qk_sniffer.dataset.verify_parts import first_parts, part_problems
from qk_sniffer.dataset.verify_report import Problem, Report
from qk_sniffer.dataset.verify_rows import Examples
from qk_sniffer.machine import available_memory
from qk_sniffer.store.form_types import MOST_BUCKETS
from qk_sniffer.store.layout import Layout, examples_schema
from qk_sniffer.store.parquet_files import open_parquet
from qk_sniffer.store.parquet_tables import UNREADABLE, first_line, out_of_order, read_table, values
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.store.text_segments import TextSegments
from qk_sniffer.text import counted

_BYTES_PER_TOKEN = 64
"""The memory that the sampler takes for each token of an example, at most."""


def check_examples(facts: ManifestFacts, report: Report) -> Examples | None:
    """Reports on the examples. Returns them, or None if they are too damaged to check the rows with them."""
    path = Layout(facts.root).examples
    expected = examples_schema(split=facts.is_split, segments=facts.config.has_segments, from_python=facts.from_python)
    try:
        with open_parquet(path) as file:
            found = file.schema_arrow
        if not found.equals(expected):
            columns = ", ".join(f"{column.name} {column.type}" for column in found)
            report.add([Problem("examples", "the columns differ from the contract", columns)])
            return None
        table = read_table(path, expected, way_out="")
    except UnreadableError as error:
        report.add([Problem("examples", "cannot be read as Parquet", error.problem)])
        return None
    except UNREADABLE as error:
        report.add([Problem("examples", "cannot be read as Parquet", first_line(error))])
        return None
    example_id, num_tokens, index = (values(table[name]) for name in ("example_id", "num_tokens", "index"))
    part = values(table["part"]) if facts.is_split else np.zeros_like(num_tokens)
    first = values(table["first_position"]) if facts.from_python else np.zeros_like(num_tokens)
    for key, number in (
        ("examples", len(table)),
        ("texts", int(np.count_nonzero(part == 0))),
        ("tokens", int(num_tokens.sum(dtype=np.int64))),
        ("longest_example", longest := int(num_tokens.max(initial=0))),
        ("truncated_examples", int(np.count_nonzero(values(table["truncated"])))),
        ("examples_beyond_max_positions", int(np.count_nonzero(num_tokens > (facts.max_positions or 0)))),
    ):
        if facts.counts.get(key, number) != number:
            instance = f"{key}: {number:,}, not {facts.counts[key]:,}"
            report.add([Problem("examples", "the numbers differ from manifest.json", instance)])
    max_length = facts.config.model.tokenizer.max_length
    ids, counts = np.unique(example_id, return_counts=True)
    repeated = np.isin(example_id, ids[counts > 1])
    by_index = facts.config.dataset.id_column is None
    length_is_wrong = (num_tokens < 1) | (num_tokens > max_length)
    for what, wrong in (
        ("an example_id occurs twice", repeated),
        ("the indices do not ascend", out_of_order(index, part) & ~facts.is_split),
        (f"num_tokens is not 1 to {max_length:,} (model.tokenizer.max_length)", length_is_wrong),
        (
            "example_id is not the index, although dataset.id_column is null",
            (example_id != index) & (part == 0) & by_index,
        ),
        ("first_position is not one of the example's", (first < 0) | (first >= num_tokens)),
        *(part_problems(table, facts.config.model.tokenizer.max_length, facts.added_tokens) if facts.is_split else ()),
    ):
        if wrong.any():
            row = int(np.argmax(wrong))
            example = ", ".join(f"{name} {table[name][row]}" for name in ("index", "example_id", "num_tokens"))
            report.add([Problem("examples", what, f"row {row}: {example}", rows=int(wrong.sum()))])
    report.passed("examples", f"{len(table):,}, with {counted(int(num_tokens.sum(dtype=np.int64)), 'token')}")
    too_long = _is_too_long(facts, longest)
    if too_long:
        report.add([Problem("examples", "an example has too many tokens to check its rows", f"{longest:,} tokens")])
    segments = None
    is_damaged = repeated.any() or length_is_wrong.any() or not len(table) or too_long
    if facts.config.has_segments and not is_damaged:
        segments = _segments(facts, table, report)
        is_damaged = segments is None
    if is_damaged:
        return None
    return Examples(example_id, num_tokens, sampling_ids(example_id[first_parts(index)], part), first, segments)


def _segments(facts: ManifestFacts, table: pa.Table, report: Report) -> TextSegments | None:
    """Returns the segments of the examples of `table`; None and the problem in the report if they are damaged."""
    try:
        found = TextSegments.of(table["segments"].to_pylist(), table["num_tokens"].to_pylist())
    except ValueError as error:
        report.add([Problem("examples", "the segments of an example are not runs of its tokens", first_line(error))])
        return None
    if found.num_tokens() != facts.segments:
        report.add([Problem("examples", "the tokens in segments differ from manifest.json", "segments")])
    return found


def _is_too_long(facts: ManifestFacts, longest: int) -> bool:
    """Whether the sampler cannot choose the rows of an example of `longest` tokens again, for memory or its buckets."""
    last = max(longest - 1, 0)
    buckets = max(int(facts.sampler.bucket(head.kind, [last])[0]) for head in facts.heads.values())
    return buckets > MOST_BUCKETS or longest * _BYTES_PER_TOKEN > available_memory()
