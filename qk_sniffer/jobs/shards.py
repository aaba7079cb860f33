"""Finds the work of the shards of an unfinished job: their journals, and the shards that are not captured yet."""

from collections.abc import Mapping
from typing import Any

from qk_sniffer.store.journal import Journal
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.record import read_mark


def journals_of(layout: Layout, record: Mapping[str, Any], access: Access = PLAIN) -> list[Journal]:
    """Returns the journals of all shards of the job of `record`, in their order. Their checksums are not compared."""
    count, job_id = record["config"]["shard"]["count"], record["job_id"]
    return [Journal(layout.journal(index, count), job_id, verify=False, access=access) for index in range(count)]


def uncaptured(layout: Layout, record: Mapping[str, Any], access: Access = PLAIN) -> list[int]:
    """Returns the shards of the job of `record` that are not marked as captured.

    Raises:
        UnreadableError: a mark cannot be read.
    """
    count, job_id = record["config"]["shard"]["count"], record["job_id"]
    return [index for index in range(count) if read_mark(layout, index, count, job_id, access) is None]
