"""Makes inputs of forward passes, and reads captured states in the form of the model."""

import numpy as np
import torch

from qk_sniffer.notebook.captured import Captured
from support.zoo import CASES, VOCAB

BY_NAME = {case.name: case for case in CASES}
LLAMA = BY_NAME["llama"]


def random_ids(rows: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, n), generator=torch.Generator().manual_seed(seed))


def states(captured: Captured, layer: int, kind: str, example: int) -> torch.Tensor:
    """Returns the captured states (heads, n, d) of an example, sorted by position."""
    heads = [head.head for head in captured.heads if head[0] == layer and head.kind == kind]
    found = [captured.vectors(layer, head, kind, example_id=example) for head in heads]
    assert all(np.array_equal(each.positions, np.arange(len(each.positions))) for each in found)
    return torch.from_numpy(np.stack([each.vectors for each in found]))


def padded(lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and mask of texts of these lengths with padding."""
    longest = max(lengths)
    ids, mask = torch.zeros(len(lengths), longest, dtype=torch.long), torch.zeros(len(lengths), longest).long()
    for row, length in enumerate(lengths):
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = random_ids(1, length, seed=row)[0], 1
    return ids, mask
