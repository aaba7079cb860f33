"""Texts and checkpoints that change while a job runs, between its starts, or between its shards: never a mixture."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.jobs import TEXTS, Stopped, captured_only, hashes, run

from qk_sniffer.capture.capture import Capture
from qk_sniffer.config import DatasetConfig
from qk_sniffer.corpus.examples import open_corpus
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.hub.checkpoint_files import CheckpointFiles
from qk_sniffer.jobs import assemble, components, identity, shards
from qk_sniffer.jobs import components as components_module
from qk_sniffer.jobs import run as run_module
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import Layout

SECTIONS: dict[str, Any] = {"inference": {"batch_size": 4, "lookahead": 10}, "capture": {"layers": [1]}}


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def changed(row: int) -> list[str]:
    """The texts, with another one in this row."""
    return [text[::-1] if index == row else text for index, text in enumerate(TEXTS)]


def copy_of(checkpoint: Path, folder: Path) -> Path:
    """Copies a checkpoint that the test changes."""
    return Path(shutil.copytree(checkpoint, folder / checkpoint.name))


def half(index: int) -> dict[str, Any]:
    return SECTIONS | {"shard": {"index": index, "count": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("verify", [0, 1])
def test_shards_of_other_texts_make_no_dataset(checkpoint: Path, tmp_path: Path, verify: int) -> None:
    root, texts, whole = tmp_path / "out", write(tmp_path / "texts.jsonl", TEXTS), tmp_path / "whole"
    sections = {"verify": {"examples": verify}}
    run(checkpoint, texts, root, **half(0), **sections)
    write(texts, changed(4))  # a row of the first shard
    with pytest.raises(SourceError, match=r"example 4 .* not the text that was captured"):
        run(checkpoint, texts, root, **half(1), **sections)
    assert not (root / "manifest.json").exists()
    run(checkpoint, texts, root, **half(1), **sections, output={"overwrite": True})
    run(checkpoint, texts, root, **half(0), **sections)
    run(checkpoint, texts, whole, **SECTIONS, **sections)
    assert hashes(root).keys() == hashes(whole).keys()
    assert hashes(root)["examples/data.parquet"] == hashes(whole)["examples/data.parquet"]


def test_a_dataset_does_not_grow_from_a_source_that_has_lost_a_text(checkpoint: Path, tmp_path: Path) -> None:
    root, texts = tmp_path / "out", write(tmp_path / "texts.jsonl", TEXTS[:4])
    run(checkpoint, texts, root, **SECTIONS)
    write(texts, [TEXTS[0], "", *TEXTS[2:6]])
    with pytest.raises(SourceError, match=r"example 1 of the dataset has lost the text that .* was made from"):
        run(checkpoint, texts, root, **SECTIONS)
    assert manifests.read(root)["examples"] == 4


@pytest.mark.parametrize("row", [1, 3])
@pytest.mark.parametrize("appended", [0, 2])
def test_a_dataset_that_lacks_a_text_which_has_come_since_is_refused(
    checkpoint: Path, tmp_path: Path, row: int, appended: int
) -> None:
    """Its rows are numbered by the source: the new text would never be captured, and nothing would say so."""
    root, texts = tmp_path / "out", tmp_path / "texts.jsonl"
    write(texts, [text if index != row else "" for index, text in enumerate(TEXTS[:4])])
    run(checkpoint, texts, root, **SECTIONS)
    write(texts, TEXTS[: 4 + appended])
    with pytest.raises(SourceError, match=rf"example {row} of the dataset .* has a text now, and had none"):
        run(checkpoint, texts, root, **SECTIONS)
    run(checkpoint, texts, root, **SECTIONS, output={"overwrite": True})
    assert hashes(root) == hashes(run(checkpoint, texts, tmp_path / "whole", **SECTIONS))


@pytest.mark.parametrize("row", [1, 3])
def test_shards_that_lack_a_text_which_has_come_since_make_no_dataset(
    checkpoint: Path, tmp_path: Path, row: int
) -> None:
    root, texts = tmp_path / "out", tmp_path / "texts.jsonl"
    write(texts, [text if index != row else "" for index, text in enumerate(TEXTS[:4])])
    run(checkpoint, texts, root, **half(1))
    write(texts, TEXTS[:4])
    with pytest.raises(SourceError, match=rf"example {row} of the dataset .* has a text now, and had none"):
        run(checkpoint, texts, root, **half(0))
    assert not (root / "manifest.json").exists()


def test_texts_without_tokens_are_in_no_dataset_and_are_no_change(checkpoint: Path, tmp_path: Path) -> None:
    root, texts = tmp_path / "out", write(tmp_path / "texts.jsonl", [TEXTS[0], " ", *TEXTS[1:3], " "])
    folder = copy_of(checkpoint, tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for index in (0, 1):
        run(folder, texts, root, **half(index))
    assert manifests.read(root)["skipped_rows"] == 2
    run(folder, texts, root, **SECTIONS)  # nothing to do
    write(texts, [TEXTS[0], " ", *TEXTS[1:3], " ", TEXTS[3]])
    run(folder, texts, root, **SECTIONS)
    assert manifests.read(root)["examples"] == 4


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (changed(11), "not the text that was captured"),
        ([*TEXTS[:11], ""], "lost the text"),
        ([TEXTS[0], *TEXTS[2:]], "not the text"),
    ],
)
def test_a_captured_job_whose_texts_have_changed_makes_no_dataset_of_the_old_ones(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], message: str
) -> None:
    """The next start would refuse it. The proof reads only the texts that it draws."""
    path, root = write(tmp_path / "texts.jsonl", TEXTS[:12]), tmp_path / "out"
    sections = SECTIONS | {"verify": {"examples": 0}}
    captured_only(checkpoint, path, root, monkeypatch, **sections)
    write(path, texts[:12])
    for _ in range(2):
        with pytest.raises(SourceError, match=message):
            run(checkpoint, path, root, **sections)
    assert not (root / "manifest.json").exists()
    assert finalize(root, prove=False) == 0, "the way out that keeps what was captured"
    assert manifests.read(root)["examples"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("done", [False, True])
def test_overwriting_gets_out_of_a_job_whose_texts_have_changed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    root, texts = tmp_path / "out", write(tmp_path / "texts.jsonl", TEXTS)
    if done:
        captured_only(checkpoint, texts, root, monkeypatch, **SECTIONS)
    else:
        real, ran = Capture.run, []

        def stop(self: Capture, plan: Any) -> None:
            ran.append(plan)
            if len(ran) > 4:
                raise Stopped
            real(self, plan)

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(Capture, "run", stop)
            run(checkpoint, texts, root, **SECTIONS)
    write(texts, changed(7))
    run(checkpoint, texts, root, **SECTIONS, output={"overwrite": True})
    assert hashes(root) == hashes(run(checkpoint, texts, tmp_path / "whole", **SECTIONS))


def other_weights(model: Path) -> bytes:
    """The file of other weights of the same shapes."""
    weights = load_file(model / "model.safetensors")
    other = model.with_suffix(".other")
    save_file({name: value * 1.5 for name, value in weights.items()}, other, {"format": "pt"})
    return other.read_bytes()


def overwrite(path: Path, content: bytes) -> None:
    """Writes into the file, which stays the same one."""
    with path.open("r+b") as file:
        file.write(content)


def replace(path: Path, content: bytes) -> None:
    """Puts another file in the place of the file."""
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").rename(path)


@pytest.mark.parametrize("change", [overwrite, pytest.param(replace, marks=pytest.mark.slow)])
def test_a_model_whose_file_is_written_while_the_job_runs(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    model, root = copy_of(checkpoint, tmp_path), tmp_path / "out"
    file = model / "model.safetensors"
    before, real, ran = file.read_bytes(), Capture.run, []

    def run_changed(self: Capture, plan: Any) -> None:
        ran.append(plan)
        if len(ran) == 4:
            change(file, other_weights(model))
        real(self, plan)

    with monkeypatch.context() as patch:
        patch.setattr(Capture, "run", run_changed)
        if change is replace:  # the loaded weights are those of the former file
            run(model, texts, root, **SECTIONS)
            replace(file, before)
        else:
            with pytest.raises(StoreError, match=r"model\.safetensors was changed while the job computed with it"):
                run(model, texts, root, **SECTIONS)
            assert not (root / "manifest.json").exists()
            with pytest.raises(StoreError, match="commit of the model"):
                run(model, texts, root, **SECTIONS)
            overwrite(file, before)
    run(model, texts, root, **SECTIONS)
    assert hashes(root) == hashes(run(checkpoint, texts, tmp_path / "whole", **SECTIONS))


@pytest.mark.parametrize("change", [pytest.param(overwrite, marks=pytest.mark.slow), replace])
def test_a_model_that_changes_between_its_digest_and_its_loading_is_refused(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    model, root, real = copy_of(checkpoint, tmp_path), tmp_path / "out", components.load_backbone

    def load(*args: Any, **options: Any) -> Any:
        change(model / "model.safetensors", other_weights(model))
        return real(*args, **options)

    monkeypatch.setattr(components, "load_backbone", load)
    with pytest.raises(SourceError, match=r"the files of the model in .* changed while the job used them"):
        run(model, texts, root, **SECTIONS)
    assert not root.exists()


def test_a_model_that_is_written_before_the_proof_proves_nothing(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, root, real = copy_of(checkpoint, tmp_path), tmp_path / "out", assemble.compact

    def compact(*args: Any, **options: Any) -> Any:
        overwrite(model / "model.safetensors", other_weights(model))
        return real(*args, **options)

    monkeypatch.setattr(assemble, "compact", compact)
    with pytest.raises(SourceError, match="was changed while the job computed with it"):
        run(model, texts, root, **SECTIONS)


def test_the_strings_of_tokens_are_those_of_the_tokenizer_of_the_capture(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, root, real = copy_of(checkpoint, tmp_path), tmp_path / "out", run_module.finish
    sections = SECTIONS | {"capture": {"layers": [1], "capture_token_strings": True}}
    vocabulary = model / "tokenizer.json"
    before = vocabulary.read_text(encoding="utf-8")

    def finish(*args: Any) -> Any:
        replace(vocabulary, before.replace('"a":', '"A":').encode())
        return real(*args)

    monkeypatch.setattr(run_module, "finish", finish)
    assert '"a":' in before
    run(model, texts, root, **sections)
    monkeypatch.undo()
    whole = run(checkpoint, texts, tmp_path / "whole", **sections)
    assert hashes(root)["l01h00q/data.parquet"] == hashes(whole)["l01h00q/data.parquet"]


def test_finalize_refuses_a_tokenizer_that_changes_under_it(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, root, real = copy_of(checkpoint, tmp_path), tmp_path / "out", assemble.load_tokenizer
    sections = SECTIONS | {"capture": {"layers": [1], "capture_token_strings": True}}
    captured_only(model, texts, root, monkeypatch, **sections)

    def load(*args: Any) -> Any:
        vocabulary = model / "tokenizer.json"
        replace(vocabulary, vocabulary.read_bytes().replace(b'"a":', b'"A":'))
        return real(*args)

    monkeypatch.setattr(assemble, "load_tokenizer", load)
    with pytest.raises(SourceError, match=r"the files of the tokenizer in .* changed while the job used them"):
        finalize(root, prove=False)


def test_a_repository_does_not_take_the_place_of_a_folder(
    checkpoint: Path, texts: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint, "mine")
    captured_only(Path("mine"), texts, in_tmp / "out", monkeypatch, **SECTIONS)
    shutil.rmtree("mine")
    monkeypatch.setattr(identity, "current_commit", lambda name, revision: "c" * 40)
    with pytest.raises(StoreError, match=f"commit of the model: 'sha256:.*' there, '{'c' * 40}' now"):
        run(Path("mine"), texts, in_tmp / "out", **SECTIONS)
    with pytest.raises(SourceError, match="changed after the capture"):
        finalize(in_tmp / "out")


def test_a_file_is_read_again_only_when_it_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qk_sniffer.hub.checkpoint_files._TICK_NS", -(10**12))
    file = tmp_path / "config.json"
    file.write_bytes(b"one")
    files = CheckpointFiles(tmp_path)
    monkeypatch.setattr("qk_sniffer.hub.checkpoint_files.hashlib.file_digest", None)
    assert CheckpointFiles(tmp_path).digest == files.digest
    files.check()
    monkeypatch.undo()
    file.chmod(0o600)  # other attributes, the same content
    files.check()
    overwrite(file, b"two")
    with pytest.raises(SourceError, match=r"config\.json was changed"):
        files.check()
    assert CheckpointFiles(tmp_path).digest != files.digest


def test_a_job_does_not_replace_a_dataset_that_was_made_while_it_started(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, real = tmp_path / "out", components_module.load_components

    def load(*args: Any) -> Any:
        monkeypatch.setattr(components_module, "load_components", real)
        run(checkpoint, texts, root, **SECTIONS, sampler={"seed": 3})
        return real(*args)

    monkeypatch.setattr(components_module, "load_components", load)
    with pytest.raises(StoreError, match=r"another job has changed the dataset in .* while this one started"):
        run(checkpoint, texts, root, **half(0))
    assert manifests.read(root)["config"]["sampler"]["seed"] == 3


def test_a_job_that_adds_to_another_version_does_not_discard_the_work_of_a_shard(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, texts = tmp_path / "out", write(tmp_path / "texts.jsonl", TEXTS[:12])
    run(checkpoint, texts, root, **SECTIONS)
    write(texts, TEXTS)
    aside, real = tmp_path / "aside", components_module.load_components
    names = [path.name for path in root.iterdir()]
    aside.mkdir()

    def load(*args: Any) -> Any:
        monkeypatch.setattr(components_module, "load_components", real)
        for name in names:
            (root / name).rename(aside / name)
        run(checkpoint, texts, root, **half(1))
        for name in names:
            (aside / name).rename(root / name)
        return real(*args)

    monkeypatch.setattr(components_module, "load_components", load)
    # The dataset is checked in a thread meanwhile, which may find no manifest.
    with pytest.raises(StoreError, match=r"another job has changed the dataset|nothing can be added to "):
        run(checkpoint, texts, root, **half(0))
    assert Layout(root).shard_done(1, 2).exists()


def test_the_last_of_two_shards_makes_the_dataset_though_the_lock_was_held(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    monkeypatch.setattr(assemble, "FINALIZE_PATIENCE_S", 0.0)
    marks = shards.read_mark

    def read_mark(layout: Layout, *rest: Any) -> Any:
        found = marks(layout, *rest)
        if rest[0] == 1 and found is None:  # the other shard ends while this one holds the lock
            monkeypatch.setattr(shards, "read_mark", marks)
            run(checkpoint, texts, root, **half(1))
            assert not (root / "manifest.json").exists()
        return found

    monkeypatch.setattr(shards, "read_mark", read_mark)
    run(checkpoint, texts, root, **half(0))
    assert manifests.read(root)["examples"] == len(TEXTS)


@pytest.mark.parametrize("change", [write, pytest.param(None, marks=pytest.mark.slow)])
def test_a_file_with_the_time_of_another_one_is_read_again(tmp_path: Path, change: Any) -> None:
    path = write(tmp_path / "texts.jsonl", ["one", "two"])
    config, facts = DatasetConfig(path=str(path)), path.stat()
    assert [each.content for each in open_corpus(config).examples()] == ["one", "two"]
    if change is None:
        path.unlink()
    write(path, ["six", "ten"])
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert [each.content for each in open_corpus(config).examples()] == ["six", "ten"]


def test_a_rerun_notices_other_texts_of_the_same_times(checkpoint: Path, tmp_path: Path) -> None:
    # A renamed folder takes its files along with all their times.
    now, later, root = tmp_path / "now", tmp_path / "later", tmp_path / "out"
    for folder, texts in ((now, TEXTS[:4]), (later, [TEXTS[0], TEXTS[1][::-1], *TEXTS[2:4]])):
        folder.mkdir()
        write(folder / "texts.jsonl", texts)
        os.utime(folder / "texts.jsonl", (10**9, 10**9))
    run(checkpoint, now / "texts.jsonl", root, **SECTIONS)
    now.rename(tmp_path / "before")
    later.rename(now)
    with pytest.raises(SourceError, match=r"example 1 .* is not the text that .* was made from"):
        run(checkpoint, now / "texts.jsonl", root, **SECTIONS)
