"""Passes with a key-value cache show the vectors and the attention of one pass over the same tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from support.decoding import TOP_POSITION, Passes, at_once, decoded, differences, left_padded
from support.eager import eager_backbone
from tiny_configs import VOCAB, WINDOW
from transformers import StaticCache

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.slots import PADDING, Slots
from qk_sniffer.errors import CaptureError

pytestmark = pytest.mark.floor

IDS = torch.randint(5, VOCAB, (2, 3 * WINDOW - 2), generator=torch.Generator().manual_seed(1))
STEPS = [WINDOW + 4, 1, 1, 3, *[1] * 5]
"""A prompt longer than the window, tokens one by one, and a part of a prompt after the cache is filled."""

SLOTS = sum(STEPS)
PADDED = left_padded([0, 5], SLOTS)
slow = pytest.mark.slow


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("model_type", "held"),
    [
        ("llama", None),
        pytest.param("llama", PADDED, marks=slow),
        ("gemma2", PADDED),
        ("gpt_oss", None),
        ("deepseek_v3", PADDED),
        ("gemma3n_text", PADDED),
        ("bloom", PADDED),
        ("gptj", PADDED),
        pytest.param("hrm_text", PADDED, marks=slow),
    ],
)
def test_decoding_shows_the_vectors_and_the_attention_of_one_pass(model_type: str, held: Any) -> None:
    """Softcap and windows, learned sinks, latent and shared keys, a bias, own attention, modules that run twice."""
    backbone = eager_backbone(model_type)
    found, _ = decoded(backbone, Passes(backbone.decoder, IDS, STEPS, held=held))
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


@pytest.mark.parametrize(
    ("model_type", "prompt"), [("llama", 12), ("gemma3_text", 12), pytest.param("gemma3_text", 4, marks=slow)]
)
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_static_cache_shows_the_keys_that_it_holds(model_type: str, prompt: int, kernel: str) -> None:
    backbone = eager_backbone(model_type)
    backbone.decoder.set_attn_implementation(kernel)  # type: ignore[operator]
    cache = StaticCache(config=backbone.config, max_cache_len=SLOTS + 5)
    steps = [prompt, *[1] * 3, 2, *[1] * 5]
    found, _ = decoded(backbone, Passes(backbone.decoder, IDS, steps, cache=cache))
    assert differences(found, at_once(backbone, IDS)) == []


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", pytest.param("jetmoe", marks=slow)])
def test_vectors_before_rope_are_those_of_one_pass(model_type: str) -> None:
    decoder = eager_backbone(model_type).decoder
    backbone = Backbone(decoder, eager_backbone(model_type).family, pre_rope=True)
    found, _ = decoded(backbone, Passes(decoder, IDS, STEPS, held=PADDED), "qka")
    expected = at_once(backbone, IDS, "qka")
    assert differences(found, expected) == []
    assert differences(expected, at_once(Backbone(decoder, backbone.family), IDS, "qka")) != []


def test_a_key_at_a_position_is_the_one_that_a_summary_names() -> None:
    """Padding and a window do not move positions: the largest weights are at the same tokens as without a cache."""
    backbone = eager_backbone("mistral")
    found, _ = decoded(backbone, Passes(backbone.decoder, IDS, STEPS, held=PADDED), "a")
    expected = at_once(backbone, IDS, "a")
    for key, rows in found.items():
        for states, wanted in zip(rows, expected[key], strict=True):
            top = states[..., TOP_POSITION]
            assert torch.equal(top, wanted[:, : states.shape[1], TOP_POSITION])
            assert int(top.max()) in range(states.shape[1] - WINDOW, states.shape[1])


RIGHT_PADDED = np.array([[True] * 12 + [True] * (SLOTS - 12), [True] * 7 + [False] * 5 + [True] * (SLOTS - 12)])
"""The second row has padding between its prompt and the tokens after it."""


def test_padding_between_tokens_is_left_out_of_full_attention() -> None:
    backbone = eager_backbone("llama")
    found, _ = decoded(backbone, Passes(backbone.decoder, IDS, STEPS, held=RIGHT_PADDED))
    assert differences(found, at_once(backbone, IDS)) == []


def test_padding_between_tokens_in_a_window_is_refused() -> None:
    backbone = eager_backbone("mistral")
    with pytest.raises(CaptureError, match=r"its cache has dropped keys .* A window over padding"):
        decoded(backbone, Passes(backbone.decoder, IDS, STEPS, held=RIGHT_PADDED))


def test_padding_that_no_mask_hides_is_refused() -> None:
    backbone = eager_backbone("llama")
    passes = Passes(backbone.decoder, IDS, [12, 1], held=PADDED)
    passes._is_masked = False
    with pytest.raises(CaptureError, match=r"its mask hides keys .* or shows keys|attends to padding"):
        decoded(backbone, passes)


def test_positions_that_start_again_are_refused() -> None:
    Slots(np.array([[PADDING, 0, 1, PADDING, 2], [5, 6, 7, 8, 9]]))
    with pytest.raises(CaptureError, match=r"row 1 do not count on by one: 0 follows 1. Packed texts"):
        Slots(np.array([[0, 1, 2, 3], [0, 1, 0, 1]]))


def test_slots_of_other_texts_are_refused() -> None:
    backbone = eager_backbone("llama")
    passes = Passes(backbone.decoder, IDS, [12, 1])
    opened = backbone.tapped(lambda call: None, slots=lambda _: Slots(np.arange(12)[None].repeat(2, axis=0)))
    with torch.no_grad(), opened, pytest.raises(CaptureError, match=r"1 queries after 12 slots .* 2 rows of 12 slots"):
        passes.run()


def test_a_job_never_takes_a_pass_with_a_cache() -> None:
    backbone = eager_backbone("llama")
    opened = backbone.tapped(lambda call: None)
    with torch.no_grad(), opened, pytest.raises(CaptureError, match="attends with 1 queries to 13 keys"):
        Passes(backbone.decoder, IDS, [12, 1]).run()
