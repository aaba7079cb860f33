"""Writes the vectors of a tiny decoder as a dataset's files, and runs the card's code on them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import Family
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.dataset.card_rotation import rotary_embedding
from qk_sniffer.store.layout import Head

Vectors = dict[tuple[int, str], torch.Tensor]
"""The vectors (heads, n, d) of a text, by (layer, kind)."""


def vectors_of(decoder: nn.Module, family: Family, length: int, *, pre_rope: bool) -> Vectors:
    """Returns the vectors of a text of that length, which runs alone."""
    seen: Vectors = {}
    ids = torch.randint(5, 90, (1, length), generator=torch.Generator().manual_seed(length))

    def keep(call: AttentionCall) -> None:
        seen[call.layer, "q"], seen[call.layer, "k"] = call.query[0].clone(), call.key[0].clone()

    Backbone(decoder, family, pre_rope=pre_rope).forward(ids, keep)
    return seen


def run_card(
    root: Path, manifest: dict[str, Any], layer: int, kind: str, texts: dict[int, torch.Tensor], *, pre_rope: bool
) -> dict[int, np.ndarray]:
    """Writes rows of each text (n, d), by example_id, as a head's; returns the vectors that the card's code makes."""
    head = Head(layer, 0, kind, 0, next(iter(texts.values())).shape[-1], None, 0)
    facts: Any = SimpleNamespace(
        heads=[head],
        rotations={one["layer"]: one["rotation"] for one in manifest["model"]["layers"]},
        config=SimpleNamespace(capture=SimpleNamespace(capture_pre_rope=pre_rope)),
    )
    for folder in (head.name, "examples"):
        (root / folder).mkdir(exist_ok=True)
    (root / "manifest.json").write_text(json.dumps(manifest))
    lengths = {"example_id": list(texts), "num_tokens": [len(vectors) for vectors in texts.values()]}
    pq.write_table(pa.table(lengths), root / "examples" / "data.parquet")
    rows = {
        "example_id": [example for example, vectors in texts.items() for _ in vectors],
        "position": [position for vectors in texts.values() for position in range(len(vectors))],
        "vector": [vector for vectors in texts.values() for vector in vectors.numpy()],
    }
    pq.write_table(pa.table(rows), root / head.file)
    (code,) = re.findall(r"```python\n(.*?)```", rotary_embedding(facts), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    made: dict[int, np.ndarray] = names["rotated"]
    return made


def manifest_of(backbone: Backbone) -> dict[str, Any]:
    """Returns the part of a manifest that the code reads, as it is read back."""
    layers = [fact.to_dict() for fact in backbone.probe()]
    manifest: dict[str, Any] = json.loads(
        json.dumps({"model": {"layers": layers, "rotary": backbone.rotary_parameters()}})
    )
    return manifest
