"""Collects mean and covariance of the queries before RoPE with the functions of kvpress for Expected Attention.

kvpress cuts texts at characters. These have at most TOKENS tokens, and are taken whole.

python benchmarks/peers/with_kvpress.py MODEL TEXTS TOKENS ROOT
"""

import json
import shutil
import tempfile
from pathlib import Path

import datasets
import torch
from kvpress.presses.expected_attention_with_stats import ExpectedAttentionStats, collect_queries
from shared import arguments
from transformers import AutoModel

N_SINK = 4
"""The default of kvpress: leaves out this many first tokens of each text."""


def main() -> None:
    given = arguments()
    # The script loads the model with its head. The statistics do not need it, so that this is the least work.
    model = AutoModel.from_pretrained(given.model, dtype=torch.float32).eval()
    lengths = [len(json.loads(line)["text"]) for line in given.texts.read_text().splitlines()]
    settings = {"num_samples": len(lengths), "sample_seq_len": max(lengths), "n_sink": N_SINK}
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")  # no run reads what an earlier one prepared
        texts = Path(folder, "texts")
        texts.mkdir()
        shutil.copy(given.texts, texts / "train.jsonl")
        _, mean, covariance = collect_queries(model, str(texts), text_column="text", **settings)
    stats = ExpectedAttentionStats(
        num_layers=model.config.num_hidden_layers,
        num_heads=model.config.num_attention_heads,
        head_dim=model.config.head_dim,
        dataset_name=given.texts.name,
        model_name=given.model,
        **settings,
    )
    stats.query_mean.data, stats.query_cov.data = mean, covariance
    stats.save_pretrained(given.root)


if __name__ == "__main__":
    main()
