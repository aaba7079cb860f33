"""Checks the files of pictures: both formats, whole or not at all, the same bytes twice, without time and version."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pytest

import qk_sniffer
from qk_sniffer.drawing.style import PAPER_SUFFIXES, as_text, check_cells, figure, save
from qk_sniffer.errors import QkSnifferError, StoreError
from qk_sniffer.store.open_folder import PLAIN, Checked, OpenFolder
from qk_sniffer.store.places import is_drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPO = Path(qk_sniffer.__file__).parent.parent


def drawing() -> "Figure":
    drawn = figure(3.0, 2.0)
    axes = drawn.add_subplot()
    axes.imshow(np.arange(12.0).reshape(3, 4))
    axes.set(title=as_text("$a$ <b>\x1b"), xlabel="channel")
    return drawn


def test_a_picture_is_gone_when_it_is_written(tmp_path: Path) -> None:
    drawn: list[weakref.ref[Figure]] = []

    def remembered() -> "Figure":
        made = drawing()
        drawn.append(weakref.ref(made))
        return made

    # As in a program, which collects next to nothing by itself.
    gc.disable()
    try:
        save(tmp_path / "picture", remembered)
        assert [reference() for reference in drawn] == [None]
    finally:
        gc.enable()


def test_a_picture_is_a_png_and_an_svg_of_the_same_bytes_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = save(tmp_path / "a.b", drawing)
    assert files == [tmp_path / "a.b.png", tmp_path / "a.b.svg"]
    first = [path.read_bytes() for path in files]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert [path.read_bytes() for path in save(tmp_path / "a.b", drawing)] == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.png", "a.b.svg"], "no temporary file is left"
    png, svg = first[0], first[1].decode()
    assert png.startswith(b"\x89PNG") and ">channel</text>" in svg and "&lt;b&gt;" in svg
    assert matplotlib.__version__ not in svg and matplotlib.__version__.encode() not in png and "dc:date" not in svg
    with OpenFolder.at(tmp_path) as folder:
        assert all(is_drawn(folder, path.name) for path in files)


@pytest.mark.slow
def test_pictures_for_papers_are_a_pdf_too_which_is_known_and_replaced(tmp_path: Path) -> None:
    files = save(tmp_path / "a", drawing, suffixes=PAPER_SUFFIXES)
    assert [file.suffix for file in files] == [".png", ".svg", ".pdf"]
    first = files[2].read_bytes()
    assert first.startswith(b"%PDF") and b"/CreationDate" not in first and b"/Subtype /Type3" not in first
    with OpenFolder.at(tmp_path) as folder:
        assert is_drawn(folder, "a.pdf")
    save(tmp_path / "a", drawing, suffixes=PAPER_SUFFIXES)
    assert files[2].read_bytes() == first
    files[2].write_bytes(first.replace(b"(qk-sniffer)", b"(other)"))
    with pytest.raises(StoreError, match=r"a\.pdf was not written by qk-sniffer"):
        save(tmp_path / "a", drawing, suffixes=PAPER_SUFFIXES)


@pytest.mark.slow
def test_settings_of_others_do_not_change_a_picture(tmp_path: Path) -> None:
    """A matplotlibrc of the current folder makes such settings. With LaTeX, they would read a file into the picture."""
    expected = [path.read_bytes() for path in save(tmp_path / "a", drawing)]
    with matplotlib.rc_context():
        matplotlib.rcParams.update(
            {"text.usetex": True, "text.latex.preamble": r"\input{/etc/passwd}", "axes.facecolor": "red"}
        )
        assert [path.read_bytes() for path in save(tmp_path / "a", drawing)] == expected
        assert matplotlib.rcParams["axes.facecolor"] == "red"


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["a link to a secret", "a pipe", "no text"])
def test_a_matplotlibrc_of_the_current_folder_is_not_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hf_secret")
    (tmp_path / "here").mkdir()
    file = tmp_path / "here" / "matplotlibrc"
    match kind:
        case "a link to a secret":
            file.symlink_to(tmp_path / "secret")
        case "a pipe":
            os.mkfifo(file)
        case _:
            file.write_bytes(b"\xff")
    code = "from qk_sniffer.drawing.style import styled\nimport os\nwith styled(): print(os.getcwd())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "here",
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.rstrip("\n")) == (tmp_path / "here").resolve()


@pytest.mark.slow
def test_a_picture_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    save(tmp_path / "a", drawing)
    (tmp_path / "a.svg").unlink()
    (tmp_path / "a.svg").mkdir()
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(StoreError, match=r"a\.svg is a folder, and is not replaced: move it away"):
        save(tmp_path / "a", lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    (tmp_path / "a.svg").rmdir()
    with pytest.raises(ZeroDivisionError):
        save(tmp_path / "a", drawing, access=Checked(PLAIN, lambda: 1 // 0))  # type: ignore[arg-type,return-value]
    assert (tmp_path / "a.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_a_picture_of_someone_else_stays(name: str, tmp_path: Path) -> None:
    def appears() -> "Figure":
        (tmp_path / name).write_bytes(b"\x89PNG the user's own")
        return drawing()

    (tmp_path / name).write_bytes(b"\x89PNG the user's own")
    with pytest.raises(StoreError, match=rf"{name} was not written by qk-sniffer, and is not replaced: move it away"):
        save(tmp_path / "a", lambda: pytest.fail("it is refused before the drawing"))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / name).unlink()
    with pytest.raises(StoreError, match=f"{name} was not written by qk-sniffer"):
        save(tmp_path / "a", appears)
    assert (tmp_path / name).read_bytes() == b"\x89PNG the user's own"
    assert {path.name for path in tmp_path.iterdir()} <= {"a.png", name}, "no temporary file is left"
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("elsewhere")
    with pytest.raises(StoreError, match=f"{name} is a link, and is not replaced"):
        save(tmp_path / "a", drawing)


def test_a_hidden_file_of_the_same_name_stays(tmp_path: Path) -> None:
    names = [".a.png", ".a.png.tmp", "a.png.tmp"]
    for name in names:
        (tmp_path / name).write_text("the user's")
    save(tmp_path / "a", drawing)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "a.png", "a.svg"])
    assert {(tmp_path / name).read_text() for name in names} == {"the user's"}


def test_a_grid_of_any_size_is_refused() -> None:
    check_cells((1, 1 << 25))
    with pytest.raises(QkSnifferError, match=r"a grid of 2 x 16,777,217 cells; a picture shows at most 33,554,432"):
        check_cells((2, (1 << 24) + 1))
