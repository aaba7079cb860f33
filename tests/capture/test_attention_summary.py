"""Attention summaries are those of whole matrices of attention weights: of eager kernels, and of dense ones."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import examine
import numpy as np
import pytest
import supported
import torch
import transformers
from summaries import SINK_TOKENS, differences, summarized, wrong_summaries
from support.eager import eager_backbone
from tiny_configs import VOCAB, WINDOW

from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.capture import attention_summary
from qk_sniffer.errors import CaptureError

TABLE = supported.TABLE.read_text()
SUMMARIZED = re.findall(r"^\| (\S+) \| \w+ \| yes \| [^|]+ \| \w+ \| yes ", TABLE, flags=re.MULTILINE)
IDS = torch.randint(5, VOCAB, (2, 3 * WINDOW + 2), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "llama4_text", "minimax_m3_vl_text", "bloom"])
def test_summaries_are_those_of_eager_weights(model_type: str) -> None:
    """Softcap and windows, learned sinks, chunks, a selection of keys in the mask, and a bias by position."""
    backbone = eager_backbone(model_type)
    assert wrong_summaries(backbone, backbone.probe(), IDS) == []


@pytest.mark.slow
@pytest.mark.skipif(f"transformers {transformers.__version__}" not in TABLE, reason="the table is of another version")
@pytest.mark.parametrize("model_type", SUMMARIZED)
def test_summaries_of_every_type_are_those_of_eager_weights(model_type: str) -> None:
    backbone, facts, _ = examine._loaded(model_type)
    assert wrong_summaries(backbone, facts, IDS) == []


def call_of(query: torch.Tensor, key: torch.Tensor, **facts: Any) -> AttentionCall:
    call = AttentionCall(
        layer=0,
        query=query,
        key=key,
        sliding_window=None,
        attention_chunk=None,
        softmax_scale=0.5,
        softcap=None,
        sinks=None,
        position_bias=False,
        sparse_attention=False,
        hides_keys=False,
        attended=(query, key),
        arguments={},
    )
    return replace(call, **facts)


def dense(call: AttentionCall, row: int) -> tuple[np.ndarray, np.ndarray]:
    """The weights and logits (H, n, n) of a text, computed at once."""
    query, key = (states[row].double() for states in call.attended)
    n = query.shape[1]
    logits = 0.5 * query @ key.repeat_interleave(len(query) // len(key), dim=0).mT
    at, to = torch.arange(n)[:, None], torch.arange(n)
    hidden = to > at
    if call.sliding_window is not None:
        hidden |= to <= at - call.sliding_window
    if call.attention_chunk is not None:
        hidden |= to // call.attention_chunk != at // call.attention_chunk
    sinks = torch.full((len(query), 1, 1), -torch.inf) if call.sinks is None else call.sinks.double()[:, None, None]
    both = torch.cat([logits.masked_fill(hidden, -torch.inf), sinks.expand(-1, n, 1)], dim=-1)
    return both.softmax(-1)[..., :-1].numpy(), logits.numpy()


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"sliding_window": 40},
        {"attention_chunk": 33},
        {"sliding_window": 30, "attention_chunk": 50},
        {"sinks": torch.linspace(-2, 3, 6)},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_any_size_give_the_summaries_of_the_whole(
    facts: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 100, 8, generator=draw).to(dtype) for heads in (6, 2))
    call = call_of(query, key, **facts)
    weights, logits = dense(call, 1)
    for block_keys, part_keys in ((1024, 16), (32, 4), (7, 16)):
        monkeypatch.setattr(attention_summary, "BLOCK_KEYS", block_keys)
        monkeypatch.setattr(attention_summary, "PART_KEYS", part_keys)
        monkeypatch.setattr(attention_summary, "BLOCK_LOGITS", {"cpu": block_keys * 6 * 9})
        assert [*differences(summarized(call, 1), weights, logits)] == []


@pytest.mark.parametrize("heads", [[0], [1, 2, 3], [0, 2, 3, 4, 5], [0, 1, 5]])
def test_some_heads_have_the_summaries_that_they_have_among_all(heads: Sequence[int]) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, number, 20, 8, generator=draw) for number in (6, 3))
    call = call_of(query, key, sinks=torch.linspace(-2, 3, 6))
    weights, logits = (values[list(heads)] for values in dense(call, 0))
    assert [*differences(summarized(call, 0, heads), weights, logits)] == []


def test_columns_follow_their_definitions() -> None:
    """Four equal keys: a query at position 3 gives each a weight of 1/4, and with a sink of the same logit 1/5."""
    states = torch.zeros(1, 1, 4, 8)
    plain, with_sink = (summarized(call_of(states, states, sinks=sinks), 0) for sinks in (None, torch.zeros(1)))
    for summary, weight in ((plain, 1 / 4), (with_sink, 1 / 5)):
        of_last = {name: values[0, 3] for name, values in summary.columns.items()}
        assert of_last["num_keys"] == 4
        assert of_last["logsumexp"] == pytest.approx(np.log(1 / weight)) and of_last["max_logit"] == 0
        assert of_last["entropy"] == pytest.approx(-4 * weight * np.log(weight))
        assert of_last["effective_keys"] == pytest.approx(1 / (4 * weight**2))
        assert of_last["sink_weight"] == pytest.approx(1 - 4 * weight)
        assert of_last["first_mass"] == pytest.approx(SINK_TOKENS * weight)
        np.testing.assert_allclose(of_last["distance_mass"], [weight, 2 * weight, weight], rtol=1e-6)
        assert of_last["top_position"].tolist() == [0, 1, 2, 3, -1], "of equal weights, earlier keys come first"
        np.testing.assert_allclose(of_last["top_weight"], [weight] * 4 + [0], rtol=1e-6)


def test_what_the_kernel_does_not_tell_is_refused() -> None:
    states = torch.zeros(1, 1, 4, 8)
    for facts, reason in [
        ({"hides_keys": True}, "which earlier keys its queries see is not known"),
        ({"sparse_attention": True, "hides_keys": True}, "the selection of its keys is not in its kernel's mask"),
        ({"position_bias": True}, "a bias is added to its logits, which its kernel does not receive"),
        ({"arguments": {"temperature": 2.0}}, "its kernel has an argument temperature, whose effect is not known"),
        ({"arguments": {"sinks": torch.zeros(4)}}, "its sinks are not one logit for each query"),
    ]:
        with pytest.raises(CaptureError, match=f"the attention of layer 0 cannot be summarized: {reason}"):
            summarized(call_of(states, states, **facts), 0)
