"""Checks that the hooks of a job's proof derive the captured vectors of one model type (see `examine.py`)."""

from unittest.mock import patch

import numpy as np
import torch

from qk_sniffer.backbone import family as family_module
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import Family
from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.backbone.provable_types import PROVABLE_TYPES, PROVABLE_VALUE_TYPES
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.capture import proof as proof_module
from qk_sniffer.capture import proof_vectors
from qk_sniffer.store.layout import Head


class WrongError(Exception):
    """The capture differs from the recording and was not refused."""


def proven_kinds(backbone: Backbone, facts: list[LayerFacts], ids: torch.Tensor) -> list[str]:
    """Returns the kinds whose captured vectors the hooks of a job's proof derive.

    `ids` (1, n) have more tokens than heads. Types outside of the lists of provable types are tried too, so that the
    sweep finds the types of those lists itself.

    Raises:
        WrongError: the hooks derive other vectors although the type is in the list, or its family names them. A job
            would refuse a right dataset.
    """
    family, decoder_type = backbone.family, backbone.config.model_type
    vectors: dict[Head, np.ndarray] = {}

    def keep(layer: int, kind: str, states: torch.Tensor) -> None:
        for head in range(states.shape[1]):
            spec = Head(layer, head, kind, key_head=0, head_dim=states.shape[-1], sliding_window=None, row=0)
            vectors[spec] = states[0, head].float().numpy().copy()

    def keep_call(call: AttentionCall) -> None:
        for kind, states in {"q": call.query, "k": call.key, "v": call.value}.items():
            if states is not None and (kind != "v" or isinstance(widths[call.layer], int)):
                keep(call.layer, kind, states)

    def keep_output(call: AttentionCall, output: torch.Tensor | None) -> None:
        if output is not None and isinstance(widths[call.layer], int):
            keep(call.layer, "o", output)

    widths = {fact.heads.layer: fact.value_dim for fact in facts}
    backbone.forward(ids, keep_call, on_output=keep_output)
    positions = np.arange(ids.shape[1])
    alone = {decoder_type}
    with patch.multiple(family_module, PROVABLE_TYPES=alone, PROVABLE_VALUE_TYPES=alone):
        found = proof_vectors.derive(
            backbone, ids[0].numpy().astype(np.int32), dict.fromkeys(vectors, positions), facts
        )
    if found is None:
        return []
    derived, _ = found
    proven: list[str] = []
    for kinds, is_known in (
        ("qk", names_projections(family) or decoder_type in PROVABLE_TYPES),
        ("v", names_values(family) or decoder_type in PROVABLE_VALUE_TYPES),
        ("o", names_values(family) or decoder_type in PROVABLE_VALUE_TYPES),
    ):
        specs = [spec for spec in derived if spec.kind in kinds]
        if not specs:
            continue
        largest = max(proof_module.differences(vectors[spec], derived[spec])[0] for spec in specs)
        if largest <= proof_module.TOLERANCES["float32"]:
            proven += kinds
        elif is_known:
            raise WrongError(f"hooks derive other vectors ({kinds}): relative difference {largest:.2g}")
        else:
            break
    return proven


def names_values(family: Family) -> bool:
    """Whether the class of `family` overrides `projected_value`: its types need not be in `PROVABLE_VALUE_TYPES`."""
    return type(family).projected_value is not Family.projected_value


def names_projections(family: Family) -> bool:
    """Whether the class of `family` overrides `projections`, so that its types need not be in `PROVABLE_TYPES`."""
    return type(family).projections is not Family.projections
