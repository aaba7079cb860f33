"""Passes with a key-value cache show the vectors and the attention of one pass over the same tokens."""

from typing import Any

import pytest
import torch
from support.decoding import Passes, at_once, decoded, differences
from support.eager import eager_backbone
from tiny_configs import VOCAB, WINDOW

pytestmark = pytest.mark.floor

IDS = torch.randint(5, VOCAB, (2, 3 * WINDOW - 2), generator=torch.Generator().manual_seed(1))
STEPS = [WINDOW + 4, 1, 1, 3, *[1] * 5]
"""A prompt longer than the window, tokens one by one, and a part of a prompt after the cache is filled."""

PADDING = [0, 5]
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("model_type", "padding"),
    [
        ("llama", None),
        pytest.param("llama", PADDING, marks=slow),
        ("gemma2", PADDING),
        ("gpt_oss", None),
        ("deepseek_v3", PADDING),
        ("gemma3n_text", PADDING),
        ("bloom", PADDING),
        ("gptj", PADDING),
        pytest.param("hrm_text", PADDING, marks=slow),
    ],
)
def test_decoding_shows_the_vectors_and_the_attention_of_one_pass(model_type: str, padding: Any) -> None:
    """Softcap and windows, learned sinks, latent and shared keys, a bias, own attention, modules that run twice."""
    backbone = eager_backbone(model_type)
    found, _ = decoded(backbone, Passes(backbone.decoder, IDS, STEPS, padding=padding))
    assert differences(found, at_once(backbone, IDS)) == []


@pytest.mark.parametrize(("model_type", "kernel"), [("mistral", "sdpa"), ("llama4_text", "eager")])
def test_capturing_does_not_change_decoding(model_type: str, kernel: str) -> None:
    backbone = eager_backbone(model_type)
    backbone.decoder.set_attn_implementation(kernel)  # type: ignore[operator]
    with torch.no_grad():
        expected = Passes(backbone.decoder, IDS, STEPS).run()
    found, hidden = decoded(backbone, Passes(backbone.decoder, IDS, STEPS))
    assert all(map(torch.equal, hidden, expected))
    assert differences(found, at_once(backbone, IDS)) == []
