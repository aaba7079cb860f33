"""Captures the vectors before RoPE with forward hooks, written by hand, on the projections of a Llama.

python benchmarks/peers/with_hooks.py MODEL TEXTS TOKENS ROOT
"""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from shared import Kept, arguments, token_ids, write
from transformers import AutoModel


def main() -> None:
    given = arguments()
    model = AutoModel.from_pretrained(given.model, dtype=torch.float32).eval()
    head_dim = model.config.head_dim
    kept: Kept = defaultdict(list)

    def keep(layer: int, kind: str, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        kept[layer, kind].append(output[0].unflatten(-1, (-1, head_dim)))

    for number, layer in enumerate(model.layers):
        layer.self_attn.q_proj.register_forward_hook(partial(keep, number, "q"))
        layer.self_attn.k_proj.register_forward_hook(partial(keep, number, "k"))
    with torch.inference_mode():
        for ids in token_ids(given):
            model(input_ids=ids, use_cache=False)
        write(kept, given.root)


if __name__ == "__main__":
    main()
