"""Writes small data files of every kind, and opens a corpus on them."""

import bz2
import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qk_sniffer.config import DatasetConfig
from qk_sniffer.corpus.examples import Corpus, Example, open_corpus
from qk_sniffer.errors import SourceError

ROWS = [
    {"id": "a", "text": "first text", "n": 7, "length": "long"},
    {"id": "b", "text": "", "n": 8, "length": "short"},
    {"id": "c", "text": "third, é and 漢", "n": -9, "length": "long"},
    {"id": "d", "text": " \n\t ", "n": 10, "length": "long"},
    {"id": "e", "text": None, "n": 2**31 - 1, "length": "short"},
    {"id": "f", "text": "sixth\nof two lines", "n": 2**31, "length": "short"},
]
TEXTS = [(0, "first text"), (2, "third, é and 漢"), (5, "sixth\nof two lines")]

both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv(rows: list[dict[str, Any]]) -> bytes:
    def cell(value: Any) -> str:
        return "" if value is None else f'"{value}"'

    lines = [",".join(rows[0]), *(",".join(cell(value) for value in row.values()) for row in rows)]
    return "\n".join(lines).encode()


FORMATS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "rows.parquet": parquet,
    "rows.jsonl": jsonl,
    "ROWS.JSONL": jsonl,
    "rows.json": lambda rows: json.dumps(rows).encode(),
    "rows.csv": csv,
    "rows.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "rows.csv.gz": lambda rows: gzip.compress(csv(rows)),
    "rows.jsonl.bz2": lambda rows: bz2.compress(jsonl(rows)),
    "odd [name]*, é.v1.txt.jsonl": jsonl,
}


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def opened(path: Path | str, **options: Any) -> Corpus:
    return open_corpus(DatasetConfig(path=str(path), **options))


def texts(examples: Iterable[Example]) -> list[tuple[int, str]]:
    return [(example.index, example.content) for example in examples]


def message(path: Path | str, **options: Any) -> str:
    """Returns the message of the error that opening or reading `path` raises, after checking that it is short."""
    with pytest.raises(SourceError) as caught:
        list(opened(path, **options).examples())
    text = str(caught.value)
    assert "Traceback" not in text and len(text) < 1500
    return text
