"""Draws the pictures of a dataset at the end of its job, and by the program."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from support.fake_hub import FakeHub
from support.hub_cases import BRANCH, REPO, copied, held
from support.jobs import run, write_texts
from support.verify_cases import edit

from qk_sniffer import pictures as program
from qk_sniffer.dataset.verify import verify
from qk_sniffer.drawing import draw, style
from qk_sniffer.jobs import pictures as of_job
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import TakenAwayError, hold, is_held
from qk_sniffer.store.open_folder import PLAIN

SECTIONS: dict[str, Any] = {
    "sampler": {"type": "none"},
    "capture": {"statistics": {"enabled": True}},
    "verify": {"examples": 0},
}
NAMES = [f"{name}{suffix}" for name in ("channel_ranges_post", "norms") for suffix in (".png", ".svg")]


@pytest.fixture(scope="module")
def base(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with statistics after RoPE, whose job had no matplotlib."""
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qk_sniffer.jobs.pictures.can_draw", lambda: False)
        return run(checkpoint, write_texts(folder / "texts.jsonl"), folder / "out", **SECTIONS)


@pytest.fixture
def root(base: Path, tmp_path: Path) -> Path:
    """A copy of `base` that a test may change."""
    return copied(base, tmp_path / "out")


def drawn(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "pictures").iterdir())}


