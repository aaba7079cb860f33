"""Refuses configs of models that are larger than any model's, ask for more layers, or stand for another config.

Libraries read a config several times and copy it. Building a model of a million layers, or its config, does not end.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qk_sniffer.errors import SourceError
from qk_sniffer.hub.json_files import DamagedFileError, json_object
from qk_sniffer.store.form_types import MOST_LAYERS
from qk_sniffer.text import in_mb

_LAYERS = re.compile(r"(^|[_.])(layers?|blocks?|block_count|depths?)$")
"""The keys of a number of layers, such as num_hidden_layers, n_layer and llama.block_count."""


_MOST_BYTES = 1 << 23
"""The largest config. Those of quantized models list modules: some 3 MB for every expert of a large model."""

_CONFIG = re.compile(r"([a-z_]+_)?config(\..+)?\.json")
"""The names of configs in the folder of a model, such as config.json and tokenizer_config.json."""


def refuse_large_config(path: Path) -> None:
    """Checks the size of a file that has the name of a config. A missing one is left to its reader.

    Raises:
        SourceError: it is too large.
    """
    try:
        size = path.stat().st_size if _CONFIG.fullmatch(path.name) else 0
    except OSError:
        return
    if size > _MOST_BYTES:
        raise SourceError(
            f"{path} is refused: it has {in_mb(size)}, and no config of a model has more than {_MOST_BYTES >> 20} MB. "
            "Restore the file, or download the model again (hf download)"
        )


def refuse_other_configs(path: Path) -> None:
    """Checks that a config.json does not name other files, one of which transformers would read in its place.

    The checks of a checkpoint read its config.json alone. A missing or damaged one is left to its reader.

    Raises:
        SourceError: it names some.
    """
    with suppress(OSError, DamagedFileError):
        if json_object(path.read_bytes()).get("configuration_files"):
            raise SourceError(
                f"{path} is refused: its configuration_files names configs that transformers would read in its place. "
                "Copy the right one to config.json without this key"
            )


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
