"""Checks the examples of a dataset whose texts are split: that the parts of a text follow each other.

All parts have the same room for tokens of their text: `max_length`, less the special tokens that are added to each.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qk_sniffer.store.parquet_tables import out_of_order, values

Bools = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


def first_parts(index: Int64) -> Int64:
    """Returns the row of the first part of each example's text, (num_examples,). `index` is that of the texts."""
    starts = np.flatnonzero(np.diff(index, prepend=index[:1] - 1) != 0)
    return np.repeat(starts, np.diff(starts, append=len(index)))


def part_problems(table: pa.Table, max_length: int, added: int | None) -> Iterator[tuple[str, Bools]]:
    """Yields each problem of parts, and whether each row of the list of examples has it.

    `added` is the number of special tokens that are added to each text; None if it is not known.
    """
    names = ("example_id", "num_tokens", "index", "part", "first_token", "truncated")
    example_id, num_tokens, index, part, first_token, truncated = (values(table[name]) for name in names)
    yield "the parts of a text do not follow each other in the order of the source", out_of_order(index, part)
    later: Bools = part > 0
    number = np.cumsum(later, dtype=np.int64)
    yield "the numbers of later parts are not -1, -2, ... in the order of the source", later & (example_id != -number)
    yield "the number of a text is negative", ~later & (example_id < 0)
    first = first_parts(index)
    same = np.ones(len(table), np.bool_)
    for name in ("source_id", "text_hash"):
        column = table[name]
        same &= values(pc.equal(column, column.take(pa.array(first))))
    yield "the parts of a text have different ids or hashes of it", ~same
    yield "an example is truncated, although texts are split", truncated
    room = max_length - added if added is not None else _room(part, first_token, max_length)
    yield (
        "first_token is not the number of the text's tokens before the part",
        first_token != part.astype(np.int64) * room,
    )
    follows = np.append(later[1:], False)[: len(part)]
    yield "a part that is not the last has not max_length tokens", follows & (num_tokens != max_length)
    yield "a part has no token of its text", later & (num_tokens <= max_length - room)


def _room(part: npt.NDArray[np.int32], first_token: Int64, max_length: int) -> int:
    """Returns the room that the first later part shows; `max_length` if there is none, or it shows none."""
    later = np.flatnonzero(part > 0)
    if not len(later):
        return max_length
    room = int(first_token[later[0]]) // int(part[later[0]])
    return room if 1 <= room <= max_length else max_length
