"""A capture streams to a folder: the dataset is the one that it would be saved as, and memory does not grow with it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import TEXTS, hashes, run
from support.passes import Passes, facts_of

import qk_sniffer
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import CaptureError, StoreError
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.notebook.facts import CaptureFacts
from qk_sniffer.notebook.memory import MemoryStore
from qk_sniffer.notebook.save import save
from qk_sniffer.notebook.stream import FolderStream
from qk_sniffer.store.journal_writer import JournalWriter

SOME = TEXTS[:6]

STATISTICS: dict[str, Any] = {"capture": {"statistics": {"enabled": True}, "attention": {"enabled": True}}}

KILLED = """
import os, signal, sys
from pathlib import Path
from support.jobs import TEXTS
from support.passes import Passes, facts_of
from qk_sniffer.notebook.stream import FolderStream

facts = facts_of(Path(sys.argv[1]))
stream = FolderStream(facts, Path(sys.argv[2]))
with stream:
    stream._writer._segments._flush_s = 0.0
    passes = Passes(facts, stream)
    passes.whole(TEXTS[:4])
    passes.part(4, TEXTS[4], 0, 9)
    while stream._writer.durable_examples < 4:
        pass
    print("four", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def streamed(facts: CaptureFacts, folder: Path, act: Callable[[Passes], None]) -> Path:
    """Streams the passes that `act` runs."""
    holder: list[Passes] = []
    has_statistics = facts.config.capture.statistics.enabled
    stream = FolderStream(facts, folder, (lambda: holder[0].statistics()) if has_statistics else None)
    with stream:
        holder.append(Passes(facts, stream))
        act(holder[0])
    return folder


def in_parts(passes: Passes) -> None:
    """Runs texts two at a time, in turns, a few tokens in each pass, as generation does."""
    for first in range(0, len(SOME), 2):
        pair = {number: SOME[number] for number in (first, first + 1)}
        for start in range(0, max(map(len, pair.values())), 7):
            for number, text in pair.items():
                if start < len(text):
                    passes.part(number, text, start, min(start + 7, len(text)))
        passes.sink.complete([passes.record(number, pair[number]) for number in reversed(pair)])


@pytest.mark.slow
def test_it_is_what_a_capture_in_memory_is_saved_as(checkpoint: Path, tmp_path: Path) -> None:
    facts = facts_of(checkpoint, **STATISTICS)
    store = MemoryStore(piece_bytes=1 << 20)
    passes = Passes(facts, store)
    passes.whole(SOME)
    save(facts, store.finished, [*store.records.values()], tmp_path / "saved", statistics=passes.statistics())
    whole = streamed(facts, tmp_path / "whole", lambda passes: passes.whole(SOME))
    assert hashes(whole) == hashes(tmp_path / "saved")
    parts = streamed(facts, tmp_path / "parts", in_parts)
    assert verify(parts).problems == 0
    found, expected = hashes(parts), hashes(whole)
    files = {name for name in expected if name.endswith(".parquet") and "a/" not in name}
    assert {name: found[name] for name in files} == {name: expected[name] for name in files} and len(files) == 19
    assert not (parts / ".qk_sniffer").exists()


@pytest.mark.slow
def test_rows_do_not_stay_in_memory(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = facts_of(checkpoint, sampler={"type": "all"}, inference={"queue_mb": 1, "segment_mb": 1})
    taken, reserved, real = [], [], JournalWriter.reserve

    def watched(self: JournalWriter, rows: Any) -> Any:
        taken.append(self._segments._buffer.taken)
        reserved.append(rows.nbytes)
        return real(self, rows)

    monkeypatch.setattr(JournalWriter, "reserve", watched)
    streamed(facts, tmp_path / "out", lambda passes: passes.whole(TEXTS * 5))
    assert sum(reserved) > 2 << 20 and max(taken) <= 1 << 20
    assert verify(tmp_path / "out").problems == 0


@pytest.mark.slow
def test_a_killed_capture_can_be_finished(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(checkpoint), str(root)], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "four\n"), done.stderr
    with pytest.raises(StoreError, match="It is an unfinished capture from Python, of whose whole examples"):
        qk_sniffer.open_dataset(root)
    unfinished = r"holds an unfinished capture from Python, of 4 whole examples: python -m qk_sniffer\.finalize"
    with pytest.raises(StoreError, match=rf"{unfinished} .* Choose another folder \(to=\.\.\.\), or remove this one"):
        streamed(facts_of(checkpoint), root, lambda passes: None)
    with pytest.raises(StoreError, match="holds a capture from Python, which no job resumes"):
        run(checkpoint, texts, root)
    assert f"qk_sniffer.finalize data_root={root}" in str(verify(root))
    capsys.readouterr()
    assert finalize(root) == 0
    assert "Not proven: captured from Python" in capsys.readouterr().out
    dataset = qk_sniffer.open_dataset(root)
    assert dataset.examples["num_tokens"].to_pylist() == [len(text) for text in TEXTS[:4]]
    assert verify(root).problems == 0


def test_an_unfinished_capture_is_replaced_by_a_job_that_may(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        streamed(facts_of(checkpoint), root, interrupted)
    run(checkpoint, texts, root, output={"overwrite": True})
    assert "source" not in json.loads((root / "manifest.json").read_text())


def interrupted(passes: Passes) -> None:
    passes.whole(TEXTS[:3])
    passes.part(3, TEXTS[3], 0, 9)
    raise KeyboardInterrupt


@pytest.mark.parametrize("sections", [{}, STATISTICS], ids=["rows", "statistics"])
def test_an_error_leaves_the_whole_examples(sections: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"

    def act(passes: Passes) -> None:
        passes.whole(TEXTS[:3])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        streamed(facts_of(checkpoint, **sections), root, interrupted if not sections else act)
    (note,) = caught.value.__notes__
    assert note.startswith(f"{root} holds an unfinished capture from Python, of 3 whole examples: python -m")
    assert finalize(root) == 0
    assert verify(root).problems == 0
    assert len(qk_sniffer.open_dataset(root).examples) == 3


def test_an_error_before_the_first_example_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def act(passes: Passes) -> None:
        passes.part(0, TEXTS[0], 0, 9)
        raise ValueError

    with pytest.raises(ValueError):
        streamed(facts_of(checkpoint), tmp_path / "out", act)
    with pytest.raises(CaptureError, match=r"nothing was captured to .*: no forward pass has run in the block"):
        streamed(facts_of(checkpoint), tmp_path / "out", lambda passes: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sections", [{}, STATISTICS], ids=["rows", "statistics"])
def test_a_failed_pass_leaves_no_row(sections: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    def act(passes: Passes) -> None:
        passes.whole(TEXTS[:2])
        with pytest.raises(CaptureError, match="out of memory"):
            passes.part(2, TEXTS[2], fails=True)  # its number is free
        passes.part(2, TEXTS[5])
        passes.sink.complete([passes.record(2, TEXTS[5])])
        passes.part(3, TEXTS[3], 0, 40)
        with pytest.raises(CaptureError, match="out of memory"):
            passes.part(3, TEXTS[3], 40, fails=True)
        passes.part(4, TEXTS[4])
        passes.sink.complete([passes.record(4, TEXTS[4]), passes.record(3, TEXTS[3][:40])])

    root = streamed(facts_of(checkpoint, **sections), tmp_path / "out", act)
    examples = qk_sniffer.open_dataset(root).examples
    assert examples["num_tokens"].to_pylist() == [20, 33, len(TEXTS[5]), 40, len(TEXTS[4])] and len(TEXTS[3]) > 50
    assert verify(root).problems == 0


def test_two_captures_do_not_write_to_one_folder(checkpoint: Path, tmp_path: Path) -> None:
    facts = facts_of(checkpoint)

    def act(passes: Passes) -> None:
        passes.whole(TEXTS[:1])
        with pytest.raises(StoreError, match=r"is in use: process \d+ .* is capturing from Python"):
            streamed(facts, tmp_path / "out", lambda passes: None)

    assert verify(streamed(facts, tmp_path / "out", act)).problems == 0
