"""Random edits of every file that is read back: each program ends with a result or one clear error, and soon.

An edit is named by its seed. A failure prints it; `edit("job", "3-17")` makes it again.
"""

import io
import json
import logging
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from support import segmented
from support.edits import Editor, copied
from support.jobs import Stopped, captured_only, hashes, run, settings
from support.plasticity_cases import measure

from qk_sniffer.config import from_dict
from qk_sniffer.dataset.reader import open_dataset
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import QkSnifferError
from qk_sniffer.hub.branch import Branch
from qk_sniffer.jobs import components, hub_resume, sweep
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.jobs.job_status import Status
from qk_sniffer.jobs.run import run_job
from qk_sniffer.jobs.sweep import PlannedJob
from qk_sniffer.plasticity import compare, tables
from qk_sniffer.plasticity.results import Results
from qk_sniffer.resolved import resolve
from qk_sniffer.status import Settings, show
from qk_sniffer.store.layout import Layout

pytestmark = pytest.mark.slow

SECONDS = 30
"""The longest time of one edit and all programs."""

SECTIONS: dict[str, Any] = {
    "model": {"tokenizer": {"max_length": 9, "overlong": "split"}},
    "dataset": segmented.COLUMNS,
    "sampler": {"segments": ["user", "assistant"]},
    "capture": {
        "capture_segments": True,
        "layers": [0],
        "heads": [0, 1],
        "capture_token_ids": True,
        "statistics": {"enabled": True, "stages": ["pre", "post"]},
    },
    "verify": {"examples": 0},
    "inference": {"queue_mb": 4},
}
NUM_TEXTS = 4


class TooSlow(BaseException):
    """A program hangs."""


def _stop(*_: Any) -> None:
    raise Stopped


