"""Continues the dataset on a branch of the Hub (`output.resume_from_hub`), and never replaces a newer one.

When a job starts, it fetches the branch's manifest and list of examples. It fetches the heads only to add rows to them.
`.sniff_snapshot.json` in the data root holds the commit of the branch and the manifest that the data root corresponds
to. Before it publishes, the job checks again what the branch holds.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

from qk_sniffer.errors import StoreError
from qk_sniffer.hub.branch import Branch, find
from qk_sniffer.jobs.identity import Job, refuse_from_python
from qk_sniffer.logs import logger
from qk_sniffer.resolved import ResolvedConfig, fingerprint
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store import previous, stored
from qk_sniffer.store.disk import explained, sha256_of, write_atomic
from qk_sniffer.store.form_types import Commit, Sha256
from qk_sniffer.store.layout import EXAMPLES, MANIFEST, Layout
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.parquet_tables import read_examples
from qk_sniffer.store.stored import Text, UnreadableError

log = logger(__name__)


def branch_ahead(config: ResolvedConfig, layout: Layout, here: Mapping[str, Any] | None) -> Branch | None:
    """The branch that the job publishes to, if its dataset has more source rows than `here`; else None.

    `here` is the manifest of the finished dataset in the data root; None if there is none.

    Raises:
        HubError: the Hub cannot be reached.
        StoreError: the branch holds a dataset of another configuration or of other texts, or a capture from Python.
    """
    output = config.output
    assert output.hf_repo_id is not None and output.hf_branch is not None
    branch = find(output.hf_repo_id, output.hf_branch)
    if branch is not None and here is not None and matches_snapshot(layout, branch):
        return None
    if branch is None or not branch.has(MANIFEST):
        log.info("there is no dataset on the branch %s of %s yet", output.hf_branch, output.hf_repo_id)
        return None
    there = manifests.of(branch)
    refuse_from_python(there, str(branch))
    earlier = Job.from_record(there)
    mine = Job(fingerprint(config), earlier.commits, earlier.versions) if here is None else Job.from_record(here)
    mine.check_continues(earlier, str(branch), finished=True)
    if here is None:
        return branch
    if there["source_rows"] <= here["source_rows"]:
        return None
    if not _are_versions(layout, here, branch, there):
        raise StoreError(
            f"{branch} has more examples than {layout.root}, and was made from other texts: give this job another "
            "folder (output.data_root=...) or another output.hf_branch, or replace both datasets with "
            "output.overwrite=true"
        )
    return branch


def guard(layout: Layout, here: Mapping[str, Any], branch: Branch) -> None:
    """Refuses to replace the dataset of the branch unless the data root, with the manifest `here`, continues it.

    Raises:
        HubError: the Hub cannot be reached.
        StoreError: the branch has a dataset of another configuration, of other texts, or of more texts; or a capture
            from Python.
    """
    if not branch.has(MANIFEST):
        return
    there = manifests.of(branch)
    refuse_from_python(there, str(branch))
    Job.from_record(here).check_continues(Job.from_record(there), str(branch), finished=True)
    if there["source_rows"] > here["source_rows"]:
        raise StoreError(
            f"not published: {branch} has {there['source_rows']} examples by now, and {layout.root} has "
            f"{here['source_rows']}. Raise dataset.max_samples and rerun the command, which continues the branch; or "
            "publish to another output.hf_branch"
        )
    if not _are_versions(layout, here, branch, there):
        raise StoreError(
            f"not published: {branch} was made from other texts than {layout.root}. Publish to another "
            "output.hf_branch, or replace its dataset with output.overwrite=true"
        )


def refuse_other(layout: Layout, here: Mapping[str, Any], branch: Branch) -> None:
    """Refuses to replace the dataset of the branch if its settings, model or texts are others, or if it has more texts.

    The name of a branch follows from few settings, and in a received manifest its author chooses them. Of a local
    source, settings and commits name only the last part of a path: its texts are compared, as far as both have them.

    Raises:
        HubError: the Hub cannot be reached.
        StoreError: the branch has another dataset, or one of the two is a capture from Python.
    """
    if not branch.has(MANIFEST):
        return
    there = manifests.of(branch)
    different = Job.from_record(here).differences(Job.from_record(there), finished=True)
    if "source" in here or "source" in there:
        different.append("a capture from Python, which nothing but its own calls repeats")
    if there["source_rows"] > here["source_rows"]:
        more, fewer = f"{there['source_rows']:,}", f"{here['source_rows']:,}"
        different.append(f"more examples: {more}, and there are {fewer} here. A dataset grows, and does not shrink")
    if not different and here["commits"]["dataset"] is None and not _are_versions(layout, here, branch, there):
        different.append("the texts of a source with the same name, or their tokens")
    if different:
        raise StoreError(
            f"not published: {branch} has another dataset, which this one would replace:",
            *(f"  - {line}" for line in different),
            "Publish to another branch (output.hf_branch=..., of finalize hf_branch=...), or replace the branch's "
            "dataset: name its branch to finalize (hf_branch=...), or give the job output.overwrite=true.",
        )


def _are_versions(layout: Layout, here: Mapping[str, Any], branch: Branch, there: Mapping[str, Any]) -> bool:
    """Whether the datasets `here`, in the data root, and `there`, on the branch, are versions of one, of the same texts

    Raises:
        HubError: the list of the branch's examples cannot be fetched.
        StoreError: one of the lists is missing or damaged.
    """
    way_out = "publish to another output.hf_branch, or replace the branch's dataset with output.overwrite=true"
    if (entry := there["files"].get(EXAMPLES)) is None:
        raise UnreadableError(EXAMPLES, f"of {branch} is not listed in manifest.json", way_out)
    theirs = read_examples(branch.path(EXAMPLES, entry["bytes"]), there, way_out=way_out)
    ours = read_examples(layout.examples, here, way_out=previous.WAY_OUT)
    fewer, more = (theirs, ours) if there["source_rows"] <= here["source_rows"] else (ours, theirs)
    return bool(more.slice(0, len(fewer)).equals(fewer))


def matches_snapshot(layout: Layout, branch: Branch) -> bool:
    """Whether the data root and the branch are still those of the snapshot."""
    return _read(layout) == _snapshot_of(layout, branch)


def write_snapshot(layout: Layout, branch: Branch, access: Access = PLAIN) -> None:
    """Records that the data root and the branch hold the same dataset. `access` is the way to the data root.

    Raises:
        StoreError: the data root cannot be written.
    """
    if not matches_snapshot(layout, branch):
        with explained(layout.snapshot, "write"):
            write_atomic(layout.snapshot, stored.encode(_snapshot_of(layout, branch), indent=2), access=access)


class _Snapshot(TypedDict):
    repo_id: Text
    branch: Text
    commit: Commit
    manifest_sha256: Sha256 | None


def _snapshot_of(layout: Layout, branch: Branch) -> _Snapshot:
    manifest = layout.manifest
    digest = sha256_of(manifest) if manifest.exists() else None
    return _Snapshot(repo_id=branch.repo_id, branch=branch.name, commit=branch.commit, manifest_sha256=digest)


def _read(layout: Layout) -> _Snapshot | None:
    """Returns the snapshot; None if there is none. One that cannot be read tells nothing, and is written again."""
    try:
        return stored.read(layout.snapshot, _Snapshot, way_out="remove it")
    except FileNotFoundError:
        return None
    except StoreError as error:
        log.warning("%s; its content is not used", error)
        return None
