"""The whole job with `output=hub`, as a user types it: captured here, published there, read back by revision."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fake_hub import FakeHub

REPO = "alice/vectors"


def run(hub: FakeHub, folder: Path, *command: str, token: str | None = "hf_alice") -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    if token is not None:
        environment["HF_TOKEN"] = token
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


JOB = [
    "-m",
    "qk_sniffer",
    "output=hub",
    "output.hf_repo_id=alice/vectors",
    "dataset.max_samples=3",
    "model.tokenizer.max_length=100",
    "capture.layers=[1]",
    "sampler=all",
]

READ = """
import json
from datasets import load_dataset
rows = load_dataset("alice/vectors", "l01h03q", revision="pydoc-tiny-pydoc", split="train")
print(json.dumps([len(rows), rows.column_names]))
"""


def test_a_job_publishes_and_the_same_command_publishes_nothing_new(tmp_path: Path) -> None:
    with FakeHub() as hub:
        done = run(hub, tmp_path, *JOB)
        assert done.returncode == 0, done.stderr
        assert f"Published: {hub.url}/datasets/{REPO}/tree/pydoc-tiny-pydoc" in done.stdout
        assert "hf_alice" not in done.stdout + done.stderr
        rows, columns = json.loads(run(hub, tmp_path, "-c", READ).stdout)
        assert rows == 300 and columns == ["bucket", "example_id", "position", "vector", "sliding_window"]
        again = run(hub, tmp_path, *JOB)
        assert again.returncode == 0 and "Nothing to do" in again.stdout and "Already published" in again.stdout
        assert hub.count("POST", "/commit/") == 1
        written = [path for path in tmp_path.rglob("*") if path.is_file() and "home" not in path.parts]
        assert len(written) > 10
        assert not [path for path in written if b"hf_alice" in path.read_bytes()]


def test_a_failed_publication_keeps_the_dataset_and_can_be_made_up_for(tmp_path: Path) -> None:
    with FakeHub() as hub:
        hub.fault("POST", "/commit/", status=403, times=1)
        failed = run(hub, tmp_path, *JOB)
        assert failed.returncode == 1 and "Traceback" not in failed.stderr
        assert (tmp_path / "outputs" / "pydoc-tiny-pydoc" / "manifest.json").exists()
        done = run(hub, tmp_path, *JOB)
        assert done.returncode == 0 and "Nothing to do" in done.stdout and "Published: " in done.stdout


def test_without_a_token_nothing_is_captured(tmp_path: Path) -> None:
    with FakeHub() as hub:
        failed = run(hub, tmp_path, *JOB, token=None)
    assert failed.returncode == 1 and "HF_TOKEN" in failed.stderr
    assert not (tmp_path / "outputs" / "pydoc-tiny-pydoc").exists()
