"""Damages datasets for the tests of verify, and reads its reports."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qk_sniffer.dataset import verify as verify_module
from qk_sniffer.dataset import verify_rows
from qk_sniffer.dataset.verify import verify

HEAD = "l00h01q"
FILE = f"{HEAD}/data.parquet"
LAYER_0_QUERIES = [f"l00h{head:02d}q" for head in range(4)]
QUERY_1 = "query head 1 of layer 0"


def verified(root: Path) -> str:
    """Returns the report, and checks that it does not depend on the sizes of batches."""
    report = verify(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_rows, "BLOCK_TOKENS", 300)
        patch.setattr(verify_rows, "BATCH_ROWS", 60)
        patch.setattr(verify_rows, "BATCH_BYTES", 5000)
        patch.setattr(verify_module, "HEADS_PER_TASK", 3)
        assert str(verify(root)) == str(report)
    text = str(report)
    assert text.endswith(f"NOT WHOLE: {report.problems} problem{'s'[: report.problems != 1]}") == bool(report.problems)
    return text


def wrong(report: str) -> dict[str, str]:
    """Returns the text of the problems by check, without line breaks."""
    found: dict[str, str] = {}
    blocks = re.findall(r"^  (\w+) +WRONG  (.*(?:\n {25}.*)*)", report, flags=re.MULTILINE)
    for check, text in blocks:
        assert "way out: " in text
        found[check] = found.get(check, "") + re.sub(r"\s+", " ", text)
    return found


def rewrite(root: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes the table of a Parquet file, and updates the manifest."""
    path = root / name
    table = change(pq.read_table(path))
    pq.write_table(table, path)
    restate(root)


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest."""
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def restate(root: Path) -> None:
    """Updates the files and rows in the manifest to the files in the folder."""

    def change(manifest: dict[str, Any]) -> None:
        buckets: dict[str, Counter[str]] = {"q": Counter(), "k": Counter()}
        for name, entry in manifest["files"].items():
            data = (root / name).read_bytes()
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            if name.endswith(".parquet") and data.startswith(b"PAR1"):
                entry["rows"] = pq.read_metadata(root / name).num_rows
            if name[6:7] in buckets and data.startswith(b"PAR1"):
                column = pq.read_table(root / name)
                if "bucket" in column.column_names:
                    buckets[name[6]].update(map(str, column["bucket"].to_pylist()))
        manifest["rows_by_bucket"] = buckets
        manifest["rows"] = sum(counter.total() for counter in buckets.values())

    edit(root, change)


def with_values(table: pa.Table, column: str, values: dict[int, Any]) -> pa.Table:
    """Returns `table` with other values of `column` in some rows."""
    place = table.schema.get_field_index(column)
    changed = table[column].to_pylist()
    for row, value in values.items():
        changed[row] = value
    return table.set_column(place, table.schema.field(column), pa.array(changed, table.schema.field(column).type))


def value(table: pa.Table, column: str, row: int) -> Any:
    return table[column][row].as_py()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
