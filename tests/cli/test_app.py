"""Runs the program from outside: help, refused command lines, jobs, and exit codes."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra._internal.utils import get_args
from omegaconf import OmegaConf

import qk_sniffer
from qk_sniffer.cli import app, preflight
from qk_sniffer.cli.flags import parse_flags
from qk_sniffer.cli.programs import PROGRAMS
from qk_sniffer.config import schema
from qk_sniffer.jobs import job_status
from qk_sniffer.store.locks import hold

REPO = Path(qk_sniffer.__file__).parent.parent
MODEL = ("model=hf", "model.name=org/model")
# Replaces the runner, which has tests of its own.
RUNNER = """
import os, time, types
from pathlib import Path
import qk_sniffer
from qk_sniffer.errors import ConfigError, StoreError

def run_job(config, begin):
    begin()
    print("running with seed", config.sampler.seed, flush=True)
    match config.sampler.seed:
        case 1: raise StoreError("the disk is full:", "  free some space")
        case 2: raise RuntimeError("out of luck")
        case 3: time.sleep(60)
        case 6: print("code from", Path(qk_sniffer.__file__).parent, os.environ.get("HF_XET_CACHE"), os.environ["HOME"])
        case 5: raise ConfigError(["model.tokenizer.max_length is 9, but this model has positions for 8"])
    return types.SimpleNamespace(rows=1234, url=None, manifest=None)
"""


@pytest.fixture
def light(tmp_path: Path) -> dict[str, str]:
    """Returns an environment in which heavy libraries end the process, and `RUNNER` runs the jobs."""
    folder = tmp_path / "light"
    folder.mkdir()
    for name in ("torch", "transformers", "datasets", "pyarrow"):
        (folder / f"{name}.py").write_text(f"import os\nos.write(2, b'imported {name}')\nos._exit(97)\n")
    (folder / "sitecustomize.py").write_text(
        "import sys, types\n"
        f"runner = types.ModuleType('qk_sniffer.jobs.run')\nexec({RUNNER!r}, runner.__dict__)\n"
        "sys.modules['qk_sniffer.jobs.run'] = runner\n"
    )
    return os.environ | {"PYTHONPATH": str(folder)}


def sniff(
    env: dict[str, str], cwd: Path, *arguments: str, program: Sequence[str] = (sys.executable, "-m", "qk_sniffer")
) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*program, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def rows_of(output: str) -> list[list[str]]:
    """Returns the words of each row of a sweep's table."""
    return [line.split() for line in output.splitlines() if re.match(r"\d+  ", line)]


@pytest.mark.slow
def test_help_is_true(light: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = sniff(light, tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    for needed in ("--multirun", "--hydra-help", "pydoc_tiny", "longbench_v2_long", "log_uniform", "sniffed_qk"):
        assert needed in done.stdout
    keys = re.findall(r"^  ([a-z_]+(?:\.[a-z_]+)+) ", done.stdout, flags=re.MULTILINE)
    keys = [key for key in keys if key not in PROGRAMS]
    assert len(keys) > 15
    for section, _, name in (key.rpartition(".") for key in keys):
        assert name in OmegaConf.select(schema(), section)
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").touch()
    whole = re.sub(r" \\\n +", " ", done.stdout)
    commands = re.findall(r"^  python -m qk_sniffer(.*?)$", whole, flags=re.MULTILINE)
    assert len(commands) > 5
    executable = tmp_path / "srun"  # one of the commands needs a login node of SLURM
    executable.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for command in commands:
        assert preflight.planned(get_args(command.split()), app.APPLICATION)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        (("model=qwen", "foo=1", "sampler.base_rate=-1"), 3),
        (("--multirun", "model=qwen3_8b,llama3_1_8b,qwen3_4b", "sampler.base_rate=-1"), 1),
        (("+experiment=smollm3_checkpoints", "shard.index=1"), 1),
    ],
)
def test_a_bad_command_line_ends_before_heavy_libraries_are_imported(
    arguments: tuple[str, ...], problems: int, light: dict[str, str], tmp_path: Path
) -> None:
    done = sniff(light, tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert f"{problems} problem" in done.stderr and "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "outputs").exists()


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "configs/sample.yaml"), "--config is a flag of the original tool"),
        (("--config=configs/sample.yaml",), "--config is a flag of the original tool"),
        (("--model", "qwen"), "--model: no such flag; settings are written key=value"),
        (
            ("-c", "file.yaml"),
            "for a file of your own settings, FOLDER/experiment/mine.yaml, write --config-dir FOLDER",
        ),
        (("model=pydoc_tiny", "--package"), "argument --package/-p: expected one argument"),
        (("--cfg", "job", "dataset.filter={lang: fr}"), "to add it, write '+dataset.filter={lang: fr}'"),
        (("--cfg", "job", "--multirun"), "Only one of"),
        (("--help", "+experiment=none"), "Could not find 'experiment/none'"),
        (("--experimental-rerun", "config.pickle"), "--experimental-rerun: no such flag here"),
    ],
)
def test_bad_flags(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["qk_sniffer", *arguments])
    assert app.main() == 2
    assert message in capsys.readouterr().err


