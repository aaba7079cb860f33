"""Finds the work of the shards of an unfinished job: their journals, and the shards that are not captured yet."""

from collections.abc import Mapping
from typing import Any

from qk_sniffer.store.journal import Journal
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.record import read_mark


def journals_of(layout: Layout, record: Mapping[str, Any]) -> list[Journal]:
    """Returns the journals of all shards of the job of `record`, in their order. Their checksums are not compared."""
    count = record["config"]["shard"]["count"]
    return [Journal(layout.journal(index, count), record["job_id"], verify=False) for index in range(count)]


def uncaptured(layout: Layout, record: Mapping[str, Any]) -> list[int]:
    """Returns the shards of the job of `record` that are not marked as captured.

    Raises:
        UnreadableError: a mark cannot be read.
    """
    count = record["config"]["shard"]["count"]
    return [index for index in range(count) if read_mark(layout, index, count, record["job_id"]) is None]
