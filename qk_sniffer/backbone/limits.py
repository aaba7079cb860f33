"""Finds the limits of a decoder: the rows of its embedding, and the positions and layers that its config names."""

from contextlib import suppress
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from qk_sniffer.backbone.unloaded import unloaded


def max_positions(config: PretrainedConfig) -> int | None:
    """Returns the most tokens of a text that the config provides for; None if it names no number.

    This is `max_position_embeddings`, or the larger number that a scaling such as YaRN extends the original one to. A
    model with rotary embeddings computes longer texts too.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_kind_of_layer = [value for value in rope.values() if isinstance(value, dict)]
    extended = [
        int(one["factor"] * one["original_max_position_embeddings"])
        for one in by_kind_of_layer or [rope]
        if one.get("factor") and one.get("original_max_position_embeddings")
    ]
    return max([limit, *extended])


def num_layers(config: PretrainedConfig) -> int | None:
    """Returns the number of layers that the config names, with attention or not; None if it names no number."""
    number = getattr(config, "num_hidden_layers", None)
    return number if isinstance(number, int) and number > 0 else None


def num_embeddings(decoder: nn.Module) -> int | None:
    """Returns the number of rows of the decoder's embedding of token ids; None if it is not known."""
    embedding: Any = None
    with suppress(AttributeError, NotImplementedError, TypeError):
        embedding = decoder.get_input_embeddings()  # type: ignore[operator]
    rows = getattr(embedding, "num_embeddings", None)
    return rows + getattr(embedding, "num_additional_embeddings", 0) if isinstance(rows, int) else None


def planned_num_embeddings(config: PretrainedConfig, largest: int) -> int | None:
    """Returns the number of rows of the embedding that the decoder of `config` would have, without its weights.

    None if that is not known, or if `largest`, an id of a token, is one of the config's vocabulary. Some models have
    more rows than their vocabulary has tokens, so the decoder is built on the meta device.
    """
    if largest < (getattr(config, "vocab_size", None) or 0):
        return None
    decoder = unloaded(config)  # None, if it fails; the loaded decoder is checked too
    return None if decoder is None else num_embeddings(decoder)
