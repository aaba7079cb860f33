"""Writes the section of a dataset card on the rotary embedding: code that rotates vectors, or turns them back."""

from collections.abc import Mapping

from qk_sniffer.dataset.card_facts import CardFacts
from qk_sniffer.markdown import plain
from qk_sniffer.store.layout import EXAMPLES
from qk_sniffer.text import compact_ranges

_ROTATION = """\
```python
import json

import numpy as np
import pandas as pd

with open("manifest.json", encoding="utf-8") as file:
    model = json.load(file)["model"]
rotations = {{layer["layer"]: layer["rotation"] for layer in model["layers"]}}


def rotate(vectors, positions, num_tokens, layer, undo=False):
    # The vectors (rows, head_dim) at these positions of a text of num_tokens tokens, rotated or turned back.
    rotation = rotations[layer]
    if rotation is None:
        return vectors
    if isinstance(rotation, str):
        raise ValueError(rotation)
    of = model["rotary"]["frequencies"][rotation["frequencies"]]
    inv_freq, scaling = np.array(of["inv_freq"]), of["attention_scaling"]
    size = len(inv_freq)
    if "boundary" in of and num_tokens > of["boundary"]:
        long = of["long"]
        if isinstance(long, str):
            raise ValueError(long)
        scaling = long["attention_scaling"]
        if "inv_freq" in long:
            inv_freq = np.array(long["inv_freq"])
        else:
            growth = long["factor"] * num_tokens / of["boundary"] - long["factor"] + 1
            base = long["rope_theta"] * growth ** (size / (size - 1))
            inv_freq = base ** (-np.arange(size) / size)
    halves = np.arange(size), np.arange(size) + size
    neighbours = 2 * np.arange(size), 2 * np.arange(size) + 1
    source = halves if rotation["pairs"] == "halves" else neighbours
    target = neighbours if rotation["pairs"] == "neighbours" else halves
    angle = rotation["direction"] * np.asarray(positions)[:, None] * inv_freq
    if undo:
        source, target, angle, scaling = target, source, -angle, 1 / scaling
    turned, first = np.array(vectors, np.float64), rotation["first"]
    one, other = (turned[:, first + part] for part in source)
    turned[:, first + target[0]] = scaling * (one * np.cos(angle) - other * np.sin(angle))
    turned[:, first + target[1]] = scaling * (one * np.sin(angle) + other * np.cos(angle))
    return turned


rows = pd.read_parquet("{file}")
lengths = pd.read_parquet("{examples}").set_index("example_id")["num_tokens"]
rotated = {{
    example: rotate(np.stack(part["vector"]), part["position"], lengths[example], {layer}{undo})
    for example, part in rows.groupby("example_id")
}}
```
"""


def rotary_embedding(facts: CardFacts) -> str:
    """Returns the section; empty for a dataset that does not say how its layers rotate."""
    captured = {head.layer for head in facts.heads}
    of_layers = {layer: rotation for layer, rotation in sorted(facts.rotations.items()) if layer in captured}
    if not of_layers:
        return ""
    parts = []
    rotations = {layer: rotation for layer, rotation in of_layers.items() if isinstance(rotation, Mapping)}
    if rotations:
        before = facts.config.capture.capture_pre_rope
        change = (
            "rotates the stored vectors to those after RoPE" if before else "turns the stored vectors back before RoPE"
        )
        head = min((head for head in facts.heads if head.layer == min(rotations)), key=lambda head: head.key.order)
        parts.append(
            f"This code {change}. `manifest.json` has the frequencies of each\n"
            "layer and the components that turn together. Where frequencies depend on the length of the text, it has\n"
            "those of long texts too, and the boundary.\n"
        )
        parts.append(
            _ROTATION.format(file=head.file, examples=EXAMPLES, layer=head.layer, undo="" if before else ", undo=True")
        )
    if changed := [layer for layer, rotation in rotations.items() if rotation["changed_after"]]:
        parts.append(
            f"Layers {compact_ranges(changed)} also scale or normalize queries or keys after the rotation. The code\n"
            "leaves that out.\n"
        )
    if unrotated := [layer for layer, rotation in of_layers.items() if rotation is None]:
        parts.append(f"Not rotated: layers {compact_ranges(unrotated)}.\n")
    for reason in sorted({rotation for rotation in of_layers.values() if isinstance(rotation, str)}):
        layers = compact_ranges(layer for layer, rotation in of_layers.items() if rotation == reason)
        parts.append(f"Layers {layers}: rotation {plain(reason)}.\n")
    return "## Rotary embedding\n\n" + "\n".join(parts)