class Bench:
    """The states of a data root that edits start from, and the reference of a finished one."""

    def __init__(self, folder: Path, checkpoint: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.texts = folder / "texts.jsonl"
        segments = [["system", 0], ["user", 3], ["assistant", 6]]
        rows = [{"input_ids": [*range(1, 9)] * (2 + i), "segments": segments} for i in range(NUM_TEXTS)]
        self.texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.root, self.outside = folder / "root", folder / "outside"
        self.outside.mkdir()
        (self.outside / "file").write_text("untouched")
        self.sweep = folder / "sweep"
        self.states = {
            name: folder / f"state-{name}" for name in ("job", "staged", "finished", "grown", "results", "measuring")
        }

        loaded: dict[str, Any] = {}
        real = components._load

        def load(config: Any, commits: Any) -> Any:
            if "parts" not in loaded:
                loaded["parts"] = real(config, commits)
            return loaded["parts"]

        patch.setattr(components, "_load", load)
        captured_only(checkpoint, self.texts, self.root, patch, **SECTIONS)
        (self.root / ".qk_sniffer" / "finalize.lock").write_text(
            json.dumps({"pid": 1, "host": "h", "slurm_job_id": None})
        )
        self.root.rename(self.states["job"])
        self._staged(patch)
        run(checkpoint, self.texts, self.root, **SECTIONS)
        hub_resume.write_snapshot(Layout(self.root), Branch("me/my", "b", "c" * 40))
        self.reference = self.files()
        self.root.rename(self.states["finished"])
        run(checkpoint, self.texts, self.root, **self.fewer())
        copied(self.root, self.states["grown"])
        run(checkpoint, self.texts, self.root, **SECTIONS)
        self.grown_reference = self.files()
        shutil.rmtree(self.root)
        measure(self.states["finished"], self.states["results"])
        with patch.context() as inside, pytest.raises(Stopped):
            inside.setattr(Results, "finish", _stop)
            measure(self.states["finished"], self.states["measuring"])
        self._sweep()

    def fewer(self) -> dict[str, Any]:
        return {**SECTIONS, "dataset": segmented.COLUMNS | {"max_samples": NUM_TEXTS - 1}}

    def files(self) -> dict[str, str]:
        return {name: digest for name, digest in hashes(self.root).items() if name.endswith((".parquet", "tensors"))}

    def _staged(self, patch: pytest.MonkeyPatch) -> None:
        with patch.context() as inside, pytest.raises(Stopped):
            inside.setattr("qk_sniffer.store.promote._move", _stop)
            run(self.checkpoint, self.texts, self.root, **SECTIONS)
        self.root.rename(self.states["staged"])

    def _sweep(self) -> None:
        job = PlannedJob(0, (), resolve(from_dict(settings(self.checkpoint, self.texts, self.root, **SECTIONS))))
        with sweep.announced(self.sweep, [job], outlive=True):
            (self.sweep / "0").mkdir()
            Status.of(0, job.config, state="interrupted").write(self.sweep / "0")
        self.sweep.rename(self.folder / "state-sweep")
        self.states["sweep"] = self.folder / "state-sweep"

    def run(self, *, overwrite: bool = False, **sections: Any) -> None:
        given = {**SECTIONS, **sections, "output": {"overwrite": overwrite}}
        run_job(from_dict(settings(self.checkpoint, self.texts, self.root, **given)))


@pytest.fixture(scope="module")
def bench(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        yield Bench(tmp_path_factory.mktemp("edits"), checkpoint, patch)


@contextmanager
def limited() -> Iterator[None]:
    def end(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(program: Callable[[], Any]) -> Any:
    """Returns the result of a program, or None for one of our errors, which must be a message."""
    try:
        return program()
    except QkSnifferError as error:
        assert str(error).strip(), "an error without a message"
        return None


def files_of(state: Path, kind: str) -> list[Path]:
    """The files that are edited in a state."""
    names = sorted(path.relative_to(state) for path in state.rglob("*") if path.is_file())
    if kind in ("finished", "grown", "staged"):
        heavy = [name for name in names if name.suffix == ".json"]
        return [*names, *heavy * 8]  # more edits of the manifests than of each head
    if kind == "job":
        return [*names, *[name for name in names if name.suffix in (".json", ".safetensors")] * 3]
    return names


def read(bench: Bench) -> None:
    """Runs the programs that only read the data root."""
    root = bench.root
    for shape in ("table", "json"):
        attempt(lambda shape=shape: show(Settings(root, format=shape)))
    report = verify(root)
    str(report)
    if not report.problems:
        assert bench.files() == bench.reference, "verify calls it whole"
    dataset = attempt(lambda: open_dataset(root))
    if dataset is not None:
        repr(dataset)
        attempt(lambda: dataset.examples)
        for key in dataset.heads[:2]:
            attempt(lambda key=key: dataset.vectors(*key))
            attempt(lambda key=key: dataset.segments(*key))
            attempt(lambda key=key: dataset.is_intact(*key))
            attempt(lambda key=key: dataset.statistics(key.layer, key.kind, "pre"))


def job(bench: Bench, editor: Editor) -> None:
    """The programs on an unfinished or finished job of all texts."""
    read(bench)
    if editor.random.random() < 0.5:
        code = attempt(lambda: finalize(bench.root, prove=False))
        if code == 0 and not editor.is_signed:
            assert bench.files() == bench.reference, "finalize calls it finished"
    if attempt(lambda: bench.run() or "done") == "done" and not editor.is_signed:
        assert bench.files() == bench.reference, "the job calls it finished"
    bench.run(overwrite=True)
    if not editor.is_signed:
        assert bench.files() == bench.reference, "overwriting does not help"
    assert not (bench.root / ".qk_sniffer").exists()


def finished(bench: Bench, editor: Editor) -> None:
    read(bench)
    if editor.random.random() < 0.3:
        out = bench.folder / "out"
        attempt(lambda: measure(bench.root, out))
        copied(bench.states["results"], out)
    code = attempt(lambda: finalize(bench.root, prove=False))
    del code  # the files of a finished dataset are compared by verify
    attempt(bench.run)


def grown(bench: Bench, editor: Editor) -> None:
    if attempt(lambda: bench.run() or "done") == "done":
        assert verify(bench.root).problems == 0
        assert bench.files() == bench.grown_reference, "grown from a damaged dataset"


def results(bench: Bench, editor: Editor) -> None:
    folder, wanted = bench.root, bench.states["results"]
    attempt(lambda: compare.read(Results(folder)))
    attempt(lambda: compare.draw([compare.read(Results(folder))]))
    if attempt(lambda: measure(bench.states["finished"], folder)) == 0:
        for name in tables.TABLES:
            for ending in ("csv", "parquet"):
                file = f"{name}.{ending}"
                assert (folder / file).read_bytes() == (wanted / file).read_bytes(), f"{file} differs"


def sweeps(bench: Bench, editor: Editor) -> None:
    for shape in ("table", "json"):
        assert show(Settings(bench.root, format=shape)) == 0
    sweep.statuses(bench.root)
    attempt(lambda: sweep.submitted(bench.root, 0))


PROGRAMS = {
    "job": job,
    "staged": job,
    "finished": finished,
    "grown": grown,
    "results": results,
    "measuring": results,
    "sweep": sweeps,
}


def edit(bench: Bench, kind: str, seed: str) -> None:
    """Makes one edit of a file of a state, and runs the programs on it."""
    state = bench.states[kind]
    copied(state, bench.root)
    editor = Editor(f"{kind}-{seed}", bench.outside)
    name = editor.random.choice(files_of(state, kind))
    editor.edit(bench.root / name)
    said = io.StringIO()
    try:
        with limited(), redirect_stdout(said), redirect_stderr(said):
            PROGRAMS[kind](bench, editor)
        assert sorted(path.name for path in bench.outside.iterdir()) == ["file"], "written outside"
        assert (bench.outside / "file").read_text() == "untouched", "written outside"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        pytest.fail(f"edit({kind!r}, {seed!r}): {name}: {editor.what}\n{traceback.format_exc()[-3000:]}", pytrace=False)


COUNTS = {"job": 700, "staged": 300, "finished": 600, "grown": 100, "results": 100, "measuring": 100, "sweep": 300}


def edits(bench: Bench, kind: str, seeds: Iterable[str]) -> None:
    logging.disable(logging.CRITICAL)
    try:
        for seed in seeds:
            edit(bench, kind, seed)
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("kind", COUNTS)
def test_many_edits(kind: str, part: int, bench: Bench) -> None:
    edits(bench, kind, (f"{part}-{number}" for number in range(COUNTS[kind] // 10)))


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("job", ".qk_sniffer/job.json", b'{"config": {"shard": {"count": 1e9}}}'),
        ("job", ".qk_sniffer/shard-00000-of-00001.done", b"garbage"),
        ("staged", ".qk_sniffer/staging/manifest.json", b"[" * 100_000),
        ("finished", "manifest.json", b'{"format": "qk-sniffer/1"}'),
        ("finished", "examples/data.parquet", b"PAR1"),
    ],
)
def test_nothing_raw_reaches_the_terminal(kind: str, name: str, content: bytes, bench: Bench) -> None:
    copied(bench.states[kind], bench.root)
    (bench.root / name).write_bytes(content)
    arguments = [f"model.name={bench.checkpoint}", "model.dtype=float32", "dataset=hf", f"dataset.path={bench.texts}"]
    arguments += [f"dataset.{key}={column}" for key, column in segmented.COLUMNS.items()]
    for command in (
        ["qk_sniffer.status", str(bench.root)],
        ["qk_sniffer.verify", f"data_root={bench.root}"],
        ["qk_sniffer.finalize", f"data_root={bench.root}", "prove=false"],
        ["qk_sniffer.plasticity", f"data_root={bench.root}", f"output_dir={bench.folder / 'out'}"],
        ["qk_sniffer", "model=hf", *arguments, f"output.data_root={bench.root}", "verify.examples=0"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=bench.folder, capture_output=True, text=True, timeout=120
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        reads_it = command[0] not in ("qk_sniffer.status", "qk_sniffer.plasticity")
        assert done.returncode in ((1, 2) if reads_it else (0, 1, 2)), (command, done.stderr)
