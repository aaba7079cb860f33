"""Reads the vectors of several heads token by token, as a training loop does."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.verify_cases import restate, rewrite
from torch.utils.data import DataLoader

import qk_sniffer
from qk_sniffer.config import KeySamplerConfig, SamplerConfig
from qk_sniffer.dataset import token_vectors
from qk_sniffer.dataset.token_vectors import ShuffledBatches, check_same_tokens
from qk_sniffer.errors import StoreError
from qk_sniffer.store.layout import HeadKey

SHARED = {"type": "uniform", "base_rate": 6.0, "min_bucket_size": 16, "share": "example"}
HEADS = [HeadKey(2, 1, "q"), HeadKey(0, 0, "k"), HeadKey(1, 3, "q")]


@pytest.fixture
def shared(undisturbed: Callable[..., Path]) -> qk_sniffer.Dataset:
    return qk_sniffer.open_dataset(undisturbed(sampler=SHARED))


@pytest.mark.parametrize("sizes", [(7, 7, 7), (5, 64, 9)])
def test_each_item_has_the_vectors_of_one_token(
    undisturbed: Callable[..., Path], sizes: tuple[int, ...], tmp_path: Path
) -> None:
    root = shutil.copytree(undisturbed(sampler=SHARED), tmp_path / "out")
    for key, size in zip(HEADS, sizes, strict=True):  # row groups of several sizes, as heads of several sizes have
        path = root / key.name / "data.parquet"
        pq.write_table(pq.read_table(path), path, row_group_size=size)
    restate(root)
    shared = qk_sniffer.open_dataset(root)
    tokens = shared.torch(HEADS)
    wanted = [shared.vectors(*key) for key in HEADS]
    assert len(tokens) == len(wanted[0].vectors) > 30
    some = [len(tokens) - 1, 0, 5]
    several, one = tokens[some], tokens[5]
    assert list(one) == list(several) == ["example_id", "position", *(key.name for key in HEADS)]
    for key, rows in zip(HEADS, wanted, strict=True):
        assert one[key.name].dtype == torch.float32 and one[key.name].shape == (16,)
        np.testing.assert_array_equal(several[key.name].numpy(), rows.vectors[some])
        np.testing.assert_array_equal(one[key.name].numpy(), rows.vectors[5])
        np.testing.assert_array_equal(several["example_id"].numpy(), rows.example_ids[some])
        np.testing.assert_array_equal(several["position"].numpy(), rows.positions[some])
    assert one["position"].dtype == torch.int32 and one["position"].shape == ()
    with pytest.raises(IndexError):
        tokens[len(tokens)]


def test_heads_are_given_by_their_names_too(shared: qk_sniffer.Dataset) -> None:
    by_key, by_name = shared.torch(HEADS)[3], shared.torch([key.name for key in HEADS])[3]
    assert by_key.keys() == by_name.keys() and all(torch.equal(by_key[name], by_name[name]) for name in by_key)
    for heads in (["l00h00q", "layer 1"], "l0h0q"):
        with pytest.raises(StoreError, match="is not the name of a head: give one such as l00h00q"):
            shared.torch(heads)


def test_workers_read_every_token_once_in_an_order_that_follows_from_the_seed(shared: qk_sniffer.Dataset) -> None:
    tokens = shared.torch(HEADS)

    def epoch(batches: ShuffledBatches, workers: int = 0) -> list[tuple[int, int]]:
        seen = []
        for batch in DataLoader(tokens, sampler=batches, batch_size=None, num_workers=workers):
            assert len(batch["l02h01q"]) <= 7
            seen += list(zip(batch["example_id"].tolist(), batch["position"].tolist(), strict=True))
        return seen

    batches = tokens.batches(7, seed=1)
    first, second = epoch(batches, workers=2), epoch(batches)
    rows = shared.vectors(*HEADS[0])
    in_order = list(zip(rows.example_ids.tolist(), rows.positions.tolist(), strict=True))
    assert len(batches) == -(-len(tokens) // 7)
    assert sorted(first) == sorted(second) == sorted(in_order) and in_order != first != second
    again = tokens.batches(7, seed=1)
    again.epoch = 1
    assert epoch(again) == second
    assert epoch(tokens.batches(7, seed=2)) != first


def test_the_file_is_shared_between_processes_and_goes_with_its_object(shared: qk_sniffer.Dataset) -> None:
    tokens = shared.torch(HEADS)
    tokens[0]
    copied = pickle.dumps(tokens)
    assert len(copied) < 2000
    copy, folder = pickle.loads(copied), tokens.path.parent
    assert torch.equal(copy[3]["l00h00k"], tokens[3]["l00h00k"])
    del copy
    assert folder.is_dir()
    del tokens
    assert not folder.exists()


def test_a_cache_is_used_again_for_the_same_heads_alone(
    shared: qk_sniffer.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = shared.torch(HEADS, tmp_path / "cache")
    wanted = tokens[2]["l01h03q"]
    assert [*(tmp_path / "cache").iterdir()] == [tokens.path]
    with monkeypatch.context() as patch:
        patch.setattr(token_vectors, "write", lambda *_: pytest.fail("written a second time"))
        assert torch.equal(shared.torch(HEADS, tmp_path / "cache")[2]["l01h03q"], wanted)
    fewer = shared.torch(HEADS[:2], tmp_path / "cache")
    assert [*fewer[2]] == ["example_id", "position", "l02h01q", "l00h00k"]
    assert {*(tmp_path / "cache").iterdir()} == {tokens.path, fewer.path}
    for damage in (b"short", tokens.path.read_bytes()[:-1] + b"?", fewer.path.read_bytes()):
        tokens.path.write_bytes(damage)
        assert torch.equal(shared.torch(HEADS, tmp_path / "cache")[2]["l01h03q"], wanted)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file"):
        shared.torch(HEADS, tmp_path / "file")


def test_two_datasets_in_one_cache_stay_apart(
    shared: qk_sniffer.Dataset, undisturbed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = qk_sniffer.open_dataset(undisturbed(sampler=SHARED | {"seed": 1}))
    real, started = token_vectors.write, []

    def write(*arguments: Any) -> None:
        monkeypatch.setattr(token_vectors, "write", real)
        started.append(other.torch(HEADS, tmp_path))  # the other process begins and ends while this one writes
        real(*arguments)

    monkeypatch.setattr(token_vectors, "write", write)
    for dataset, tokens in ((shared, shared.torch(HEADS, tmp_path)), (other, *started)):
        np.testing.assert_array_equal(tokens[range(len(tokens))]["l00h00k"].numpy(), dataset.vectors(0, 0, "k").vectors)


def test_files_of_another_dataset_are_not_taken_for_those_of_the_manifest(
    shared: qk_sniffer.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, real = Path(shutil.copytree(str(shared.folder), tmp_path / "out")), token_vectors._ids
    dataset = qk_sniffer.open_dataset(root)
    head = root / "l00h00k" / "data.parquet"
    whole = head.read_bytes()
    head.write_bytes(whole[:5] + bytes([whole[5] ^ 1]) + whole[6:])
    with pytest.raises(StoreError, match="is damaged, or of another dataset: its sha256 differs"):
        dataset.torch(HEADS, tmp_path / "cache")
    head.write_bytes(whole)

    def replaced(*arguments: Any) -> Any:  # while it is read
        shutil.copy(head, root / "new")
        (root / "new").rename(head)
        return real(*arguments)

    monkeypatch.setattr(token_vectors, "_ids", replaced)
    with pytest.raises(StoreError, match="was changed while it was read"):
        dataset.torch(HEADS, tmp_path / "cache")
    assert [*(tmp_path / "cache").iterdir()] == []


def test_no_link_in_a_cache_is_followed(shared: qk_sniffer.Dataset, tmp_path: Path) -> None:
    path, mine = shared.torch(HEADS, tmp_path / "cache").path, tmp_path / "mine"
    whole = path.read_bytes()
    for content in (b"the user's", whole):
        mine.write_bytes(content)
        path.unlink()
        path.symlink_to(mine)
        tokens = shared.torch(HEADS, tmp_path / "cache")
        assert mine.read_bytes() == content and not path.is_symlink() and path.read_bytes() == whole
    path.rename(mine)
    path.symlink_to(mine)
    with pytest.raises(StoreError, match=r"is missing or damaged \(a link, which is not followed\)"):
        tokens[0]


def test_a_file_that_was_replaced_is_not_read(shared: qk_sniffer.Dataset, tmp_path: Path) -> None:
    tokens = shared.torch(HEADS, tmp_path)
    shared.torch(HEADS[::-1], tmp_path).path.rename(tokens.path)
    with pytest.raises(StoreError, match="does not hold the vectors of these heads; call `torch` of the dataset again"):
        tokens[0]
    tokens.path.unlink()
    with pytest.raises(StoreError, match="is missing or damaged"):
        pickle.loads(pickle.dumps(tokens))[0]


@pytest.mark.parametrize(
    ("sampler", "heads", "problem"),
    [
        (SamplerConfig(share="example"), HEADS, None),
        (SamplerConfig(), HEADS, r"sampler\.share=layer_kind"),
        (SamplerConfig(), [HeadKey(0, 0, "q"), HeadKey(0, 0, "k")], r"sampler\.share=example"),
        (SamplerConfig(), [HeadKey(0, 0, "q"), HeadKey(0, 1, "q")], None),
        (SamplerConfig(type="all"), HEADS, None),
        (SamplerConfig(type="all", max_rows_per_example=3), HEADS, r"sampler\.share=example"),
        (SamplerConfig(share="example", keys=KeySamplerConfig("all")), HEADS, r"at different tokens \(sampler\.keys\)"),
        (SamplerConfig(share="example", keys=KeySamplerConfig("all")), HEADS[::2], None),
        (SamplerConfig(share="example"), [], "give at least one"),
        (SamplerConfig(share="example"), HEADS[:1] * 2, "each once"),
    ],
)
def test_heads_of_different_tokens_are_refused(
    sampler: SamplerConfig, heads: list[HeadKey], problem: str | None
) -> None:
    if problem is None:
        check_same_tokens(heads, sampler)
    else:
        with pytest.raises(StoreError, match=problem):
            check_same_tokens(heads, sampler)


def test_the_dataset_names_what_it_lacks(undisturbed: Callable[..., Path], root: Path) -> None:
    with pytest.raises(StoreError, match=r"sampler\.share=layer_kind"):
        qk_sniffer.open_dataset(root).torch(HEADS)
    with pytest.raises(StoreError, match="has no rows of layer 9, head 0"):
        qk_sniffer.open_dataset(undisturbed(sampler=SHARED)).torch([(9, 0, "q")])


def test_rows_of_other_tokens_than_the_manifest_implies_are_refused(root: Path) -> None:
    rewrite(root, "l00h01q/data.parquet", lambda table: table.take(list(range(len(table)))[::-1]))
    with pytest.raises(StoreError, match=r"l00h01q.* has other tokens than .*l00h00q"):
        qk_sniffer.open_dataset(root).torch([(0, 0, "q"), (0, 1, "q")])


@pytest.mark.parametrize("cache", ["a\0b", "x" * 300])
def test_a_cache_that_no_folder_can_be(cache: str, undisturbed: Callable[..., Path]) -> None:
    with pytest.raises(StoreError, match=r"cache is .*, which has a"):
        qk_sniffer.open_dataset(undisturbed()).torch(["l00h00q"], cache=cache)
