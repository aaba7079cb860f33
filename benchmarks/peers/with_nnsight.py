"""Captures with nnsight, one trace for each text.

It takes the arguments of attention (after RoPE), or with `projections` the output of the projections (before RoPE).

python benchmarks/peers/with_nnsight.py MODEL TEXTS TOKENS ROOT [projections]
"""

from collections import defaultdict

import nnsight
import torch
from shared import Kept, arguments, token_ids, write
from transformers import AutoModel


def main() -> None:
    given = arguments()
    projections = "projections" in given.options
    bare = AutoModel.from_pretrained(given.model, dtype=torch.float32).eval()
    head_dim = bare.config.head_dim
    model = nnsight.NNsight(bare)
    kept: Kept = defaultdict(list)
    with torch.inference_mode():
        for ids in token_ids(given):
            with model.trace(input_ids=ids, use_cache=False):
                seen = nnsight.save([])
                for layer in model.layers:
                    attention = layer.self_attn
                    if projections:
                        seen.append((attention.q_proj.output, attention.k_proj.output))
                    else:
                        _, query, key, *_ = attention.source.attention_interface_1.inputs[0]
                        seen.append((query, key))
            for number, pair in enumerate(seen):
                for kind, vectors in zip("qk", pair, strict=True):
                    by_token = vectors[0].unflatten(-1, (-1, head_dim)) if projections else vectors[0].transpose(0, 1)
                    kept[number, kind].append(by_token)
        write(kept, given.root)


if __name__ == "__main__":
    main()
