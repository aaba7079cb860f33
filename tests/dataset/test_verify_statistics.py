"""Tests what verify says of whole statistics, and of those that contradict manifest, examples, rows or themselves."""

import itertools
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.backbones import FolderOf
from support.edits import Editor
from support.hub_cases import copied
from support.jobs import TEXTS, run
from support.verify_cases import edit, flip, restate, verified, wrong
from support.zoo import CASES, Case

import qk_sniffer
from qk_sniffer.dataset.verify import verify
from qk_sniffer.dataset.verify_statistics import number_problems
from qk_sniffer.errors import StoreError
from qk_sniffer.store.statistics import Statistics
from qk_sniffer.store.statistics_file import FIELDS, Heads, encode, heads_in, read_statistics

LAYER_1 = "statistics/layer-01.safetensors"
TOKENS = sum(max(0, len(text) - 3) for text in TEXTS)

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def made(undisturbed: Callable[..., Path]) -> Path:
    statistics = {"enabled": True, "stages": ["pre", "post"], "skip_tokens": 3}
    return undisturbed(capture={"layers": [1, 2], "statistics": statistics}, verify={"examples": 0})


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return copied(made, tmp_path / "out")


def change(root: Path, edit_arrays: Callable[[Arrays], object], name: str = LAYER_1) -> dict[str, str]:
    """Changes the arrays of a file, lists it in the manifest, and returns the problems by check."""
    arrays = {key: np.array(values) for key, values in load_file(root / name).items()}
    edit_arrays(arrays)
    save_file({key: np.ascontiguousarray(values) for key, values in arrays.items()}, root / name)
    restate(root)
    return wrong(verified(root))


def plus(key: str, at: Any, number: float) -> Callable[[Arrays], object]:
    return lambda arrays: np.add.at(arrays[key], at, number)


def put(key: str, at: Any, number: float) -> Callable[[Arrays], object]:
    def edit_arrays(arrays: Arrays) -> None:
        arrays[key][at] = number

    return edit_arrays


