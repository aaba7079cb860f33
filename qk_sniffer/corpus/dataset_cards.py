"""Refuses descriptions of a folder or repository of texts with which the libraries that read them would not end.

`datasets` and huggingface_hub read README.md, .huggingface.yaml and dataset_infos.json. In YAML, a name for a list that
holds names of lists may stand for billions of values, and the description of a folder may be a pipe.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qk_sniffer.errors import SourceError
from qk_sniffer.hub.checkpoint_links import refuse_special

_FILES = ("README.md", ".huggingface.yaml", "dataset_infos.json")

_MOST_REPEATED = 100_000
"""The most values for which the names (`*name`) in a description may stand. Such names are rare, and stand for few."""


def refuse_special_cards(folder: Path) -> None:
    """Checks that the descriptions of a folder of texts are regular files.

    Raises:
        SourceError: one is a pipe or a device.
    """
    for name in _FILES:
        refuse_special(folder / name)


@contextmanager
def yaml_limited(where: str) -> Iterator[None]:
    """Ends the reading of YAML in the block if the names in it stand for too many values.

    Args:
        where: the name of the source in errors.

    Raises:
        SourceError: they do.
    """
    import yaml

    original = yaml.composer.Composer.compose_node
    sizes: dict[int, int] = {}  # of each node that is complete, by its id
    nodes: list[Any] = []  # they stay, so that no other node gets the id of one
    outer, repeated = [0], 0

    def compose_node(composer: Any, parent: Any, index: Any) -> Any:
        nonlocal repeated
        is_name = composer.check_event(yaml.AliasEvent)
        outer.append(1)
        node = original(composer, parent, index)
        size = outer.pop()
        if is_name:
            size = sizes.get(id(node), _MOST_REPEATED + 1)  # a node that is not complete is within itself
            repeated += size
            if repeated > _MOST_REPEATED:
                raise SourceError(
                    f"{where} is refused: the names for values (*name) in the YAML of its README.md or "
                    f".huggingface.yaml stand for more than {_MOST_REPEATED:,} values, or for themselves. Write the "
                    "values out, or remove them"
                )
        else:
            sizes[id(node)] = size
            nodes.append(node)
        outer[-1] += size
        return node

    yaml.composer.Composer.compose_node = compose_node
    try:
        yield
    finally:
        yaml.composer.Composer.compose_node = original
