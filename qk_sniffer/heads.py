"""Ranks query heads by where their attention goes: to the first tokens, close keys, distant keys, or the token before.

capture.attention makes the summaries that this reads, so no model runs. It writes heads.csv, heads.parquet and, if
matplotlib is installed, a map of layers and heads as heads.png and heads.svg. docs/heads.md describes the columns.

Exit codes: 0 written, 1 the dataset has no such summaries, 2 the settings are wrong, 130 interrupted.
"""

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from qk_sniffer.cli import program
from qk_sniffer.dataset.head_scores import RANKED, Ranges, head_scores
from qk_sniffer.dataset.reader import open_dataset
from qk_sniffer.drawing.draw import MATPLOTLIB_MISSING, can_draw
from qk_sniffer.drawing.head_scores import score_maps, title
from qk_sniffer.drawing.style import save
from qk_sniffer.store.disk import write_atomic
from qk_sniffer.store.layout import PICTURE_SUFFIXES
from qk_sniffer.store.open_folder import OpenFolder
from qk_sniffer.store.output_folder import claimed_folder
from qk_sniffer.store.own_files import MADE_BY, is_marked_table, starts_with
from qk_sniffer.text import counted, say

NAME = "heads"
"""The name of the files, without their suffixes."""

SHOWN = 5
"""The heads that are printed for each score."""


@dataclass(frozen=True)
class Settings:
    """The settings of the program."""

    data_root: str = field(metadata=program.DATA_ROOT)
    revision: str | None = field(default=None, metadata=program.REVISION)
    output_dir: Path | None = field(
        default=None, metadata={"help": "folder to write; null: <data_root>-heads, or outputs/<revision>-heads"}
    )
    local_distance: int = field(default=63, metadata={"help": "keys closer than this are close: 2**b - 1"})
    far_distance: int = field(default=511, metadata={"help": "keys from this distance on are distant: 2**b - 1"})


def main() -> int:
    """Runs `python -m qk_sniffer.heads`; returns the exit code."""
    return program.run("qk_sniffer.heads", __doc__ or "", Settings, _program)


def _program(settings: Settings) -> int:
    dataset = open_dataset(settings.data_root, settings.revision)
    sink_tokens = dataset.attention_settings.sink_tokens
    ranges = Ranges(settings.local_distance, settings.far_distance, sink_tokens)
    scores = head_scores(dataset, ranges)
    folder = settings.output_dir or dataset.beside("-heads")
    of_results, is_default = partial(_is_of_results, folder), settings.output_dir is None
    with claimed_folder(folder, "ranking heads", is_own=of_results, is_default=is_default) as lock:
        for suffix, data, is_own in (
            ("csv", _csv(scores), _IS_OWN),
            ("parquet", _parquet(scores), is_marked_table),
        ):
            write_atomic(folder / f"{NAME}.{suffix}", data, access=lock, is_own=is_own)
        written = [f"{NAME}.csv", f"{NAME}.parquet"]
        if can_draw():
            save(folder / NAME, lambda: score_maps(scores, title(dataset, ranges)), access=lock)
            written += [f"{NAME}{suffix}" for suffix in PICTURE_SUFFIXES]
    say(f"{counted(scores.num_rows, 'query head')}; queries at positions from {ranges.first_position:,} on.")
    for line in _leaders(scores):
        say(line)
    say(f"Written: {folder}/{', '.join(written)}")
    if not can_draw():
        say(f"No picture: {MATPLOTLIB_MISSING}")
    return 0


def _is_of_results(folder: Path, names: list[str]) -> bool:
    """Whether a folder has the table of this program."""
    name = f"{NAME}.csv"
    with OpenFolder.at(folder) as opened:
        return name in names and opened.type_of(name) == "file" and _IS_OWN(opened, name)


_IS_OWN = starts_with(b'"layer","head","key_head","sliding_window","rows","examples"')
"""Tells heads.csv, by its first columns, from other tables of this name."""


def _leaders(scores: pa.Table) -> Iterator[str]:
    """Yields a line for each score, with the heads in which it is largest."""
    for name, words in RANKED.items():
        ordered = scores.sort_by(f"{name}_rank").slice(0, SHOWN).to_pylist()
        heads = ", ".join(f"l{row['layer']:02d}h{row['head']:02d} {row[name]:.3f}" for row in ordered if row["rows"])
        yield f"{words}: {heads}"


def _csv(scores: pa.Table) -> bytes:
    target = io.BytesIO()
    pa_csv.write_csv(scores, target)
    return target.getvalue()


def _parquet(scores: pa.Table) -> bytes:
    target = io.BytesIO()
    pq.write_table(scores.replace_schema_metadata(MADE_BY), target, compression="zstd")
    return target.getvalue()


if __name__ == "__main__":
    sys.exit(main())
