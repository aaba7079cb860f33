"""Checks that all programs are found by their names, and start and end alike."""

import importlib
import os
import pty
import shlex
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.rights import without_root

import qk_sniffer
from qk_sniffer.cli import app, preflight
from qk_sniffer.cli.flags import parse_flags
from qk_sniffer.cli.programs import PROGRAMS, listed, mistaken_part, run_named
from qk_sniffer.plasticity import cli as plasticity


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sniff-qk", *arguments])
    return run_named()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_has_one_name_for_both_ways(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_spec(f"qk_sniffer.{name}") is not None and callable(importlib.import_module(PROGRAMS[name].module).main)
    assert run(monkeypatch, name, "--version") == 0
    assert capsys.readouterr().out == f"qk-sniffer {qk_sniffer.__version__}\n"
    assert f"  {name} " in listed()
    assert run(monkeypatch, name, "outputs/nope", "nonsense=1") == 2
    assert "nonsense is not a key" in capsys.readouterr().err
    assert run(monkeypatch, name, "--nonsense") == 2
    assert "--nonsense: no such flag" in capsys.readouterr().err


def test_a_misspelled_program_is_told_the_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "verfy", "outputs/mine") == 2
    assert "verfy is not a program, did you mean verify?" in capsys.readouterr().err
    assert run(monkeypatch, "compare", "runs=a,b") == 2
    assert "compare is not a program, did you mean plasticity.compare?" in capsys.readouterr().err
    for name in ("plasticity-compare", "plasticity_compare", "plasticity/compare"):
        assert run(monkeypatch, name, "a,b") == 2
        assert f"{name} is not a program, did you mean plasticity.compare?" in capsys.readouterr().err
    for arguments in (["runs=a,b"], ["--multirun", "compare", "runs=a,b"]):
        assert run(monkeypatch, "plasticity", *arguments) == 2
        assert "runs is a setting of plasticity.compare" in capsys.readouterr().err
    for argument in ("runs=a,b", "--help"):
        assert run(monkeypatch, "plasticity", "compare", argument) == 2
        assert "plasticity compare is not a program, did you mean plasticity.compare?" in capsys.readouterr().err
    assert run(monkeypatch, "capture", "model=pydoc_tiny") == 2
    assert "capture is not a program: without the name of one, the command captures" in capsys.readouterr().err
    for flag in ("version", "help"):
        assert run(monkeypatch, flag) == 2
        assert f"{flag} is not a program, did you mean --{flag}?" in capsys.readouterr().err
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"qk-sniffer {qk_sniffer.__version__}\n"


def test_a_folder_may_have_the_name_of_a_part_of_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert mistaken_part("plasticity", "compare") is not None
    (tmp_path / "compare").mkdir()
    assert mistaken_part("plasticity", "compare") is None


NAMES = ["plain", "it's", "a,b", "x=1", "${oc.env:HOME}", "back\\", "q\"\\'", "{a: [b", " "]
INTERPOLATIONS = [f"a{slashes}${{seed}}" for slashes in ("\\", "\\\\", "\\\\\\", "'\\", "$\\")]


@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES + INTERPOLATIONS)
def test_plasticity_takes_a_folder_without_its_key_whatever_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    arguments = ["seed=3", f"{tmp_path}/{name}"]
    monkeypatch.setattr(sys, "argv", ["plasticity", *arguments])
    args = parse_flags(arguments, first_key="data_root")
    (job,) = preflight.planned(args, plasticity.APPLICATION)
    assert (job.config.data_root, job.config.seed) == (f"{tmp_path}/{name}", 3)
    assert sys.argv[1:] == args.overrides


@pytest.mark.few(1)
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [("verify", "--help"), ("status", "."), ("verify", "nope")])
def test_a_reader_that_goes_away_changes_nothing(arguments: tuple[str, ...], unbuffered: str, tmp_path: Path) -> None:
    def code(**streams: Any) -> tuple[int, bytes]:
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        command = [sys.executable, "-m", "qk_sniffer", *arguments]
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, **streams) as process:
            assert process.stderr is not None
            said = process.stderr.read()
        return process.returncode, said

    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert code(stdout=writer) == code(stdout=subprocess.DEVNULL)
    finally:
        os.close(writer)


