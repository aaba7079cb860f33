"""Compares the vectors in a journal, bit for bit, with those that attention received in the same forward pass.

`python -m gpu.vectors cuda` does so with a tiny model, for a process in which torch's sanitizer looks for accesses to
memory that no event orders.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from gpu.bench import Bench, Model
from gpu.capturing import WAYS, capturing, make_room
from gpu.results import Budget, LeftOutError, Results
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.capture import row_writer
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.segment import read_header

TOKENS = 4096
PIECE_BYTES = 1 << 20
"""Small enough to fill each buffer on the device again while its last content is copied."""
SANITIZED_S = 90
"""The longest time of the process with the sanitizer."""


def check_vectors(bench: Bench, shape: str) -> None:
    """Adds a row for a pass with `uniform` and one with `all`. A block is a layer and kind."""
    model, tokens = bench.model(shape), bench.tokens(TOKENS)
    for name in ("uniform", "all"):
        blocks, wrong = _compare(bench, model, name, tokens)
        row = {"model": model.name, "tokens": tokens, "way": name, "blocks": blocks, "that differ": wrong}
        bench.results.add("Vectors in the journal", row)
        if wrong or not blocks:
            bench.results.fail(f"{model.name}, {name}: {wrong} of {blocks} blocks differ from what attention received")


def _compare(bench: Bench, model: Model, name: str, tokens: int) -> tuple[int, int]:
    """Returns the number of blocks, and of those that differ in any bit from the arguments of attention."""
    received: dict[tuple[int, str], torch.Tensor] = {}
    with (
        mock.patch.object(row_writer, "PIECE_BYTES", PIECE_BYTES),
        capturing(bench, model, WAYS[name], tokens) as one,
        _receiving(model, received),
    ):
        plan = one.plan(tokens)
        make_room(bench, one.nbytes(plan))
        one.run(plan)
        one.writer.close()
        stored = _stored(one.writer._journal)
    wrong = 0
    for (layer, kind), chosen in plan.tokens.items():
        states = received[layer, kind][0].cpu()[list(one.capture._heads[layer, kind])][:, chosen.position]
        bits = states.contiguous().view(torch.int16).numpy().view(np.uint16)
        wrong += not np.array_equal(bits, stored[f"l{layer:02d}{kind}"])
    return len(plan.tokens), wrong


@contextmanager
def _receiving(model: Model, received: dict[tuple[int, str], torch.Tensor]) -> Iterator[None]:
    """Copies query and key (B, H, n, d) of every layer on the device, before the capture sees them."""
    forward = model.backbone.forward

    def watched(ids: torch.Tensor, on_call: Callable[[AttentionCall], None], *args: Any, **options: Any) -> None:
        def copy(call: AttentionCall) -> None:
            received[call.layer, "q"], received[call.layer, "k"] = call.query.clone(), call.key.clone()
            on_call(call)

        forward(ids, copy, *args, **options)

    with mock.patch.object(model.backbone, "forward", watched):
        yield


def _stored(journal: Journal) -> dict[str, np.ndarray]:
    """Returns {l00q: (num_heads, num_rows, head_dim) bits}. Several segments may hold parts of one block."""
    parts: dict[str, list[np.ndarray]] = {}
    for path in journal.segments:
        data = np.fromfile(path, np.uint8)
        for name, place in read_header(path).tensors.items():
            if name.endswith(".vectors"):
                size = int(np.prod(place.shape)) * 2
                block = data[place.offset : place.offset + size].view(np.uint16).reshape(place.shape)
                parts.setdefault(name.removesuffix(".vectors"), []).append(block)
    return {name: np.concatenate(blocks, axis=1) for name, blocks in parts.items()}


def check_accesses(bench: Bench) -> None:
    """Runs this module under the sanitizer, in a process of its own: the sanitizer must see all work of a device."""
    if bench.device.type != "cuda":
        main([bench.device.type])
        bench.results.leave_out("the sanitizer of torch", "it needs CUDA")
        return
    command = [sys.executable, "-m", "gpu.vectors", "cuda"]
    sanitized = os.environ | {"TORCH_CUDA_SANITIZER": "1"}
    try:
        done = subprocess.run(command, env=sanitized, capture_output=True, text=True, timeout=SANITIZED_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise LeftOutError(f"its process took more than {SANITIZED_S} s") from error
    told = done.stderr.strip()
    found = "nothing" if done.returncode == 0 and not told else (told or "it ended").splitlines()[-1][:200]
    bench.results.add("Sanitizer", {"found": found, "exit": done.returncode})
    if "CUDASanitizerErrors" in told or "possible data race" in told:
        bench.results.fail(f"the sanitizer found accesses that no event orders:\n{told[-4000:]}")
    elif done.returncode:
        bench.results.leave_out("the sanitizer of torch", f"the process ended with {done.returncode}")


def main(arguments: list[str]) -> int:
    (device,) = arguments
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        results = Results(folder, {})
        bench = Bench(torch.device(device), True, folder, Budget(minutes=5, nbytes=1 << 30), results)
        check_vectors(bench, "tiny")
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
