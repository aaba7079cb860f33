"""Checkpoints whose folders, files or links are swapped and swapped back while a job loads them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.jobs import captured_only, hashes, run

from qk_sniffer.errors import SourceError
from qk_sniffer.hub.file_trails import Trails
from qk_sniffer.jobs import assemble, components
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.store import manifest as manifests

SECTIONS: dict[str, Any] = {"capture": {"layers": [1]}}

CHANGED = r"the files of the (model|tokenizer) in .* changed while the job used them: .*, or a link on its way, was"


@pytest.fixture
def other(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with other weights and another vocabulary, of the same shapes."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    weights = load_file(folder / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    vocabulary = folder / "tokenizer.json"
    vocabulary.write_bytes(vocabulary.read_bytes().replace(b'"a":', b'"A":'))
    return folder


@pytest.fixture
def mine(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, which a test may rename."""
    return Path(shutil.copytree(checkpoint, tmp_path / "mine" / checkpoint.name))


def link(path: Path, target: Path) -> Path:
    """Makes a link, or replaces one."""
    new = path.with_name(f"{path.name}.new")
    new.symlink_to(target)
    new.replace(path)
    return path


def during(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, swap: Callable[[], None]) -> None:
    """Swaps twice, around a call of `name` that loads files: the second time back."""
    real = getattr(module, name)

    def swapped(*args: Any, **options: Any) -> Any:
        swap()
        try:
            return real(*args, **options)
        finally:
            swap()

    monkeypatch.setattr(module, name, swapped)


def exchanging(one: Path, two: Path) -> Callable[[], None]:
    """Returns a function that gives each of two files or folders the name of the other."""

    def exchange() -> None:
        kept = one.with_name("kept")
        one.rename(kept)
        two.rename(one)
        kept.rename(two)

    return exchange


@pytest.mark.parametrize("loader", ["load_backbone", "open_tokenizer"])
def test_a_link_that_leads_elsewhere_for_a_moment_is_followed_once(
    checkpoint: Path, other: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    latest, targets = link(tmp_path / "latest", checkpoint), [checkpoint, other]

    def swap() -> None:
        targets.reverse()
        link(latest, targets[0])

    during(monkeypatch, components, loader, swap)
    root = run(latest, texts, tmp_path / "out", **SECTIONS)
    monkeypatch.undo()
    whole = run(checkpoint, texts, tmp_path / "whole", **SECTIONS)
    assert hashes(root) == hashes(whole)
    assert manifests.read(root)["commits"] == manifests.read(whole)["commits"]


def test_a_link_that_leads_elsewhere_after_the_start_is_followed_once(
    checkpoint: Path, other: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latest, real = link(tmp_path / "latest", checkpoint), components.check_model

    def moved(*args: Any, **options: Any) -> Any:
        link(latest, other)
        return real(*args, **options)

    monkeypatch.setattr(components, "check_model", moved)
    root = run(latest, texts, tmp_path / "out", **SECTIONS)
    monkeypatch.undo()
    assert hashes(root) == hashes(run(checkpoint, texts, tmp_path / "whole", **SECTIONS))


@pytest.mark.few(3)
@pytest.mark.parametrize("loader", ["load_backbone", "open_tokenizer"])
@pytest.mark.parametrize("name", ["", "model.safetensors", "tokenizer.json"])
def test_a_folder_or_file_that_is_exchanged_for_a_moment_is_refused(
    mine: Path, other: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str, name: str
) -> None:
    during(monkeypatch, components, loader, exchanging(mine / name, other / name))
    with pytest.raises(SourceError, match=CHANGED):
        run(mine, texts, tmp_path / "out", **SECTIONS)
    assert not (tmp_path / "out").exists()


def test_a_link_on_the_way_to_the_weights_that_is_exchanged_for_a_moment_is_refused(
    mine: Path, other: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, targets = tmp_path / "store", [tmp_path / "old", other]
    targets[0].mkdir()
    (mine / "model.safetensors").rename(targets[0] / "model.safetensors")
    link(store, targets[0])
    (mine / "model.safetensors").symlink_to(store / "model.safetensors")

    def swap() -> None:
        targets.reverse()
        link(store, targets[0])

    during(monkeypatch, components, "load_backbone", swap)
    with pytest.raises(SourceError, match=CHANGED):
        run(mine, texts, tmp_path / "out", **SECTIONS)


@pytest.mark.parametrize("where", [(components, "load_backbone"), (assemble, "load_tokenizer")])
def test_finalize_loads_no_folder_that_is_exchanged_for_a_moment(
    mine: Path, other: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str]
) -> None:
    root, sections = tmp_path / "out", {"capture": {"layers": [1], "capture_token_strings": True}}
    captured_only(mine, texts, root, monkeypatch, **sections)
    with monkeypatch.context() as patch, pytest.raises(SourceError, match=CHANGED):
        during(patch, *where, exchanging(mine, other))
        finalize(root)
    assert not (root / "manifest.json").exists()
    assert finalize(root) == 0


def test_trails_see_a_link_in_the_middle_of_a_path(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file").write_text(name)
    way = link(tmp_path / "way", Path("a"))
    up = link(tmp_path / "a" / "inner" / "up", Path("../../way/inner/file"))
    trails = Trails(tmp_path / "a" / "inner", [up])
    trails.check("unchanged")
    link(way, Path("b"))
    link(way, Path("a"))
    with pytest.raises(SourceError, match=r"^swapped: .*up, or a link on its way, was replaced"):
        trails.check("swapped")
    loop = link(tmp_path / "loop", tmp_path / "loop")
    Trails(tmp_path / "a", [loop]).check("links in a circle end")
