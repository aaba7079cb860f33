"""A disturbed job loses nothing that was written, and the same command ends with the same dataset."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from support import segmented
from support.fake_hub import FakeHub
from support.forked import STEPS, Server
from support.jobs import QWEN3, hashes, heads_of, run, settings, vectors
from support.tiny import save_checkpoint

from qk_sniffer.jobs import batch_groups
from qk_sniffer.store import manifest as manifests

SMALL_GROUPS = "from qk_sniffer.jobs import batch_groups; batch_groups.GROUP = 1e-5"
"""Makes a job end a group of batches with statistics every two or three batches."""

SEEDS = int(os.environ.get("KILL_SEEDS", "0"))
"""The random series of kills; without this number, a single and shorter one."""

KILLS = 5 if SEEDS else 2
"""How often a series kills a job in each step, at least."""

SECTIONS: dict[str, Any] = {"inference": {"batch_size": 1, "segment_mb": 1, "queue_mb": 1}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("forked")) as server:
        yield server


@pytest.fixture
def job(checkpoint: Path, texts: Path, tmp_path: Path) -> dict[str, Any]:
    return settings(checkpoint, texts, tmp_path / "out", **SECTIONS)


@pytest.fixture
def whole(undisturbed: Callable[..., Path]) -> dict[str, str]:
    """The hashes of the dataset of an undisturbed job."""
    return hashes(undisturbed(**SECTIONS))


def root_of(job: dict[str, Any]) -> Path:
    return Path(job["output"]["data_root"])


def finish(server: Server, job: dict[str, Any], before: str = "") -> str:
    """Runs the job to its end; returns its stderr."""
    child = server.start(job, before=before)
    assert child.wait() == 0, child.stderr
    assert not (root_of(job) / ".qk_sniffer").exists()
    return child.stderr


def test_a_killed_job_resumes_and_ends_with_the_same_bytes(
    server: Server, job: dict[str, Any], whole: dict[str, str]
) -> None:
    child = server.start(job, held={"forward": 8})
    assert child.reaches("forward", 8)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (root_of(job) / "manifest.json").exists()
    finish(server, job)
    assert hashes(root_of(job)) == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS or 1))
@pytest.mark.parametrize(
    ("batch_size", "more"),
    [
        (1, {}),
        (2, {}),
        (2, {"capture": {"statistics": {"enabled": True, "stages": ["pre", "post"]}}}),
        (2, {"capture": {"attention": {"enabled": True}}}),
        (2, {"capture": {"capture_values": True, "capture_outputs": True, "capture_offsets": True}}),
        (
            2,
            {
                "dataset": segmented.COLUMNS,
                "capture": {"capture_segments": True, "statistics": {"enabled": True}, "attention": {"enabled": True}},
                "sampler": {"segments": ["assistant", "user"]},
            },
        ),
        (
            2,
            {
                "model": {"tokenizer": {"max_length": 20, "overlong": "split"}},
                "capture": {"statistics": {"enabled": True}},
            },
        ),
    ],
)
def test_killed_at_random_moments_of_every_step(
    batch_size: int,
    more: dict[str, Any],
    seed: int,
    server: Server,
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    undisturbed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inference = SECTIONS["inference"] | {"batch_size": batch_size, "lookahead": 12}
    sections: dict[str, Any] = {"inference": inference} | more
    monkeypatch.setattr(batch_groups, "GROUP", 1e-5)  # as in the processes
    if "dataset" in more:
        texts = segmented.write(tmp_path / "ids.jsonl")
        whole = hashes(run(checkpoint, texts, tmp_path / "whole", **sections))
    else:
        whole = hashes(undisturbed(**sections))
    job = settings(checkpoint, texts, tmp_path / "out", **sections)
    rng = np.random.default_rng(seed)
    slow = dict.fromkeys(STEPS, 0.02) | {"forward": 0.004}
    root = root_of(job)
    killed: Counter[str] = Counter()
    while killed.total() < 7 * KILLS or min(killed[name] for name in STEPS) < KILLS:
        step = min(STEPS, key=lambda name: (killed[name], rng.random()))
        child = server.start(job, slow=slow, before=SMALL_GROUPS)
        if child.reaches(step, int(rng.integers(1, 6))):
            time.sleep(rng.uniform(0, 0.03))
            child.send(signal.SIGKILL)
        if child.wait() == 0:  # the job ended before the kill
            assert hashes(root) == whole
            shutil.rmtree(root)
            continue
        assert child.code == -signal.SIGKILL, child.stderr
        killed[step] += 1
        if (root / "manifest.json").exists():
            assert hashes(root) == whole, "a manifest says that all is there"
        if rng.random() < 0.2:
            finish(server, job, SMALL_GROUPS)
            assert hashes(root) == whole
            shutil.rmtree(root)
    finish(server, job, SMALL_GROUPS)
    assert hashes(root) == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_it_at_the_next_batch(
    name: str, server: Server, job: dict[str, Any], whole: dict[str, str]
) -> None:
    number = signal.Signals[name]
    child = server.start(job, held={"forward": 3})
    assert child.reaches("forward", 3)
    child.send(number)
    child.release("forward")
    assert child.wait() == 128 + number
    assert child.told.count("forward") == 3, "the batch that ran was the last one"
    assert f"stopped by {name}; rerun the same command" in child.stderr
    assert "3 of 24 examples are done" in child.stderr
    assert "resuming: 3 of 24 examples are done" in finish(server, job)
    assert hashes(root_of(job)) == whole


@pytest.mark.slow
def test_a_second_signal_stops_it_at_once(server: Server, job: dict[str, Any], whole: dict[str, str]) -> None:
    child = server.start(job, held={"forward": 1})
    assert child.reaches("forward")
    child.send(signal.SIGINT)
    child.says("SIGINT: stopping after this batch")
    child.send(signal.SIGINT)
    assert child.wait() == 130, "the batch was never released"
    finish(server, job)
    assert hashes(root_of(job)) == whole


@pytest.mark.slow
def test_a_schedulers_warning_is_heeded_where_somebody_handles_it(
    server: Server, job: dict[str, Any], whole: dict[str, str]
) -> None:
    # submitit installs its handler before it calls the job's function.
    handled = "import os, signal; signal.signal(signal.SIGUSR2, lambda *_: os._exit(7))"
    child = server.start(job, held={"forward": 3}, before=handled)
    assert child.reaches("forward", 3)
    child.send(signal.SIGUSR2)
    child.release("forward")
    assert child.wait() == 128 + signal.SIGUSR2, "the job's own way to stop, then the other's"
    assert child.told.count("forward") == 3
    assert "SIGUSR2: stopping after this batch, or in 20 s" in child.stderr
    assert "resuming: 3 of 24 examples are done" in finish(server, job)
    assert hashes(root_of(job)) == whole


@pytest.mark.slow
def test_a_scheduler_does_not_wait_for_a_long_batch(server: Server, job: dict[str, Any], whole: dict[str, str]) -> None:
    impatient = "from qk_sniffer.jobs import signals; signals.PATIENCE_S = 0.5"
    child = server.start(job, held={"forward": 1}, before=impatient)
    assert child.reaches("forward")
    child.send(signal.SIGTERM)
    assert child.wait() == 143, "the batch was never released"
    finish(server, job)
    assert hashes(root_of(job)) == whole


@pytest.mark.slow
def test_more_signals_of_a_scheduler_do_not_disturb_what_is_written(
    server: Server, job: dict[str, Any], whole: dict[str, str]
) -> None:
    child = server.start(job, held={"forward": 3, "segment": 1})
    assert child.reaches("forward", 3)
    child.send(signal.SIGTERM)
    child.says("SIGTERM: stopping after this batch")
    child.release("forward")
    assert child.reaches("segment")
    for _ in range(3):
        child.send(signal.SIGTERM)
        time.sleep(0.1)
    child.release("segment")
    assert child.wait() == 143
    assert "resuming: 3 of 24 examples are done" in finish(server, job)
    assert hashes(root_of(job)) == whole


@pytest.mark.slow
def test_a_signal_while_the_forward_waits_for_the_disk(
    server: Server, job: dict[str, Any], whole: dict[str, str]
) -> None:
    child = server.start(job, held={"segment": 1})
    assert child.reaches("segment")
    time.sleep(0.5)  # by now the queue of 1 MB is full, or holds all rows
    child.send(signal.SIGINT)
    child.release("segment")
    assert child.wait() == 130
    finish(server, job)
    assert hashes(root_of(job)) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        "publication",
        "compaction",
        "manifest",
    ],
)
def test_a_signal_while_the_dataset_is_made(
    step: str, server: Server, job: dict[str, Any], whole: dict[str, str]
) -> None:
    child = server.start(job, held={step: 1})
    assert child.reaches(step)
    child.send(signal.SIGTERM)
    child.release(step)
    assert child.wait() == 143
    finish(server, job)
    assert hashes(root_of(job)) == whole


LIMIT = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["segment", "compaction"])
def test_a_full_disk_is_said_and_what_was_there_is_kept(
    step: str, server: Server, job: dict[str, Any], whole: dict[str, str], texts: Path
) -> None:
    root = root_of(job)
    job["dataset"]["max_samples"] = 3
    finish(server, job)
    before = hashes(root)
    job["dataset"]["max_samples"] = None
    if step == "compaction":
        child = server.start(job, held={"compaction": 1})
        assert child.reaches("compaction")
        child.send(signal.SIGKILL)
        child.wait()
    largest_head = max(path.stat().st_size for path in root.rglob("data.parquet"))
    child = server.start(job, before=LIMIT.format(size=largest_head + 4000))
    assert child.wait() == 1
    assert "File too large" in child.stderr and "rerun the command" in child.stderr
    assert ("cannot write the journal" in child.stderr) == (step == "segment")
    assert hashes(root) == before and manifests.read(root)["examples"] == 3
    finish(server, job)
    assert hashes(root) == whole


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["flipped", "cut short", "gone"])
def test_a_damaged_segment_is_found_and_its_examples_run_again(
    harm: str, server: Server, job: dict[str, Any], whole: dict[str, str]
) -> None:
    job["inference"]["lookahead"] = 4
    child = server.start(job, held={"compaction": 1})
    assert child.reaches("compaction")
    child.send(signal.SIGKILL)
    child.wait()
    segments = sorted(root_of(job).rglob("*.safetensors"))
    data = bytearray(segments[0].read_bytes())
    if harm == "flipped":
        data[-100] ^= 4
        segments[0].write_bytes(data)
    elif harm == "cut short":
        segments[0].write_bytes(data[:-100])
    else:
        segments[0].unlink()
    child = server.start(job)
    assert child.wait() == 0, child.stderr
    assert "captured again" in child.stderr or harm == "gone"
    assert hashes(root_of(job)).keys() == whole.keys()
    assert manifests.read(root_of(job))["examples"] == 24


@pytest.mark.slow
def test_too_little_space_is_refused_before_the_first_forward(server: Server, job: dict[str, Any]) -> None:
    tiny = "import shutil; usage = shutil.disk_usage('/')._replace(free=100_000); shutil.disk_usage = lambda _: usage"
    child = server.start(job, before=tiny)
    assert child.wait() == 1
    assert "forward" not in child.told
    assert "not enough disk space" in child.stderr and "0.1 MB are free" in child.stderr
    assert not root_of(job).exists() or not (root_of(job) / "manifest.json").exists()


@pytest.mark.slow
def test_a_writer_that_fails_ends_the_job_with_its_error(
    server: Server, job: dict[str, Any], whole: dict[str, str]
) -> None:
    failing = """
