"""Tests `qk_sniffer.open_dataset` on folders and on branches of the Hub."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from support.fake_hub import FakeHub
from support.hub_cases import BRANCH, REPO, MakeDataset, client, publish
from support.jobs import vectors
from support.verify_cases import edit, restate

import qk_sniffer
from qk_sniffer.dataset.heads import captured_heads, key_head
from qk_sniffer.errors import HubError, StoreError
from qk_sniffer.hub import branch
from qk_sniffer.store import manifest as manifests

pytestmark = pytest.mark.floor


def assert_same(dataset: qk_sniffer.Dataset, root: Path) -> None:
    """Asserts that the dataset equals the files in the folder."""
    assert [key.name for key in dataset.heads] == ["l00h00q", "l00h03q", "l00h00k", "l00h01k"]
    for layer, head, kind in dataset.heads:
        table = pq.read_table(root / f"l{layer:02d}h{head:02d}{kind}" / "data.parquet")
        rows = dataset.vectors(layer, head, kind)
        assert rows.vectors.dtype == np.float32 and len(rows.vectors) > 5
        np.testing.assert_array_equal(rows.vectors, vectors(table))
        np.testing.assert_array_equal(rows.positions, table["position"].to_numpy())
        np.testing.assert_array_equal(rows.example_ids, table["example_id"].to_numpy())
        assert dataset.table(layer, head, kind) == table
        assert dataset.table(layer, head, kind, ["bucket"]).column_names == ["bucket"]
    assert dataset.examples == pq.read_table(root / "examples/data.parquet")


def test_a_folder(make_dataset: MakeDataset, tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "a")
    dataset = qk_sniffer.open_dataset(str(root))
    assert_same(dataset, root)
    assert dataset.manifest == manifests.read(root) and str(dataset) == str(root)
    queries, positions, example_ids = dataset.vectors(*dataset.heads[0])
    assert queries.shape == (len(positions), 16) and len(example_ids) == len(positions)


def test_the_key_head_of_each_query_head(make_dataset: MakeDataset, tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "a")
    (layer,) = manifests.read(root)["model"]["layers"]
    assert layer["key_head"] == [0, 0, 1, 1]
    assert [qk_sniffer.open_dataset(root).key_head(0, head) for head in range(4)] == [0, 0, 1, 1]
    for wrong in ((1, 0), (0, 4), (0, -1)):
        with pytest.raises(StoreError, match=r"has no (layer 1; it has layers 0|query head (4|-1); it has 0-3)"):
            qk_sniffer.open_dataset(root).key_head(*wrong)


@pytest.mark.parametrize("listed", [None, [1, 0, 1, 0]], ids=["of an earlier version", "in another order"])
def test_key_heads_are_those_that_the_manifest_lists(
    listed: list[int] | None, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    root = make_dataset(tmp_path / "a")

    def change(manifest: dict[str, Any]) -> None:
        (layer,) = manifest["model"]["layers"]
        del layer["key_head"]
        layer.update({} if listed is None else {"key_head": listed})

    edit(root, change)
    dataset = qk_sniffer.open_dataset(root)
    assert [dataset.key_head(0, head) for head in range(4)] == (listed or [0, 0, 1, 1])
    of_queries = {head.head: head.key_head for head in captured_heads(dataset.manifest) if head.kind == "q"}
    assert of_queries == ({0: 0, 3: 1} if listed is None else {0: 1, 3: 0})


@pytest.mark.parametrize("key_heads", [4, 0])
def test_key_heads_that_do_not_divide_the_query_heads_are_refused(key_heads: int) -> None:
    layer = {"layer": 3, "num_q_heads": 6, "num_k_heads": key_heads}
    assert key_head(layer | {"key_head": [0, 0, 1, 1, 2, 3]}, 5) == 3
    with pytest.raises(StoreError, match=f"layer 3 has 6 query heads and {key_heads} key heads, and no key_head"):
        key_head(layer, 5)


@pytest.mark.parametrize(
    ("key_head", "problem"),
    [([0, 0, 1], "key heads of 3 query heads, and has 4"), ([0, 0, 1, 2], "lists key head 2 in key_head")],
)
def test_impossible_key_heads_are_refused(
    key_head: list[int], problem: str, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    root = make_dataset(tmp_path / "a")
    edit(root, lambda manifest: manifest["model"]["layers"][0].update(key_head=key_head))
    with pytest.raises(StoreError, match=f"contradicts itself .*{problem}"):
        qk_sniffer.open_dataset(root)


def test_rows_in_several_chunks_and_none(make_dataset: MakeDataset, tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "a")
    path = root / "l00h00q/data.parquet"
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=3)
    restate(root)
    np.testing.assert_array_equal(qk_sniffer.open_dataset(root).vectors(0, 0, "q").vectors, vectors(table))
    pq.write_table(table.schema.empty_table(), path)
    restate(root)
    empty = qk_sniffer.open_dataset(root).vectors(0, 0, "q")
    assert empty.vectors.shape == (0, 16) and empty.positions.shape == empty.example_ids.shape == (0,)


def test_errors_name_the_missing_thing(make_dataset: MakeDataset, tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "a")
    dataset = qk_sniffer.open_dataset(root)
    with pytest.raises(StoreError, match=r"no rows of layer 7, head 1, kind 'q'; it has l00h00q, l00h03q"):
        dataset.vectors(7, 1, "q")
    with pytest.raises(StoreError, match=r"no column token_id; it has bucket, example_id"):
        dataset.table(0, 0, "q", ["position", "token_id"])
    (root / "l00h00q/data.parquet").write_bytes(b"PAR1 nothing")
    (root / "l00h03q/data.parquet").unlink()
    for head in (0, 3):
        with pytest.raises(StoreError, match=rf"l00h0{head}q/data\.parquet is missing or damaged"):
            dataset.vectors(0, head, "q")
    with pytest.raises(StoreError, match=r"is a folder: it has no revision 'main'"):
        qk_sniffer.open_dataset(root, revision="main")
    with pytest.raises(StoreError, match="no such folder"):
        qk_sniffer.open_dataset(tmp_path / "nothing")
    (root / "manifest.json").unlink()
    with pytest.raises(StoreError, match="incomplete"):
        qk_sniffer.open_dataset(root)


@pytest.mark.usefixtures("endpoint")
def test_a_branch_is_fetched_head_by_head_and_once(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_dataset(tmp_path / "a")
    publish(root, REPO, BRANCH, api=api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    start = len(hub.log)

    def fetched() -> list[str]:
        return [path.split("/", 6)[-1] for method, path, _ in hub.log[start:] if method == "GET" and "resolve" in path]

    dataset = qk_sniffer.open_dataset(REPO, revision=BRANCH)
    assert fetched() == ["manifest.json"] and str(dataset) == f"{REPO}, branch {BRANCH}"
    head = dataset.vectors(0, 3, "q")
    assert fetched() == ["manifest.json", "l00h03q/data.parquet"]
    np.testing.assert_array_equal(head.vectors, vectors(pq.read_table(root / "l00h03q/data.parquet")))
    dataset.fetch(dataset.heads)
    assert len(fetched()) == 5
    assert_same(dataset, root)
    assert_same(qk_sniffer.open_dataset(REPO, revision=BRANCH), root)
    assert len(fetched()) == 6 and fetched()[-1] == "examples/data.parquet"

    # An open dataset stays at its commit. Opening it again reads the new commit.
    publish(make_dataset(tmp_path / "b", seed=1), REPO, BRANCH, api=api)
    assert_same(dataset, root)
    assert_same(qk_sniffer.open_dataset(REPO, revision=BRANCH), tmp_path / "b")
    assert_same(qk_sniffer.open_dataset(REPO, revision=hub.repositories[REPO].history(BRANCH)[1].id), root)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same(qk_sniffer.open_dataset(REPO, revision=BRANCH), tmp_path / "b")


@pytest.mark.usefixtures("endpoint")
def test_a_branch_that_moves_while_it_is_opened_is_opened_at_the_commit_that_was_checked(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_dataset(tmp_path / "a")
    publish(root, REPO, BRANCH, api=api)
    repository = hub.repositories[REPO]
    first, real = repository.history(BRANCH)[0].id, branch._missing_size

    def move(info: Any) -> int | None:
        if repository.history(BRANCH)[0].id == first:
            repository.add(BRANCH, "larger", repository.files(BRANCH) | {"manifest.json": b" " * 100_000_000})
        return real(info)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(branch, "_missing_size", move)
    dataset = qk_sniffer.open_dataset(REPO, revision=BRANCH)
    assert dataset.commit == first != repository.history(BRANCH)[0].id
    assert_same(dataset, root)


@pytest.mark.usefixtures("endpoint")
def test_a_file_that_is_larger_than_its_manifest_lists_is_not_fetched(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=api)
    repository, name = hub.repositories[REPO], "l00h03q/data.parquet"
    repository.add(BRANCH, "larger", repository.files(BRANCH) | {name: b"x" * 1_000_000})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    dataset = qk_sniffer.open_dataset(REPO, revision=BRANCH)
    for read in (lambda: dataset.vectors(0, 3, "q"), lambda: dataset.fetch(dataset.heads)):
        with pytest.raises(
            StoreError, match=r"l00h03q/data\.parquet of .* has 1,000,000 bytes instead of the .*not fetched"
        ):
            read()
    assert hub.count("GET", name) == 0


@pytest.mark.usefixtures("endpoint")
def test_datasets_that_cannot_be_read_from_the_hub(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(make_dataset(tmp_path / "a"), REPO, BRANCH, api=api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    for revision in (None, "main", "some-modle"):
        with pytest.raises(HubError, match=rf"no dataset of qk-sniffer at .*revision=\.\.\.; it has: {BRANCH}$"):
            qk_sniffer.open_dataset(REPO, revision=revision)
    with pytest.raises(HubError, match=r"no dataset repository alice/none .*hf auth login"):
        qk_sniffer.open_dataset("alice/none", revision="main")
    hub.create("alice/empty")
    with pytest.raises(HubError, match=r"; it has none$"):
        qk_sniffer.open_dataset("alice/empty")
    hub.repositories[REPO].gated = True
    with pytest.raises(HubError, match=r"gated .*ask for access"):
        qk_sniffer.open_dataset(REPO, revision=BRANCH)
    hub.repositories[REPO].gated, hub.repositories[REPO].private = False, True
    with pytest.raises(HubError, match=r"no dataset repository .*private one is shown after a login"):
        qk_sniffer.open_dataset(REPO, revision=BRANCH)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"cannot be read from the Hub: offline mode is on: unset HF_HUB_OFFLINE"):
        qk_sniffer.open_dataset(REPO, revision=BRANCH)


@pytest.mark.few(3)
@pytest.mark.usefixtures("endpoint")
@pytest.mark.parametrize("how", ["reply", "drop"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("HEAD", "/manifest.json"),
        ("GET", "/manifest.json"),
        ("HEAD", "/l00h00q/"),
        ("GET", "/l00h00q/"),
        ("GET", "/tree/"),
        ("GET", "/l00h01k/"),
    ],
)
def test_transient_errors_are_retried(
    method: str,
    path: str,
    how: str,
    hub: FakeHub,
    api: HfApi,
    make_dataset: MakeDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = make_dataset(tmp_path / "a")
    publish(root, REPO, BRANCH, api=api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    hub.fault(method, path, how, times=2)
    dataset = qk_sniffer.open_dataset(REPO, revision=BRANCH)
    dataset.vectors(0, 0, "q")
    dataset.fetch(dataset.heads)
    assert_same(dataset, root)
    assert not hub.take_fault(method, path), "the fault was used"


@pytest.mark.slow
def test_with_xet_and_a_login(make_dataset: MakeDataset, tmp_path: Path) -> None:
    """Separate processes publish and read a private repository through the storage of real uploads."""
    from support.local_xet import LocalXet

    root = make_dataset(tmp_path / "a")
    write = f"""
