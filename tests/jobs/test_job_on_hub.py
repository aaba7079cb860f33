"""A whole job with `output=hub`, as a user types it: captured, published, and read back as the card says."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.fake_hub import FakeHub
from support.hub_cases import REPO, assert_whole, client, environment, held, publish, published
from support.jobs import TEXTS, run
from support.local_xet import LocalXet
from support.tiny import save_checkpoint
from support.zoo import CASES

import qk_sniffer

pytestmark = pytest.mark.floor

BRANCH = "pydoc-tiny-pydoc-all"

JOB = [
    "-m",
    "qk_sniffer",
    "output=hub",
    f"output.hf_repo_id={REPO}",
    "dataset.max_samples=3",
    "model.tokenizer.max_length=100",
    "capture.layers=[1]",
    "sampler=all",
]


@pytest.mark.slow
def test_a_job_publishes_and_its_card_tells_how_to_read_it(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("HF_TOKEN=hf_alice\n")
    with FakeHub(LocalXet(tmp_path / "xet")) as hub:
        done = client(hub, tmp_path, *JOB, xet=True, token=None)
        assert done.returncode == 0, done.stderr
        assert f"Published: {hub.url}/datasets/{REPO}/tree/{BRANCH}" in done.stdout
        assert "hf_alice" not in done.stdout + done.stderr and "it/s" not in done.stderr
        assert_whole(held(hub, BRANCH), tmp_path / "copy")
        card = held(hub, BRANCH)["README.md"].decode()
        assert "`pydoc_tiny` (licence: `apache-2.0`) and from `pydoc` (licence: `psf-2.0`)" in card
        assert yaml.safe_load(card.split("---\n")[1])["language"] == ["en"]

        (download,) = re.findall(r"```bash\n(.*?)```", card, flags=re.DOTALL)
        blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        hub_code, folder_code = blocks[:2], blocks[2:]
        assert len(folder_code) == 6
        shown = "print('shown', len(rows), len(list(stream)), len(vectors), len(positions), len(example_ids))"
        read = client(hub, tmp_path, "-c", "\n".join([*hub_code, shown]), xet=True, token=None)
        assert read.stdout.splitlines()[-1] == "shown 300 300 300 300 300", read.stderr
        program = [
            f"import os, subprocess; subprocess.run({download!r}, shell=True, check=True)",
            f"os.chdir({BRANCH!r})",
        ]
        shown = "print('shown', len(rows), len(frame), len(vectors[0]), counts)"
        copied = client(hub, tmp_path, "-c", "\n".join([*program, *folder_code, shown]), xet=True, token=None)
        assert "shown 300 300 300 [" in copied.stdout, copied.stderr

        again = client(hub, tmp_path, *JOB, xet=True, token=None)
        assert again.returncode == 0 and "Nothing to do" in again.stdout and "Already published" in again.stdout
        assert (published(hub, BRANCH), published(hub, "main")) == (1, 1)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".env"]
    assert len(written) > 10
    assert not [path for path in written if b"hf_alice" in path.read_bytes()]


@pytest.mark.slow
def test_killed_in_mid_upload_and_refused(tmp_path: Path) -> None:
    """The dataset stays whole on disk. The same command publishes it in one commit, without capturing again."""
    with FakeHub() as hub:
        hub.fault("PUT", "/lfs/", "hold")
        process = subprocess.Popen([sys.executable, *JOB], cwd=tmp_path, env=environment(hub, tmp_path))
        assert hub.held.wait(60), "the upload has started"
        process.send_signal(signal.SIGKILL)
        process.wait()
        hub.held.clear()
        dataset = qk_sniffer.open_dataset(tmp_path / "outputs" / BRANCH)
        assert len(dataset.vectors(1, 3, "q").vectors) == 300 and published(hub, BRANCH) == 0

        hub.fault("POST", "/commit/", status=403)
        refused = client(hub, tmp_path, *JOB)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr
        assert "rerun the command of its job to publish it" in refused.stderr and published(hub, BRANCH) == 0

        done = client(hub, tmp_path, *JOB)
        assert done.returncode == 0 and "Nothing to do" in done.stdout and "Published: " in done.stdout
        assert published(hub, BRANCH) == 1
        assert_whole(held(hub, BRANCH), tmp_path / "copy")


@pytest.mark.slow
def test_without_a_token_nothing_is_captured(tmp_path: Path) -> None:
    with FakeHub() as hub:
        failed = client(hub, tmp_path, *JOB, token=None)
    assert failed.returncode == 1 and "HF_TOKEN" in failed.stderr
    assert not (tmp_path / "outputs" / BRANCH).exists()


@pytest.mark.slow
def test_1300_heads(hub: FakeHub, api: Any, endpoint: str, tmp_path: Path) -> None:
    """A real job publishes as many files as a large model has in one commit, and every head loads by its name."""
    llama = next(case for case in CASES if case.name == "llama")
    sizes = {"num_hidden_layers": 26, "num_attention_heads": 40, "num_key_value_heads": 10, "hidden_size": 160}
    checkpoint = save_checkpoint(replace(llama, options=llama.options | sizes | {"head_dim": 4}), tmp_path / "model")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:3]))
    root = run(checkpoint, texts, tmp_path / "root")
    done = publish(root, REPO, BRANCH, api=api)
    files = held(hub, BRANCH)
    assert done.changed and published(hub, BRANCH) == 1 and len(files) == 1300 + 3
    assert len(files["README.md"]) < 100_000
    assert_whole(files, tmp_path / "copy")
    code = f"""
from datasets import get_dataset_config_names, load_dataset
names = get_dataset_config_names({REPO!r}, revision={BRANCH!r})
print(len(names), [len(load_dataset({REPO!r}, name, revision={BRANCH!r}, split="train")) for name in names[:1300:433]])
"""
    read = client(hub, tmp_path, "-c", code)
    dataset = qk_sniffer.open_dataset(root)
    rows = len(dataset.vectors(0, 0, "q").vectors)
    assert read.stdout.split() == ["1301", f"[{rows},", f"{rows},", f"{rows},", f"{rows}]"], read.stderr
    assert len(qk_sniffer.open_dataset(REPO, revision=BRANCH).vectors(25, 9, "k").vectors) == rows
