"""Tests the buffer between forward pass and disk: its regions never overlap and are as low as possible."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qk_sniffer.store.buffer import Buffer, Region


@given(st.lists(st.one_of(st.integers(1, 700), st.just(None)), max_size=60))
def test_a_region_keeps_its_bytes_until_it_is_given_back(calls: list[int | None]) -> None:
    buffer, held = Buffer(1000), list[tuple[Region, int]]()
    for number, nbytes in enumerate(calls):
        if nbytes is None:
            if held:
                buffer.give_back(held.pop(0)[0])
        elif (region := buffer.take(nbytes)) is not None:
            assert len(region.memory) == nbytes
            region.memory[:] = number
            held.append((region, number))
        else:
            assert held  # an empty buffer takes everything up to its own size
        assert all((region.memory == content).all() for region, content in held)


def test_the_lowest_region_is_taken_first_and_starts_aligned() -> None:
    buffer = Buffer(1000)
    first, second, third = (buffer.take(nbytes) for nbytes in (100, 200, 300))
    assert first is not None and second is not None and third is not None
    assert [region.start for region in (first, second, third)] == [0, 128, 384]
    assert buffer.take(500) is None  # 296 are left at the end
    buffer.give_back(second)
    again = buffer.take(256)
    assert again is not None and (again.start, again.stop) == (128, 384)
    buffer.give_back(first)
    last = buffer.take(129)
    assert last is not None and last.start == 704  # after the third
    lowest = buffer.take(128)
    assert lowest is not None and lowest.start == 0


@given(st.permutations(range(8)))
def test_regions_given_back_in_any_order_become_one_gap(order: list[int]) -> None:
    buffer = Buffer(8 * 64)
    regions = [buffer.take(60) for _ in order]
    assert buffer.take(1) is None
    for number in order:
        region = regions[number]
        assert region is not None
        buffer.give_back(region)
    assert buffer.take(8 * 64) is not None


def test_a_region_larger_than_the_buffer_is_given_while_nothing_else_is_taken() -> None:
    buffer = Buffer(100)
    one = buffer.take(1)
    assert one is not None and buffer.take(101) is None
    buffer.give_back(one)
    large = buffer.take(101)
    assert large is not None and len(large.memory) == 101
    assert buffer.take(1) is None
    buffer.give_back(large)
    np.testing.assert_array_equal([region is not None for region in (buffer.take(100), buffer.take(1))], [True, False])