@pytest.mark.parametrize("closed", [(0, 1, 2), (2,)])
def test_a_closed_stream_does_not_become_a_file_of_the_program(closed: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(OPENED)
    command = [sys.executable, "-m", "qk_sniffer", "status", "."]
    shell = ["sh", "-c", f"exec {shlex.join(command)} {' '.join(f'{stream}>&-' for stream in closed)}"]
    done = subprocess.run(
        shell, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, input=b"", stdout=subprocess.PIPE
    )
    assert done.returncode == 0
    assert (tmp_path / "streams").read_text() == "".join(f"{number} True\n" for number in closed)


OPENED = """
import atexit
import os

def tell():
    paths = [(number, os.readlink(f"/proc/self/fd/{number}")) for number in range(3)]
    with open("streams", "w") as file:
        file.writelines(f"{number} {os.get_inheritable(number)}\\n" for number, path in paths if path == os.devnull)

atexit.register(tell)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_on_a_full_disk_is_an_error_in_the_end(unbuffered: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qk_sniffer", "status", "."]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    said = "the output of this program is not complete, because it cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


IMPORTS = """
import os
import sys
import tempfile

class Telling:
    def find_spec(self, name, path=None, target=None):
        if name in {names}:
            os.write(2, f"imports {name}\\n".encode())

sys.meta_path.insert(0, Telling())
"""


@pytest.mark.parametrize("arguments", [(), ("-m", "sampler.seed=0,1"), ("--config-dir", ".")])
def test_a_job_says_that_it_starts_before_it_imports_what_takes_long(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    heavy = {"hydra", "omegaconf", "numpy", "pyarrow", "torch", "transformers", "datasets", "pandas"}
    (tmp_path / "sitecustomize.py").write_text(IMPORTS.replace("{names}", repr(heavy)))
    command = [sys.executable, "-m", "qk_sniffer", *arguments, "model=nope"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    first, *others = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert first == f"qk-sniffer {qk_sniffer.__version__}: reading the settings ..."
    assert "imports hydra" in others and first not in others


@pytest.mark.parametrize("arguments", [("--help",), ("-c", "job"), ("--cfg=job",), ("verfy",), ("--nonsense", "a=1")])
def test_a_command_that_runs_no_job_does_not_say_that_one_starts(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(app, "main", lambda: ran.append(sys.argv[1:]) or 0)
    assert run(monkeypatch, *arguments) == 0
    assert capsys.readouterr().err == "" and ran == [[*arguments]]


@pytest.mark.slow
@pytest.mark.parametrize(("variables", "is_red"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_errors_are_red_on_a_terminal_alone(variables: dict[str, str], is_red: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qk_sniffer", "verify", "a", "b"]
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    master, slave = pty.openpty()
    done = subprocess.run(command, cwd=tmp_path, env=environment | variables, stderr=slave)
    os.close(slave)
    said = os.read(master, 10_000)
    os.close(master)
    assert done.returncode == 2 and b"1 problem in the configuration" in said
    assert (b"\x1b[31m" in said and b"\x1b[0m" in said) == is_red and (b"\x1b" in said) == is_red
    piped = subprocess.run(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    assert b"1 problem" in piped.stderr and b"\x1b" not in piped.stderr


@pytest.mark.parametrize("name", ["verify", "report", "heads", "export", "pictures", "finalize"])
def test_a_folder_without_rights_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module(PROGRAMS[name].module)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "private", "dataset")
        root.mkdir(parents=True)
        root.parent.chmod(0)
        try:
            with without_root():
                assert run(monkeypatch, name, str(root), *(["format=qfilters"] if name == "export" else [])) == 1
        finally:
            root.parent.chmod(0o700)
    said = capsys.readouterr().err
    assert "Permission denied" in said and str(root.parent) in said and "Traceback" not in said
