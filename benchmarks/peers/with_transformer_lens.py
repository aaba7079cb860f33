"""Captures the rotated queries and keys with `run_with_cache` of TransformerLens, on unprocessed weights.

python benchmarks/peers/with_transformer_lens.py MODEL TEXTS TOKENS ROOT
"""

from collections import defaultdict

import torch
from shared import Kept, arguments, token_ids, write
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

HOOKS = {"q": "blocks.{}.attn.hook_rot_q", "k": "blocks.{}.attn.hook_rot_k"}


def main() -> None:
    given = arguments()
    # The bridge needs a model with a head. The checkpoint has none: the head is random, and its output is not used.
    whole = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    model = TransformerBridge.boot_transformers(given.model, hf_model=whole, device="cpu")
    names = {
        hook.format(number): (number, kind)
        for number in range(whole.config.num_hidden_layers)
        for kind, hook in HOOKS.items()
    }
    kept: Kept = defaultdict(list)
    with torch.inference_mode():
        for ids in token_ids(given):
            _, cache = model.run_with_cache(
                ids,
                names_filter=list(names),
                return_cache_object=False,
                return_type=None,
                use_cache=False,
                logits_to_keep=1,  # the least work that the head allows
            )
            for name, place in names.items():
                kept[place].append(cache[name][0])
        write(kept, given.root)


if __name__ == "__main__":
    main()
