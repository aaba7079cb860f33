"""Serves all peers: turns texts into token ids and writes a Parquet file for each head with the defaults of pyarrow."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer

Kept = dict[tuple[int, str], list[torch.Tensor]]
"""By layer and kind ("q" or "k"): a tensor (tokens, heads, head_dim) for each text."""


@dataclass(frozen=True)
class Arguments:
    """The command line: SCRIPT MODEL TEXTS TOKENS ROOT [OPTION ...]."""

    model: str
    texts: Path
    tokens: int
    root: Path
    options: tuple[str, ...]


def arguments() -> Arguments:
    model, texts, tokens, root, *options = sys.argv[1:]
    return Arguments(model, Path(texts), int(tokens), Path(root), tuple(options))


def token_ids(given: Arguments) -> Iterator[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    for line in given.texts.read_text().splitlines():
        text = json.loads(line)["text"]
        yield tokenizer(text, truncation=True, max_length=given.tokens, return_tensors="pt").input_ids


def write(kept: Kept, root: Path) -> None:
    for (layer, kind), texts in kept.items():
        lengths = [len(text) for text in texts]
        example_id = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)
        position = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        vectors = torch.cat(texts)
        for head in range(vectors.shape[1]):
            numbers = pa.array(vectors[:, head].flatten().numpy())
            vector = pa.FixedSizeListArray.from_arrays(numbers, vectors.shape[2])
            folder = root / f"l{layer:02}h{head:02}{kind}"
            folder.mkdir(parents=True)
            table = pa.table({"example_id": example_id, "position": position, "vector": vector})
            pq.write_table(table, folder / "data.parquet")