def called(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pictures", *arguments])
        return program.main()


@pytest.mark.slow
@pytest.mark.usefixtures("draws")
def test_a_job_draws_and_a_rerun_draws_what_is_missing(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run(checkpoint, texts, tmp_path / "out", dataset={"max_samples": 4}, **SECTIONS)
    assert f"Pictures: {root}/pictures/channel_ranges_post, norms (.png, .svg)\n" in capsys.readouterr().out
    first = drawn(root)
    assert [*first] == NAMES and not verify(root).problems
    (root / "pictures" / "norms.svg").unlink()
    (root / "pictures" / "channel_ranges_post.png").write_bytes(b"the user's own")
    run(checkpoint, texts, root, dataset={"max_samples": 4}, **SECTIONS)
    assert drawn(root) == first | {"channel_ranges_post.png": b"the user's own"}, "the same bytes, and nothing else"
    assert f"Pictures: {root}/pictures/norms (.png, .svg)\n" in capsys.readouterr().out
    run(checkpoint, texts, root, **SECTIONS)
    grown = drawn(root)
    assert grown.pop("channel_ranges_post.png") == b"the user's own"
    assert [*grown] == NAMES[2:] and all(grown[name] != first[name] for name in grown), "of more examples"


def test_without_matplotlib_a_job_says_so_and_ends_well(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(draw, "find_spec", lambda name: None)
    monkeypatch.setattr("qk_sniffer.jobs.pictures.can_draw", draw.can_draw)
    assert finalize(root) == 0 and not (root / "pictures").exists()
    message = "matplotlib is not installed: pip install matplotlib, and rerun the same command"
    assert [record.getMessage() for record in caplog.records] == [f"no pictures: {message}"]
    assert called(f"data_root={root}") == 1


@pytest.mark.usefixtures("draws")
def test_what_goes_wrong_with_pictures_does_not_fail_the_job(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (root / "pictures").symlink_to(tmp_path / "elsewhere")
    assert finalize(root) == 0 and not [*(tmp_path / "elsewhere").iterdir()]
    assert "pictures is not a folder, and pictures are not written through it" in caplog.text
    (root / "pictures").unlink()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 // 0)
    assert finalize(root) == 0 and [*(root / "pictures").iterdir()] == []
    assert "no pictures: " in caplog.text and "division" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("draws")
def test_pictures_are_published_with_the_dataset(
    root: Path, hub: FakeHub, api: HfApi, endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    assert finalize(root, hf_repo_id=REPO, hf_branch=BRANCH) == 0
    files = held(hub)
    assert {name for name in files if name.startswith("pictures/")} == {f"pictures/{name}" for name in NAMES}
    card = files["README.md"].decode()
    assert "![norms](pictures/norms.png)" in card and "[norms as SVG](pictures/norms.svg)" in card
    (root / "pictures").rename(tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    assert called(f"data_root={REPO}", f"revision={BRANCH}") == 0
    (folder,) = (tmp_path / "outputs").iterdir()
    assert folder.name == f"{BRANCH}-pictures"
    of_the_hub = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    assert of_the_hub == {path.name: path.read_bytes() for path in sorted((tmp_path / "first").iterdir())}


@pytest.mark.slow
def test_the_program_keeps_pictures_that_the_manifest_lists(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"bytes": 3, "sha256": "0" * 64}
    edit(root, lambda manifest: manifest["files"].update({"pictures/norms.png": entry}))
    assert called(f"data_root={root}") == 0
    said = capsys.readouterr().out
    assert said == (
        "Kept, because manifest.json lists them: norms; output_dir=... draws them elsewhere\n"
        f"Pictures: {root}/pictures/channel_ranges_post (.png, .svg)\n"
    )
    assert [*drawn(root)] == NAMES[:2]


def test_the_program_names_what_is_wrong(
    root: Path, verify_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(f"data_root={verify_base}") == 1
    assert "has nothing to draw: capture.statistics.enabled=true makes statistics" in capsys.readouterr().err

    def replaced(*_: Any, **__: Any) -> None:
        edit(root, lambda manifest: manifest["config"]["model"].update(slug="another"))

    monkeypatch.setattr("qk_sniffer.drawing.statistics.channel_ranges", replaced)
    assert called(f"data_root={root}") == 1
    assert "another dataset has replaced the one in" in capsys.readouterr().err
    assert Layout(root).pictures() == []


@pytest.mark.slow
@pytest.mark.usefixtures("draws")
@pytest.mark.parametrize("draw_again", [finalize, lambda root: called(f"data_root={root}")], ids=["job", "program"])
def test_no_dataset_is_moved_into_place_while_a_picture_gets_its_name(
    draw_again: Callable[[Path], int], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of the dataset before would be one of the new dataset."""
    real, held = style.rename_over_own, []

    def rename(*arguments: Any) -> None:
        held.append(is_held(Layout(root).finalize_lock))
        real(*arguments)

    monkeypatch.setattr(style, "rename_over_own", rename)
    assert draw_again(root) == 0
    assert held == [True] * 4 and not Layout(root).work.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("draws")
def test_pictures_wait_for_no_job_that_makes_another_dataset(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qk_sniffer.store.same_dataset.PATIENCE_S", 0.0)
    with hold(Layout(root).finalize_lock, "making a dataset there"):
        assert called(f"data_root={root}") == 1
        assert f"{root} is in use: process {os.getpid()} on " in capsys.readouterr().err
        assert finalize(root) == 0
    assert "no pictures: " in caplog.text and "is in use" in caplog.text
    assert Layout(root).pictures() == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_program_keeps_a_picture_of_someone_else(
    name: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (root / "pictures", tmp_path / "album"):
        folder.mkdir()
        (folder / name).write_bytes(b"the user's own")
        assert called(f"data_root={root}", f"output_dir={folder}") == 1
        assert f"{folder / name} was not written by qk-sniffer, and is not replaced" in capsys.readouterr().err
        assert (folder / name).read_bytes() == b"the user's own"


@pytest.mark.slow
def test_no_picture_is_written_through_a_link_that_is_planted_meanwhile(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    album = tmp_path / "album"
    album.mkdir()
    (album / "norms.png").write_text("the user's")
    real = draw.save

    def plant(path: Path, *arguments: Any, **options: Any) -> Any:
        if not (root / "pictures").is_symlink():
            (root / "pictures").rename(tmp_path / "moved")
            (root / "pictures").symlink_to(album)
        return real(path, *arguments, **options)

    monkeypatch.setattr(draw, "save", plant)
    assert called(f"data_root={root}") == 0
    assert [path.name for path in album.iterdir()] == ["norms.png"]
    assert (album / "norms.png").read_text() == "the user's"
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == NAMES


def test_the_own_folder_of_pictures_has_many_names(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(root, lambda manifest: manifest["files"].update({"pictures/norms.png": {"bytes": 3, "sha256": "0" * 64}}))
    monkeypatch.setattr(draw, "save", lambda *_, **__: [Path("a")])
    (root / "pictures").mkdir()
    for folder, name in ((root, "pictures"), (root / "pictures", ".")):
        monkeypatch.chdir(folder)
        assert called(f"data_root={root}", f"output_dir={name}") == 0
        assert "Kept, because manifest.json lists them: norms" in capsys.readouterr().out


@pytest.mark.usefixtures("draws")
def test_a_job_does_not_draw_another_dataset_that_is_in_its_folder_for_a_moment(
    checkpoint: Path, texts: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = SECTIONS | {"capture": {"statistics": {"enabled": True, "skip_tokens": 1}}}
    with monkeypatch.context() as patch:
        patch.setattr("qk_sniffer.jobs.pictures.can_draw", lambda: False)
        run(checkpoint, texts, tmp_path / "other", **sections)
    manifest, draw_all = manifests.read(root), of_job.draw

    def swap() -> None:
        root.rename(tmp_path / "aside")
        (tmp_path / "other").rename(root)
        (tmp_path / "aside").rename(tmp_path / "other")

    def in_time(pictures: Any, *arguments: Any, **options: Any) -> list[str]:
        made = {name: make() for name, make in pictures.items()}
        swap()
        return draw_all({name: lambda name=name: made[name] for name in made}, *arguments, **options)

    monkeypatch.setattr(of_job, "draw", in_time)
    swap()
    with pytest.raises(TakenAwayError, match="another dataset has replaced"):
        of_job.draw_pictures(Layout(root), PLAIN, manifest)
    assert not (root / "pictures").exists() and not (tmp_path / "other" / "pictures").exists()
