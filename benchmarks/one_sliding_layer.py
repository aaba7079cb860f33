"""Measures one sliding layer over n tokens, run as in a job: its seconds and its additional memory, as JSON.

python benchmarks/one_sliding_layer.py LENGTH
"""

import json
import resource
import sys
import time

import torch
from common import WINDOW, sliding_qwen3
from transformers import Qwen3Model

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import find_family
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.machine import return_memory


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    length = int(sys.argv[1])
    config = sliding_qwen3(
        length,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
    )
    return_memory()  # as a job does
    backbone = Backbone(Qwen3Model(config).eval(), find_family("qwen3"))
    windows: list[int | None] = []

    def note_window(call: AttentionCall) -> None:
        windows.append(call.sliding_window)

    backbone.forward(torch.zeros(1, 1024, dtype=torch.int64), note_window)
    before = peak_mb()
    start = time.perf_counter()
    backbone.forward(torch.zeros(1, length, dtype=torch.int64), note_window)
    seconds = time.perf_counter() - start
    assert windows == [WINDOW, WINDOW]
    print(json.dumps({"forward_s": seconds, "above_mb": peak_mb() - before}))


if __name__ == "__main__":
    main()
