"""Draws docs/report.png: the upper part of a report, as a browser shows it.

python scripts/report_picture.py

Runs the commands of docs/report.md in an empty folder. Needs Debian's chromium.
"""

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
PICTURE = REPOSITORY / "docs" / "report.png"
WIDTH = 1180

sys.path.insert(0, str(REPOSITORY / "tests"))
from support.browser import browser  # noqa: E402


def reduced(image: Image.Image) -> Image.Image:
    """Returns the picture in 256 colours: the 128 most frequent, and 128 for all others, of which none counts twice.

    A palette by the number of pixels has no place for the frame of the chosen cell.
    """
    colours, counts = np.unique(np.asarray(image).reshape(-1, 3), axis=0, return_counts=True)
    colours = colours[np.argsort(-counts, kind="stable")]
    others = Image.fromarray(colours[None])
    palette = Image.new("P", (1, 1))
    palette.putpalette([*colours[:128].ravel().tolist(), *(others.quantize(128).getpalette() or ())])
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


def main() -> None:
    page = (REPOSITORY / "docs" / "report.md").read_text(encoding="utf-8")
    block = re.search(r"```bash\n(.*?)```", page, re.DOTALL)
    assert block is not None
    with TemporaryDirectory() as folder, browser() as opened:
        for command in block[1].replace("\\\n", " ").splitlines():
            subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=folder, check=True)
        (report,) = (Path(folder) / "outputs").glob("*-report.html")
        opened.size(WIDTH, 900)
        opened.open(report)
        below = opened.value("document.querySelector('#heads').getBoundingClientRect().bottom + scrollY + 10")
        file = Path(folder) / "report.png"
        opened.screenshot(file, height=below)
        assert not opened.problems, opened.problems
        image = Image.open(io.BytesIO(file.read_bytes())).convert("RGB")
    reduced(image).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