from qk_sniffer.store import segment_writers
def fail(*args):
    raise RuntimeError("the disk controller is on fire")
segment_writers.whole_segment = fail
"""
    child = server.start(job, before=failing)
    assert child.wait() == 1
    assert "the disk controller is on fire" in child.stderr
    finish(server, job)
    assert hashes(root_of(job)) == whole


@pytest.mark.slow
def test_a_second_job_ends_at_once_and_names_the_first(
    server: Server, job: dict[str, Any], whole: dict[str, str], tmp_path: Path
) -> None:
    child = server.start(job, held={"forward": 1}, before="import os; os.environ['SLURM_JOB_ID'] = '4711'")
    assert child.reaches("forward")
    with Server(tmp_path) as other:
        second = other.start(job)
        assert second.wait() == 1 and "forward" not in second.told
        assert f"process {child.pid} on " in second.stderr and "SLURM job 4711" in second.stderr
    child.send(signal.SIGKILL)
    child.wait()
    finish(server, job)
    assert hashes(root_of(job)) == whole


@pytest.mark.slow
def test_clocks_that_jump_change_nothing(server: Server, job: dict[str, Any], whole: dict[str, str]) -> None:
    jumping = """
import itertools, time
jumps = itertools.count()
time.time = lambda: 1.7e9 + (-1) ** next(jumps) * 1e7
"""
    child = server.start(job, before=jumping)
    assert child.wait() == 0, child.stderr
    assert hashes(root_of(job)) == whole


def test_what_is_not_finite_is_kept_counted_and_told(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_checkpoint(QWEN3, tmp_path / "model")
    weights = load_file(checkpoint / "model.safetensors")
    bias = "model.layers.2.self_attn.q_norm.weight"
    weights[bias][3] = torch.inf
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    root = run(checkpoint, texts, tmp_path / "out")
    counted = {}
    for name, table in heads_of(root).items():
        if rows := int((~np.isfinite(vectors(table)).all(axis=1)).sum()):
            counted[f"{name}/data.parquet"] = rows
    assert counted.keys() == {f"l02h{head:02d}q/data.parquet" for head in range(4)}
    assert manifests.read(root)["nonfinite_rows"] == counted
    assert f"{sum(counted.values()):,} rows of 4 heads hold NaN or infinite numbers" in capsys.readouterr().out
    assert manifests.read(root)["proof"]["proven"] is True
    assert manifests.read(root)["rows"] > sum(counted.values())


RUN = """
import json, sys, time
from qk_sniffer.capture import capture
from qk_sniffer.jobs import run
from qk_sniffer.config import from_dict
real = capture.Capture.run
def slow(self, plan):
    real(self, plan)
    print("batch", flush=True)
    time.sleep(float(sys.argv[2]))
