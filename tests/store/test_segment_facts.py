"""A segment whose checksum is right and whose facts contradict each other is damaged."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
from support.store_cases import Captured, by_index, captured_journal

from qk_sniffer.store.journal import ExampleRecord, Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.segment import DamageError, read_header, segment_number
from qk_sniffer.store.segment_facts import blocks_of, check_runs, facts_of

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captured_journal(tmp_path_factory.mktemp("journal"), Captured(), segment_bytes=1 << 20).segments[0]


def edited(segment: Path, folder: Path, edit: Edit, tail: bytes = b"") -> Path:
    """Writes a copy of a segment with another header; its name has the checksum of its new bytes."""
    data = segment.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    edit(entries)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    whole = len(header).to_bytes(8, "little") + header + data[8 + length :] + tail
    path = folder / f"{segment.name.partition('-')[0]}-{xxhash.xxh3_64_hexdigest(whole)}.safetensors"
    path.write_bytes(whole)
    return path


def check(path: Path) -> None:
    header = read_header(path)
    facts = facts_of(header, segment_number(path) or 0)
    blocks_of(header)
    check_runs(path, header, facts)


def metadata(key: str, value: Any) -> Edit:
    return lambda entries: entries["__metadata__"].update({key: value})


def ended(change: Callable[[list[dict[str, Any]]], object]) -> Edit:
    def edit(entries: dict[str, Any]) -> None:
        values = json.loads(entries["__metadata__"]["ended"])
        change(values)
        entries["__metadata__"]["ended"] = json.dumps(values)

    return edit


def place(name: str, key: str, value: Any) -> Edit:
    return lambda entries: entries[name].update({key: value})


def swapped(entries: dict[str, Any]) -> None:
    one, other = entries["l00q.position"], entries["l00q.token_id"]
    one["data_offsets"] = other["data_offsets"]


def renamed(old: str, new: str) -> Edit:
    return lambda entries: entries.update({new: entries.pop(old)})


def test_an_untouched_segment_is_whole(segment: Path, tmp_path: Path) -> None:
    check(segment)
    check(edited(segment, tmp_path, lambda _: None))
    checked = {"layer": 0, "kind": "", "tokens": 1, "positions": [0], "tolerance": 1, "passed": None, "reason": ""}
    check(edited(segment, tmp_path, ended(lambda values: values[0].update(checks=[checked]))))
    assert [each["batch"] for each in facts_of(read_header(segment), 0).ended] == [0, 1, 2, 3]


@pytest.mark.parametrize("length", [6, 9])
def test_records_of_earlier_versions_and_negative_ids_are_read(length: int, segment: Path, tmp_path: Path) -> None:
    def shorten(values: list[dict[str, Any]]) -> None:
        for end in values:
            end["records"] = [[record[0], -record[1], *record[2:length]] for record in end["records"]]

    folder = tmp_path / "journal"
    folder.mkdir()
    path = edited(segment, folder, ended(shorten))
    check(path)
    (records, *_) = [end["records"] for end in facts_of(read_header(path), 0).ended]
    assert ExampleRecord(*records[0]) == replace(
        Captured().record(records[0][0]), example_id=records[0][1], left_out=0, begins_special=False
    )


@pytest.mark.parametrize(
    "edit",
    [
        lambda entries: entries.pop("__metadata__"),
        metadata("batches", 1),
        metadata("batches", "[0]"),
        metadata("batches", "[3, 0]"),
        metadata("batches", "[-1, 9]"),
        metadata("batches", "[0, 1e99]"),
        metadata("batches", "["),
        metadata("ended", "{}"),
        metadata("ended", "[" * 5000),
        metadata("format", "other"),
        metadata("batching", '{"max_batch_tokens": -1, "batch_size": null}'),
        lambda entries: entries["__metadata__"].pop("ended"),
        ended(lambda values: values[0].update(batch=99)),
        ended(lambda values: values[0].update(since=10**15)),
        ended(lambda values: values[0].update(since=-1)),
        ended(lambda values: values[0].pop("records")),
        ended(lambda values: values[0].update(checks=[{"layer": 0}])),
        ended(lambda values: values[0]["records"][0].__delitem__(slice(8, None))),
        ended(lambda values: values[0]["records"][0].__setitem__(9, "[]")),
        ended(lambda values: values[0]["records"][0].__setitem__(9, '[["user",1]]')),
        ended(lambda values: values[0]["records"][0].__setitem__(9, '[["user",0],["user",1]]')),
        ended(lambda values: values[0]["records"][0].__setitem__(9, '[["user",0],["tool",9999]]')),
        ended(lambda values: values[0]["records"][0].__setitem__(9, "x")),
        ended(lambda values: values[0]["records"][0].append(1)),
        ended(lambda values: values[0]["records"][0].__delitem__(slice(7, None))),
        ended(lambda values: values[0]["records"][0].__setitem__(10, -1)),
        ended(lambda values: values[0]["records"][0].__setitem__(10, 2**24)),
        ended(lambda values: values[0]["records"][0].__setitem__(11, -1)),
        ended(lambda values: values[0]["records"][0].__setitem__(12, 1)),
        ended(lambda values: values[0]["records"].append([2**38, 1, "x", 1, False, "00"])),
        ended(lambda values: values[0]["records"].append([1, 2**31, "x", 1, False, "00"])),
        ended(lambda values: values[0]["records"].append([1, 1, "x", 0, False, "00"])),
        place("l00q.vectors", "dtype", "F64"),
        place("l00q.vectors", "dtype", "F16x"),
        place("l00q.vectors", "shape", [4]),
        place("l00q.vectors", "shape", [-4, -1, 16]),
        place("l00q.vectors", "shape", [10**18, 10**18, 10**18]),
        place("l00q.vectors", "data_offsets", [0, 10**18]),
        place("l00q.vectors", "data_offsets", [-8, 0]),
        place("l00q.runs", "shape", [6, 6, 6, 6]),
        place("l00q.position", "dtype", "F32"),
        swapped,
        lambda entries: entries.pop("l00q.runs"),
        renamed("l00q.runs", "l00q.run"),
        renamed("l00q.runs", "l0q.runs"),
        renamed("l00q.runs", "../../x"),
        renamed("l00q.vectors", "l00q.token_id"),
        lambda entries: entries.update({"l09q.runs": {"dtype": "I64", "shape": [0, 6], "data_offsets": [0, 0]}}),
        lambda entries: entries.update({"x": [1]}),
    ],
)
def test_other_metadata_and_places_are_damage(edit: Edit, segment: Path, tmp_path: Path) -> None:
    with pytest.raises(DamageError):
        check(edited(segment, tmp_path, edit))


@pytest.mark.parametrize("tensor", ["l00q.runs", "l00q.position"])
@pytest.mark.parametrize("value", [-1, 2**31 - 1, 1 << 20])
def test_other_runs_are_damage(tensor: str, value: int, segment: Path, tmp_path: Path) -> None:
    header = read_header(segment)
    where, size = header.tensors[tensor].offset, 8 if tensor.endswith("runs") else 4
    for column in range(6 if size == 8 else 1):
        data = bytearray(segment.read_bytes())
        at = where + column * size
        if data[at : at + size] != (new := value.to_bytes(size, "little", signed=True)) and (column != 1 or value < 0):
            data[at : at + size] = new
            path = tmp_path / f"00000000-{xxhash.xxh3_64_hexdigest(bytes(data))}.safetensors"
            path.write_bytes(data)
            with pytest.raises(DamageError):
                check(path)


def test_more_bytes_than_the_header_lists_are_damage(segment: Path, tmp_path: Path) -> None:
    with pytest.raises(DamageError, match="bytes instead of"):
        check(edited(segment, tmp_path, lambda _: None, tail=b"0"))


def test_other_things_of_the_name_of_a_segment(segment: Path, tmp_path: Path) -> None:
    folder, pipe, link = (tmp_path / f"0000000{number}-{'0' * 16}.safetensors" for number in range(3))
    folder.mkdir()
    os.mkfifo(pipe)
    link.symlink_to(segment)
    for path, problem in ((folder, "not a file"), (pipe, "not a file"), (link, "is a link")):
        with pytest.raises(DamageError, match=problem):
            read_header(path)


def test_the_examples_of_a_damaged_segment_are_captured_again(tmp_path: Path) -> None:
    journal = captured_journal(tmp_path / "journal", Captured(), segment_bytes=1 << 14)
    path = journal.segments[1]
    edited(path, path.parent, ended(lambda values: values[0].update(since=10**15)))
    path.unlink()
    again = Journal(journal.folder)
    assert len(again.damaged) == 1 and not again.is_whole
    assert again.records.keys() < journal.records.keys()
    with JournalWriter(again, queue_bytes=1 << 20, segment_bytes=1 << 14) as writer:
        Captured().write(writer, by_index(again))
    whole = Journal(journal.folder)
    assert whole.is_whole and whole.records == journal.records


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values[0]["records"].pop(),  # its rows are of no example
        lambda values: values[0]["records"].clear(),
        lambda values: [each["records"].clear() for each in values],
        lambda values: values[0]["records"].append(values[0]["records"][0]),
        lambda values: values.append(values[0]),
    ],
)
def test_batches_that_contradict_the_rows_are_damage(
    change: Callable[[list[dict[str, Any]]], object], segment: Path, tmp_path: Path
) -> None:
    edited(segment, tmp_path, ended(change))
    journal = Journal(tmp_path)
    assert len(journal.damaged) == 1 and not journal.records


def test_two_segments_of_one_number_are_damage(segment: Path, tmp_path: Path) -> None:
    edited(segment, tmp_path, lambda _: None)
    edited(segment, tmp_path, metadata("more", "1"))
    journal = Journal(tmp_path)
    assert len(journal.damaged) == 2 and not journal.segments
