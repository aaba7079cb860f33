"""Going on from what a branch of the Hub holds (`output.resume_from_hub`): what a job finds there when it starts.

The manifest and the list of examples are fetched from there, the heads only when rows are added to them. The data root
notes at which commit of the branch it stands, in `.sniff_snapshot.json`; huggingface_hub keeps what was fetched of it.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

from qk_sniffer.config import Config
from qk_sniffer.hub.branch import Branch, find
from qk_sniffer.job import Job, fingerprint
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.disk import explained, write_atomic
from qk_sniffer.store.layout import MANIFEST, Layout

log = logging.getLogger(__name__)


def branch_ahead(config: Config, layout: Layout, here: Mapping[str, Any] | None) -> Branch | None:
    """The branch that the job publishes to, where its dataset has more rows of the source than `here`.

    `here` is the manifest of a finished dataset in the data root, if there is one.

    Raises:
        HubError: the Hub cannot be asked.
        StoreError: the branch holds a dataset of another configuration.
    """
    output = config.output
    assert output.hf_repo_id is not None and output.hf_branch is not None
    branch = find(output.hf_repo_id, output.hf_branch)
    if branch is not None and here is not None and stands_at(layout, branch):
        return None
    if branch is None or not branch.has(MANIFEST):
        log.info("there is no dataset on the branch %s of %s yet", output.hf_branch, output.hf_repo_id)
        return None
    there = manifests.read(branch.path(MANIFEST).parent)
    earlier = Job.from_record(there)
    Job(fingerprint(config), earlier.commits, earlier.versions).check_continues(earlier, str(branch), finished=True)
    return branch if here is None or there["source_rows"] > here["source_rows"] else None


def stands_at(layout: Layout, branch: Branch) -> bool:
    """Whether the data root was last seen to be what this branch is."""
    return _read(layout) == _note(branch)


def note(layout: Layout, branch: Branch) -> None:
    """Notes that the data root is what this branch is.

    Raises:
        StoreError: the data root cannot be written.
    """
    if not stands_at(layout, branch):
        with explained(layout.snapshot, "write"):
            write_atomic(layout.snapshot, json.dumps(_note(branch), indent=2).encode())


def _note(branch: Branch) -> dict[str, str]:
    return {"repo_id": branch.repo_id, "branch": branch.name, "commit": branch.commit}


def _read(layout: Layout) -> dict[str, str] | None:
    try:
        stored: dict[str, str] = json.loads(layout.snapshot.read_bytes())
    except (OSError, ValueError):
        return None
    return stored