capture.Capture.run = slow
run.run_job(from_dict(json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_the_commit_of_the_first_start_is_used_though_main_has_moved(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    weights = {name: weight * 2 for name, weight in load_file(checkpoint / "model.safetensors").items()}
    with FakeHub() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}

        def process(root: Path, seconds: float) -> subprocess.Popen[str]:
            values = json.dumps(settings(Path("org/model"), texts, root, **SECTIONS))
            command = [sys.executable, "-c", RUN, values, str(seconds)]
            return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

        first = hub.commit("org/model", files)
        with process(tmp_path / "whole", 0.0) as whole:
            whole.communicate()
        with process(tmp_path / "out", 0.05) as stopped:
            assert stopped.stdout is not None
            assert [stopped.stdout.readline() for _ in range(5)] == ["batch\n"] * 5
            stopped.send_signal(signal.SIGTERM)
        hub.commit("org/model", files | {"model.safetensors": save(weights, {"format": "pt"})})
        with process(tmp_path / "out", 0.0) as again:
            said, _ = again.communicate()
        with process(tmp_path / "new", 0.0) as new:
            new.communicate()
    assert (whole.returncode, again.returncode, new.returncode) == (0, 0, 0)
    assert said.count("batch") < 24
    assert manifests.read(tmp_path / "out")["commits"]["model"] == first
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert hashes(tmp_path / "new") != hashes(tmp_path / "whole"), "the model did move"


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_loaded(server: Server, job: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not inside pytest's folder, which other users may not enter
        locked = Path(folder) / "locked"
        locked.mkdir()
        for path in (Path(folder), locked):
            path.chmod(0o555)
        shutil.copytree(job["model"]["name"], Path(folder) / "model")
        job["model"]["name"] = f"{folder}/model"
        job["dataset"]["path"] = shutil.copy(job["dataset"]["path"], folder)
        job["output"]["data_root"] = f"{locked}/out"
        child = server.start(job, before="import os; os.getuid() or os.setuid(65534)")
        assert child.wait() == 1 and "forward" not in child.told
        assert "cannot write to the data root" in child.stderr and "another output.data_root" in child.stderr
        assert list(locked.iterdir()) == []
