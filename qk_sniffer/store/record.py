"""Reads and writes the record of an unfinished job: everything that finalizing its journals needs."""

from collections.abc import Mapping
from typing import Any

from qk_sniffer.store import forms
from qk_sniffer.store.disk import write_atomic
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.stored import encode

WAY_OUT = "replace the unfinished job with output.overwrite=true, or use the version of qk-sniffer that wrote it"


def read_record(layout: Layout) -> dict[str, Any] | None:
    """Returns the record of the unfinished job in `layout`, which it wrote at its start; None without a job.

    Raises:
        StoreError: the record cannot be read, or is not one of this package.
    """
    try:
        return forms.read_record(layout.job_file, way_out=WAY_OUT)
    except FileNotFoundError:
        return None


def write_record(layout: Layout, record: Mapping[str, Any]) -> None:
    """Writes the record of a job that starts. Hold the start lock."""
    write_atomic(layout.job_file, encode(record, indent=2, sort_keys=True))
