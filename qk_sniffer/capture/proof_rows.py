"""Reads the rows of a head's file that a proof compares."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qk_sniffer.store.open_folder import Access
from qk_sniffer.store.parquet_files import open_parquet


def tables_of_examples(
    path: Path,
    wanted: Sequence[tuple[int, npt.NDArray[np.int64]]],
    columns: Sequence[str],
    access: Access | None = None,
) -> list[pa.Table]:
    """Returns, for each (example_id, rows) in `wanted`, the position and `columns` of those of the numbered rows of a
    head's file that are of the example. Reads only the row groups that contain them."""
    if not wanted:
        return []
    with open_parquet(path, access) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        group_of = [np.searchsorted(starts, rows, side="right") - 1 for _, rows in wanted]
        read = np.unique(np.concatenate(group_of))
        table = file.read_row_groups(read.tolist(), columns=["example_id", "position", *columns]).combine_chunks()
    # The first row of each group that was read, among all rows that were read.
    place = dict(zip(read.tolist(), np.cumsum([0, *(sizes[group] for group in read)]).tolist(), strict=False))
    ids = table["example_id"].to_numpy()
    found = []
    for (example_id, rows), groups in zip(wanted, group_of, strict=True):
        numbers = rows - starts[groups] + np.array([place[group] for group in groups.tolist()], np.int64)
        found.append(table.take(numbers[ids[numbers] == example_id]))
    return found
