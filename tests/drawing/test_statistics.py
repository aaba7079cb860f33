"""Checks that the pictures of statistics show the numbers of `Dataset.statistics` and of the rows, and their names."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.export_cases import statistics

import qk_sniffer
from qk_sniffer.config import STAGES
from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.drawing import statistics as module
from qk_sniffer.drawing.style import ABSENT, styled
from qk_sniffer.store.statistics import Statistics

KINDS = {"k": "key", "q": "query"}


@pytest.fixture
def dataset(undisturbed: Callable[..., Path]) -> Dataset:
    """A dataset with every row, and statistics before and after RoPE."""
    return qk_sniffer.open_dataset(undisturbed(capture=statistics(), verify={"examples": 0}))


@pytest.fixture(autouse=True)
def in_style() -> Iterator[None]:
    with styled():
        yield


def drawn(dataset: Dataset, name: str) -> Any:
    return module.pictures(dataset)[name]()


def grid(axes: Any) -> np.ndarray:
    (image,) = axes.get_images()
    return np.ma.filled(image.get_array().astype(float), np.nan)


def layers_of(dataset: Dataset, kind: str, stage: str) -> list[Statistics]:
    return [dataset.statistics(layer, kind, stage) for layer in (0, 1, 2)]


def norms_of(dataset: Dataset, layer: int, kind: str) -> list[np.ndarray]:
    """The norms of the rows of each head of a layer."""
    keys = [key for key in dataset.heads if (key.layer, key.kind) == (layer, kind)]
    return [np.linalg.norm(dataset.vectors(*key).vectors.astype(np.float64), axis=1) for key in keys]


def bars(figure: Any) -> list[str]:
    """The labels of the bars of colours."""
    return [axes.get_ylabel() for axes in figure.axes if axes.get_label() == "<colorbar>"]


@pytest.mark.parametrize("stage", STAGES)
def test_channels_show_the_largest_values_of_the_heads(dataset: Dataset, stage: str) -> None:
    figure = drawn(dataset, f"channel_ranges_{stage}")
    model = dataset.manifest["config"]["model"]["slug"]
    tokens = dataset.manifest["tokens"]
    words = {"pre": "before RoPE", "post": "after RoPE"}[stage]
    assert figure.get_suptitle() == f"{model} on texts, {tokens:,} tokens a head, {words}"
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    for (kind, name), by_channel, by_head in zip(KINDS.items(), panels[::2], panels[1::2], strict=True):
        absmax = np.stack([one.absmax for one in layers_of(dataset, kind, stage)])
        np.testing.assert_array_equal(grid(by_channel), absmax.max(axis=1))
        np.testing.assert_array_equal(grid(by_head), absmax.max(axis=2))
        assert (by_channel.get_xlabel(), by_channel.get_ylabel()) == (f"channel of the {name} head", "layer")
        assert by_channel.get_title() == f"{name} channels: largest over the heads"
        assert (by_head.get_xlabel(), by_head.get_title()) == (f"{name} head", "largest of each head")
        assert by_channel.get_images()[0].norm is by_head.get_images()[0].norm, "one scale of colours"
    assert bars(figure) == ["largest |value| (vector units)"] * 2 and not figure.legends


def test_norms_are_those_of_the_rows(dataset: Dataset) -> None:
    figure = drawn(dataset, "norms")
    assert [axes.get_title() for axes in figure.axes] == ["key vectors", "query vectors"]
    assert figure.axes[0].get_ylabel() == "Euclidean norm (vector units)"
    for kind, axes in zip(KINDS, figure.axes, strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        every = [np.concatenate(norms_of(dataset, layer, kind)) for layer in (0, 1, 2)]
        after = lines["mean ± standard deviation, after RoPE"]
        np.testing.assert_array_equal(after.get_xdata(), [0, 1, 2])
        np.testing.assert_allclose(after.get_ydata(), [norms.mean() for norms in every], rtol=1e-5)
        before = lines["mean ± standard deviation, before RoPE"]
        np.testing.assert_allclose(before.get_ydata(), after.get_ydata(), rtol=1e-5, err_msg="RoPE keeps norms")
        # The upper edge of the band: after RoPE, then before.
        for band in axes.collections:
            (path,) = band.get_paths()
            top = [max(y for x, y in path.vertices if x == layer) for layer in (0, 1, 2)]
            np.testing.assert_allclose(top, [norms.mean() + norms.std(ddof=1) for norms in every], rtol=1e-4)
        heads = [norms.mean() for layer in (0, 1, 2) for norms in norms_of(dataset, layer, kind)]
        np.testing.assert_allclose(lines["mean of each head"].get_ydata(), heads, rtol=1e-5)


def test_frequencies_show_modulus_and_concentration(dataset: Dataset) -> None:
    figure = drawn(dataset, "rotary_frequencies")
    assert figure.get_suptitle().endswith("before RoPE")
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    for (kind, name), moduli, directed in zip(KINDS.items(), panels[::2], panels[1::2], strict=True):
        layers = layers_of(dataset, kind, "pre")
        np.testing.assert_allclose(grid(moduli), [one.frequency_modulus.mean(axis=0) for one in layers], rtol=1e-6)
        expected = [(np.abs(one.frequency_mean) / one.frequency_modulus).mean(axis=0) for one in layers]
        np.testing.assert_allclose(grid(directed), expected, rtol=1e-5)
        assert directed.get_images()[0].get_clim() == (0, 1)
        assert moduli.get_title() == f"{name} vectors: mean modulus"
        assert directed.get_title() == f"{name} vectors: concentration of the direction"
        assert {axes.get_xlabel() for axes in (moduli, directed)} == {"rotary frequency (0: the fastest)"}
    assert sorted(bars(figure)) == ["R = |mean| / mean modulus"] * 2 + ["mean modulus (vector units)"] * 2


def test_there_are_pictures_of_the_stages_that_were_taken(dataset: Dataset, verify_base: Path) -> None:
    names = ["channel_ranges_pre", "channel_ranges_post", "norms", "rotary_frequencies"]
    assert [*module.pictures(dataset)] == names
    dataset.stages = ["post"]
    assert [*module.pictures(dataset)] == names[1:3]
    assert module.pictures(qk_sniffer.open_dataset(verify_base)) == {}


def test_values_and_outputs_are_in_the_pictures_after_rope(undisturbed: Callable[..., Path]) -> None:
    capture = statistics() | {"capture_values": True, "capture_outputs": True, "capture_keys": False}
    dataset = qk_sniffer.open_dataset(undisturbed(capture=capture, verify={"examples": 0}))
    figure = drawn(dataset, "norms")
    assert [axes.get_title() for axes in figure.axes] == [f"{kind} vectors" for kind in ("value", "query", "output")]
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 3, 2]
    assert len(figure.legends[0].get_texts()) == 3, "the lines of queries, which RoPE changes"
    for stage, number in (("pre", 1), ("post", 3)):
        panels = [axes for axes in drawn(dataset, f"channel_ranges_{stage}").axes if axes.get_label() != "<colorbar>"]
        assert len(panels) == 2 * number


def test_norms_without_a_variance(dataset: Dataset) -> None:
    """A head with one token has none, and a variance that float32 cannot hold is not known."""
    one = dataset.statistics(0, "q", "pre")
    norms, nan = np.array([3.0, 4.0, 5.0, 6.0], np.float32), np.full(4, np.nan, np.float32)
    single = replace(one, count=np.ones(4, np.int64), norm_mean=norms, norm_variance=nan)
    np.testing.assert_allclose(module.pooled(single), (4.5, norms.std(ddof=1)))
    mean, deviation = module.pooled(replace(single, count=np.array([1, 2, 1, 1])))
    assert mean == 4.4 and np.isnan(deviation)


def test_covariances_are_not_read(dataset: Dataset) -> None:
    found = module.read(dataset, "post")
    assert [*found] == [*KINDS] and all([*layers] == [0, 1, 2] for layers in found.values())
    whole = dataset.statistics(1, "q", "post")
    assert whole.covariance is not None and found["q"][1].covariance is None
    np.testing.assert_array_equal(found["q"][1].variance, whole.variance)
    assert dataset.find_statistics(9, "q", "post") is dataset.find_statistics(0, "x", "post") is None


def without_numbers(one: Statistics) -> Statistics:
    """Statistics of heads without a token."""
    return replace(
        one,
        count=np.zeros_like(one.count),
        **{
            name: np.full_like(getattr(one, name), np.nan)
            for name in ("minimum", "maximum", "norm_mean", "norm_variance", "frequency_modulus", "mean")
        },
    )


def test_what_is_not_there_is_hatched_and_zeros_are_not(dataset: Dataset) -> None:
    narrow = dataset.statistics(0, "k", "pre")
    wide = replace(
        narrow,
        heads=np.array([1, 40]),
        minimum=np.concatenate([narrow.minimum, narrow.minimum * 0, narrow.minimum * 1e30], axis=1),
        maximum=np.concatenate([narrow.maximum, narrow.maximum * 0, np.full_like(narrow.maximum, np.inf)], axis=1),
    )
    figure = module.channel_ranges({"k": {3: narrow, 7: wide}}, "title")
    assert figure is not None
    by_channel, by_head = figure.axes[:2]
    d = narrow.mean.shape[1]
    shown = grid(by_channel)
    assert shown.shape == (2, 3 * d) and np.isnan(shown[0, d:]).all() and np.isnan(shown[1, 2 * d :]).all()
    norm = by_channel.get_images()[0].norm
    np.testing.assert_array_equal(shown[1, d : 2 * d], norm.vmin, "0 has the lowest colour")
    assert norm.vmin == narrow.absmax.max(axis=0).min() and norm.vmax == narrow.absmax.max()
    assert [tick.get_text() for tick in by_head.get_xticklabels()] == ["0", "1", "40"]
    assert [tick.get_text() for tick in by_head.get_yticklabels()] == ["3", "7"]
    assert np.argwhere(np.isnan(grid(by_head))).tolist() == [[0, 2], [1, 0]]
    assert by_channel.patch.get_hatch() == by_head.patch.get_hatch() == ABSENT["hatch"]
    assert figure.legends[0].get_texts()[0].get_text() == "none, or not captured"
    figure.canvas.draw()


def test_nothing_to_show_is_no_picture_and_constant_numbers_are_one(dataset: Dataset) -> None:
    one = dataset.statistics(0, "q", "pre")
    empty = {"q": {0: without_numbers(one)}}
    assert module.channel_ranges(empty, "") is module.rotary_frequencies(empty, "") is None
    assert module.norms({"pre": empty}, "") is None and module.norms({}, "") is None
    assert module.rotary_frequencies({"q": {0: replace(one, frequency_pairs=None, frequency_modulus=None)}}, "") is None
    for value in (0.0, 2.0):
        constant = replace(one, minimum=one.minimum * 0, maximum=np.full_like(one.maximum, value))
        figure = module.channel_ranges({"q": {0: constant}}, "")
        assert figure is not None
        figure.canvas.draw()
        np.testing.assert_array_equal(grid(figure.axes[0]), value)
