"""Reads Parquet files of a declared form. `ParquetWriter` writes them; someone else may have changed them since."""

import stat
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from qk_sniffer.store.parquet_files import open_parquet
from qk_sniffer.store.stored import UnreadableError


def read_table(path: Path, schema: pa.Schema, *, way_out: str) -> pa.Table:
    """Returns the columns of `schema` from a Parquet file, in the order and with the types of `schema`.

    The file may have other columns too. `way_out` is the end of the error message.

    Raises:
        UnreadableError: the file is missing or damaged, or lacks one of the columns.
    """
    try:
        # pyarrow would read all files of a folder, and wait for the other end of a pipe.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableError(path, "is not a file", way_out)
        with open_parquet(path) as file:
            if wrong := "; ".join(_differences(file.schema_arrow, schema)):
                raise UnreadableError(path, f"has other columns ({wrong})", way_out)
            table = file.read(columns=schema.names).select(schema.names)
        table.validate(full=True)  # also that texts are UTF-8
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UnreadableError(path, f"is missing or damaged ({reason})", way_out) from error
    for field in schema:
        if not field.nullable and table[field.name].null_count:
            raise UnreadableError(path, f"has nulls in the column {field.name}", way_out)
    return table


def _differences(found: pa.Schema, expected: pa.Schema) -> Iterator[str]:
    for field in expected:
        places = found.get_all_field_indices(field.name)
        if len(places) != 1:
            yield f"{field.name} {'is missing' if not places else 'occurs twice'}"
        elif (kind := found.field(places[0]).type) != field.type:
            yield f"{field.name} is {kind} instead of {field.type}"
