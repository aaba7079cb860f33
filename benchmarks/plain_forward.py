"""Runs plain forward passes over the tokens of a job, as the process to compare the job with.

python benchmarks/plain_forward.py MODEL TEXTS TOKENS
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer


def main() -> None:
    model_name, texts, tokens = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModel.from_pretrained(model_name, dtype=torch.float32).eval()
    with torch.inference_mode():
        for line in Path(texts).read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"]
            ids = tokenizer(text, truncation=True, max_length=int(tokens), return_tensors="pt").input_ids
            model(input_ids=ids, use_cache=False)


if __name__ == "__main__":
    main()
