"""Tests the choice of the examples that prove a dataset."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.jobs import heads_of, run

from qk_sniffer.capture import proof_examples
from qk_sniffer.capture.forward_cost import ForwardCost, LayerCost
from qk_sniffer.capture.proof_examples import Pass, choose
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.journal import ExampleRecord
from qk_sniffer.store.layout import Head, Layout

TINY = 1_000
"""Weights of a model that runs any number of tokens."""

LARGE = 10**12
"""Weights of a model for which only the share of the dataset's tokens counts."""

Rows = dict[tuple[int, str], dict[int, list[int]]]
"""Positions by example in each (layer, kind)."""


def chosen(
    tmp_path: Path,
    tokens: list[int],
    rows: Rows,
    count: int | None = None,
    *,
    parameters: int = TINY,
    layers: int = 4,
    heads_of_layer: int = 4,
    boundary: int | None = None,
    parts: Sequence[int] = (),
) -> list[Pass]:
    """The passes for a dataset of one head for each (layer, kind) and of examples 0, 1, ... of these lengths.

    `parts` are the numbers of examples of the parts before the last one.
    """
    heads = [Head(layer, 0, kind, 0, 4, None, 0) for layer, kind in rows]
    for head in heads:
        of_head = rows[head.layer, head.kind]
        table = pa.table(
            {
                "example_id": pa.array(np.repeat([*of_head], [*map(len, of_head.values())]), pa.int32()),
                "position": pa.array([*chain.from_iterable(of_head.values())], pa.int32()),
            }
        )
        (tmp_path / head.file).parent.mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / head.file)
    examples = [ExampleRecord(number, number, str(number), length, False, "") for number, length in enumerate(tokens)]
    sizes = [*parts, len(tokens) - sum(parts)]
    ends = np.cumsum(sizes).tolist()
    return choose(
        Layout(tmp_path),
        heads,
        [examples[end - size : end] for end, size in zip(ends, sizes, strict=True)],
        count=count,
        cost=ForwardCost(parameters, tuple(LayerCost(layer, heads_of_layer, 4, None) for layer in range(layers))),
        boundary=boundary,
    )


def ids(passes: list[Pass]) -> list[int]:
    return [each.example.example_id for each in passes]


def test_examples_are_added_until_every_layer_and_kind_has_rows(tmp_path: Path) -> None:
    rows: Rows = {(0, "q"): {0: [3], 1: [2, 9]}, (1, "q"): {1: [1]}, (0, "k"): {2: [5]}, (1, "k"): {0: [7], 3: [1]}}
    choice = chosen(tmp_path, [60, 60, 300, 120], rows)
    assert ids(choice) == [1, 0, 2, 3], "first what adds the most; all of them, because there are few rows"
    assert {group: numbers.tolist() for group, numbers in choice[0].rows.items()} == {(0, "q"): [1, 2], (1, "q"): [0]}
    assert {group: numbers.tolist() for group, numbers in choice[1].rows.items()} == {(0, "q"): [0], (1, "k"): [0]}


def test_enough_rows_are_enough_and_the_longest_example_reaches_the_late_positions(tmp_path: Path) -> None:
    tokens = [300, 310, 5000, 320, 330]
    rows: Rows = {(0, kind): {number: [*range(150)] for number in range(5)} for kind in "qk"}
    rows[0, "q"][2] = [*range(100), 4095, 4096]
    rows[3, "q"] = {2: [4999]}
    *passes, last, third, fourth, beyond = chosen(tmp_path, tokens, rows, layers=8)
    assert ids(passes) == [0, 1] and ids([third, fourth]) == [3, 4]
    assert (last.example.example_id, last.tokens, last.for_late_rows) == (2, 4096, False)
    assert last.rows[0, "q"].tolist() == [300 + number for number in range(101)], "rows of later tokens are not run"
    assert (beyond.example.example_id, beyond.tokens, beyond.for_late_rows) == (2, 5000, True)
    late = {group: numbers.tolist() for group, numbers in beyond.rows.items()}
    assert late == {(0, "q"): [401], (3, "q"): [0]}, "no row twice, and all layers, which cost little"
    few = int(6e11) // 2 // (4096 + 1000)
    short = chosen(tmp_path, tokens, rows, layers=8, parameters=few)
    assert [each.tokens for each in short] == [300, 310, 4096, 330], "the last one is drawn for what is left"
    fewer = int(6e11) // 2 // 4000
    passes = chosen(tmp_path, tokens, rows, layers=8, parameters=fewer)
    assert ids(passes) == [0, 1, 3, 4, 2] and passes[-1].for_late_rows
    assert passes[-1].rows.keys() == {(0, "q")}, "the first layer alone, for what is left of the budget"


