"""Reads and writes the record of an unfinished job, and the marks of its captured shards.

The record is everything that finalizing the journals needs. It carries the identity of the job, `job_id`: a random
number, and a digest of settings, commits and versions. Each segment, each mark and the staged manifest carry it too.
Those with another identity are not the job's. When the job has made its dataset and has yet to publish it, a mark says
so.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from qk_sniffer.errors import StoreError
from qk_sniffer.logs import logger
from qk_sniffer.store import forms, stored
from qk_sniffer.store.disk import remove, write_atomic
from qk_sniffer.store.forms import Identity, Mark, Unpublished
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.stored import LARGE, UnreadableError

log = logger(__name__)

WAY_OUT = "replace the unfinished job with output.overwrite=true, or use the version of qk-sniffer that wrote it"


def new_job_id(record: Mapping[str, Any]) -> str:
    """Draws the identity of a job that starts with `record`."""
    return f"{secrets.token_hex(8)}-{_digest(record)}"


def stored_job_id(layout: Layout, access: Access) -> str:
    """Returns the identity of the job whose record is in `layout`.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no record.
        UnreadableError: it cannot be read.
    """
    return stored.read(layout.job_file, Identity, way_out=WAY_OUT, most_bytes=LARGE, access=access)["job_id"]


def read_record(layout: Layout, access: Access = PLAIN) -> dict[str, Any] | None:
    """Returns the record of the unfinished job in `layout`, which it wrote at its start; None without a job.

    Raises:
        UnreadableError: the record cannot be read, or is not one of this package.
    """
    try:
        record = forms.read_record(layout.job_file, way_out=WAY_OUT, access=access)
    except FileNotFoundError:
        return None
    if record.pop("sha256") != stored.digest(record):
        raise UnreadableError(layout.job_file, "has changed since it was written", WAY_OUT)
    if record["job_id"].partition("-")[2] != _digest(record):
        raise UnreadableError(
            layout.job_file, "contradicts itself (job_id is of other settings, commits or versions)", WAY_OUT
        )
    return record


def is_from_python(layout: Layout) -> bool:
    """Whether the unfinished job in `layout` is a capture from Python."""
    try:
        record = read_record(layout)
    except (OSError, StoreError):
        return False
    return record is not None and "source" in record


def write_record(layout: Layout, record: Mapping[str, Any], *, access: Access = PLAIN) -> None:
    """Writes the record of a job, with a digest of it. Hold the start lock.

    Raises:
        StoreError: no reader would accept it. A setting or a fact of the model is outside of its limits.
    """
    data = stored.encode({**record, "sha256": stored.digest(record)}, indent=2, sort_keys=True)
    try:
        forms.decode_record(data, layout.job_file, way_out="")
    except UnreadableError as error:
        raise StoreError(
            f"the job cannot be stored in {layout.job_file}: it {error.problem}. Change the setting that this names"
        ) from error
    if len(data) > LARGE:
        raise StoreError(f"the job cannot be stored in {layout.job_file}: it has {len(data):,} bytes, over {LARGE:,}")
    write_atomic(layout.job_file, data, access=access)


def write_unpublished(layout: Layout, manifest: Mapping[str, Any], *, access: Access = PLAIN) -> None:
    """Marks the dataset of `manifest` as one that its job has yet to publish.

    A job with `output.overwrite` that starts while the mark exists publishes the dataset, and does not replace it.
    """
    mark = Unpublished(manifest=_manifest_digest(manifest))
    write_atomic(layout.unpublished, stored.encode(mark), access=access)


def read_unpublished(layout: Layout, manifest: Mapping[str, Any]) -> Unpublished | None:
    """Returns the mark of the dataset of `manifest`; None if it has none.

    Raises:
        UnreadableError: the mark cannot be read.
    """
    try:
        mark = stored.read(layout.unpublished, Unpublished, way_out="remove it, or use output.overwrite=true")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return mark if mark["manifest"] == _manifest_digest(manifest) else None


def remove_unpublished(layout: Layout, access: Access = PLAIN) -> None:
    """Removes the mark of a dataset that is published, or that is to be replaced."""
    remove(layout.unpublished, access)
    with suppress(FileNotFoundError), access.open(layout.root) as root:
        root.rmdir(layout.work.name)  # it may contain locks


def read_mark(layout: Layout, shard_index: int, shard_count: int, job_id: str, access: Access = PLAIN) -> Mark | None:
    """Returns the mark of a captured shard of the job `job_id`; None if there is none of this job.

    Raises:
        UnreadableError: the mark cannot be read.
    """
    path = layout.shard_done(shard_index, shard_count)
    way_out = "remove it, or use output.overwrite=true; then rerun the shard's job"
    try:
        mark = stored.read(path, Mark, way_out=way_out, access=access)
    except FileNotFoundError:
        return None
    if mark["job"] != job_id:
        log.warning("%s is of another job and does not count", path)
        return None
    return mark


def write_mark(layout: Layout, shard_index: int, shard_count: int, mark: Mark, *, access: Access = PLAIN) -> None:
    """Marks a shard as captured, durably."""
    write_atomic(layout.shard_done(shard_index, shard_count), stored.encode(mark), access=access)


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return stored.digest({key: value for key, value in manifest.items() if key != "job_id"})


def _digest(record: Mapping[str, Any]) -> str:
    words = [record[key] for key in ("fingerprint", "commits", "versions")]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]
