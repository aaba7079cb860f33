"""Maintains the list of a repository's branches in README.md on main, at every publication.

The list follows from the branches alone. It has a row for each branch with a dataset, made from the manifest. A writer
lists the branches of all jobs, so that jobs that end together need few commits, and the next job writes the row that a
killed job could not write. A row stays as it is while its branch stays at the commit that the row names. The text
around the list, which people may have edited, is not changed.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from qk_sniffer.config import from_dict
from qk_sniffer.errors import HubError
from qk_sniffer.hub.branch import branch_url, download
from qk_sniffer.hub.client import REPO_TYPE, with_retries
from qk_sniffer.hub.endpoint import public
from qk_sniffer.hub.revisions import hub_commit_of, is_hub_id
from qk_sniffer.logs import logger
from qk_sniffer.markdown import block, code, in_url, link, plain, table_row
from qk_sniffer.resolved import rule
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.disk import open_file
from qk_sniffer.store.forms import decode_manifest
from qk_sniffer.store.layout import CARD, FORMAT, KINDS, MANIFEST
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.text import python_literal

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logger(__name__)

_BEGIN = "<!-- qk-sniffer: the list of branches, written anew at every publication -->"
_END = "<!-- qk-sniffer: end of the list -->"
"""Markers around the list. Published pages have them, so their wording cannot change."""

_COLUMNS = ("branch", "model", "texts", "split", "sampler", "heads", "rows", "size", "date")

_NEW_PAGE = """\
---
pretty_name: Vectors of attention heads
license: other
license_name: terms-of-the-models-and-the-texts
tags:
- qk-sniffer
- attention
- interpretability
viewer: false
---

# Vectors of attention heads

Vectors of transformer attention heads at sampled token positions, captured with qk-sniffer in the models' own forward
passes: queries (Q), keys (K), values (V) and outputs (O). Some datasets also have summaries of where the queries
attend, and statistics of all tokens. Each branch is a separate dataset, of one model over one set of texts, with a card
that describes it. The branch `main` has only this list.

{list}
"""

_LOADING = (
    """\
from datasets import load_dataset

rows = load_dataset({repo}, {head}, revision={branch}, split="train")
""",
    """\
import qk_sniffer

