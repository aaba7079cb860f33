"""Lists the heads of a dataset, from its manifest or from the record of its job."""

from collections.abc import Mapping
from typing import Any

from qk_sniffer.backbone.layers import LayerHeads
from qk_sniffer.store.layout import KEY_HEAD_KINDS, KINDS, Head


def captured_heads(record: Mapping[str, Any]) -> list[Head]:
    """Returns the captured heads in the order of the record's layers, queries before keys in each layer."""
    heads = []
    for layer in record["model"]["layers"]:
        of_layer = LayerHeads(**{key: layer[key] for key in LayerHeads.__dataclass_fields__})
        for kind in KINDS:
            for row, head in enumerate(layer["captured"].get(kind, ())):
                key_head = head if kind in KEY_HEAD_KINDS else of_layer.key_head(head)
                heads.append(
                    Head(
                        layer=of_layer.layer,
                        head=head,
                        kind=kind,
                        key_head=key_head,
                        head_dim=of_layer.head_dim,
                        sliding_window=of_layer.sliding_window,
                        row=row,
                        metadata=_metadata(record, layer, head, kind, key_head),
                        attention_chunk=layer.get("attention_chunk"),
                    )
                )
    return heads


def _metadata(
    record: Mapping[str, Any], layer: Mapping[str, Any], head: int, kind: str, key_head: int
) -> dict[str, str]:
    model = record["model"]
    values = {
        "model": record["fingerprint"]["model.name"],
        "revision": record["commits"]["model"],
        "layer": layer["layer"],
        "head": head,
        "key_head": key_head,
        "kind": kind,
        "rope_stage": model["rope_stage"],
        "sliding_window": layer["sliding_window"],
        "softmax_scale": layer["softmax_scale"],
        "dtype": model["dtype"],
    }
    return {key: "null" if value is None else str(value) for key, value in values.items()}
