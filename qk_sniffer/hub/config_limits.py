"""Refuses configs of models with more layers than any model has. Building such a model, or its config, does not end."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qk_sniffer.errors import SourceError
from qk_sniffer.store.form_types import MOST_LAYERS

_LAYERS = re.compile(r"(^|[_.])(layers?|blocks?|block_count|depths?)$")
"""The keys of a number of layers, such as num_hidden_layers, n_layer and llama.block_count."""


def refuse_too_many_layers(where: str, values: Mapping[str, Any]) -> None:
    """Checks the numbers of layers in a config, and the lists that have an entry for each layer.

    Args:
        where: the name of the config in errors.
        values: as saved. The configs in it, such as that of a decoder in a larger model, are checked too.

    Raises:
        SourceError: a value is too large. The error names its key.
    """
    for key, number in _numbers_of_layers(values, ""):
        if number > MOST_LAYERS:
            raise SourceError(
                f"{where} is refused: its {key} asks for {number:,} layers, and no model has more than "
                f"{MOST_LAYERS:,}. Restore the file, or download the model again (hf download)"
            )


def _numbers_of_layers(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, int]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _numbers_of_layers(value, f"{path}{key}.")
        elif isinstance(value, int | float) and _LAYERS.search(key):
            yield f"{path}{key}", int(min(value, 1 << 64)) if value == value else 0
        elif isinstance(value, list) and "layer" in key:
            yield f"{path}{key}", len(value)