from pathlib import Path
from qk_sniffer.dataset.card import branch_card
from qk_sniffer.hub.publish import publish
from qk_sniffer.store.manifest import read
root = Path({str(root)!r})
place = root, read(root), {REPO!r}, {BRANCH!r}
print(publish(*place, branch_card(*place), private=True).changed)
"""
    read = f"""
import qk_sniffer
from datasets import load_dataset
dataset = qk_sniffer.open_dataset({REPO!r}, revision={BRANCH!r})
dataset.fetch(dataset.heads[:3])
print([float(dataset.vectors(*head).vectors.sum()) for head in dataset.heads])
stream = load_dataset({REPO!r}, "l00h00k", revision={BRANCH!r}, split="train", streaming=True)
print(len(list(stream)), len(load_dataset({REPO!r}, "l00h00k", revision={BRANCH!r}, split="train")))
"""
    with FakeHub(LocalXet(tmp_path / "xet")) as hub:
        hub.fault("GET", "/xet-write-token/")
        hub.fault("GET", "/xet-read-token/", how="drop")
        done = client(hub, tmp_path, "-c", write, xet=True)
        assert done.stdout == "True\n", done.stderr
        assert hub.count("GET", "/xet-write-token/") > 0 and hub.count("PUT", "/lfs/") == 0
        shutil.rmtree(tmp_path / "home")
        done = client(hub, tmp_path, "-c", read, xet=True)
        assert done.returncode == 0, done.stderr
        assert hub.count("GET", "/xet-read-token/") > 0
        refused = client(hub, tmp_path / "xet", "-c", read, xet=True, token=None)
        unread = client(
            hub, tmp_path / "xet", "-c", "".join(read.splitlines(True)[2:3] + read.splitlines(True)[6:]), token=None
        )
        assert unread.returncode == 1 and "doesn't exist on the Hub or cannot be accessed" in unread.stderr
    dataset = qk_sniffer.open_dataset(root)
    sums, counts = done.stdout.splitlines()
    assert sums == str([float(dataset.vectors(*head).vectors.sum()) for head in dataset.heads])
    assert counts.split() == [str(len(dataset.vectors(0, 0, "k").positions))] * 2
    assert refused.returncode == 1 and "a private one is shown after a login" in refused.stderr


def test_schema_of_rows(make_dataset: MakeDataset, tmp_path: Path) -> None:
    """Callers unpack these public names in this order."""
    assert qk_sniffer.HeadVectors._fields == ("vectors", "positions", "example_ids")
    table = qk_sniffer.open_dataset(make_dataset(tmp_path / "a")).table(0, 0, "k")
    assert isinstance(table, pa.Table)
    assert table.column_names == ["bucket", "example_id", "position", "vector", "sliding_window"]
