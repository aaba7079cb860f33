"""Measures tokens that a model generates, alone and under `qk_sniffer.capture`, in turn: milliseconds of CPU, as JSON.

python benchmarks/decoding.py
"""

import json
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from common import in_turn, medians, smollm2_config
from transformers import LlamaForCausalLM

import qk_sniffer

PROMPT, TOKENS = 64, 32


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more of them wait for each other in every small product, and waiting counts
    model = LlamaForCausalLM(smollm2_config()).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT))

    def token_ms(capture: Any) -> float:
        with capture():
            start = time.process_time()
            model.generate(ids, min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
            return (time.process_time() - start) / TOKENS * 1e3

    measures = {
        "plain": lambda: token_ms(nullcontext),
        "captured": lambda: token_ms(partial(qk_sniffer.capture, model)),
    }
    in_turn(1, measures)  # warms up
    print(json.dumps(medians(in_turn(7, measures))))


if __name__ == "__main__":
    main()
