"""Tests the statistics of heads over all tokens against float64 over the rows of `sampler=all`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.backbones import FolderOf
from support.jobs import TEXTS, captured_only, hashes, run, stopped_after
from support.tiny import save_checkpoint
from support.verify_cases import edit, restate, verified, wrong
from support.zoo import CASES, Case

import qk_sniffer
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import StoreError
from qk_sniffer.jobs import batch_groups, capture_examples
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.store.segment import read_header, segment_number
from qk_sniffer.store.segment_facts import facts_of
from qk_sniffer.store.statistics import Statistics

BY_NAME = {case.name: case for case in CASES}


def asked(stages: Sequence[str] = ("post",), **values: Any) -> dict[str, Any]:
    return {"statistics": {"enabled": True, "stages": [*stages], **values}}


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every two or three batches a group."""
    monkeypatch.setattr(batch_groups, "GROUP", 1e-5)


def expected_pairs(case: Case, layer: int, head_dim: int) -> list[tuple[int, int]] | None:
    if layer in case.unrotated:
        return None
    width = case.rotary_dim or head_dim
    first = head_dim - width if case.rotates_last else 0
    if case.pairs == "halves":
        return [(first + i, first + width // 2 + i) for i in range(width // 2)]
    return [(first + 2 * i, first + 2 * i + 1) for i in range(width // 2)]


def assert_close(found: Statistics, rows: np.ndarray, *, covariance: bool = True) -> None:
    """Compares statistics with those of `rows` (heads, tokens, d) in float64. The bars are those of the docs."""
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=1)
    scale = np.abs(rows).max()
    assert found.mean == pytest.approx(mean, abs=1e-6 * scale)
    whole = np.stack([np.cov(of_head.T) for of_head in rows])
    spread = np.abs(whole).max()
    assert found.variance == pytest.approx(np.diagonal(whole, axis1=1, axis2=2), abs=1e-5 * spread)
    if covariance:
        assert found.covariance is not None
        assert np.abs(found.covariance - whole).max() < 1e-5 * spread
    else:
        assert found.covariance is None
    assert np.array_equal(found.minimum, rows.min(axis=1)) and np.array_equal(found.maximum, rows.max(axis=1))
    assert np.array_equal(found.absmax, np.abs(rows).max(axis=1))
    norms = np.linalg.norm(rows, axis=2)
    assert found.norm_mean == pytest.approx(norms.mean(axis=1), rel=1e-6)
    assert found.norm_variance == pytest.approx(norms.var(axis=1, ddof=1), rel=1e-4, abs=1e-6 * scale)


def rows_of(root: Path, layer: int, kind: str, skip: int = 0) -> np.ndarray:
    """The rows of a layer's heads from position `skip` on: (heads, tokens, d)."""
    dataset = qk_sniffer.open_dataset(root)
    heads = [dataset.vectors(*key) for key in dataset.heads if (key.layer, key.kind) == (layer, kind)]
    return np.stack([head.vectors[head.positions >= skip] for head in heads])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    CASES,
    ids=lambda case: case.name,
)
def test_they_are_those_of_all_rows_before_and_after_rope(
    case: Case, folder_of: FolderOf, texts: Path, tmp_path: Path
) -> None:
    folder, off = folder_of(case), {"verify": {"examples": 0}}
    capture = asked(["pre", "post"]) | {"capture_values": True, "capture_outputs": True}
    post = run(folder, texts, tmp_path / "post", capture=capture, **off)
    pre = run(folder, texts, tmp_path / "pre", capture={"capture_pre_rope": True}, **off)
    dataset = qk_sniffer.open_dataset(post)
    tokens = dataset.manifest["tokens"]
    for layer in case.layers:
        for kind in "qk":
            for stage, root in (("pre", pre), ("post", post)):
                found, rows = dataset.statistics(layer, kind, stage), rows_of(root, layer, kind)
                assert found.heads.tolist() == [*range(len(rows))]
                assert set(found.count) == {tokens} and not found.nonfinite.any()
                assert_close(found, rows)
                pairs = expected_pairs(case, layer, rows.shape[2]) if stage == "pre" else None
                if pairs is None:
                    assert found.frequency_pairs is None is found.frequency_mean
                    continue
                assert found.frequency_pairs is not None and found.frequency_pairs.tolist() == [*map(list, pairs)]
                one, other = np.array(pairs).T
                as_complex = rows[..., one].astype(np.float64) + 1j * rows[..., other]
                assert found.frequency_mean == pytest.approx(as_complex.mean(axis=1), abs=1e-5)
                assert found.frequency_modulus == pytest.approx(np.abs(as_complex).mean(axis=1), rel=1e-5)
        for kind in "vo":
            found, rows = dataset.statistics(layer, kind), rows_of(post, layer, kind)
            assert found.heads.tolist() == [*range(len(rows))] and set(found.count) == {tokens}
            assert_close(found, rows)
            assert found.frequency_pairs is None
            with pytest.raises(StoreError, match="stages pre, post; values and outputs have the stage post alone"):
                dataset.statistics(layer, kind, "pre")
    assert verify(post).problems == 0


def test_the_first_tokens_and_the_covariances_can_be_left_out(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", capture=asked(skip_tokens=30, covariance=False, stages=["post"]))
    dataset = qk_sniffer.open_dataset(root)
    for kind in "qk":
        found = dataset.statistics(1, kind)
        assert_close(found, rows_of(root, 1, kind, skip=30), covariance=False)
        assert set(found.count) == {sum(max(0, len(text) - 30) for text in TEXTS)}


@pytest.mark.slow
def test_no_row_is_needed(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    rows = run(checkpoint, texts, tmp_path / "rows", capture=asked())
    root = run(checkpoint, texts, tmp_path / "none", sampler={"type": "none"}, capture=asked())
    dataset = qk_sniffer.open_dataset(root)
    assert dataset.manifest["rows"] == 0 and len(dataset.heads) == 18
    of = {name: digest for name, digest in hashes(rows).items() if name.startswith("statistics/")}
    assert len(of) == 3 and of.items() <= hashes(root).items()


def test_heads_that_are_not_captured_are_left_out(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", capture=asked() | {"heads": [1, 3], "layers": [0, 2]})
    dataset = qk_sniffer.open_dataset(root)
    found = dataset.statistics(2, "q")
    assert found.heads.tolist() == [1, 3]
    assert_close(found, rows_of(root, 2, "q"))
    with pytest.raises(
        StoreError, match="no statistics of layer 1, kind 'q', stage 'post'; it has those of layers 0, 2"
    ):
        dataset.statistics(1, "q")
    for stage in ("pre", "mid"):
        with pytest.raises(StoreError, match=r"stages post$"):
            dataset.statistics(0, "q", stage)


@pytest.mark.slow
def test_a_killed_job_makes_the_same_bytes(checkpoint: Path, texts: Path, tmp_path: Path, small_groups: None) -> None:
    capture = asked(["pre", "post"]) | {"capture_values": True, "capture_outputs": True}
    values: dict[str, Any] = {"capture": capture, "inference": {"batch_size": 2, "lookahead": 12}}
    whole = hashes(run(checkpoint, texts, tmp_path / "whole", **values))
    for batches in (1, 4, 9):
        root = tmp_path / f"after-{batches}"
        stopped_after(batches, checkpoint, texts, root, **values)
        assert hashes(run(checkpoint, texts, root, **values)) == whole


@pytest.mark.slow
def test_a_lost_segment_costs_its_group_alone(
    checkpoint: Path, texts: Path, tmp_path: Path, small_groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"capture": asked(), "inference": {"batch_size": 2, "lookahead": 12}}
    whole = hashes(run(checkpoint, texts, tmp_path / "whole", **values))
    root = tmp_path / "lost"
    captured_only(checkpoint, texts, root, monkeypatch, **values)
    segments = sorted((root / ".qk_sniffer" / "journal").rglob("*.safetensors"))
    assert len(segments) > 3
    segments[1].write_bytes(segments[1].read_bytes()[:-1])
    assert hashes(run(checkpoint, texts, root, **values)) == whole


@pytest.mark.parametrize("are_long", [False, True])
def test_long_ids_end_a_group(
    are_long: bool, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if are_long:
        monkeypatch.setattr(batch_groups, "GROUP_IDS", 1)
    values: dict[str, Any] = {"capture": asked(), "inference": {"batch_size": 2}, "sampler": {"type": "none"}}
    captured_only(checkpoint, texts, tmp_path / "out", monkeypatch, **values)
    segments = (tmp_path / "out" / ".qk_sniffer" / "journal").rglob("*.safetensors")
    found = [facts_of(read_header(path), segment_number(path) or 0) for path in segments]
    groups, batches = sum(bool(each.statistics) for each in found), sum(len(each.ended) for each in found)
    assert batches >= 12 and groups == (batches if are_long else 1)


@pytest.mark.slow
@pytest.mark.parametrize("covariance", [True, False])
def test_the_disk_is_checked_for_them_before_the_first_forward(
    covariance: bool, checkpoint: Path, texts: Path, tmp_path: Path, small_groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    required: list[int] = []

    def ensure_space(root: Path, size: int, *, way_out: str) -> None:
        required.append(size)
        assert way_out.endswith("or capture.statistics.covariance=false") == covariance

    monkeypatch.setattr(capture_examples, "ensure_space", ensure_space)
    values: dict[str, Any] = {
        "capture": asked(["pre", "post"], covariance=covariance),
        "sampler": {"type": "none"},
        "inference": {"batch_size": 2, "lookahead": 12},
    }
    root = tmp_path / "out"
    captured_only(checkpoint, texts, root, monkeypatch, **values)
    in_journal = sum(path.stat().st_size for path in (root / ".qk_sniffer" / "journal").rglob("*.safetensors"))
    names = 8 * 2 * 2 * 3 * 100 * len([*(root / ".qk_sniffer" / "journal").rglob("*.safetensors")])
    run(checkpoint, texts, root, **values)
    used = in_journal + sum(path.stat().st_size for path in (root / "statistics").iterdir())
    assert used - names < required[0] < 1.5 * used


@pytest.mark.slow
def test_batches_and_shards_change_only_rounding(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    sampler = {"type": "none"}
    one = qk_sniffer.open_dataset(run(checkpoint, texts, tmp_path / "one", sampler=sampler, capture=asked()))
    small = {"inference": {"batch_size": 1}}
    other = qk_sniffer.open_dataset(run(checkpoint, texts, tmp_path / "b", sampler=sampler, capture=asked(), **small))
    for index in range(2):
        shard = {"shard": {"index": index, "count": 2}}
        run(checkpoint, texts, tmp_path / "shards", sampler=sampler, capture=asked(), **shard)
    shards = qk_sniffer.open_dataset(tmp_path / "shards")
    for layer in range(3):
        for kind in "qk":
            first = one.statistics(layer, kind)
            for dataset in (other, shards):
                found = dataset.statistics(layer, kind)
                assert np.array_equal(found.count, first.count)
                assert found.mean == pytest.approx(first.mean, abs=1e-5)
                assert found.covariance == pytest.approx(first.covariance, abs=1e-5)


@pytest.mark.slow
def test_a_dataset_that_grows_merges_them(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"capture": asked(["pre", "post"])}
    root = tmp_path / "out"
    for count in (10, 24):
        run(checkpoint, texts, root, dataset={"max_samples": count}, **values)
    dataset = qk_sniffer.open_dataset(root)
    found = dataset.statistics(1, "q", "post")
    assert set(found.count) == {dataset.manifest["tokens"]}
    assert_close(found, rows_of(root, 1, "q"))
    assert dataset.statistics(1, "q", "pre").frequency_modulus is not None


@pytest.mark.parametrize("harm", ["narrow", "fewer tokens", "no file", "other arrays"])
def test_a_dataset_with_other_statistics_does_not_grow(
    harm: str, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"capture": asked(), "verify": {"examples": 0}}
    root = run(checkpoint, texts, tmp_path / "out", dataset={"max_samples": 10}, **values)
    name = "statistics/layer-01.safetensors"
    arrays = load_file(root / name)
    if harm == "narrow":
        cut = {each: values[..., :8] for each, values in arrays.items() if values.dim() > 1}
        arrays |= cut | {each: values[:, :8] for each, values in cut.items() if values.dim() == 3}
    elif harm == "fewer tokens":
        arrays["q.post.count"] -= 1
    elif harm == "other arrays":
        del arrays["q.post.mean"]
    save_file({each: values.contiguous() for each, values in arrays.items()}, root / name)
    restate(root)
    if harm == "no file":
        edit(root, lambda manifest: manifest["files"].pop(name))
    before = hashes(root)
    expected = {
        "narrow": "vectors of another size than manifest.json says",
        "fewer tokens": "count and nonfinite do not sum to the tokens of the examples",
        "no file": r"holds statistics/layer-01\.safetensors, which no dataset of qk-sniffer there lists",
        "other arrays": "lacks arrays of the kind 'q'",
    }[harm]
    with pytest.raises(StoreError, match=expected):
        run(checkpoint, texts, root, **values)
    assert hashes(root) == before


def test_vectors_with_nan_are_counted_and_left_out(texts: Path, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(BY_NAME["llama"], tmp_path / "model")
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.embed_tokens.weight"][5] = np.nan
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    root = run(checkpoint, texts, tmp_path / "out", capture=asked(), verify={"examples": 0})
    dataset = qk_sniffer.open_dataset(root)
    rows = rows_of(root, 0, "q")
    finite = np.isfinite(rows).all(axis=(0, 2))
    found = dataset.statistics(0, "q")
    assert 0 < (~finite).sum() < len(finite)
    assert set(found.nonfinite) == {(~finite).sum()} and set(found.count) == {finite.sum()}
    assert_close(found, rows[:, finite])
    assert dataset.manifest["statistics"]["nonfinite"]["l00h00q.post"] == (~finite).sum()
    assert wrong(verified(root)) == {}


def test_a_dataset_without_them_says_so(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    dataset = qk_sniffer.open_dataset(run(checkpoint, texts, tmp_path / "out"))
    with pytest.raises(StoreError, match=r"has no statistics: capture\.statistics\.enabled=true makes them"):
        dataset.statistics(0, "q")


def test_finalize_makes_them(checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured_only(checkpoint, texts, tmp_path / "out", monkeypatch, capture=asked())
    finalize(tmp_path / "out", prove=False)
    assert_close(qk_sniffer.open_dataset(tmp_path / "out").statistics(0, "k"), rows_of(tmp_path / "out", 0, "k"))


def test_damaged_files_are_named(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", capture=asked())
    file = root / "statistics" / "layer-00.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["q.post.mean"]["shape"] = header["q.post.mean"]["shape"][::-1]
    changed = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    for damaged in (data[:-1], data[:8] + b"x" + data[9:], data[:8] + changed + data[8 + length :]):
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match="layer-00"):
            qk_sniffer.open_dataset(root).statistics(0, "q")