def test_flags_may_stand_between_settings() -> None:
    args = parse_flags(["model=pydoc_tiny,qwen3_8b", "-m", "sampler=all", "--config-dir", "mine", "dataset=pydoc"])
    assert (args.multirun, args.config_dir) == (True, "mine")
    assert args.overrides == ["model=pydoc_tiny,qwen3_8b", "sampler=all", "dataset=pydoc"]


@pytest.mark.slow
def test_hydras_own_flags_work(light: dict[str, str], tmp_path: Path) -> None:
    for flags, expected in ((("--cfg", "job"), "name: Qwen/Qwen3-8B"), (("--info", "defaults"), "model/qwen3_8b")):
        done = sniff(light, tmp_path, "sampler=all", *flags, "model=qwen3_8b")
        assert (done.returncode, done.stderr) == (0, "") and expected in done.stdout
    assert not (tmp_path / "outputs").exists()


def test_a_printed_config_has_the_slugs_that_its_values_refer_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = ("model=hf", "model.name=org/Foo", "dataset=hf", "dataset.path=org/some_Texts")
    root = "output.data_root=x/${model.slug}/${dataset.slug}"
    monkeypatch.setattr(sys, "argv", ["qk_sniffer", "--cfg", "job", "--resolve", *values, root])
    assert app.main() == 0
    printed = capsys.readouterr().out
    assert "data_root: x/foo/some_texts" in printed and "slug: foo" in printed


def test_a_job_that_ends_well(light: dict[str, str], tmp_path: Path) -> None:
    done = sniff(light, tmp_path, *MODEL)
    assert (done.returncode, done.stdout) == (0, "running with seed 0\n")
    (status,) = (tmp_path / "outputs" / ".runs").rglob("status.json")
    assert json.loads(status.read_text())["state"] == "done"
    assert (status.parent / "qk_sniffer.log").exists()


@pytest.mark.slow
def test_the_state_of_an_earlier_run_is_not_that_of_a_job_that_could_not_record_its_own(
    light: dict[str, str], tmp_path: Path
) -> None:
    command = (*MODEL, f"hydra.run.dir={tmp_path / 'run'}")
    assert sniff(light, tmp_path, *command).returncode == 0
    with hold(tmp_path / "run" / job_status.LOCK, "running this job", of_user=True):
        done = sniff(light, tmp_path, *command, "output.data_root=other")
    assert done.returncode == 1 and "run is in use" in done.stderr
    assert "running with seed" not in done.stdout


