"""Tests that no answer of a Hub has huggingface_hub store a file outside of its cache."""

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import file_download
from support.fake_hub import FakeHub, Repository

from qk_sniffer.errors import HubError, QkSnifferError
from qk_sniffer.hub.branch import Branch, open_branch
from qk_sniffer.hub.catalogue import update_catalogue
from qk_sniffer.hub.client import reading_api, writing_api
from qk_sniffer.hub.revisions import HubUnreachableError, hub_commit, hub_file

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("waits")]

NAME = "alice/some"
COMMIT = "a" * 40


@pytest.fixture
def repository(endpoint: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository on the Hub of this process."""
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    hub.commit(NAME, {"manifest.json": b"{}", "config.json": b"{}"})
    return hub.repositories[NAME]


def written(folder: Path) -> list[str]:
    """Returns the files outside of the cache in `folder`."""
    return [str(path) for path in folder.rglob("*") if not path.is_relative_to(folder / "hub")]


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"../../../out"', "X_Repo_Commit": COMMIT},
        {"ETag": '"{}/out"', "X_Repo_Commit": COMMIT},
        {"ETag": 'W/".."', "X_Repo_Commit": COMMIT},
        {"ETag": '"abc"', "X_Linked_Etag": "../../../out", "X_Repo_Commit": COMMIT},
        {"ETag": '"abc"', "X_Repo_Commit": "../../../../out"},
        {"ETag": '"abc"', "X_Repo_Commit": "{}/out"},
    ],
)
def test_the_names_in_an_answer_lead_to_no_file_outside_of_the_cache(
    headers: dict[str, str], status: int, repository: Repository, hub: FakeHub, tmp_path: Path
) -> None:
    sent = {name: value.format(tmp_path) for name, value in headers.items()}
    if status == 404:
        sent["X_Error_Code"] = "EntryNotFound"
    hub.fault("HEAD", "/resolve/", status=status, times=9, **sent)
    with pytest.raises(HubError, match=r"the Hub answers with|has no dataset of qk-sniffer"):
        open_branch(NAME, None)
    assert written(tmp_path) == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda: hub_commit("dataset", NAME),
        lambda: hub_file(NAME, "config.json"),
        lambda: update_catalogue(writing_api(), NAME),
    ],
    ids=["hub_commit", "hub_file", "catalogue"],
)
def test_a_commit_of_another_form_names_no_folder(
    ask: Callable[[], object], repository: Repository, tmp_path: Path
) -> None:
    (head,) = repository.branches.values()
    odd = "../../../../out"
    repository.commits[odd] = type(repository.commits[head])(odd, None, "", repository.commits[head].files)
    repository.branches["main"] = odd
    with pytest.raises(QkSnifferError, match=r"named no commit|is not a revision|in the place of a commit"):
        ask()
    assert written(tmp_path) == []


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_no_library_makes_a_path_of_the_commit_of_a_repository(
    kind: str, repository: Repository, tmp_path: Path
) -> None:
    (head,) = repository.branches.values()
    odd = "../../../out"
    repository.commits[odd] = type(repository.commits[head])(odd, None, "", repository.commits[head].files)
    repository.branches["main"] = odd
    with pytest.raises(HubError, match=r"answers with '\.\./\.\./\.\./out' in the place of a commit"):
        reading_api().snapshot_download(NAME, repo_type=kind)
    assert written(tmp_path) == []


def test_a_commit_that_is_no_text_is_refused(repository: Repository) -> None:
    api = reading_api()
    with pytest.raises(HubError, match="answers with '7' in the place of a commit"):
        huggingface_hub.hf_api.DatasetInfo(id=NAME, sha=7)
    assert api.dataset_info(NAME).sha == repository.branches["main"]


def test_usual_answers_are_taken(repository: Repository, tmp_path: Path) -> None:
    path = reading_api().hf_hub_download(NAME, "manifest.json", repo_type="dataset")
    assert Path(path).read_bytes() == b"{}" and Path(path).is_relative_to(huggingface_hub.constants.HF_HUB_CACHE)


@pytest.mark.skipif(not hasattr(file_download, "read_tree_cache"), reason="this version keeps no listings")
def test_a_listing_in_the_cache_names_no_file_outside_of_it(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    commit = repository.branches["main"]
    listing = tmp_path / "hub" / "datasets--alice--some" / "trees" / f"{commit}.json"
    listing.parent.mkdir(parents=True)
    entry = {"size": 2, "blob_id": "b", "lfs_sha256": "../../../out", "lfs_size": 2, "xet_hash": "c" * 64}
    listing.write_text(json.dumps({"format_version": 1, "files": {"manifest.json": entry}}))
    with pytest.raises(HubError, match=r"the ETag '../../../out'"):
        Branch(NAME, "main", commit).path("manifest.json")
    assert written(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "message"), [(401, "the Hub refuses the token: set HF_TOKEN"), (418, "cannot be reached: .*418")]
)
def test_a_refused_token_is_not_a_hub_out_of_reach(
    status: int, message: str, repository: Repository, hub: FakeHub
) -> None:
    hub.fault("GET", "/api/models/", status=status, times=9)
    with pytest.raises(HubUnreachableError, match=message):
        hub_commit("model", NAME)
