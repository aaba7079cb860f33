"""A job publishes as its latest start asks, and its dataset is captured once, however often the upload fails."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_hub import FakeHub
from support.hub_cases import REPO
from support.jobs import captured_only, run, stopped_after

from qk_sniffer.capture.capture import Capture
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import ConfigError, HubError, StoreError
from qk_sniffer.jobs import capture_examples as capture_module
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store import record as records
from qk_sniffer.store.layout import Layout

SECTIONS: dict[str, Any] = {
    "model": {"slug": "m"},
    "dataset": {"max_samples": 4},
    "capture": {"layers": [0], "heads": [0]},
    "inference": {"batch_size": 2, "lookahead": 4},
    "verify": {"examples": 0},
}
PUBLIC = {"hf_repo_id": REPO}
PRIVATE = PUBLIC | {"private": True}


@pytest.fixture
def logged_in(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    return endpoint


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches that are captured."""
    captured: list[Any] = []
    real = Capture.run

    def counted(self: Capture, plan: Any) -> None:
        captured.append(plan)
        real(self, plan)

    monkeypatch.setattr(Capture, "run", counted)
    return captured


@pytest.mark.few(3)
@pytest.mark.parametrize("captures", [0, 1, 2])
@pytest.mark.parametrize("second", [PRIVATE, {}], ids=["private", "local"])
def test_finalize_publishes_as_the_latest_start_asks(
    captures: int,
    second: dict[str, Any],
    hub: FakeHub,
    logged_in: str,
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`captures` batches are done at the first start: none, some or all."""
    root = tmp_path / "out"
    if captures < 2:
        stopped_after(captures, checkpoint, texts, root, **SECTIONS, output=PUBLIC)
    else:
        captured_only(checkpoint, texts, root, monkeypatch, **SECTIONS, output=PUBLIC)
    captured_only(checkpoint, texts, root, monkeypatch, **SECTIONS, output=second)
    assert finalize(root) == 0
    assert {name: repository.private for name, repository in hub.repositories.items()} == (
        {REPO: True} if second else {}
    )


def test_the_last_shard_publishes_privately_if_a_later_start_asked_for_it(
    hub: FakeHub, logged_in: str, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, real = tmp_path / "out", capture_module.capture_examples

    def meanwhile(*arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(capture_module, "capture_examples", real)
            run(checkpoint, texts, root, **SECTIONS, shard={"index": 1, "count": 2}, output=PRIVATE)
        real(*arguments)

    monkeypatch.setattr(capture_module, "capture_examples", meanwhile)
    run(checkpoint, texts, root, **SECTIONS, shard={"index": 0, "count": 2}, output=PUBLIC)
    assert hub.repositories[REPO].private


def test_finalize_keeps_a_dataset_private_whose_upload_has_failed(
    hub: FakeHub, logged_in: str, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    root = tmp_path / "out"
    hub.fault("POST", "/repos/create", status=403, times=1)
    with pytest.raises(HubError):
        run(checkpoint, texts, root, **SECTIONS, output=PRIVATE)
    assert finalize(root, hf_repo_id=REPO) == 0
    assert hub.repositories[REPO].private
    assert not Layout(root).work.exists()
    assert finalize(root, hf_repo_id="alice/other") == 0
    assert hub.repositories["alice/other"].private


LOCAL_PRIVATE = {"private": True}


def test_a_dataset_stays_private_until_a_start_allows_a_public_one(
    hub: FakeHub, logged_in: str, checkpoint: Path, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The start that asks for it names no repository."""
    caplog.set_level("INFO", "qk_sniffer")
    root = run(checkpoint, texts, tmp_path / "out", **SECTIONS, output=LOCAL_PRIVATE)
    assert verify(root).problems == 0 and not Layout(root).work.exists()
    assert finalize(root, hf_repo_id="alice/a") == 0
    more: Any = SECTIONS | {"dataset": {"max_samples": 6}}
    run(checkpoint, texts, root, **more, output={"hf_repo_id": "alice/b"})
    run(checkpoint, texts, root, **SECTIONS, output={"hf_repo_id": "alice/c", "overwrite": True})
    assert {name: repository.private for name, repository in hub.repositories.items()} == dict.fromkeys(
        ("alice/a", "alice/b", "alice/c"), True
    )
    assert "stays private, as an earlier start has asked" in caplog.text
    hub.create("alice/public")
    for publishes in (
        lambda: finalize(root, hf_repo_id="alice/public"),
        lambda: run(checkpoint, texts, root, **SECTIONS, output={"hf_repo_id": "alice/public"}),
    ):
        with pytest.raises(HubError, match=r"exists and is public.*run qk_sniffer\.finalize with private=false"):
            publishes()
    assert finalize(root, hf_repo_id="alice/public", private=False) == 0
    assert finalize(root, hf_repo_id="alice/d") == 0
    assert not hub.repositories["alice/d"].private


@pytest.mark.parametrize("captures", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_unfinished_job_stays_private(
    captures: int, hub: FakeHub, logged_in: str, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    root = tmp_path / "out"
    stopped_after(captures, checkpoint, texts, root, **SECTIONS, output=LOCAL_PRIVATE)
    stopped_after(0, checkpoint, texts, root, **SECTIONS, output=PUBLIC)
    run(checkpoint, texts, root, **SECTIONS)
    assert finalize(root, hf_repo_id=REPO) == 0
    assert hub.repositories[REPO].private


@pytest.mark.parametrize("finalizes", [True, False], ids=["finalize", "start"])
def test_a_start_makes_a_finished_dataset_private_and_finalize_makes_it_public(
    finalizes: bool, unpublished: Path, hub: FakeHub, logged_in: str, checkpoint: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(unpublished / "out", tmp_path / "out"))

    def start(*, private: bool, repository: str | None = None) -> None:
        if finalizes:
            finalize(root, hf_repo_id=repository, private=private or None)
        else:
            output: Any = {"private": private, "hf_repo_id": repository}
            run(checkpoint, unpublished / "texts.jsonl", root, **SECTIONS, output=output)

    start(private=True)
    start(private=False, repository="alice/a")
    assert finalize(root, private=False) == 0
    start(private=False, repository="alice/b")
    assert {name: repository.private for name, repository in hub.repositories.items()} == {
        "alice/a": True,
        "alice/b": False,
    }


def test_finalize_can_allow_a_public_repository_for_an_unfinished_job(
    hub: FakeHub, logged_in: str, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    captured_only(checkpoint, texts, root, monkeypatch, **SECTIONS, output=PRIVATE)
    assert finalize(root, private=False) == 0
    assert not hub.repositories[REPO].private


def test_a_dataset_whose_folder_was_emptied_by_hand_stays_private(
    hub: FakeHub, logged_in: str, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    """`rm -r out/*` leaves hidden files."""
    root = tmp_path / "out"
    root.mkdir()
    Layout(root).private.touch()
    run(checkpoint, texts, root, **SECTIONS, output=PUBLIC)
    assert hub.repositories[REPO].private


def test_overwriting_publishes_without_capturing_again(
    hub: FakeHub, logged_in: str, checkpoint: Path, texts: Path, tmp_path: Path, batches: list[Any]
) -> None:
    root, output = tmp_path / "out", PUBLIC | {"overwrite": True}
    hub.fault("POST", "/commit/", status=403, times=1)
    with pytest.raises(HubError, match="without capturing again"):
        run(checkpoint, texts, root, **SECTIONS, output=output)
    assert len(batches) == 4
    run(checkpoint, texts, root, **SECTIONS, output=output)
    assert len(batches) == 4 and REPO in hub.repositories
    assert not Layout(root).work.exists()
    run(checkpoint, texts, root, **SECTIONS, output=output)  # published: another start replaces it
    assert len(batches) == 8


@pytest.fixture(scope="module")
def unpublished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose publication has not ended, and its texts."""
    from support.jobs import write_texts

    folder = tmp_path_factory.mktemp("unpublished")
    root = run(checkpoint, write_texts(folder / "texts.jsonl"), folder / "out", **SECTIONS)
    Layout(root).work.mkdir()
    records.write_unpublished(Layout(root), manifests.read(root))
    return folder


def damage(root: Path) -> None:
    path = root / "l00h00q" / "data.parquet"
    path.write_bytes(bytes(path.stat().st_size))


def lose(root: Path) -> None:
    (root / "l00h00q" / "data.parquet").unlink()


def garble_the_mark(root: Path) -> None:
    Layout(root).unpublished.write_bytes(b"\xff{")


@pytest.mark.parametrize("make", [lose, garble_the_mark, pytest.param(damage, marks=pytest.mark.slow)])
def test_overwriting_gets_out_of_a_dataset_that_cannot_be_published(
    make: Callable[[Path], object],
    unpublished: Path,
    hub: FakeHub,
    logged_in: str,
    checkpoint: Path,
    tmp_path: Path,
    batches: list[Any],
) -> None:
    root = Path(shutil.copytree(unpublished / "out", tmp_path / "out"))
    make(root)
    run(checkpoint, unpublished / "texts.jsonl", root, **SECTIONS, output=PUBLIC | {"overwrite": True})
    assert len(batches) == 4
    assert REPO in hub.repositories


def test_a_start_that_does_not_publish_replaces_the_dataset(
    unpublished: Path, checkpoint: Path, tmp_path: Path, batches: list[Any]
) -> None:
    root = Path(shutil.copytree(unpublished / "out", tmp_path / "out"))
    run(checkpoint, unpublished / "texts.jsonl", root, **SECTIONS, output={"overwrite": True})
    assert len(batches) == 4
    assert not Layout(root).work.exists()


def test_a_dataset_that_its_branch_refuses_stays_private_and_is_not_captured_again(
    hub: FakeHub, logged_in: str, checkpoint: Path, texts: Path, tmp_path: Path, batches: list[Any]
) -> None:
    root = tmp_path / "other"
    run(checkpoint, texts, tmp_path / "first", **SECTIONS, output=PRIVATE)
    seed: Any = SECTIONS | {"sampler": {"seed": 9}}
    with pytest.raises(StoreError, match="has another dataset"):
        run(checkpoint, texts, root, **seed, output=PRIVATE)
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    assert finalize(copy, hf_repo_id="alice/other") == 0
    assert hub.repositories["alice/other"].private
    batches.clear()
    run(checkpoint, texts, root, **seed, output=PRIVATE | {"overwrite": True})
    assert batches == [] and not Layout(root).work.exists()


def test_a_damaged_dataset_stays_private(
    unpublished: Path, hub: FakeHub, logged_in: str, checkpoint: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(unpublished / "out", tmp_path / "out"))
    damage(root)
    with pytest.raises(StoreError, match="has changed since"):
        run(checkpoint, unpublished / "texts.jsonl", root, **SECTIONS, output=PRIVATE)
    shutil.copy(unpublished / "out/l00h00q/data.parquet", root / "l00h00q/data.parquet")
    assert finalize(root, hf_repo_id="alice/other") == 0
    assert hub.repositories["alice/other"].private


def test_texts_of_another_file_of_the_same_name_do_not_replace_a_dataset(
    hub: FakeHub, logged_in: str, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    other = tmp_path / "elsewhere" / texts.name
    other.parent.mkdir()
    other.write_text("".join(reversed(texts.read_text(encoding="utf-8").splitlines(keepends=True))))
    run(checkpoint, texts, tmp_path / "first", **SECTIONS, output=PUBLIC)
    (branch,) = (name for name in hub.repositories[REPO].branches if name != "main")
    head = hub.repositories[REPO].branches[branch]
    with pytest.raises(StoreError, match="the texts of a source with the same name"):
        run(checkpoint, other, tmp_path / "second", **SECTIONS, output=PUBLIC)
    assert hub.repositories[REPO].branches[branch] == head
    more: Any = SECTIONS | {"dataset": {"max_samples": 6}}
    run(checkpoint, texts, tmp_path / "third", **more, output=PUBLIC)
    assert hub.repositories[REPO].branches[branch] != head, "more of the same texts"


def test_a_dataset_of_fewer_texts_does_not_replace_its_own_later_version(
    hub: FakeHub, logged_in: str, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    """As of an older copy of the texts: a folder of a dataset that has grown refuses it too."""
    run(checkpoint, texts, tmp_path / "first", **SECTIONS, output=PUBLIC)
    before = {**hub.repositories[REPO].branches}
    fewer: Any = SECTIONS | {"dataset": {"max_samples": 2}}
    with pytest.raises(StoreError, match=r"more examples: 4, and there are 2 here"):
        run(checkpoint, texts, tmp_path / "second", **fewer, output=PUBLIC)
    assert hub.repositories[REPO].branches == before
    run(checkpoint, texts, tmp_path / "second", **fewer, output=PUBLIC | {"overwrite": True})
    assert hub.repositories[REPO].branches != before


def test_finalize_replaces_nothing_on_a_branch_that_no_start_has_named(
    hub: FakeHub, logged_in: str, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job was to replace the dataset in its folder."""
    run(checkpoint, texts, tmp_path / "first", **SECTIONS, output=PUBLIC)
    seed: Any = SECTIONS | {"sampler": {"seed": 9}}
    captured_only(checkpoint, texts, tmp_path / "other", monkeypatch, **seed, output={"overwrite": True})
    with pytest.raises(StoreError, match="has another dataset"):
        finalize(tmp_path / "other", hf_repo_id=REPO)


def test_finalize_does_not_replace_the_branch_of_a_job_for_another_that_is_named(
    hub: FakeHub, logged_in: str, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(checkpoint, texts, tmp_path / "first", **SECTIONS, output=PUBLIC)
    before = {**hub.repositories[REPO].branches}
    seed: Any = SECTIONS | {"sampler": {"seed": 9}}
    captured_only(checkpoint, texts, tmp_path / "other", monkeypatch, **seed, output=PUBLIC)
    with pytest.raises(ConfigError, match="hf_branch is 'mine', but hf_repo_id is not given"):
        finalize(tmp_path / "other", hf_branch="mine")
    assert hub.repositories[REPO].branches == before


@pytest.mark.slow
def test_the_dataset_of_other_settings_on_a_branch_is_replaced_only_by_its_name(
    hub: FakeHub, logged_in: str, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    run(checkpoint, texts, first, **SECTIONS, output=PUBLIC)
    (branch,) = (name for name in hub.repositories[REPO].branches if name != "main")
    history = [commit.id for commit in hub.repositories[REPO].history(branch)]
    seed: Any = SECTIONS | {"sampler": {**SECTIONS.get("sampler", {}), "seed": 9}}
    with pytest.raises(StoreError, match=r"has another dataset, which this one would replace"):
        run(checkpoint, texts, other, **seed, output=PUBLIC)
    with pytest.raises(StoreError, match=r"sampler\.seed"):
        finalize(other, hf_repo_id=REPO)
    assert [commit.id for commit in hub.repositories[REPO].history(branch)] == history
    assert finalize(other, hf_repo_id=REPO, hf_branch=branch) == 0
    assert len(hub.repositories[REPO].history(branch)) == len(history) + 1
    with pytest.raises(StoreError, match="has another dataset"):
        run(checkpoint, texts, first, **SECTIONS, output=PUBLIC)
    run(checkpoint, texts, first, **SECTIONS, output=PUBLIC | {"overwrite": True})
    assert len(hub.repositories[REPO].history(branch)) == len(history) + 2
