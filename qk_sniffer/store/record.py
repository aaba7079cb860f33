"""Reads and writes the record of an unfinished job: everything that finalizing its journals needs."""

import json
from collections.abc import Mapping
from typing import Any

from qk_sniffer.store.disk import write_atomic
from qk_sniffer.store.layout import Layout


def read_record(layout: Layout) -> dict[str, Any] | None:
    """Returns the record of the unfinished job in `layout`, which it wrote at its start; None without a job."""
    try:
        record: dict[str, Any] = json.loads(layout.job_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return record


def write_record(layout: Layout, record: Mapping[str, Any]) -> None:
    """Writes the record of a job that starts. Hold the start lock."""
    write_atomic(layout.job_file, json.dumps(record, indent=2, sort_keys=True).encode())
