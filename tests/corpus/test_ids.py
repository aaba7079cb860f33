"""Tests the rule that gives each id its number, and compares it with a search through a set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data_files import both_ways, jsonl, message, opened, write

from qk_sniffer.corpus import ids as module
from qk_sniffer.corpus.ids import RepeatedIdError, StreamedIds, moved_numbers, preferred_number

LARGEST = 2**31 - 1


def by_brute_force(preferred: list[int], has_text: list[bool]) -> list[int | None]:
    taken: set[int] = set()
    numbers: list[int | None] = []
    for number, used in zip(preferred, has_text, strict=True):
        while used and number in taken:
            number = (number + 1) % 2**31
        numbers.append(number if used else None)
        if used:
            taken.add(number)
    return numbers


def mapped(preferred: list[int], has_text: list[bool], seen: list[int] | None = None) -> list[int | None]:
    def id_of(place: int) -> str | None:
        if seen is not None:
            seen.append(place)
        return f"id {place}" if has_text[place] else None

    moved = moved_numbers(np.array(preferred, np.int32), id_of)
    numbers = [moved.get(place, number) for place, number in enumerate(preferred)]
    return [number if used else None for number, used in zip(numbers, has_text, strict=True)]


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int], list[bool]], list[int | None]]:
    def numbers(preferred: list[int], has_text: list[bool]) -> list[int | None]:
        monkeypatch.setattr(module, "preferred_number", lambda source_id: preferred[int(source_id)])
        table = StreamedIds()
        return [table.add(place, str(place)) if used else None for place, used in enumerate(has_text)]

    return numbers


def test_both_ways_agree_with_a_search_through_a_set(
    streamed: Callable[[list[int], list[bool]], list[int | None]],
) -> None:
    generator = np.random.default_rng(0)
    for trial in range(30):
        count = int(generator.integers(1, 200))
        # Close together, so that many ids claim one number; some at the end, where the search starts again from 0.
        preferred = generator.integers(0, int(generator.integers(1, 3 * count)), count)
        preferred = (preferred + (LARGEST - count if trial % 3 == 0 else 0)) % 2**31
        numbers, has_text = preferred.tolist(), (generator.random(count) < 0.8).tolist()
        expected = by_brute_force(numbers, has_text)
        assert mapped(numbers, has_text) == streamed(numbers, has_text) == expected
        whole = [number for number in expected if number is not None]
        assert len(set(whole)) == len(whole) and all(0 <= number <= LARGEST for number in whole)


def test_the_number_after_the_largest_is_0(streamed: Callable[[list[int], list[bool]], list[int | None]]) -> None:
    preferred, all_used = [LARGEST, LARGEST, 0, -5], [True] * 4
    assert mapped(preferred, all_used) == streamed(preferred, all_used) == [LARGEST, 0, 1, -5]


@pytest.mark.slow
def test_a_hundred_thousand_string_ids(tmp_path: Path) -> None:
    count = 100_000
    names = [f"document-{number}" for number in range(count)]
    preferred = [preferred_number(name) for name in names]
    expected = by_brute_force(preferred, [True] * count)
    assert expected != preferred, "some of these ids have the same digest"
    pq.write_table(pa.table({"id": names, "text": ["t"] * count}), tmp_path / "rows.parquet")
    corpus = opened(tmp_path / "rows.parquet", id_column="id")
    moved = {place: number for place, number in enumerate(expected) if number != preferred[place]}
    assert corpus._moved == moved
    table = StreamedIds()
    assert [table.add(place, name) for place, name in enumerate(names)] == expected
    # A dataset that grows, and shards: each id keeps the number that it has in the whole source.
    for part in (next(iter(moved)) + 1, count // 2):
        shorter = opened(tmp_path / "rows.parquet", id_column="id", max_samples=part)
        assert shorter._moved == {place: number for place, number in moved.items() if place < part}
    last = max(moved)
    for shards in (1, 3):
        examples = corpus.examples(shard_index=last % shards, shard_count=shards, after=last)
        assert next(examples).example_id == moved[last]


def test_few_rows_are_read_to_find_the_numbers() -> None:
    preferred = [*range(1000), 7]
    used = [True] * 1000 + [False]
    seen: list[int] = []
    assert mapped(preferred, used, seen)[:1000] == preferred[:1000]
    assert sorted(seen) == [7, 1000], "the row without text takes no number, so no other row moves"


def test_one_id_twice_is_an_error_also_where_it_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "preferred_number", lambda source_id: 5)
    names = ["a", "b", "c", "b"]
    table = StreamedIds()
    with pytest.raises(RepeatedIdError) as streamed:
        for place, name in enumerate(names):
            table.add(place, name)
    with pytest.raises(RepeatedIdError) as found:
        moved_numbers(np.full(4, 5, np.int32), lambda place: names[place])
    assert (streamed.value.first, streamed.value.second) == (found.value.first, found.value.second) == (1, 3)


@both_ways
def test_a_number_and_its_text_are_two_ids(tmp_path: Path, streaming: bool) -> None:
    values: list[Any] = [12, "12", True, "True", 2**40, str(2**40), [1], "[1]", 1.5, "1.5"]
    file = write(tmp_path / "rows.jsonl", jsonl([{"id": value, "text": "text"} for value in values]))
    examples = list(opened(file, id_column="id", streaming=streaming).examples())
    assert [example.source_id for example in examples] == [str(value) for value in values]
    expected = by_brute_force([preferred_number(value) for value in values], [True] * len(values))
    assert [example.example_id for example in examples] == expected and len(set(expected)) == len(values)
    pairs: list[tuple[Any, Any]] = [(12, 12), ("12", "12"), (True, True), ([1], [1]), (1.0, 1)]
    for one, again in pairs:
        rows = [{"id": each, "text": "text"} for each in ("x", 12 if one == "12" else "12", one, again)]
        text = message(write(tmp_path / "again.jsonl", jsonl(rows)), id_column="id", streaming=streaming)
        assert f"examples 2 and 3 have the same id '{again}'" in text


def test_one_spelling_in_csv_is_one_id(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv", 'id,text\n12,a\n"12",b\n')
    assert "examples 0 and 1 have the same id '12'" in message(file, id_column="id")
