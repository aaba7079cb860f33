"""Sweeps on a real SLURM of two nodes: disturbed jobs end with the datasets of undisturbed local runs."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.fake_hub import FakeHub
from support.hub_cases import REPO, assert_whole, held, published
from support.jobs import TEXTS, hashes, heads_of, keys, run
from support.slurm_cluster import Cluster, why_not
from support.slurm_sweep import Sweep, sweeps
from support.zoo import CASES

from qk_sniffer.store.layout import Layout

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(400),
]

FAMILIES = ("qwen3_sliding", "llama", "gemma3")
MANY = 2000
"""Texts that take a tiny model some 10 s, long enough to disturb it."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def models(folder_of: Callable[[Any], Path]) -> dict[str, Path]:
    return {case.name: folder_of(case) for case in CASES if case.name in FAMILIES}


@pytest.fixture(scope="module")
def many_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": TEXTS[i % len(TEXTS)]}) + "\n" for i in range(MANY)))
    return path


@pytest.fixture(scope="module")
def few_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


SAMPLED: dict[str, Any] = {
    "sampler": {"type": "uniform", "min_bucket_size": 16},
    "inference": {"batch_size": 1, "segment_mb": 1},
}


@pytest.fixture(scope="module")
def undisturbed(
    models: dict[str, Path], many_texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The dataset of a local run of a model, made once."""
    folder, made = tmp_path_factory.mktemp("local"), dict[str, Path]()

    def dataset(name: str) -> Path:
        if name not in made:
            made[name] = run(models[name], many_texts, folder / name, **SAMPLED)
        return made[name]

    return dataset


@pytest.fixture
def sweep(cluster: Cluster, many_texts: Path, tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    with sweeps(cluster, tmp_path, many_texts) as start:
        yield start


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.rglob("qk_sniffer.log")))


def rows_of(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines() if re.match(r"\d+  ", line)]


def test_three_families_on_two_nodes_with_a_preemption_in_the_middle(
    sweep: Callable[..., Sweep], models: dict[str, Path], undisturbed: Callable[[str], Path]
) -> None:
    names = ",".join(str(models[name]) for name in FAMILIES)
    running = sweep("model=hf", f"model.name={names}", "hydra.launcher.array_parallelism=2")
    slugs = [models[name].name for name in FAMILIES]
    roots = [running.dataset(models[name]) for name in FAMILIES]
    running.until_captures(roots[0])
    states = [running.jobs()[running.job(number)] for number in range(3)]
    assert states == ["RUNNING", "RUNNING", "PENDING"], "array_parallelism"
    shown = {line["model"]: line["state"] for line in running.status()}
    assert shown == dict(zip(slugs, ["running", "running", "queued"], strict=True))
    # A scheduler's warning, as before a time limit or a preemption.
    running.cluster.run("scancel", "--signal=USR2", running.job(0))
    requeued = lambda: {line["model"]: line["state"] for line in running.status()}[slugs[0]] == "requeued"  # noqa: E731
    running.until(requeued, "the first job is requeued")
    code, said = running.wait()
    assert code == 0, said
    assert [row[1:3] for row in rows_of(said)] == [[slug, "done"] for slug in slugs]
    log = logs(running.folder)
    assert "stopped by SIGUSR2" in log, "between two batches, or after the one that it came in"
    assert re.search(rf"resuming: \d+ of {MANY} examples are done", log)
    for name, root in zip(FAMILIES, roots, strict=True):
        assert hashes(root) == hashes(undisturbed(name))
    assert {line["restarts"] for line in running.status() if line["model"] == slugs[0]} == {1}


def test_three_models_on_the_hub(
    sweep: Callable[..., Sweep], models: dict[str, Path], few_texts: Path, tmp_path: Path
) -> None:
    """Each model gets a branch, and main lists three, in any order of their ends. Only `.env` holds the token."""
    names = ",".join(str(models[name]) for name in FAMILIES)
    slugs = [models[name].name for name in FAMILIES]
    with FakeHub() as hub:
        lines = ["HF_TOKEN=hf_alice", f"HF_HOME={tmp_path / 'home'}", "HF_HUB_DISABLE_XET=1"]
        (tmp_path / ".env").write_text("\n".join(lines) + "\n")
        running = sweep(
            *("model=hf", f"model.name={names}", "output=hub", f"output.hf_repo_id={REPO}"),
            texts=few_texts,
            environment={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url},
        )
        code, said = running.wait()
        assert code == 0, said
        assert [row[1:3] for row in rows_of(said)] == [[slug, "published"] for slug in slugs]
        branches = [f"{slug}-texts-uniform" for slug in slugs]
        listed = re.findall(r"^\| \[`(.+?)`\]", held(hub, "main")["README.md"].decode(), flags=re.MULTILINE)
        assert listed == sorted(branches) and set(held(hub, "main")) == {"README.md"}
        for branch in branches:
            assert published(hub, branch) == 1
            assert_whole(held(hub, branch), tmp_path / "copies" / branch)
        assert "hf_alice" not in said + logs(running.folder)
        assert logs(running.folder).count(f"go to {hub.url} instead of https://huggingface.co") == len(names.split(","))


@pytest.mark.parametrize("how", ["requeue", "kill and requeue", "node"])
def test_a_requeued_job_resumes(
    how: str, sweep: Callable[..., Sweep], models: dict[str, Path], undisturbed: Callable[[str], Path]
) -> None:
    running = sweep("model=hf", f"model.name={models['llama']}")
    cluster, root = running.cluster, running.dataset(models["llama"])
    running.until_captures(root)
    (job,) = running.jobs()
    if how == "requeue":
        cluster.run("scontrol", "requeue", job)
    elif how == "kill and requeue":
        cluster.kill(signal.SIGSTOP, SLURM_JOB_ID=job, SLURM_PROCID="0")  # a stopped process handles no signal
        cluster.run("scontrol", "requeue", job)
    else:
        node = cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()
        cluster.stop_node(node)
        cluster.start_node(node)
    code, said = running.wait()
    assert code == 0, said
    assert re.search(rf"resuming: \d+ of {MANY} examples are done", logs(running.folder))
    assert hashes(root) == hashes(undisturbed("llama"))


def test_jobs_that_fail_do_not_sink_their_sweep(
    sweep: Callable[..., Sweep], models: dict[str, Path], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    names = [models["qwen3_sliding"], tmp_path / "broken", models["llama"]]
    running = sweep("model=hf", f"model.name={','.join(map(str, names))}")
    killed, whole = running.dataset(names[0]), running.dataset(names[2])
    running.until_captures(killed)
    running.cluster.kill(signal.SIGKILL, SLURM_ARRAY_TASK_ID="0", SLURM_PROCID="0")
    code, said = running.wait()
    assert code == 1
    assert [row[2] for row in rows_of(said)] == ["interrupted", "failed", "done"], said
    assert re.search(r"job 0 .*: ended without a message", said) and re.search(
        r"job 1 .*: model .*broken cannot be", said
    )
    assert hashes(whole) == hashes(undisturbed("llama"))
    lines = [line for line in running.status() if line["model"] == names[0].name]
    assert [(line["state"], line["last_attempt"]) for line in lines] == [("interrupted", None)]

    running.again()
    (tmp_path / "broken").rename(tmp_path / "gone")
    (tmp_path / "broken").symlink_to(models["gemma3"])
    code, said = running.wait()
    assert code == 0, said
    assert hashes(killed) == hashes(undisturbed("qwen3_sliding"))
    assert "Nothing to do: the dataset is finished." in outputs_of(running)


def outputs_of(running: Sweep) -> str:
    return "\n".join(path.read_text() for path in sorted(running.folder.rglob("*_log.out")))


TOGETHER = """
import os
if "SLURM_PROCID" in os.environ:
    import time
    from pathlib import Path

    from qk_sniffer.jobs import capture_examples

    real, here = capture_examples.mark_done, Path(__file__).parent

    def mark_done(layout, shard, **facts):
        real(layout, shard, **facts)
        (here / f"{shard.index}").touch()
        while len(list(here.glob("[0-9]"))) < shard.count:
            time.sleep(0.001)

    capture_examples.mark_done = mark_done
"""


def test_shards_that_end_in_the_same_moment(
    sweep: Callable[..., Sweep],
    models: dict[str, Path],
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(TOGETHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    shards = ("shard.count=4", "shard.index=range(4)", "hydra.launcher.gpus_per_node=0")
    running = sweep("model=hf", f"model.name={models['llama']}", *shards)
    root = running.dataset(models["llama"])
    code, said = running.wait()
    assert code == 0, said
    assert len(list((tmp_path / "hook").glob("[0-9]"))) == 4
    mine, local = heads_of(root), heads_of(undisturbed("llama"))
    assert {name: keys(table) for name, table in mine.items()} == {name: keys(table) for name, table in local.items()}
    assert hashes(root) == hashes(undisturbed("llama")), "one text a batch: the same bytes"
    assert outputs_of(running).count("Dataset: ") == 1, "one of them made it"
    assert not Layout(root).work.exists()


def test_a_job_runs_the_settings_and_the_code_that_were_submitted(
    sweep: Callable[..., Sweep], models: dict[str, Path], tmp_path: Path
) -> None:
    mine = tmp_path / "groups" / "model" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    text = f"name: {models['llama']}\ndtype: float32\ntokenizer:\n  max_length: "
    mine.write_text(text + "30\n")
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"text": TEXTS[3]}) + "\n")
    running = sweep("model=mine", "model.slug=mine", texts=few, flags=("--config-dir", str(tmp_path / "groups")))
    running.cluster.run("scontrol", "update", "NodeName=ALL", "State=DRAIN", "Reason=test")
    try:
        running.until(running.jobs, "the job is queued")
        assert set(running.jobs().values()) == {"PENDING"}
        assert [line["state"] for line in running.status()] == ["queued"]
        mine.write_text(text + "20\n")
    finally:
        running.cluster.run("scontrol", "update", "NodeName=ALL", "State=RESUME")
    code, said = running.wait()
    assert code == 0, said
    manifest = json.loads((tmp_path / "outputs" / "mine-few-uniform" / "manifest.json").read_text())
    assert manifest["config"]["model"]["tokenizer"]["max_length"] == 30 and manifest["tokens"] == 30
    (code_folder,) = (tmp_path / "outputs" / ".sweeps").glob("*/*/code")
    assert (code_folder / "qk_sniffer" / "jobs" / "run.py").exists()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_job_that_slurm_gives_no_environment_runs_the_copy_and_takes_no_other_settings(
    sweep: Callable[..., Sweep], models: dict[str, Path], few_texts: Path, tmp_path: Path, is_replaced: bool
) -> None:
    export = "+hydra.launcher.additional_parameters.export=NONE"
    running = sweep("model=hf", f"model.name={models['llama']}", export, texts=few_texts)
    running.cluster.run("scontrol", "update", "NodeName=ALL", "State=DRAIN", "Reason=test")
    try:
        running.until(running.jobs, "the job is queued")
        (folder,) = (tmp_path / "outputs" / ".sweeps").glob("*/*")
        with (folder / "code" / "qk_sniffer" / "__init__.py").open("a") as file:
            file.write(f"\nopen({str(tmp_path / 'imported')!r}, 'a').close()\n")
        settings: dict[str, Any] = {}

        def is_recorded() -> bool:
            settings.update(json.loads((folder / "sweep.json").read_text()))
            return settings["jobs"][0]["status"]["slurm_job_id"] is not None

        running.until(is_recorded, "its id is recorded")
        if is_replaced:
            (folder / "sweep.json").write_text(json.dumps(settings | {"nonce": "0" * 32}))
    finally:
        running.cluster.run("scontrol", "update", "NodeName=ALL", "State=RESUME")
    code, said = running.wait()
    assert code == is_replaced and (tmp_path / "imported").exists(), said
    assert running.dataset(models["llama"]).exists() != is_replaced
    assert ("sweep.json was removed or is that of another sweep" in logs(folder)) == is_replaced


def tokens_in(folder: Path, token: str) -> Sequence[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def test_no_token_is_written_anywhere(sweep: Callable[..., Sweep], models: dict[str, Path], tmp_path: Path) -> None:
    token = "hf_" + "abcdefghij" * 3
    (tmp_path / ".env").write_text(f"HF_TOKEN={token}\n")
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"text": TEXTS[3]}) + "\n")
    running = sweep("model=hf", f"model.name={models['llama']},{models['gemma3']}", texts=few)
    code, said = running.wait()
    assert code == 0, said
    assert tokens_in(tmp_path, token) == [tmp_path / ".env"]
    assert not tokens_in(running.cluster.folder, token), "SLURM keeps the environment that a job is submitted with"
    assert not tokens_in(tmp_path, os.environ.get("HF_TOKEN") or token.upper())


def test_the_launcher_may_go_and_the_jobs_stay(
    sweep: Callable[..., Sweep], models: dict[str, Path], undisturbed: Callable[[str], Path]
) -> None:
    names = ("llama", "gemma3")
    paths = ",".join(str(models[name]) for name in names)
    running = sweep("model=hf", f"model.name={paths}", "hydra.launcher.array_parallelism=1")
    roots = [running.dataset(models[name]) for name in names]
    running.until_captures(roots[0])
    running.process.send_signal(signal.SIGINT)
    code, said = running.wait()
    assert code == 130 and [row[2] for row in rows_of(said)] == ["running", "queued"], said
    assert sorted(line["state"] for line in running.status()) == ["queued", "running"]
    deadline = time.monotonic() + 180
    while set(running.jobs().values()) != {"COMPLETED"}:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert [line["state"] for line in running.status()] == ["done", "done"]
    assert [hashes(root) for root in roots] == [hashes(undisturbed(name)) for name in names]
