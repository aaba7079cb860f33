"""The buffer between forward and disk: places that never overlap, as low as they can be."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qk_sniffer.store.buffer import Buffer, Slot


@given(st.lists(st.one_of(st.integers(1, 700), st.just(None)), max_size=60))
def test_what_is_in_a_slot_stays_until_it_is_given_back(calls: list[int | None]) -> None:
    buffer, held = Buffer(1000), list[tuple[Slot, int]]()
    for number, nbytes in enumerate(calls):
        if nbytes is None:
            if held:
                buffer.give_back(held.pop(0)[0])
        elif (slot := buffer.take(nbytes)) is not None:
            assert len(slot.memory) == nbytes
            slot.memory[:] = number
            held.append((slot, number))
        else:
            assert held  # an empty buffer has room for all that is not larger than itself
        assert all((slot.memory == content).all() for slot, content in held)


def test_the_lowest_place_is_taken_first_and_begins_aligned() -> None:
    buffer = Buffer(1000)
    first, second, third = (buffer.take(nbytes) for nbytes in (100, 200, 300))
    assert first is not None and second is not None and third is not None
    assert [slot.start for slot in (first, second, third)] == [0, 128, 384]
    assert buffer.take(500) is None  # 296 are left at the end
    buffer.give_back(second)
    again = buffer.take(256)
    assert again is not None and (again.start, again.stop) == (128, 384)
    buffer.give_back(first)
    last = buffer.take(129)
    assert last is not None and last.start == 704  # behind the third
    lowest = buffer.take(128)
    assert lowest is not None and lowest.start == 0


@given(st.permutations(range(8)))
def test_what_is_given_back_in_any_order_is_one_piece_again(order: list[int]) -> None:
    buffer = Buffer(8 * 64)
    slots = [buffer.take(60) for _ in order]
    assert buffer.take(1) is None
    for number in order:
        slot = slots[number]
        assert slot is not None
        buffer.give_back(slot)
    assert buffer.take(8 * 64) is not None


def test_more_than_the_buffer_is_given_alone() -> None:
    buffer = Buffer(100)
    one = buffer.take(1)
    assert one is not None and buffer.take(101) is None
    buffer.give_back(one)
    large = buffer.take(101)
    assert large is not None and len(large.memory) == 101
    assert buffer.take(1) is None
    buffer.give_back(large)
    np.testing.assert_array_equal([slot is not None for slot in (buffer.take(100), buffer.take(1))], [True, False])
