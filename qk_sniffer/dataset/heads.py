"""Lists the heads of a dataset, from its manifest or from the record of its job."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qk_sniffer.config import from_dict
from qk_sniffer.errors import StoreError
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.layout import ATTENTION, KEY_HEAD_KINDS, KINDS, WIDTHS, Head


def captured_heads(record: Mapping[str, Any]) -> list[Head]:
    """Returns the captured heads in the order of the record's layers, and of `KINDS` in each layer."""
    heads = []
    for layer in record["model"]["layers"]:
        for kind in KINDS:
            for row, head in enumerate(layer["captured"].get(kind, ())):
                of_head = head if kind in KEY_HEAD_KINDS else key_head(layer, head)
                heads.append(
                    Head(
                        layer=layer["layer"],
                        head=head,
                        kind=kind,
                        key_head=of_head,
                        head_dim=layer[WIDTHS[kind]],
                        sliding_window=layer["sliding_window"],
                        row=row,
                        metadata=_metadata(record, layer, head, kind, of_head),
                        attention_chunk=layer.get("attention_chunk"),
                        sparse_attention=layer.get("sparse_attention", False),
                        full_attention=layer.get("full_attention"),
                    )
                )
    return heads


def attention_files(record: Mapping[str, Any]) -> list[Head]:
    """Returns the files of attention summaries, one for each captured query head; none for a dataset without them.

    Their `head_dim` is the number of numbers in a record of the journal.
    """
    table = AttentionTable.of(from_dict(record["config"]))
    if table is None:
        return []
    queries = (head for head in captured_heads(record) if head.kind == "q")
    return [
        replace(head, kind=ATTENTION, head_dim=table.width, metadata=head.metadata | {"kind": ATTENTION})
        for head in queries
    ]


def key_head(layer: Mapping[str, Any], head: int) -> int:
    """Returns the key head that query head `head` of a layer of the record attends with.

    Datasets of earlier versions have no `key_head`: there, neighbouring query heads share a key head.

    Raises:
        StoreError: the layer has no `key_head`, and its query heads do not divide among its key heads.
    """
    of_queries: list[int] | None = layer.get("key_head")
    if of_queries is not None:
        return of_queries[head]
    queries, keys = layer["num_q_heads"], layer["num_k_heads"]
    if keys < 1 or queries % keys:
        raise StoreError(
            f"layer {layer.get('layer')} has {queries} query heads and {keys} key heads, and no key_head: which key "
            "head a query head attends with does not follow. Recreate the dataset with output.overwrite=true"
        )
    return int(head // (queries // keys))


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
    if (adapter := record["fingerprint"].get("model.adapter")) is not None:
        values |= {"adapter": adapter, "adapter_revision": record["commits"].get("adapter")}
    return {key: "null" if value is None else str(value) for key, value in values.items()}
