"""Draws the pictures of a dataset: ranges of channels, norms, rotary frequencies, and what heads attend to.

A job draws them itself if matplotlib is installed there. This program draws them again, also of a dataset on the Hub.
Each picture is a PNG and an SVG. docs/pictures.md describes them.

Exit codes: 0 drawn, 1 the dataset cannot be drawn, 2 the settings are wrong, 130 interrupted.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from qk_sniffer.cli import program
from qk_sniffer.dataset.reader import open_dataset
from qk_sniffer.drawing.draw import MATPLOTLIB_MISSING, can_draw, draw, drawable, folder_of, unlisted
from qk_sniffer.errors import QkSnifferError, StoreError
from qk_sniffer.store.layout import PICTURE_SUFFIXES, Layout
from qk_sniffer.store.open_folder import Checked, anchored
from qk_sniffer.store.places import refuse_inside
from qk_sniffer.store.same_dataset import check_same, same_dataset
from qk_sniffer.text import say


@dataclass(frozen=True)
class Settings:
    """The settings of the program."""

    data_root: str = field(metadata=program.DATA_ROOT)
    revision: str | None = field(default=None, metadata=program.REVISION)
    output_dir: Path | None = field(
        default=None, metadata={"help": "folder to write; null: <data_root>/pictures, or outputs/<revision>-pictures"}
    )


def main() -> int:
    """Runs `python -m qk_sniffer.pictures`; returns the exit code."""
    return program.run("qk_sniffer.pictures", __doc__ or "", Settings, _program)


def _program(settings: Settings) -> int:
    dataset = open_dataset(settings.data_root, settings.revision)
    pictures = drawable(dataset)
    if not pictures:
        raise StoreError(
            f"{dataset} has nothing to draw: capture.statistics.enabled=true makes statistics, and "
            "capture.attention.enabled=true attention summaries"
        )
    if not can_draw():
        raise QkSnifferError(f"pictures cannot be drawn: {MATPLOTLIB_MISSING}")
    own = folder_of(dataset)
    folder = settings.output_dir or own
    if folder.name in ("", ".."):  # it has no name in the folder that contains it
        folder = folder.resolve()
    if dataset.folder is not None and folder.absolute() == own.absolute():
        new = unlisted(dataset, pictures)
        if kept := ", ".join(sorted(pictures.keys() - new.keys())):
            say(f"Kept, because manifest.json lists them: {kept}; output_dir=... draws them elsewhere")
        with anchored(dataset.folder) as access:
            layout = Layout(dataset.folder)
            unchanged = Checked(access, partial(check_same, layout, dataset.manifest))
            held = partial(same_dataset, layout, dataset.manifest, access)
            drawn = draw(new, own, access=unchanged, held=held)
    else:
        refuse_inside(folder, "output_dir")
        drawn = draw(pictures, folder)
    of_which = f"{folder}/{', '.join(drawn)} ({', '.join(PICTURE_SUFFIXES)})" if drawn else "there is nothing to draw"
    say(f"Pictures: {of_which}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