def test_the_pairs_of_queries_and_keys_count_in_the_cost_of_late_positions(tmp_path: Path) -> None:
    tokens = [300, 60_000]
    rows: Rows = {(0, "q"): {0: [*range(300)], 1: [59_999]}, (1, "q"): {0: [1]}}
    assert [each.tokens for each in chosen(tmp_path, tokens, rows)] == [300, 60_000]
    whole = ForwardCost(TINY, tuple(LayerCost(layer, 4, 4, None) for layer in range(4)))
    assert whole.flops(60_000) > 10 * 2 * TINY * 60_000, "a model of few weights"
    windowed = ForwardCost(TINY, tuple(LayerCost(layer, 4, 4, 100) for layer in range(4)))
    pairs = 100 * 101 / 2 + 59_900 * 100
    assert windowed.flops(60_000) == pytest.approx(2 * TINY * 60_000 + 4 * 4 * 16 * pairs, rel=1e-3)
    assert whole.flops(60_000, last_layer=0) == pytest.approx(whole.flops(60_000) / 4)
    wide = [64, 60_000]
    assert [each.tokens for each in chosen(tmp_path, wide, rows, heads_of_layer=4096)] == [64], "more than the job"


def test_examples_of_all_parts_are_proven(tmp_path: Path) -> None:
    tokens = [20] * 400
    rows: Rows = {(0, kind): {number: [*range(20)] for number in range(400)} for kind in "qk"}
    one = ids(chosen(tmp_path, tokens, rows))
    assert one[:10] == [*range(10)], "enough rows"
    assert [number // 50 for number in one[10:]] == [*range(1, 8)], "one of each section that has no chosen one"
    assert len({number % 50 for number in one[10:]}) > 3, "which a hash draws"
    grown = ids(chosen(tmp_path, tokens, rows, parts=[396]))
    assert set(grown) & {396, 397, 398, 399}, "one of what was added"
    shards = ids(chosen(tmp_path, tokens, rows, parts=[10] * 39))
    assert {number // 10 for number in shards} == {*range(40)}, "one of each shard"
    assert ids(chosen(tmp_path, tokens, rows, parameters=LARGE)) == [*range(8)], "for what is left of the budget"


def test_a_number_takes_the_shortest_examples_that_have_rows(tmp_path: Path) -> None:
    rows: Rows = {(0, "q"): {0: [1], 1: [1], 3: [1], 4: [4096]}, (0, "k"): {3: [2]}}
    assert ids(chosen(tmp_path, [50, 30, 10, 20, 5000], rows, count=2)) == [3, 1]
    assert ids(chosen(tmp_path, [50, 30, 10, 20, 5000], rows, count=9)) == [3, 1, 0]


def test_frequencies_that_depend_on_the_length_leave_out_what_needs_padding(tmp_path: Path) -> None:
    rows: Rows = {(0, "q"): {0: [1], 1: [1], 2: [4999]}}
    tokens = [4, 300, 5000]
    assert ids(chosen(tmp_path, tokens, rows, boundary=100)) == [0, 1, 2], "the last one in full"
    assert ids(chosen(tmp_path, tokens, rows, boundary=3)) == [1, 2], "the first one would be padded to 17 tokens"
    assert ids(chosen(tmp_path, [4, 4], {(0, "q"): {0: [1], 1: [1]}}, boundary=3)) == []


def test_rows_of_large_examples_are_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof_examples, "MOST_BYTES", 2 * 16 * 4)  # four rows of two heads of 4 numbers
    rows: Rows = {(0, kind): {0: [*range(100)]} for kind in "qk"}
    assert chosen(tmp_path, [100], rows)[0].rows[0, "k"].tolist() == [0, 33, 66, 99]


def test_sparse_rows_are_proven_in_every_layer_and_head(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = {"type": "log_uniform", "base_rate": 1.0, "min_bucket_size": 64}
    root = run(checkpoint, texts, tmp_path / "out", sampler=sampler)
    proof, heads = manifests.read(root)["proof"], heads_of(root)
    assert proof["proven"] is True and proof["uncovered"] == [] and proof["heads"] == len(heads) == 18
    assert len(proof["examples"]) > 5
    compared = sum(
        table["example_id"].to_pylist().count(each) for table in heads.values() for each in proof["examples"]
    )
    assert proof["rows"] == compared
    last = max(
        position
        for table in heads.values()
        for example, position in zip(table["example_id"].to_pylist(), table["position"].to_pylist(), strict=True)
        if example in proof["examples"]
    )
    assert proof["longest_position"] == last
    line = f"Proven: {compared:,} rows of 18 heads in all 3 layers, positions to {last}; attention itself at "
    assert line in capsys.readouterr().out
