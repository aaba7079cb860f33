"""Prints the peak of anonymous memory, in MB, for one text of 131,072 tokens.

The model has ten small sliding layers of 30 query heads: a forward pass takes minutes at most on a few cores.

python benchmarks/long_context.py plain|uniform|attention|all
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import EMBEDDED_MODEL, job, sliding_qwen3, write_texts
from memory import PERIOD_S, anonymous_mb
from transformers import Qwen3Model

LENGTH = 131_072

PLAIN = """
import sys, torch
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.banded_attention import banded
from qk_sniffer.config import ModelConfig
from qk_sniffer.backbone.loading import load_backbone
backbone = load_backbone(ModelConfig(name=sys.argv[1], dtype="float32"))
with banded():
    backbone.run(torch.arange(int(sys.argv[2]))[None] % 1000)
"""
"""Runs the forward pass alone, with banded attention too: the model's own kernel needs masks of 17 GB."""


def make_model(folder: Path) -> Path:
    config = sliding_qwen3(
        LENGTH,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=10,
        num_attention_heads=30,
        num_key_value_heads=6,
        head_dim=16,
    )
    torch.manual_seed(0)
    Qwen3Model(config).save_pretrained(folder)
    for file in EMBEDDED_MODEL.glob("token*"):
        shutil.copy(file, folder)
    return folder


def main() -> None:
    who = sys.argv[1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_model(folder / "model")
        if who == "plain":
            command = [sys.executable, "-c", PLAIN, str(model), str(LENGTH)]
        else:
            texts = write_texts(folder / "texts.jsonl", 1, LENGTH)
            settings = [f"sampler={'uniform' if who == 'attention' else who}", "sampler.min_bucket_size=8192"]
            settings += ["capture.attention.enabled=true"] if who == "attention" else []
            command = job(model, texts, LENGTH, folder / "out", *settings)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, anonymous_mb(process.pid) or 0.0)
            time.sleep(PERIOD_S)
        if process.returncode:
            raise SystemExit(process.returncode)
    print(peak)


if __name__ == "__main__":
    main()
