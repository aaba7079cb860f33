"""Checks the command line of plasticity: refused settings, the folder of the results, sweeps, and imports at start."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.plasticity_cases import environment_of, full_covariance, program, record

from qk_sniffer.plasticity.config import PlasticityConfig, resolved


@pytest.mark.slow
def test_a_sweep(verify_base: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        shutil.copytree(verify_base, tmp_path / name)
    (tmp_path / "b" / "manifest.json").unlink()
    done = program(tmp_path, "--multirun", "data_root=a,b,c", "pictures=false", "estimator=full_covariance")
    assert done.returncode == 1 and "at b is incomplete" in done.stderr, done.stderr
    for name in ("a", "c"):
        estimator = record(tmp_path / f"{name}-plasticity-full-covariance")["settings"]["estimator"]
        assert estimator == {"name": "full_covariance", "alpha": 0.01}, "the other jobs ran to their end"


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("data_rot=a", "seed=x", "estimator=full", "p_alpha=2"),
            ("data_root?", "an integer", "valid: full_covariance, regression"),
        ),
        (("p_alpha=2", "seed=-1"), ("data_root is not given", "p_alpha is 2", "seed is -1")),
        (("data_root=nowhere/at/all",), ("no such folder",)),
        (("data_root=.", "estimator.alpha=0.1"), ("estimator.alpha belongs to estimator=full_covariance",)),
        (("data_root=.", "estimator=full_covariance", "estimator.alpha=1"), ("above 0 and below 1",)),
        (("data_root=.", "revision=x"), ("which has none",)),
        (("data_root=.", "output_dir=./results"), ("in the dataset itself",)),
        (("data_root=.", "num_pairs_per_bucket=1000001"), ("at most 1,000,000",)),
        (("data_root=.", "replicates=5"), ("must be 20 to 10,000, or 0 for results without intervals",)),
        (("data_root=.", "seed=1,2"), ("needs --multirun",)),
        (("--multirun", "data_root=.", "seed=1,2"), ("would both write",)),
        (("--multirun", "data_root=.", "output_dir=../A,../a"), ("../A", "which some file systems take for")),
        (("--multirun", "data_root=.", "seed=1,-2"), ("seed is -2",)),
        (("--nonsense",), ("no such flag",)),
        (("data_root=.", "~seed"), ("seed=...",)),
    ],
)
def test_what_is_wrong_is_said_at_once_and_without_a_traceback(
    arguments: tuple[str, ...], said: tuple[str, ...], in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from qk_sniffer.plasticity.cli import main

    monkeypatch.setattr(sys, "argv", ["plasticity", *arguments])
    assert main() == 2
    errors = capsys.readouterr().err
    assert all(text in errors for text in said), errors
    assert "Traceback" not in errors and not list(in_tmp.iterdir())


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"data_root": "outputs/a/"}, "outputs/a-plasticity"),
        ({"data_root": "outputs/a", "estimator": full_covariance(0.1)}, "outputs/a-plasticity-full-covariance"),
        ({"data_root": "me/vectors", "revision": "Qwen3-8b/x"}, "outputs/qwen3-8b-x-plasticity"),
        ({"data_root": "me/vectors"}, "outputs/vectors-plasticity"),
        ({"data_root": "outputs/a", "output_dir": "~/b"}, "HOME/b"),
        ({"data_root": "."}, "HERE-plasticity"),
    ],
)
def test_where_the_results_go(settings: dict[str, Any], folder: str, in_tmp: Path) -> None:
    (in_tmp / "outputs" / "a").mkdir(parents=True)
    folder = folder.replace("HOME", str(Path.home())).replace("HERE", str(in_tmp))
    assert resolved(PlasticityConfig(**settings)).output_dir == folder


def test_the_capture_says_whose_the_group_is(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from qk_sniffer.cli.app import main

    monkeypatch.setattr(sys, "argv", ["qk_sniffer", "estimator=full_covariance"])
    assert main() == 2
    assert "belongs to python -m qk_sniffer.plasticity" in capsys.readouterr().err


@pytest.mark.slow
def test_it_starts_light_and_its_help_is_true(tmp_path: Path) -> None:
    done = program(tmp_path, "--help")
    assert done.returncode == 0
    for key in ("data_root", "revision", "output_dir", "estimator", "max_tokens_per_head", "p_alpha", "pictures"):
        assert re.search(rf"^  {key}  ", done.stdout, re.MULTILINE), key
    code = "import sys; import qk_sniffer.plasticity.cli, qk_sniffer.plasticity.run, qk_sniffer.plasticity.figures; "
    code += "import qk_sniffer.plasticity.compare; print(*sorted(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment_of(), check=True
    )
    assert not {"torch", "transformers", "datasets", "scipy", "matplotlib", "pandas"} & set(found.stdout.split())
