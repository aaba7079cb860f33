"""TransformerLens: `run_with_cache` of the rotated queries and keys, on weights that it does not process.

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
    # It wants a model with a head. The checkpoint has none, so that the head is random: nothing is read behind it.
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
                logits_to_keep=1,  # the logits of one token, as cheap as the head gets
            )
            for name, place in names.items():
                kept[place].append(cache[name][0])
        write(kept, given.root)


if __name__ == "__main__":
    main()
