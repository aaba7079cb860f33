"""Tests statistics of numbers of any size that float32 holds, against float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.jobs import run
from support.verify_cases import edit, verified, wrong

import qk_sniffer
from qk_sniffer.capture import moments as moments_module
from qk_sniffer.capture.moments import Moments, _Sums
from qk_sniffer.config import StatisticsConfig
from qk_sniffer.errors import StoreError
from qk_sniffer.export.write import export
from qk_sniffer.store.statistics import PartKey, Statistics

KEY = PartKey(0, "q", "pre")
PAIRS = [(0, 2), (1, 3)]


def statistics_of(vectors: torch.Tensor, *, covariance: bool = True) -> Statistics:
    """The statistics of vectors (heads, tokens, 4) of one text, in two parts."""
    parts = []
    for piece in vectors.tensor_split(2, dim=1):
        config = StatisticsConfig(enabled=True, stages=["pre"], covariance=covariance)
        moments = Moments(config, {(0, "q"): [*range(len(vectors))]}, {0: PAIRS})
        moments.add(KEY, piece[None], [[(0, piece.shape[1])]])
        parts.append(moments.take()[KEY])
    return Statistics.of(range(len(vectors)), parts[0].merged(parts[1]), PAIRS)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1e-30, torch.bfloat16),
        (1e-22, torch.float32),
        (1e-14, torch.float32),
        (1.0, torch.float32),
        (6e4, torch.float16),
        (1e16, torch.float32),
        (4e18, torch.bfloat16),
        (4e18, torch.float32),
        (3e38, torch.bfloat16),
        (3e38, torch.float32),
    ],
)
@pytest.mark.parametrize("covariance", [True, False])
def test_numbers_of_any_size_are_right_or_nan(size: float, dtype: torch.dtype, covariance: bool) -> None:
    drawn = torch.rand((2, 301, 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    drawn[0] *= size
    drawn[0, 150] = torch.tensor([size, -size, size, -size])
    vectors = drawn.to(dtype)
    rows = vectors.double().numpy()
    found = statistics_of(vectors, covariance=covariance)
    assert found.count.tolist() == [301, 301] and not found.nonfinite.any()
    assert np.array_equal(found.minimum, rows.min(axis=1)) and np.array_equal(found.maximum, rows.max(axis=1))
    as_complex = rows[..., [0, 1]] + 1j * rows[..., [2, 3]]
    norms = np.linalg.norm(rows, axis=2)
    for head in range(2):
        scale = np.abs(rows[head]).max()
        assert found.mean[head] == pytest.approx(rows[head].mean(axis=0), abs=1e-6 * scale)
        expected = [
            (found.variance[head], rows[head].var(axis=0, ddof=1)),
            (found.norm_mean[head], norms[head].mean()),
            (found.norm_variance[head], norms[head].var(ddof=1)),
        ]
        if covariance:
            assert found.covariance is not None
            expected.append((found.covariance[head], np.cov(rows[head].T)))
        assert found.frequency_modulus is not None
        expected.append((found.frequency_modulus[head], np.abs(as_complex[head]).mean(axis=0)))
        is_held = all(np.abs(numbers).max() < np.finfo(np.float32).max for _, numbers in expected)
        assert found.overflows(head) == (not is_held) == (head == 0 and size == 3e38)
        for mine, numbers in expected:
            if np.abs(numbers).max() < np.finfo(np.float32).max:
                assert np.abs(mine - numbers).max() <= 1e-5 * np.abs(numbers).max() + np.finfo(np.float32).tiny
            else:
                assert np.isnan(mine[np.abs(numbers) > np.finfo(np.float32).max]).all()


def test_a_mean_near_zero_has_all_its_digits() -> None:
    drawn = torch.randn((2, 3000, 4), generator=torch.Generator().manual_seed(0))
    vectors = torch.cat([drawn, 1e-4 - drawn], dim=1)
    rows = vectors.double().numpy()
    found = statistics_of(vectors)
    assert np.abs(rows.mean(axis=1)).max() < 1e-4
    assert found.mean == pytest.approx(rows.mean(axis=1), rel=1e-6)
    assert found.covariance[0] == pytest.approx(np.cov(rows[0].T), abs=1e-5)


def test_memory_does_not_depend_on_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []
    add = _Sums.add

    def watched(self: _Sums, vectors: torch.Tensor, pairs: torch.Tensor | None, buffer: torch.Tensor) -> None:
        pieces.append(vectors.numel() * 4)
        assert buffer.numel() * 4 <= 1 << 14
        add(self, vectors, pairs, buffer)

    monkeypatch.setattr(_Sums, "add", watched)
    monkeypatch.setitem(moments_module.PIECE_BYTES, "cpu", 1 << 14)
    held = []
    for tokens in (2_000, 50_000):
        moments = Moments(StatisticsConfig(enabled=True, stages=["pre"]), {(0, "q"): [0, 1]}, {0: PAIRS})
        moments.add(KEY, torch.ones((2, 2, tokens, 4)), [[(0, tokens)], [(0, tokens - 7)]])
        (sums,) = moments._sums.values()
        held.append(sum(tensor.numel() for tensor in vars(sums).values()))
    assert held[0] == held[1] and max(pieces) <= 1 << 14 and sum(pieces) == 4 * 2 * 4 * (2 * 52_000 - 14)


def test_nan_and_inf_are_left_out_of_large_numbers() -> None:
    vectors = torch.full((1, 8, 4), 3e38)
    vectors[0, :4] *= -1
    vectors[0, 1, 2], vectors[0, 6, 0] = torch.nan, -torch.inf
    found = statistics_of(vectors)
    assert found.count.tolist() == [6] and found.nonfinite.tolist() == [2]
    assert found.mean[0] == pytest.approx([0.0] * 4, abs=1e32)
    assert set(found.minimum[0]) == {np.float32(-3e38)} and set(found.maximum[0]) == {np.float32(3e38)}


def scaled(checkpoint: Path, folder: Path, factor: float) -> Path:
    """Copies a checkpoint, and multiplies the queries of its last layer."""
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.2.self_attn.q_norm.weight"] *= factor
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
def test_vectors_too_small_for_squares_in_float32_are_proven_and_whole(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    """Of heads that training has left unused."""
    folder = scaled(checkpoint, tmp_path / "model", 1e-25)
    values = {"capture": {"statistics": {"enabled": True, "stages": ["pre", "post"]}}, "verify": {"examples": 1}}
    root = run(folder, texts, tmp_path / "out", **values)
    dataset = qk_sniffer.open_dataset(root)
    assert dataset.manifest["proof"]["proven"] is True and dataset.manifest["proof"]["statistics"]["heads"] == 18
    rows = dataset.vectors(2, 0, "q").vectors.astype(np.float64)
    assert 0 < np.abs(rows).max() < 1e-23
    norms = np.linalg.norm(rows, axis=1)
    assert dataset.statistics(2, "q", "post").norm_mean[0] == pytest.approx(norms.mean(), rel=1e-5, abs=0)
    assert wrong(verified(root)) == {}


@pytest.mark.slow
def test_heads_whose_covariance_float32_cannot_hold_are_reported(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = scaled(checkpoint, tmp_path / "model", 1e20)
    values = {"capture": {"statistics": {"enabled": True, "stages": ["pre", "post"]}}, "verify": {"examples": 0}}
    root = tmp_path / "out"
    for count in (10, 24):  # growth keeps what is not known
        run(folder, texts, root, dataset={"max_samples": count}, **values)
    said = capsys.readouterr().out
    assert "Statistics have NaN for numbers that float32 cannot hold: l02h00q.pre, l02h01q.pre, l02h02q.pre, " in said
    dataset = qk_sniffer.open_dataset(root)
    names = [f"l02h0{head}q.{stage}" for stage in ("pre", "post") for head in range(4)]
    assert dataset.manifest["statistics"]["overflow"] == names
    found = dataset.statistics(2, "q", "post")
    assert found.covariance is not None and np.isnan(found.covariance).any() and np.isfinite(found.mean).all()
    rows = dataset.vectors(2, 0, "q").vectors.astype(np.float64)
    assert found.mean[0] == pytest.approx(rows.mean(axis=0), abs=1e-6 * np.abs(rows).max())
    report = verified(root)
    assert wrong(report) == {} and "float32 cannot hold all numbers of 8 of the heads and stages" in report
    with pytest.raises(StoreError, match="l02h00q at the stage post have numbers that float32 cannot hold"):
        export(dataset, "qfilters", tmp_path / "filters")
    assert export(dataset, "triattention", tmp_path / "stats.pt").exists(), "which needs no covariance"
    edit(root, lambda manifest: manifest["statistics"].update(overflow=[]))
    assert "NaN differs from overflow in manifest.json" in str(wrong(verified(root)))


def test_only_tokens_of_the_spans_count() -> None:
    states = torch.randn((3, 2, 50, 4), generator=torch.Generator().manual_seed(1))
    masks = [np.zeros(50, bool), np.arange(31) % 7 < 3, np.arange(4) < 3]
    config = StatisticsConfig(enabled=True, stages=["pre"], skip_tokens=2)
    moments = Moments(config, {(0, "q"): [0, 1]}, {0: PAIRS})
    spans = moments.spans([50, 31, 4], masks)
    assert spans[0] == [] and spans[1][:2] == [(2, 3), (7, 10)] and spans[2] == [(2, 3)]
    assert moments.spans([50, 2, 1, 3], None) == [[(2, 50)], [], [], [(2, 3)]]
    moments.add(KEY, states, spans)
    (part,) = moments.take().values()
    used = torch.cat([states[1, :, :31][:, masks[1]][:, 2:], states[2, :, 2:3]], dim=1).double().numpy()
    assert part.count.tolist() == [used.shape[1]] * 2
    np.testing.assert_allclose(part.mean, used.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(part.minimum, used.min(axis=1), atol=1e-6)


def test_a_batch_without_a_token_that_counts_has_empty_statistics() -> None:
    moments = Moments(StatisticsConfig(enabled=True, stages=["pre"]), {(0, "q"): [0, 1]}, {0: PAIRS})
    moments.add(KEY, torch.ones((1, 2, 5, 4)), [[]])
    (part,) = moments.take().values()
    assert part.count.tolist() == [0, 0] and not part.mean.any()
