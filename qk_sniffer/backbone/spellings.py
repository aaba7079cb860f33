"""Finds tensors of a checkpoint that have several names and become the same weight of the model.

transformers renames the tensors of older checkpoints, and of those of larger models. Of two that become the same
weight, it reads one, without a word.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import core_model_loading

from qk_sniffer.backbone.checkpoint_weights import stored_bytes
from qk_sniffer.errors import SourceError


@contextmanager
def spellings_recorded() -> Iterator[dict[str, str]]:
    """Yields a dict that gets the names of the tensors that are loaded inside the context -> their names in the model.

    A tensor that becomes a part of a weight, as an expert does, has the name that it has before that conversion.
    """
    spellings: dict[str, str] = {}
    original: Any = core_model_loading.rename_source_key

    def rename(
        key: str,
        renamings: Any,
        converters: Any,
        base_model_prefix: str | None = None,
        meta_state_dict: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> tuple[str, str | None]:
        model = (base_model_prefix, meta_state_dict)
        name, pattern = original(key, renamings, converters, *model, **arguments)
        if meta_state_dict is not None and name in meta_state_dict:
            spelled = name if pattern is None else original(key, renamings, [], *model, **arguments)[0]
            spellings[key] = spelled.removeprefix(f"{base_model_prefix}.")
        return name, pattern

    core_model_loading.rename_source_key = rename  # type: ignore[assignment]
    try:
        yield spellings
    finally:
        core_model_loading.rename_source_key = original


def refuse_contradictions(name: str, spellings: Mapping[str, str], stored: Mapping[Path, Collection[str]]) -> None:
    """Refuses a checkpoint that has a weight twice, with other values.

    Args:
        name: of the checkpoint.
        spellings: what `spellings_recorded` has yielded.
        stored: the names of the tensors by the file that they are in.

    Raises:
        SourceError: names both, with their files.
    """
    places: dict[str, list[tuple[Path, str]]] = {}
    for path, keys in stored.items():
        for key in keys:
            places.setdefault(spellings.get(key, key), []).append((path, key))
    for (path, key), *others in (found for found in places.values() if len(found) > 1):
        for other_path, other in others:
            if stored_bytes(path, key) != stored_bytes(other_path, other):
                raise SourceError(
                    f"model {name} has a weight twice, with different values: {key} in {path.name} and {other} in "
                    f"{other_path.name}. Only one of them would be read, so nothing is captured; remove the wrong one, "
                    "or download the model again (hf download)"
                )