@pytest.mark.slow
def test_output_folder_holds_everything_that_a_job_writes(light: dict[str, str], tmp_path: Path) -> None:
    done = sniff(light, tmp_path, *MODEL, "output.folder=scratch")
    assert (done.returncode, done.stdout) == (0, "running with seed 0\n")
    assert len(list((tmp_path / "scratch" / ".runs").rglob("status.json"))) == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_a_job_that_fails(light: dict[str, str], tmp_path: Path) -> None:
    foreseen = sniff(light, tmp_path, *MODEL, "sampler.seed=1")
    assert foreseen.returncode == 1
    assert foreseen.stderr.endswith(" ...\nthe disk is full:\n  free some space\n")
    other = sniff(light, tmp_path, *MODEL, "sampler.seed=2")
    assert other.returncode == 1
    assert "Traceback" in other.stderr and "RuntimeError: out of luck" in other.stderr
    assert "HYDRA_FULL_ERROR" not in other.stderr
    logs = [log.read_text() for log in sorted((tmp_path / "outputs" / ".runs").rglob("qk_sniffer.log"))]
    assert any("the disk is full" in log for log in logs) and any("Traceback" in log for log in logs)


@pytest.mark.slow
def test_a_model_that_takes_the_place_of_a_choice_is_told(light: dict[str, str], tmp_path: Path) -> None:
    said = "org/copy is captured with the slug qwen3-8b and the settings of model=qwen3_8b"
    done = sniff(light, tmp_path, "model=qwen3_8b", "model.name=org/copy")
    assert done.returncode == 0 and said in done.stdout + done.stderr
    done = sniff(light, tmp_path, *MODEL)
    assert done.returncode == 0 and "is captured with the slug" not in done.stdout + done.stderr
    done = sniff(light, tmp_path, "--multirun", "model.name=org/a,org/b")
    assert done.returncode == 2 and "set model=hf model.name=org/a" in done.stderr


@pytest.mark.slow
def test_what_only_the_job_finds_wrong_in_the_settings_has_their_exit_code(
    light: dict[str, str], tmp_path: Path
) -> None:
    alone = sniff(light, tmp_path, *MODEL, "sampler.seed=5")
    assert alone.returncode == 2 and "this model has positions for 8" in alone.stderr + alone.stdout
    mixed = sniff(light, tmp_path, "--multirun", *MODEL, "sampler.seed=1,5", "output.data_root=o${sampler.seed}")
    assert mixed.returncode == 1, "the other job failed with exit code 1"


