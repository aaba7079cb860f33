"""Lists the heads of a dataset, from its manifest or from the record of its job."""

from collections.abc import Iterator, Mapping
from typing import Any

from qk_sniffer.backbone.layers import LayerHeads
from qk_sniffer.store.compact import HeadSpec
from qk_sniffer.store.layout import KINDS


def head_specs(record: Mapping[str, Any]) -> Iterator[HeadSpec]:
    """Every head that the job of `record` captures, queries before keys in each layer."""
    model = record["model"]
    for layer in model["layers"]:
        heads = LayerHeads(**{key: layer[key] for key in LayerHeads.__dataclass_fields__})
        for kind in KINDS:
            for row, head in enumerate(layer["captured"].get(kind, ())):
                key_head = heads.key_head(head) if kind == "q" else head
                metadata = {
                    "model": record["fingerprint"]["model.name"],
                    "revision": record["commits"]["model"],
                    "layer": heads.layer,
                    "head": head,
                    "key_head": key_head,
                    "kind": kind,
                    "rope_stage": model["rope_stage"],
                    "sliding_window": heads.sliding_window,
                    "softmax_scale": layer["softmax_scale"],
                    "dtype": model["dtype"],
                }
                yield HeadSpec(
                    layer=heads.layer,
                    head=head,
                    kind=kind,
                    key_head=key_head,
                    head_dim=heads.head_dim,
                    sliding_window=heads.sliding_window,
                    row=row,
                    metadata={key: "null" if value is None else str(value) for key, value in metadata.items()},
                )
