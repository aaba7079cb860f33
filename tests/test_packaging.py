"""Tests that the wheel holds the whole package, and that a wheel and an uninstalled checkout run from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("qk_sniffer", "conf", "models")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The build uses a copy, because setuptools puts the files of an old build/ folder into the wheel.
    copy = tmp_path_factory.mktemp("checkout")
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", copy / "dist", copy]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("qk_sniffer/")}
    expected = set()
    for part in PARTS:
        for path in (ROOT / part).rglob("*"):
            if (
                path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
            ) or path.parent.name == "pydoc_tiny":
                name = path.relative_to(ROOT).as_posix()
                expected.add(name if part == "qk_sniffer" else f"qk_sniffer/{name}")
    assert packed == expected


def hostile(folder: Path) -> Path:
    """Returns `folder`, with folders that have the names of the package's folders."""
    for name in ("conf", "models"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise SystemExit('the wrong folder was imported')")
        (folder / name / "config.yaml").write_text("wrong: true")
    return folder


def run(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    code = "import qk_sniffer, sys; print(qk_sniffer.__file__); from qk_sniffer.cli.app import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["wheel", "checkout"])
def test_it_runs_from_any_folder(form: str, wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    if form == "wheel":
        zipfile.ZipFile(wheel).extractall(site)
    else:
        for part in PARTS:
            shutil.copytree(ROOT / part, site / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "elsewhere").mkdir()
    cwd = hostile(tmp_path / "elsewhere")
    done = run(site, cwd, "dataset.max_samples=2", "model.tokenizer.max_length=64", "sampler.base_rate=4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(site / "qk_sniffer" / "__init__.py")
    assert (cwd / "outputs" / "pydoc-tiny-pydoc" / "manifest.json").exists()