def test_an_interrupted_job(light: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qk_sniffer", *MODEL, "sampler.seed=3"]
    with subprocess.Popen(
        command, env=light, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "running with seed 3\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.readline().endswith(": reading the settings ...\n")
        assert process.stderr.read() == "stopped by SIGINT; rerun the same command to resume\n"


@pytest.mark.slow
def test_a_failed_job_does_not_stop_its_sweep(light: dict[str, str], tmp_path: Path) -> None:
    arguments = ("sampler.seed=0,1,2,4", "output.data_root=x-${sampler.seed}")
    done = sniff(light, tmp_path, "--multirun", *MODEL, *arguments)
    assert done.returncode == 1
    assert [(row[0], row[1], row[2], row[-2], row[-1]) for row in rows_of(done.stdout)] == [
        ("0", "model", "done", "x-0", "sampler.seed=0"),
        ("1", "model", "failed", "x-1", "sampler.seed=1"),
        ("2", "model", "failed", "x-2", "sampler.seed=2"),
        ("3", "model", "done", "x-4", "sampler.seed=4"),
    ]
    assert rows_of(done.stdout)[0][3] == "1,234", "rows"
    assert "the disk is full: free some space" in done.stdout and "RuntimeError: out of luck" in done.stdout


@pytest.mark.slow
def test_jobs_that_start_in_one_second_keep_apart(light: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qk_sniffer", *MODEL]
    processes = [subprocess.Popen(command, env=light, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert len(list((tmp_path / "outputs" / ".runs").rglob("status.json"))) == 2


@pytest.mark.slow
def test_a_launcher_with_processes_of_its_own(light: dict[str, str], tmp_path: Path) -> None:
    arguments = ("sampler.seed=0,1", "output.data_root=x-${sampler.seed}", "hydra/launcher=submitit_local")
    done = sniff(light, tmp_path, "--multirun", *MODEL, *arguments)
    assert done.returncode == 1, done.stderr
    assert [row[2] for row in rows_of(done.stdout)] == ["done", "failed"]
    assert len(list((tmp_path / "outputs" / ".sweeps").glob("*/*"))) == 1


@pytest.mark.slow
def test_jobs_in_processes_of_their_own_run_a_copy_of_the_code_if_asked(light: dict[str, str], tmp_path: Path) -> None:
    arguments = ("sampler.seed=0,6", "output.data_root=x-${sampler.seed}", "hydra/launcher=submitit_local")
    done = sniff(light, tmp_path, "--multirun", *MODEL, *arguments, "snapshot=true")
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "outputs" / ".sweeps").glob("*/*")
    said = "".join(path.read_text() for path in sweep.rglob("*_log.out"))
    assert f"code from {sweep / 'code' / 'qk_sniffer'}" in said


@pytest.mark.slow
def test_the_env_file_is_read_for_what_is_not_set(light: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("HF_XET_CACHE=from-the-file\nHOME=/nowhere\nLD_PRELOAD=/nowhere/evil.so\n")
    done = sniff(light, tmp_path, *MODEL, "sampler.seed=6")
    assert f"from-the-file {os.environ['HOME']}" in done.stdout, done.stderr
    assert done.stderr.count("LD_PRELOAD ignored") == 1 and "evil.so" not in done.stderr
    (tmp_path / ".env").write_bytes(b"A=\xff\n")
    bad = sniff(light, tmp_path, *MODEL)
    assert bad.returncode == 2 and ".env is not UTF-8" in bad.stderr and "Traceback" not in bad.stderr


def test_the_task_can_be_sent_to_a_worker() -> None:
    import cloudpickle

    assert pickle.loads(pickle.dumps(app.task)) is app.task
    cloudpickle.register_pickle_by_value(app)
    try:
        assert len(cloudpickle.dumps(app.task)) < 10_000
    finally:
        cloudpickle.unregister_pickle_by_value(app)


@pytest.mark.slow
def test_an_uninstalled_checkout_from_any_folder(light: dict[str, str], tmp_path: Path) -> None:
    checkout, cwd = tmp_path / "checkout", tmp_path / "elsewhere"
    for name in ("qk_sniffer", "conf", "models"):
        shutil.copytree(REPO / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        (cwd / name).mkdir(parents=True)  # folders of these names in the current directory are the user's
    (cwd / "qk_sniffer").rmdir()
    (cwd / "conf" / "__init__.py").write_text("raise SystemExit(98)")
    (checkout / "conf" / "model" / "marked.yaml").write_text("name: org/marked\n")
    env = light | {"PYTHONPATH": f"{light['PYTHONPATH']}:{checkout}"}
    done = sniff(env, cwd, "--cfg", "job", "model=marked")
    assert done.returncode == 0 and "name: org/marked" in done.stdout, done.stderr
    assert sniff(env, cwd, "model=marked").stdout == "running with seed 0\n"


def test_the_console_script(light: dict[str, str], tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("sniff-qk")
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    done = sniff(light, tmp_path, "sampler.base_rate=-1", *MODEL, program=[str(script)])
    assert done.returncode == 2 and "sampler.base_rate is -1.0" in done.stderr


@pytest.mark.parametrize("module", ["finalize", "plasticity"])
def test_another_program_refuses_a_wrong_command_line_before_heavy_imports(
    module: str, light: dict[str, str], tmp_path: Path
) -> None:
    program = (sys.executable, "-m", f"qk_sniffer.{module}")
    done = sniff(light, tmp_path, "dat_root=x", program=program)
    assert done.returncode == 2, done.stderr
    assert "dat_root is not a key, did you mean data_root?" in done.stderr
    assert "data_root is not given; it is the folder of " in done.stderr