dataset = qk_sniffer.open_dataset({repo}, revision={branch})
vectors, positions, example_ids = dataset.vectors(*dataset.heads[0])
""",
)
"""Blocks of Python."""


def update_catalogue(api: "HfApi", repo_id: str) -> None:
    """Updates the list on main of a dataset repository in a separate commit, if it is out of date.

    Raises:
        HubError: the list could not be written. The published datasets are on their branches all the same.
    """
    with_retries(lambda: _update(api, repo_id), api, partial(_failed, repo_id))


def _failed(repo_id: str, reason: str) -> HubError:
    return HubError(
        f"the dataset is on its branch of {repo_id}, but the list of branches on main could not be updated: "
        f"{reason}. Rerun the command of its job to update it"
    )


def _update(api: "HfApi", repo_id: str) -> None:
    from huggingface_hub import CommitOperationAdd

    # Read before the branches: if another job updates the list after this line, the commit below is a conflict.
    head = api.repo_info(repo_id, repo_type=REPO_TYPE, revision="main").sha
    if head is None:
        raise ValueError("the Hub names no commit of main")
    branches = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id, repo_type=REPO_TYPE).branches}
    branches.pop("main", None)
    try:
        page = _text(api, repo_id, CARD, head)
    except HubError as error:  # it is too large
        raise _failed(repo_id, str(error)) from error
    listed = {name: _row(api, repo_id, name, commit, page or "") for name, commit in sorted(branches.items())}
    rows = {name: row for name, row in listed.items() if row is not None}
    new = _with_list(page, _list(api, repo_id, rows, branches))
    if new == page:
        return
    log.info("updating the list of branches on main of %s", repo_id)
    api.create_commit(
        repo_id,
        [CommitOperationAdd(CARD, new.encode())],
        commit_message="Update the list of branches",
        repo_type=REPO_TYPE,
        revision="main",
        parent_commit=head,
    )


def _list(api: "HfApi", repo_id: str, rows: dict[str, str], branches: dict[str, str]) -> str:
    lines = [_BEGIN, "", table_row(_COLUMNS), table_row(["---"] * len(_COLUMNS)), *rows.values()]
    for branch in rows:
        # The row may be one that a person wrote, or of a manifest that cannot be read any more.
        if (manifest := _manifest(api, repo_id, branch, branches[branch])) is None:
            continue
        quoted = {"repo": repo_id, "head": manifests.heads(manifest)[0].name, "branch": branch}
        literals = {key: python_literal(value) for key, value in quoted.items()}
        lines += ["", "\n".join(block("python", text.format(**literals)) for text in _LOADING).rstrip()]
        break
    return "\n".join([*lines, "", _END])


def _with_list(page: str | None, text: str) -> str:
    if page is None:
        return _NEW_PAGE.format(list=text)
    first = page.find(_BEGIN)
    end = -1 if first < 0 else page.find(_END, first)
    if end >= 0:
        begin = page.rfind(_BEGIN, 0, end)  # the last one: people may have copied the marker to their text before it
        return page[:begin] + text + page[end + len(_END) :]
    whole = page.replace(_BEGIN, "").rstrip()  # without an end, the list looks like the text around it
    return f"{whole}\n\n{text}\n"


def _row(api: "HfApi", repo_id: str, branch: str, commit: str, page: str) -> str | None:
    """Returns the row of a branch; None if it has no dataset of this package."""
    endpoint = public(api.endpoint)
    name = link(code(branch), branch_url(endpoint, repo_id, branch))
    date_url = f"{endpoint}/datasets/{repo_id}/commit/{commit}"
    for line in page.splitlines():
        if line.startswith(table_row([name])) and line.endswith(f"({date_url}) |"):
            return line
    manifest = _manifest(api, repo_id, branch, commit)
    if manifest is None:
        return None
    facts = _facts(endpoint, manifest)
    date = api.list_repo_commits(repo_id, repo_type=REPO_TYPE, revision=commit)[0].created_at
    return table_row([name, *facts, link(f"{date:%Y-%m-%d}", date_url)])


def _facts(endpoint: str, manifest: dict[str, Any]) -> list[str]:
    config, commits = from_dict(manifest["config"]), manifest["commits"]
    name = config.model.name or f"an unnamed {config.model.slug} model"
    model = _source(endpoint, name, hub_commit_of(commits["model"]))
    if config.model.adapter is not None:
        model += f" + {_source(endpoint, config.model.adapter, hub_commit_of(commits.get('adapter')))}"
    texts = _source(f"{endpoint}/datasets", config.dataset.path, commits["dataset"])
    if "source" in manifest:
        texts = "forward passes in Python"
    if config.dataset.name is not None:
        texts += f" ({plain(config.dataset.name)})"
    kinds = [key.kind for key in manifests.heads(manifest)]
    heads = [f"{kinds.count(kind):,} {kind.upper()}" for kind in KINDS if kind in kinds]
    heads += ["attention"] if config.capture.attention.enabled else []
    heads += ["statistics"] if config.capture.statistics.enabled else []
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    return [
        model,
        texts,
        "" if "source" in manifest else plain(config.dataset.split),
        rule(config.sampler),
        " + ".join(heads),
        f"{manifest['rows']:,}",
        f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB",
    ]


def _source(pages: str, name: str | None, commit: str | None) -> str:
    """Returns the name of a model or of texts, with a link if it is on the Hub."""
    if name is None or commit is None or not is_hub_id(name):
        return plain(name)
    return link(plain(name), f"{pages}/{name}/tree/{in_url(commit)}")


def _manifest(api: "HfApi", repo_id: str, branch: str, commit: str) -> dict[str, Any] | None:
    """Returns the manifest of a branch; None if it has none of this package, or one that cannot be read."""
    try:
        content = _content(api, repo_id, MANIFEST, commit)
    except HubError as error:
        log.warning("branch %s of %s is not listed: %s", branch, repo_id, error)
        return None
    if content is None:
        return None
    if f'"{FORMAT}"'.encode() not in content:
        return None
    try:
        return decode_manifest(content, MANIFEST, way_out="publish that dataset again")
    except UnreadableError as error:  # must not prevent the rows of other branches
        log.warning("branch %s of %s is not listed: its manifest is damaged (%s)", branch, repo_id, error)
        return None


def _text(api: "HfApi", repo_id: str, name: str, commit: str) -> str | None:
    """Returns the text of a file at a commit; None if the file or the commit does not exist."""
    if (content := _content(api, repo_id, name, commit)) is None:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:  # text of a person in another encoding; a card must be UTF-8
        return content.decode("latin-1")


def _content(api: "HfApi", repo_id: str, name: str, commit: str) -> bytes | None:
    from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

    try:
        path = download(api, repo_id, name, commit)
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return None
    with open_file(path.resolve()) as file:
        return file.read()
