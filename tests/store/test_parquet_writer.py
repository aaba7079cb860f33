"""Tests of the Parquet files that are written."""

import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.rights import without_root

from qk_sniffer.store import parquet_writer
from qk_sniffer.store.layout import schema
from qk_sniffer.store.parquet_writer import ParquetWriter

WIDTH = 64


@contextmanager
def file_size_limited(most: int) -> Iterator[None]:
    """Lets a file have at most `most` bytes: a write beyond takes the bytes that fit, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def rows(count: int) -> pa.Table:
    numbers = np.arange(count, dtype=np.int32)
    vectors = np.random.default_rng(0).standard_normal(count * WIDTH, np.float32)
    columns = [*map(pa.array, (numbers % 16, numbers, numbers))]
    columns += [pa.FixedSizeListArray.from_arrays(pa.array(vectors), WIDTH), pa.nulls(count, pa.int32())]
    return pa.Table.from_arrays(columns, schema=schema(WIDTH))


@pytest.fixture(params=[True, False], ids=["/dev/fd", "no /dev/fd"])
def descriptors(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives files by descriptor, or hides them, as in a container without /proc."""
    if not request.param:
        monkeypatch.setattr(parquet_writer, "DESCRIPTORS", tmp_path / "missing")


@pytest.mark.usefixtures("descriptors")
def test_a_write_that_takes_a_part_of_the_bytes_is_continued_and_its_error_is_raised(tmp_path: Path) -> None:
    path, table = tmp_path / "data.parquet", rows(100)
    with ParquetWriter(path, schema(WIDTH)) as writer:
        writer.write(table)
    most = path.stat().st_size - 3  # the last write takes one of its four bytes; pyarrow does not ask how many
    with file_size_limited(most), pytest.raises(OSError) as error, ParquetWriter(path, schema(WIDTH)) as writer:
        writer.write(table)
    assert error.value.errno == errno.EFBIG
    assert writer.entry is None
    assert path.stat().st_size == most


def test_a_file_is_written_that_its_owner_may_not_open_for_writing() -> None:
    """As with a umask of 0222, and in folders that are mounted with one."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        before = os.umask(0o222)
        try:
            with without_root(), ParquetWriter(path := Path(folder, "data.parquet"), schema(WIDTH)) as writer:
                writer.write(rows(100))
            assert path.stat().st_mode & 0o777 == 0o444
        finally:
            os.umask(before)
        assert pq.read_table(path).equals(rows(100))


@pytest.mark.usefixtures("descriptors")
def test_the_entry_is_that_of_the_file(tmp_path: Path) -> None:
    path, table = tmp_path / "data.parquet", rows(16_384)
    with ParquetWriter(path, schema(WIDTH)) as writer:
        writer.write(table)
        writer.write(table.slice(0, 100))
    assert writer.entry is not None
    assert (writer.entry.rows, writer.entry.size) == (16_484, path.stat().st_size)
    assert pq.read_table(path).equals(pa.concat_tables([table, table.slice(0, 100)]))
