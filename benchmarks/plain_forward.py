"""Runs plain forward passes over the tokens of a job, as the process to compare the job with.

python benchmarks/plain_forward.py MODEL TEXTS TOKENS [BATCH_TOKENS]

Each text is a batch; with BATCH_TOKENS, texts of about equal length fill batches of so many tokens.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer


def main() -> None:
    model_name, texts, tokens, *batch_tokens = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModel.from_pretrained(model_name, dtype=torch.float32).eval()
    if batch_tokens:
        run_batches(tokenizer, model, Path(texts), int(tokens), int(batch_tokens[0]))
        return
    with torch.inference_mode():
        for line in Path(texts).read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"]
            ids = tokenizer(text, truncation=True, max_length=int(tokens), return_tensors="pt").input_ids
            model(input_ids=ids, use_cache=False)


def run_batches(tokenizer: Any, model: Any, texts: Path, tokens: int, batch_tokens: int) -> None:
    """Runs the texts in batches, longest first. A batch has as many texts as its padding lets it have."""
    from qk_sniffer.corpus.batches import batches  # here, so that other comparisons are with a process without ours

    lines = [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines()]
    every = sorted(tokenizer(lines, truncation=True, max_length=tokens)["input_ids"], key=len, reverse=True)
    with torch.inference_mode():
        for batch in batches([len(ids) for ids in every], max_batch_tokens=batch_tokens):
            ids = torch.zeros(len(batch), len(every[batch[0]]), dtype=torch.long)
            for row, place in zip(ids, batch, strict=True):
                row[: len(every[place])] = torch.tensor(every[place])
            model(input_ids=ids, use_cache=False)


if __name__ == "__main__":
    main()
