"""Formats lists for messages."""

import pytest

from qk_sniffer.text import shortened


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b"], "a, b"),
        (["a", "b", "c"], "a, b and 1 more"),
        (["a", "b", *map(str, range(2000))], "a, b and 2,000 more"),
    ],
)
def test_a_long_list_ends_with_the_number_of_the_others(names: list[str], expected: str) -> None:
    assert shortened(names, 2) == expected
