"""Helps the tests of the Hub: makes datasets of four heads, and reads repositories."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qk_sniffer.config import from_dict
from qk_sniffer.dataset.card import branch_card
from qk_sniffer.dataset.verify import verify
from qk_sniffer.hub.publish import Published
from qk_sniffer.hub.publish import publish as publish_with_card
from qk_sniffer.jobs.run import run_job
from qk_sniffer.store import manifest as manifests
from support.fake_hub import FakeHub
from support.jobs import settings

REPO = "alice/vectors"
BRANCH = "some-model-some-texts"
HEADS = ["l00h00q", "l00h03q", "l00h00k", "l00h01k"]

MakeDataset = Callable[..., Path]
"""`make(root, model="some-model", heads=(0, 3), layer=0, seed=0)` copies the dataset of a real job to `root`."""


def capture(checkpoint: Path, texts: Path, root: Path, *, model: str, heads: Any, layer: int, seed: int) -> Path:
    sections: dict[str, Any] = {
        "model": {"slug": model},
        "sampler": {"type": "uniform", "base_rate": 6.0, "seed": seed},
        "capture": {"layers": [layer], "heads": list(heads)},
    }
    run_job(from_dict(settings(checkpoint, texts, root, **sections)))
    return root


def publish(root: Path, repo_id: str, branch: str, **options: Any) -> Published:
    """Publishes a dataset with its card, as a job does."""
    manifest = manifests.read(root)
    return publish_with_card(root, manifest, repo_id, branch, branch_card(root, manifest, repo_id, branch), **options)


def copied(source: Path, root: Path) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    return shutil.copytree(source, root)


def contents(root: Path) -> dict[str, bytes]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def vectors_of(files: dict[str, bytes]) -> dict[str, bytes]:
    """Returns the Parquet files, which are equal on a branch and in a folder; card and manifest differ."""
    return {name: content for name, content in files.items() if name.endswith(".parquet")}


def held(hub: FakeHub, branch: str = BRANCH) -> dict[str, bytes]:
    """Returns the files of the branch, without .gitattributes."""
    files = dict(hub.repositories[REPO].files(branch))
    assert files.pop(".gitattributes")
    return files


def published(hub: FakeHub, branch: str = BRANCH) -> int:
    """Returns the number of commits to the branch after the repository's first one."""
    return len(hub.repositories[REPO].history(branch)) - 1


def assert_whole(files: dict[str, bytes], folder: Path) -> None:
    """Asserts that the files of a branch are a whole dataset."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    report = verify(folder)
    assert not report.problems, str(report)


def assert_published(hub: FakeHub, root: Path, folder: Path) -> None:
    """Asserts that the branch has the whole dataset after one commit, and that main lists it."""
    assert published(hub) == 1 and vectors_of(held(hub)) == vectors_of(contents(root))
    assert_whole(held(hub), folder / "copy")
    assert f"[`{BRANCH}`]" in held(hub, "main")["README.md"].decode()


def environment(hub: FakeHub, folder: Path, *, xet: bool = False, token: str | None = "hf_alice") -> dict[str, str]:
    """Returns the environment of a process that uses only this Hub, with its cache in `folder`."""
    found = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{found['PATH']}"
    found |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home")}
    if not xet:
        found["HF_HUB_DISABLE_XET"] = "1"
    if token is not None:
        found["HF_TOKEN"] = token
    return found


def client(hub: FakeHub, folder: Path, *command: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Runs Python in that environment."""
    env = environment(hub, folder, **options)
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
