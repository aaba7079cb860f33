"""Compares the facts of a decoder's layers with the attention weights of its eager kernels."""

from dataclasses import replace
from typing import Any

import torch
from recording import KernelCall, recorded
from tiny_configs import VOCAB, WINDOW, randomized, tiny_config
from transformers import AutoModel

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import find_family
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.plasticity.measure import KeyHead

TOKENS = 3 * WINDOW + 2


def eager_backbone(model_type: str, **options: Any) -> Backbone:
    """Returns a tiny random decoder of that type, with transformers' eager attention."""
    config = tiny_config(model_type)
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    decoder = randomized(AutoModel.from_config(config, attn_implementation="eager")).eval().get_decoder()
    return Backbone(decoder, find_family(decoder.config.model_type))


def layers_and_calls(backbone: Backbone) -> list[tuple[dict[str, Any], AttentionCall, torch.Tensor]]:
    """Returns (facts in the manifest's form, captured call, attention weights (B, H, n, n)) of each layer.

    The weights are those of a recording that uses neither the tap nor families. A layer whose kernel returns none is
    left out.
    """
    ids = torch.randint(5, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    facts = {fact.heads.layer: fact.to_dict() for fact in backbone.probe()}
    seen: list[AttentionCall] = []
    backbone.forward(ids, lambda call: seen.append(replace(call, query=call.query.clone(), key=call.key.clone())))
    with torch.inference_mode():
        calls, _ = recorded(backbone.decoder, ids)
    return [
        (facts[own.layer], own, weights)
        for own, call in zip(seen, calls, strict=True)
        if (weights := _weights(call)) is not None
    ]


def visible_keys(weights: torch.Tensor) -> torch.Tensor:
    """Returns (n, n): whether some head of some text gives the key (column) a weight for the query (row)."""
    return (weights > 0).flatten(0, 1).any(0)


def declared_keys(layer: dict[str, Any], n: int) -> torch.Tensor:
    """Returns (n, n): whether the manifest's layer lets the query (row) see the key (column), before any selection."""
    row, column = torch.arange(n)[:, None], torch.arange(n)
    keys = column <= row
    if layer["sliding_window"] is not None:
        keys &= row - column < layer["sliding_window"]
    if layer["attention_chunk"] is not None:
        keys &= row // layer["attention_chunk"] == column // layer["attention_chunk"]
    return keys


def check_reach(layer: dict[str, Any], weights: torch.Tensor) -> None:
    """Asserts that the queries see the keys that the layer's facts say, and that plasticity pairs the same."""
    n = weights.shape[-1]
    visible, declared = visible_keys(weights), declared_keys(layer, n)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    if layer["sparse_attention"]:
        per_head = (weights > 0).flatten(0, 1)
        assert not (visible & ~declared).any() and not (per_head == declared).all()
        assert not layer["full_attention"]
        return
    assert torch.equal(visible, declared)
    assert layer["full_attention"] is torch.equal(visible, causal)
    head = KeyHead(layer["layer"], 0, (0,), layer["sliding_window"], layer["attention_chunk"])
    for query in range(1, n):
        for key in range(query):
            assert head.sees(query, key) is bool(visible[query:, : key + 1].any())


def check_weights(
    layer: dict[str, Any], call: AttentionCall, weights: torch.Tensor, *, without_sinks: bool = False
) -> None:
    """Asserts that the layer's facts lead from the captured vectors to the attention weights.

    `without_sinks` says that the kernel scales its output by the sinks, and not the weights that it returns.
    """
    n = call.query.shape[2]
    logits = layer["softmax_scale"] * call.query.float() @ call.key[:, layer["key_head"]].float().mT
    if layer["softcap"] is not None:
        logits = layer["softcap"] * torch.tanh(logits / layer["softcap"])
    mask = weights > 0 if layer["sparse_attention"] else declared_keys(layer, n)
    logits = logits.masked_fill(~mask, -torch.inf)
    if layer["sinks"] is not None and not without_sinks:
        sinks = torch.tensor(layer["sinks"])[None, :, None, None].expand(len(logits), -1, n, 1)
        logits = torch.cat([logits, sinks], dim=-1)
    torch.testing.assert_close(logits.softmax(-1)[..., :n], weights.float(), rtol=1e-3, atol=1e-4)


def check_scale_next_to_bias(layer: dict[str, Any], call: AttentionCall, weights: torch.Tensor) -> None:
    """Asserts that logits less the scaled products of queries and keys are alike in both texts: a bias by position."""
    products = layer["softmax_scale"] * call.query.double() @ call.key[:, layer["key_head"]].double().mT
    bias = weights.double().log() - products
    bias = (bias - bias[..., :1]).masked_fill(weights < 1e-6, 0)  # the softmax's own shift of each row
    both = (weights > 1e-6).all(0)
    torch.testing.assert_close(bias[0][both], bias[1][both], rtol=1e-3, atol=1e-3)
    assert float(bias.abs().max()) > 0.01


def _weights(call: KernelCall) -> torch.Tensor | None:
    if call.weights is None:
        return None
    heads, n = call.query.shape[1:3]
    return call.weights.view(-1, heads, n, call.weights.shape[-1])[..., :n]