@pytest.mark.slow
def test_whole_statistics_are_compared_with_the_rows(root: Path) -> None:
    text = verified(root)
    assert wrong(text) == {}
    assert f"statistics      ok     2 layers, before RoPE and after RoPE, {TOKENS:,} tokens a head\n" in text
    assert "statistics      ok     12 heads: all numbers are those of the rows\n" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "compared"),
    [
        ({"sampler": {"type": "none"}}, 0),
        ({"capture": {"statistics": {"enabled": True, "covariance": False}}}, 18),
        ({"capture": {"statistics": {"enabled": True, "stages": ["pre"]}, "capture_pre_rope": True}}, 18),
        ({"capture": {"statistics": {"enabled": True, "stages": ["pre"]}}}, 0),
        ({"sampler": {"max_rows_per_example": 5}}, 0),
        ({"sampler": {"type": "none", "keys": {"type": "all"}}}, 6),
    ],
    ids=str,
)
def test_what_jobs_make_is_whole(
    sections: dict[str, Any], compared: int, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    sections = {"capture": {"statistics": {"enabled": True}}, "verify": {"examples": 0}} | sections
    text = verified(run(checkpoint, texts, tmp_path / "out", **sections))
    assert wrong(text) == {}
    assert text.count("statistics      ok") == 1 + bool(compared)
    assert compared == 0 or f"{compared} heads: all numbers" in text


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "name", ["mean", "variance", "covariance", "norm_mean", "norm_variance", "frequency_modulus", "minimum", "maximum"]
)
def test_every_number_is_compared_with_the_rows(name: str, undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    capture = {"layers": [1], "statistics": {"enabled": True, "stages": ["pre"]}, "capture_pre_rope": True}
    root = copied(undisturbed(capture=capture, verify={"examples": 0}), tmp_path / "out")

    def widen(arrays: Arrays) -> None:
        arrays[f"q.pre.{name}"][1] *= 1.0 + 5e-5  # less than other checks find

    named = "minimum or maximum" if name in ("minimum", "maximum") else name
    assert f"{named} is not that of the rows" in str(change(root, widen))


@pytest.mark.slow
def test_what_grew_from_texts_of_one_token_is_whole(checkpoint: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    values: dict[str, Any] = {
        "capture": {"statistics": {"enabled": True, "stages": ["pre", "post"]}},
        "inference": {"batch_size": 1},
    }
    for texts_so_far in (["a"], ["a", "bc"], ["a", "bc", "defgh" * 9]):
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts_so_far))
        text = verified(run(checkpoint, texts, tmp_path / "out", **values))
        assert wrong(text) == {}, text


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("edit_arrays", "expected"),
    [
        (plus("q.post.count", 1, 1), "count and nonfinite do not sum to the tokens of the examples"),
        pytest.param(put("q.post.count", 1, -5), "count and nonfinite do not sum", marks=pytest.mark.slow),
        (plus("q.pre.nonfinite", 1, 1), "nonfinite differs from manifest.json"),
        (plus("q.post.mean", (1, 3), 1e-3), "mean is not that of the rows (query head 1 of layer 1)"),
        (plus("q.pre.mean", (1, 3), 100), "mean is not between minimum and maximum"),
        (put("k.post.mean", (1, 3), np.nan), "mean has NaN or Inf"),
        pytest.param(put("q.pre.minimum", (1, 3), -np.inf), "minimum has NaN or Inf", marks=pytest.mark.slow),
        pytest.param(
            put("q.post.minimum", (1, 3), -100), "minimum or maximum is not that of the rows", marks=pytest.mark.slow
        ),
        (plus("q.pre.covariance", (1, 3, 4), 0.1), "covariance is not symmetric"),
        (plus("q.post.covariance", (1, [3, 4], [4, 3]), 1e-4), "covariance is not that of the rows"),
        pytest.param(
            plus("q.pre.covariance", (1, [3, 4], [4, 3]), 100),
            "covariance is not positive semidefinite",
            marks=pytest.mark.slow,
        ),
        pytest.param(put("q.pre.covariance", (1, 3, 4), np.nan), "covariance has NaN or Inf", marks=pytest.mark.slow),
        (plus("q.pre.variance", (1, 3), 1), "variance is not the diagonal of covariance"),
        pytest.param(put("q.pre.variance", (1, 3), -1), "a variance is negative", marks=pytest.mark.slow),
        (put("q.pre.norm_mean", 1, 0), "norm_mean is below the norm of the mean"),
        pytest.param(
            put("q.pre.norm_mean", 1, 1e6),
            "norm_mean and norm_variance are not those of vectors with this mean",
            marks=pytest.mark.slow,
        ),
        pytest.param(put("k.post.norm_mean", 1, np.inf), "norm_mean has NaN or Inf", marks=pytest.mark.slow),
        (put("q.pre.norm_variance", 1, -1), "a variance is negative"),
        pytest.param(put("q.pre.norm_variance", 1, np.nan), "norm_variance has NaN or Inf", marks=pytest.mark.slow),
        pytest.param(
            put("q.post.norm_variance", 1, 1e6),
            "norm_mean and norm_variance are not those of vectors with this mean",
            marks=pytest.mark.slow,
        ),
        (put("q.pre.variance", (1, 3), 1e6), "variance is above that of any numbers between minimum and maximum"),
        (put("q.pre.frequency_modulus", (1, 0), -1), "frequency_modulus is below the modulus of the mean"),
        pytest.param(
            put("q.pre.frequency_modulus", (1, 0), np.inf), "frequency_modulus has NaN or Inf", marks=pytest.mark.slow
        ),
        pytest.param(
            put("q.pre.frequency_modulus", (1, 0), 1e3),
            "frequency_modulus is above the root of the mean square",
            marks=pytest.mark.slow,
        ),
        (plus("q.pre.frequency_pairs", (0, 0), 1), "frequency_pairs differ from the layer's rotation"),
        (plus("q.post.heads", 1, 1), "statistics of other heads than the captured ones"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_numbers_that_cannot_be_are_named(edit_arrays: Any, expected: str, root: Path) -> None:
    found = change(root, edit_arrays)
    assert found.keys() == {"statistics"} and expected in found["statistics"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_statistics_of_every_kind_of_model_are_possible(
    case: Case, dtype: str, folder_of: FolderOf, texts: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "model": {"dtype": dtype},
        "sampler": {"type": "none"},
        "capture": {"statistics": {"enabled": True, "stages": ["pre", "post"]}},
        "verify": {"examples": 0},
    }
    text = verified(run(folder_of(case), texts, tmp_path / "out", **sections))
    assert wrong(text) == {}, text


def one_head(vectors: np.ndarray) -> Statistics:
    """Statistics of a head over vectors (n, d), in float64."""
    n, norm = len(vectors), np.linalg.norm(vectors.astype(np.float64), axis=1)
    ddof = min(1, n - 1)
    variance = vectors.var(axis=0, ddof=ddof, dtype=np.float64) if n > 1 else np.full(vectors.shape[1], np.nan)
    a, b = vectors[:, :1].astype(np.float64), vectors[:, 1:2].astype(np.float64)
    return Statistics(
        np.array([0]),
        np.array([n]),
        np.array([0]),
        vectors.mean(axis=0, dtype=np.float64).astype(np.float32)[None],
        variance.astype(np.float32)[None],
        None,
        vectors.min(axis=0)[None],
        vectors.max(axis=0)[None],
        norm.mean().astype(np.float32)[None],
        np.array([norm.var(ddof=1) if n > 1 else np.nan], np.float32),
        np.array([[0, 1]]),
        np.hypot(a, b).mean(axis=0).astype(np.float32)[None],
    )


@pytest.mark.parametrize("n", [1, 2, 3, 1000])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1.0, 1e11, 1e20])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_numbers_of_real_vectors_are_possible(n: int, scale: float, offset: float) -> None:
    drawn = np.random.default_rng(n).standard_normal((n, 8)) + offset
    with np.errstate(over="ignore", invalid="ignore"):
        found = one_head((scale * drawn).astype(np.float32))
    assert [*number_problems(found)] == []
    if n == 1 and scale == 1:
        longer = replace(found, norm_mean=found.norm_mean * np.float32(1.01))
        assert [*number_problems(longer)] == [
            "norm_mean and norm_variance are not those of vectors with this mean and variance"
        ]


def test_memory_is_that_of_a_few_covariances_of_one_head(tmp_path: Path) -> None:
    num_heads, d = 24, 256
    one = one_head(np.random.default_rng(0).standard_normal((2 * d, d)).astype(np.float32))
    many = {name: np.repeat(getattr(one, name), num_heads, axis=0) for name in FIELDS if name != "covariance"}
    covariance = np.repeat(np.diag(one.variance[0])[None], num_heads, axis=0)
    pairs: dict[str, Any] = {"frequency_pairs": None, "frequency_modulus": None}
    whole = Statistics(**many | pairs | {"heads": np.arange(num_heads), "covariance": covariance})
    path = tmp_path / "layer-00.safetensors"
    path.write_bytes(encode({("q", "post"): whole}))
    there = heads_in(path, "q", "post", way_out="")
    assert there == Heads([*range(num_heads)], d, has_covariance=True)
    one_covariance = 4 * d * d
    tracemalloc.start()
    try:
        for row in range(num_heads):
            found = read_statistics(path, "q", "post", way_out="", row=row)
            assert found is not None and found.heads.tolist() == [row] and not [*number_problems(found)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 7 * one_covariance < path.stat().st_size / 3


def test_heads_without_tokens_have_no_numbers(root: Path) -> None:
    def without_tokens(arrays: Arrays) -> None:
        arrays["q.pre.nonfinite"] += arrays["q.pre.count"]
        arrays["q.pre.count"][:] = 0

    edit(root, lambda manifest: manifest["statistics"].update(nonfinite={f"l01h0{h}q.pre": TOKENS for h in range(4)}))
    found = change(root, without_tokens)
    assert "mean has numbers, although count is below 1 (query heads 0-3 of layer 1)" in found["statistics"]
    assert "sum to" not in found["statistics"] and "differs from manifest.json" not in found["statistics"]


def without(start: str) -> Callable[[Arrays], object]:
    return lambda arrays: [arrays.pop(key) for key in [*arrays] if key.startswith(start)]


def renamed(old: str, new: str) -> Callable[[Arrays], object]:
    return lambda arrays: [
        arrays.update({new + key.removeprefix(old): arrays.pop(key)}) for key in [*arrays] if key.startswith(old)
    ]


def narrow(arrays: Arrays) -> None:
    for key in [*arrays]:
        if key.startswith("q.post.") and arrays[key].ndim > 1:
            arrays[key] = arrays[key][(slice(None), *(slice(0, 8),) * (arrays[key].ndim - 1))]


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("edit_arrays", "expected"),
    [
        (without("q.pre."), "other kinds and stages than manifest.json says"),
        (without("k."), "k.post, k.pre, q.post, q.pre"),
        (renamed("q.pre.", "v.pre."), "q.post, v.pre instead of"),
        (without("q.pre.mean"), "a file cannot be read"),
        (without("q.pre.covariance"), "q.pre has no covariance"),
        (without("q.pre.frequency"), "frequency_pairs differ from the layer's rotation"),
        (without("q.pre.frequency_pairs"), "frequency_pairs and frequency_modulus belong together"),
        (renamed("q.pre.mean", "q.pre.median"), "lacks arrays of the kind 'q' and stage 'pre'"),
        (narrow, "vectors of another size than manifest.json says"),
        (lambda arrays: arrays.update({"q.pre.mean": arrays["q.pre.mean"].astype(np.float64)}), "another type"),
        (lambda arrays: arrays.update({"q.pre.mean": arrays["q.pre.mean"].T}), "another shape"),
        (lambda arrays: arrays.clear(), "none instead of k.post"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_other_arrays_are_named(edit_arrays: Any, expected: str, root: Path) -> None:
    found = change(root, edit_arrays)
    assert found.keys() == {"statistics"} and expected in found["statistics"]


@pytest.mark.slow
def test_files_that_are_damaged_missing_or_not_listed(root: Path, tmp_path: Path) -> None:
    path = root / LAYER_1
    data = path.read_bytes()
    flip(path, 900)
    assert "the sha256 differs" in wrong(verified(root))["files"]
    path.write_bytes(b"no statistics")
    restate(root)
    assert "a file cannot be read" in wrong(verified(root))["statistics"]
    path.write_bytes(data)
    restate(root)
    path.rename(path.with_name("layer-07.safetensors"))
    found = wrong(verified(root))
    assert "listed in manifest.json, but missing" in found["files"] and "layer-07" in found["files"]
    path.with_name("layer-07.safetensors").rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "a link leads out of the dataset" in wrong(verified(root))["files"]


@pytest.mark.parametrize(
    ("change_manifest", "expected"),
    [
        (lambda manifest: manifest.pop("statistics"), "it has no statistics, but capture.statistics.enabled is true"),
        (lambda manifest: manifest["files"].pop(LAYER_1), f"files has no {LAYER_1}"),
        (
            lambda manifest: manifest["files"].update({"statistics/layer-00.safetensors": manifest["files"][LAYER_1]}),
            "files has statistics/layer-00.safetensors, and the layer is not captured",
        ),
        (
            lambda manifest: manifest["statistics"]["nonfinite"].update({"l00h00q.post": 1}),
            "statistics.nonfinite has 'l00h00q.post', which is no head and stage",
        ),
        (
            lambda manifest: manifest["config"]["capture"]["statistics"].update(enabled=False),
            f"it has the file {LAYER_1}, but capture.statistics.enabled is false",
        ),
    ],
)
def test_manifests_that_contradict_the_statistics(change_manifest: Any, expected: str, root: Path) -> None:
    edit(root, change_manifest)
    assert expected in wrong(verified(root))["manifest"]


def test_a_dataset_without_statistics_has_no_facts_of_them(undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    root = copied(undisturbed(capture={"layers": [1]}, verify={"examples": 0}), tmp_path / "out")
    assert "  statistics" not in verified(root)
    edit(root, lambda manifest: manifest.update(statistics={"tokens": 1, "nonfinite": {}}))
    assert "it has statistics, but capture.statistics.enabled is false" in wrong(verified(root))["manifest"]


def test_the_tokens_in_the_manifest_are_those_of_the_examples(root: Path) -> None:
    edit(root, lambda manifest: manifest["statistics"].update(tokens=TOKENS - 1))
    found = wrong(verified(root))
    assert f"{TOKENS - 1:,} instead of {TOKENS:,}" in found["statistics"]


@pytest.mark.parametrize("d", [0, 1 << 20, 1 << 40])
def test_arrays_without_numbers_that_claim_any_size(d: int, root: Path) -> None:
    shapes = {name: [0, d] for name in ("mean", "variance", "minimum", "maximum")} | {"covariance": [0, d, d]}
    shapes |= {name: [0] for name in ("heads", "count", "nonfinite", "norm_mean", "norm_variance")}
    whole = ("heads", "count", "nonfinite")
    header = {
        f"q.post.{name}": {"dtype": "I64" if name in whole else "F32", "shape": shape, "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    data = json.dumps(header).encode()
    (root / LAYER_1).write_bytes(len(data).to_bytes(8, "little") + data)
    restate(root)
    with pytest.raises(StoreError, match=r"contradicts itself \(q\.post\.mean is empty\)"):
        qk_sniffer.open_dataset(root).statistics(1, "q", "post")
    assert "mean is empty" in wrong(verified(root))["statistics"]


def edit_header(path: Path, seed: str, outside: Path) -> str:
    """Makes a random change of the header of a file; returns its description."""
    editor, data = Editor(seed, outside), path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(editor.edited(json.loads(data[8 : 8 + length]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    return editor.what


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_a_changed_header_is_a_problem_or_an_error(part: int, root: Path, tmp_path: Path) -> None:
    path = root / LAYER_1
    data = path.read_bytes()
    for number in range(30 if part else 8):
        path.write_bytes(data)
        what = edit_header(path, f"{part}-{number}", tmp_path)
        restate(root)
        problems = verify(root).problems
        for kind, stage in itertools.product("qk", ("pre", "post")):
            try:
                qk_sniffer.open_dataset(root).statistics(1, kind, stage)
            except StoreError:
                assert problems, what
