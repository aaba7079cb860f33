"""Tests the selection of heads, on example layers with grouped heads and sliding windows."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from qk_sniffer.backbone.layers import LayerHeads
from qk_sniffer.capture.selection import select
from qk_sniffer.config import MOST_HEAD_DIM, CaptureConfig, HeadSamplingConfig
from qk_sniffer.errors import CaptureError, ConfigError
from qk_sniffer.text import compact_ranges

# Six layers like gemma's: two with a sliding window, then one without. Eight query heads share two key heads.
LAYERS = [LayerHeads(n, 8, 2, 64, sliding_window=None if n % 3 == 2 else 512) for n in range(6)]
ALL_HEADS = {(layer, head) for layer in range(6) for head in range(8)}
TABLE = Path(__file__).parents[1] / "data" / "sampled_rows.json"


def query_heads(layers: list[LayerHeads], capture: CaptureConfig) -> set[tuple[int, int]]:
    return {(layer, head) for layer, kind, heads in select(layers, capture) if kind == "q" for head in heads}


def drawn(count: int, seed: int = 0, layers: list[LayerHeads] = LAYERS) -> set[tuple[int, int]]:
    return query_heads(layers, CaptureConfig(head_sampling=HeadSamplingConfig(count, seed)))


def test_by_default_every_head_is_captured() -> None:
    selection = select(LAYERS, CaptureConfig())
    both = [(layer, kind) for layer in range(6) for kind in "qk"]
    assert list(selection) == [(layer, kind, tuple(range(8)) if kind == "q" else (0, 1)) for layer, kind in both]
    assert (selection.eligible, selection.drawn, selection.num_heads, selection.note) == (48, 48, 60, None)
    assert [chosen.layer for chosen in selection.layers] == LAYERS


def test_layers_come_in_order_and_once() -> None:
    selection = select(LAYERS[::-1], CaptureConfig(layers=[5, 1, 5]))
    assert [layer for layer, _, _ in selection] == [1, 1, 5, 5]


def test_key_heads_follow_their_query_heads() -> None:
    selection = select(LAYERS, CaptureConfig(layers=[0, 3], heads=[7, 2, 1]))
    expected = [(0, "q", (1, 2, 7)), (0, "k", (0, 1)), (3, "q", (1, 2, 7)), (3, "k", (0, 1))]
    assert list(selection) == expected
    assert list(select(LAYERS, CaptureConfig(layers=[0], heads=[4, 6]))) == [(0, "q", (4, 6)), (0, "k", (1,))]


@pytest.mark.parametrize("num_k_heads", [1, 2, 4, 8])
def test_key_head_of_each_group(num_k_heads: int) -> None:
    layer = LayerHeads(0, 8, num_k_heads, 64, None)
    # The order in which transformers repeats key heads for their query heads.
    repeated = [head for head in range(num_k_heads) for _ in range(8 // num_k_heads)]
    assert [layer.key_head(head) for head in range(8)] == repeated


def test_one_kind_can_be_off() -> None:
    keys_only = select(LAYERS, CaptureConfig(capture_queries=False, heads=[5]))
    assert list(keys_only) == [(layer, "k", (1,)) for layer in range(6)]
    assert keys_only.layers[0].by_kind == {"k": (1,)}
    queries_only = select(LAYERS, CaptureConfig(capture_keys=False, heads=[5]))
    assert list(queries_only) == [(layer, "q", (5,)) for layer in range(6)]
    assert queries_only.num_heads == 6


def test_values_are_of_the_key_heads_and_outputs_of_the_query_heads() -> None:
    all_kinds = CaptureConfig(capture_values=True, capture_outputs=True, heads=[4, 5])
    heads = {"q": (4, 5), "k": (1,), "v": (1,), "o": (4, 5)}
    assert list(select(LAYERS, all_kinds)) == [(layer, kind, of) for layer in range(6) for kind, of in heads.items()]
    alone = replace(all_kinds, capture_queries=False, capture_keys=False)
    assert select(LAYERS, alone).layers[0].by_kind == {"v": (1,), "o": (4, 5)}


def test_full_attention_only_comes_before_the_draw() -> None:
    capture = CaptureConfig(full_attention_only=True)
    assert query_heads(LAYERS, capture) == {(layer, head) for layer in (2, 5) for head in range(8)}
    capture = replace(capture, head_sampling=HeadSamplingConfig(10, 0))
    selection = select(LAYERS, capture)
    assert (selection.eligible, selection.drawn) == (16, 10)
    assert {layer for layer, _, _ in selection} == {2, 5}


def test_heads_differ_by_layer() -> None:
    layers = [LayerHeads(0, 4, 4, 64, None), LayerHeads(4, 8, 2, 128, None)]
    capture = CaptureConfig(heads=[3, 6])
    assert list(select(layers, capture)) == [(0, "q", (3,)), (0, "k", (3,)), (4, "q", (3, 6)), (4, "k", (0, 1))]


def test_a_larger_draw_only_adds_heads() -> None:
    before: set[tuple[int, int]] = set()
    for count in (1, 2, 17, 47, 48):
        heads = drawn(count)
        assert len(heads) == count
        assert before < heads <= ALL_HEADS
        before = heads


def test_the_draw_depends_on_its_seed_alone() -> None:
    assert drawn(12) == drawn(12, layers=LAYERS[::-1])
    assert drawn(12) != drawn(12, seed=1)
    # A head's chance does not change with the others: without layer 5 the rest keep their order.
    without = drawn(12, layers=LAYERS[:5])
    assert {pair for pair in drawn(12) if pair[0] < 5} <= without


def test_every_head_is_drawn_equally_often() -> None:
    counts = Counter(pair for seed in range(400) for pair in drawn(6, seed))
    observed = [counts[pair] for pair in sorted(ALL_HEADS)]
    assert stats.chisquare(observed).pvalue > 1e-3


def test_the_draw_has_not_drifted() -> None:
    for case in json.loads(TABLE.read_text())["head_draws"]:
        layers = [LayerHeads(layer, 16, 8, 128, None) for layer in range(28)]
        assert sorted(drawn(case["count"], case["seed"], layers)) == [tuple(pair) for pair in case["heads"]]


def test_a_draw_of_more_than_all_heads_keeps_all_and_notes_it() -> None:
    selection = select(LAYERS, CaptureConfig(head_sampling=HeadSamplingConfig(300, 0)))
    assert (selection.eligible, selection.drawn) == (48, 48)
    assert selection.note == "capture.head_sampling.count is 300, but only 48 heads are eligible: all are kept"


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (CaptureConfig(layers=[2, 6, 7, 9]), "no layer 6-7, 9; the layers with attention are 0-5"),
        (CaptureConfig(layers=[-1]), "no layer -1; the layers with attention are 0-5"),
        (CaptureConfig(layers=[]), "capture.layers is empty: null captures all; the layers with attention are 0-5"),
        (CaptureConfig(heads=[3, 8]), "no eligible layer has query head 8; the eligible layers have query heads 0-7"),
        (CaptureConfig(heads=[]), "capture.heads is empty"),
        (CaptureConfig(full_attention_only=True, layers=[0, 1, 3]),
         "every layer of capture.layers (0-1, 3) has a sliding window; full attention: layers 2, 5"),
        (CaptureConfig(capture_queries=False, capture_keys=False), "all false: nothing to capture"),
        (CaptureConfig(head_sampling=HeadSamplingConfig(0, 0)), "head_sampling.count is 0; it must be at least 1"),
    ],
)  # fmt: skip
def test_an_impossible_selection_is_an_error(capture: CaptureConfig, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        select(LAYERS, capture)
    assert message in str(error.value)


def test_layers_that_hide_keys_for_another_reason_have_no_full_attention() -> None:
    """A layer of chunks, of sparse attention or of an unknown kind has no window, and is not full."""
    layers = [LayerHeads(0, 8, 2, 64, None), LayerHeads(1, 8, 2, 64, None, hides_keys=True)]
    capture = CaptureConfig(full_attention_only=True)
    assert query_heads(layers, capture) == {(0, head) for head in range(8)}
    with pytest.raises(ConfigError, match=r"\(1\) hides earlier keys \(sliding windows, chunks or sparse .* layers 0"):
        select(layers, replace(capture, layers=[1]))


def test_a_model_of_sliding_layers_has_no_full_attention() -> None:
    with pytest.raises(ConfigError, match="every layer of the model has a sliding window; full attention: none"):
        select(LAYERS[:2], CaptureConfig(full_attention_only=True))


def test_heads_that_do_not_divide_are_an_error_where_they_are_captured() -> None:
    layers = [*LAYERS, LayerHeads(6, 8, 3, 64, None)]
    with pytest.raises(CaptureError, match="layer 6 has 8 query heads and 3 key heads"):
        select(layers, CaptureConfig())
    assert len(list(select(layers, CaptureConfig(layers=[0])))) == 2


def test_compact_ranges() -> None:
    assert compact_ranges([7, 1, 2, 0, 3, 9, 10]) == "0-3, 7, 9-10"
    assert compact_ranges([]) == ""


def test_vectors_beyond_those_of_the_contract_are_refused() -> None:
    assert select([LayerHeads(0, 2, 1, MOST_HEAD_DIM, None)], CaptureConfig()).num_heads == 3
    larger = LayerHeads(7, 2, 1, MOST_HEAD_DIM + 1, None)
    with pytest.raises(CaptureError, match="layer 7 has vectors of 4,097 numbers, and those of a dataset have at most"):
        select([*LAYERS, larger], CaptureConfig(layers=[0]))


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, qk_sniffer.capture.selection; print({'torch', 'transformers', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
