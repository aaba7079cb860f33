"""Writes the code in a dataset card that loads vectors from a folder or a branch of the Hub. Tests run this code."""

import shlex

from qk_sniffer.dataset.card_facts import Place
from qk_sniffer.markdown import block
from qk_sniffer.text import printable, python_literal

_LOAD_FOLDER = """\
```python
import os

from datasets import load_dataset

root = os.getcwd()  # the folder of this card
rows = load_dataset(root, {which}, split="train").with_format("numpy")
vectors = rows["vector"][:]  # float32 (rows, head_dim)
```
"""

_LOAD_BRANCH = """\
From the Hub, one head, with or without a copy on this machine:

{streaming}
With qk-sniffer, which fetches only the heads that you read:

{reading}
Download the whole branch, which the code below reads:

{download}"""

_STREAMING = """\
from datasets import load_dataset

rows = load_dataset({repo}, {which}, revision={branch}, split="train")
stream = load_dataset({repo}, {which}, revision={branch}, split="train", streaming=True)
"""

_READING = """\
import qk_sniffer

dataset = qk_sniffer.open_dataset({repo}, revision={branch})
vectors, positions, example_ids = dataset.vectors(*dataset.heads[0])
"""

_READ_FILES = """\
With pandas, polars or DuckDB:

```python
import numpy as np
import pandas as pd

frame = pd.read_parquet("{file}")
vectors = np.stack(frame["vector"])
```

```python
import polars as pl

vectors = pl.read_parquet("{file}")["vector"].to_numpy()
heads = pl.scan_parquet("l*{kind}/data.parquet", include_file_paths="file")
counts = heads.group_by("file", "bucket").len().collect()
```

```python
import duckdb

counts = duckdb.sql(
    "select filename, bucket, count(*) as rows "
    "from read_parquet('l*{kind}/data.parquet', filename = true) group by all order by all"
).fetchall()
```

With pyarrow, without a copy:

```python
import pyarrow.parquet as pq

column = pq.read_table("{file}", columns=["vector"])["vector"]
size = column.type.list_size
vectors = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, size) for chunk in column.chunks]
```
"""


def loading(place: Place | None, names: list[str], lists_all: bool) -> str:
    """Returns the section of a card on loading.

    Args:
        place: the branch on the Hub; None for a folder.
        names: of all heads.
        lists_all: whether the card's front matter names every head.
    """
    file = f"{names[0]}/data.parquet"
    which = python_literal(names[0]) if lists_all else f'data_files="{file}"'
    first, second = _LOAD_FOLDER.format(which=which), ""
    if place is not None:
        second = f"In that folder:\n\n{first}\n"
        repo, branch, folder = map(_shell_word, (place.repo_id, place.branch, place.branch.replace("/", "-")))
        literals = {"repo": python_literal(place.repo_id), "branch": python_literal(place.branch), "which": which}
        first = _LOAD_BRANCH.format(
            streaming=block("python", _STREAMING.format(**literals)),
            reading=block("python", _READING.format(**literals)),
            download=block("bash", f"hf download {repo} --repo-type dataset --revision {branch} --local-dir {folder}"),
        )
    text = f"## Loading\n\n{first}"
    if not lists_all:
        text += (
            f"\nA card cannot list {len(names):,} heads as configs: load every head as above, by its file.\n"
            'The default config is the first head. The config "examples" describes the examples.\n'
        )
    return f"{text}\n{second}{_READ_FILES.format(file=file, kind=names[0][-1])}"


def _shell_word(name: str) -> str:
    return shlex.quote(printable(name))
