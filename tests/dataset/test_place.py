"""A name that has the form of a folder and of a repository: what it means, and what is said of a missing folder."""

import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from support.fake_hub import FakeHub
from support.hub_cases import BRANCH, REPO, MakeDataset, publish

import qk_sniffer
from qk_sniffer.errors import HubError, StoreError
from qk_sniffer.jobs.finalize import finalize

pytestmark = pytest.mark.usefixtures("endpoint", "in_tmp")


@pytest.mark.parametrize("name", ["outputs/nope", "results/nope", "nope", "./nope", "a/b/nope", "/nope", "~/nope"])
def test_a_missing_folder_is_not_asked_of_the_hub(name: str, hub: FakeHub) -> None:
    Path("results").mkdir()
    with pytest.raises(StoreError) as raised:
        qk_sniffer.open_dataset(name)
    assert str(raised.value).startswith(f"there is no dataset at {Path(name).expanduser()}: no such folder")
    assert not hub.log


def test_the_datasets_nearby_are_named(make_dataset: MakeDataset) -> None:
    make_dataset(Path("outputs/some-model-texts"))
    make_dataset(Path("outputs/another"))
    Path("outputs/.runs").mkdir()
    for name, guess in (
        ("outputs/some-model-text", ", did you mean outputs/some-model-texts?"),
        ("outputs/none/deeper/still", ""),
        ("none", ""),
    ):
        start = f"there is no dataset at {name}: no such folder{guess}\n  datasets in "
        with pytest.raises(StoreError, match=re.escape(start)) as raised:
            qk_sniffer.open_dataset(name)
        assert "outputs/another, outputs/some-model-texts" in str(raised.value)
        hint = f"\n  for the repository {name} of the Hub, name a branch with revision=..."
        assert str(raised.value).endswith(hint) == (name.count("/") < 2)


def test_a_folder_of_datasets_names_them(make_dataset: MakeDataset) -> None:
    make_dataset(Path("outputs/some-model-texts"))
    for name in ("outputs", "."):
        with pytest.raises(
            StoreError, match=f"^{re.escape(name)} is not a dataset, but holds some: outputs/some-model-t"
        ):
            qk_sniffer.open_dataset(name)
        with pytest.raises(StoreError, match="is not a dataset, but holds some: outputs/some-model-t"):
            finalize(Path(name))
    Path("empty").mkdir()
    with pytest.raises(StoreError, match="the dataset at empty is incomplete"):
        qk_sniffer.open_dataset("empty")


def test_a_revision_names_a_repository(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_dataset(tmp_path / "made")
    publish(root, REPO, BRANCH, api=api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    owner = Path(REPO.partition("/")[0])
    with pytest.raises(HubError, match=f"it has: {BRANCH}"):
        qk_sniffer.open_dataset(REPO)
    owner.mkdir()
    with pytest.raises(StoreError, match="no such folder"):
        qk_sniffer.open_dataset(REPO)
    assert qk_sniffer.open_dataset(REPO, revision=BRANCH).commit is not None
    root.rename(REPO)
    assert qk_sniffer.open_dataset(REPO).commit is None
    with pytest.raises(StoreError, match=f"{REPO} is a folder: it has no revision {BRANCH!r}; leave it out"):
        qk_sniffer.open_dataset(REPO, revision=BRANCH)


def test_a_file_is_not_a_folder() -> None:
    Path("file").touch()
    with pytest.raises(StoreError, match="there is no dataset at file"):
        qk_sniffer.open_dataset("file")
