"""Multimodal checkpoints: the text decoder alone is loaded, whole, and captured as inside the whole model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_attention import captured
from transformers import PreTrainedModel
from zoo import ids

from qk_sniffer.config import ModelConfig
from qk_sniffer.loading import load_backbone
from qk_sniffer.proof import _derived
from qk_sniffer.store.compact import HeadSpec

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3() -> PreTrainedModel:
    text = TEXT | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 12}
    vision = VISION | {"model_type": "siglip_vision_model"}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def mistral3() -> PreTrainedModel:
    text = TEXT | {"model_type": "ministral3", "head_dim": 16}
    vision = VISION | {"model_type": "pixtral", "head_dim": 8}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision)
    return transformers.Mistral3ForConditionalGeneration(config)


def mllama() -> PreTrainedModel:
    text = TEXT | {"model_type": "mllama_text_model", "cross_attention_layers": [1]}
    vision = VISION | {
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "supported_aspect_ratios": [[1, 1]],
    }
    del vision["num_attention_heads"]
    return transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(text_config=text, vision_config=vision)
    )


WRAPPERS: dict[str, tuple[Callable[[], PreTrainedModel], list[int]]] = {
    "gemma3": (gemma3, [0, 1, 2, 3]),
    "mistral3": (mistral3, [0, 1, 2, 3]),
    "mllama": (mllama, [0, 2, 3]),
}
"""By name: how to make one, and its layers of self-attention."""


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_decoder_alone_is_loaded_and_captured_as_in_the_whole(name: str, dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, layers = WRAPPERS[name]
    make().save_pretrained(tmp_path)
    backbone = load_backbone(ModelConfig(name=str(tmp_path), dtype=dtype))
    assert not [key for key, _ in backbone.decoder.named_parameters() if "vision" in key or "projector" in key]
    assert [facts.heads.layer for facts in backbone.probe()] == layers
    seen: dict[tuple[int, str], torch.Tensor] = {}
    backbone.forward(ids(), lambda call: seen.update({(call.layer, "q"): call.query, (call.layer, "k"): call.key}))
    whole = type(make()).from_pretrained(tmp_path, dtype=getattr(torch, dtype)).get_decoder()
    expected = captured(whole, ids())
    assert seen.keys() == expected.keys() == {(layer, kind) for layer in layers for kind in "qk"}
    for key, states in seen.items():
        assert torch.equal(states, expected[key]), key


@pytest.mark.parametrize("name", WRAPPERS)
def test_hooks_derive_the_same_vectors(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, layers = WRAPPERS[name]
    make().save_pretrained(tmp_path)
    backbone = load_backbone(ModelConfig(name=str(tmp_path), dtype="float32"))
    tokens = ids(batch=1, length=300)
    seen = captured(backbone.decoder, tokens)
    head_dim = seen[0, "q"].shape[-1]
    heads = [HeadSpec(layer, 1, kind, 1, head_dim, None, 0) for layer in layers for kind in "qk"]
    positions = np.arange(300)
    derived = _derived(backbone, tokens[0].numpy(), dict.fromkeys(heads, positions))
    assert derived is not None and derived.keys() == set(heads)
    for head, vectors in derived.items():
        # Not bit-equal: the plain forward builds the mask that the bands of the captured one replace.
        assert np.allclose(vectors, seen[head.layer, head.kind][0, 1].numpy(), rtol=1e-4, atol=1e-5)
