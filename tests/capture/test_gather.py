"""Tests that every way of gathering gives the rows of plain indexing."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qk_sniffer.capture import gather as gather_module
from qk_sniffer.capture.gather import DeviceCopiers, Heads, TokenIndices, send, take
from qk_sniffer.capture.sampling import Picks

CPU = torch.device("cpu")
BATCH, HEADS, TOKENS, DIM = 3, 6, 200, 4


def states() -> torch.Tensor:
    """Returns states (B, H, n, d) with the memory layout of a model's: heads after tokens."""
    return torch.randn(BATCH, TOKENS, HEADS, DIM).transpose(1, 2)


def picks_of(kept: Sequence[Sequence[int]]) -> Picks:
    row = np.repeat(np.arange(len(kept), dtype=np.int32), [len(positions) for positions in kept])
    return Picks(row, np.array([position for positions in kept for position in positions], np.int32))


def indexed(vectors: torch.Tensor, heads: Sequence[int], picks: Picks) -> torch.Tensor:
    taken = [vectors[row, list(heads), position] for row, position in zip(picks.row, picks.position, strict=True)]
    return torch.stack(taken, dim=1)


def test_whole_examples_are_ranges_and_samples_are_not() -> None:
    whole = TokenIndices.of(picks_of([range(200), range(150), range(70)]), CPU)
    assert whole.ranges == [(0, 0, 0, 200), (200, 1, 0, 150), (350, 2, 0, 70)]
    assert TokenIndices.of(picks_of([range(0, 200, 2), [], range(3)]), CPU).ranges is None
    assert TokenIndices.of(picks_of([[], []]), CPU).ranges == []
    assert TokenIndices.of(picks_of([range(200)]), torch.device("cuda")).ranges is None


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.sets(st.integers(0, TOKENS - 1)).map(sorted),
            st.tuples(st.integers(0, 99), st.integers(100, TOKENS)).map(lambda ends: list(range(*ends))),
        ),
        min_size=1,
        max_size=BATCH,
    ),
    st.sets(st.integers(0, HEADS - 1), min_size=1).map(sorted),
    st.integers(1, 300),
)
def test_every_piece_is_what_indexing_gives(kept: list[list[int]], heads: list[int], step: int) -> None:
    vectors, picks = states(), picks_of(kept)
    shared = TokenIndices.of(picks, CPU)
    others = {"b": TokenIndices.of(picks_of([[5], [7], [1, 9]]), CPU), "c": TokenIndices.of(picks, CPU)}
    sent = send({"a": shared, **others, "d": shared}, CPU)
    assert sent["a"] is sent["d"]
    for each in (sent["a"], sent["c"]):
        for start in range(0, len(picks.row), step):
            stop = min(start + step, len(picks.row))
            memory = torch.full((len(heads), stop - start, DIM), torch.nan)
            write = partial(take, vectors, Heads(heads), each.part(start, stop))
            assert DeviceCopiers().fill(memory, CPU, write) is None
            expected = indexed(vectors, heads, Picks(picks.row[start:stop], picks.position[start:stop]))
            assert torch.equal(memory, expected)


@pytest.mark.parametrize("min_range", [1, 10**9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_both_ways_keep_every_bit(dtype: torch.dtype, min_range: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_module, "MIN_RANGE", min_range)
    vectors = states().to(dtype)
    vectors[1, 2, 3, :3] = torch.tensor([torch.nan, -torch.inf, -0.0])
    tokens = TokenIndices.of(picks_of([[], range(50), range(100, 130)]), CPU)
    assert (tokens.ranges is None) == (min_range > 1)
    memory = torch.empty(3, 80, DIM, dtype=dtype)
    DeviceCopiers().fill(memory, CPU, partial(take, vectors, Heads([1, 2, 5]), send({0: tokens}, CPU)[0]))
    expected = torch.cat([vectors[1, [1, 2, 5], :50], vectors[2, [1, 2, 5], 100:130]], dim=1)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(memory.view(bits), expected.contiguous().view(bits))
