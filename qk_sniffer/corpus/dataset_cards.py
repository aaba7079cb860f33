"""Reads the card of a folder of texts, and refuses descriptions that the libraries must not read.

`datasets` and huggingface_hub read README.md, .huggingface.yaml and dataset_infos.json. In YAML, a name for a list that
holds names of lists may stand for billions of values, and the description of a folder may be a pipe. It may also be a
link to a secret, parts of which would get into messages and into the dataset.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qk_sniffer.corpus.data_files import reason
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.hub.checkpoint_links import refuse_special
from qk_sniffer.store.files import inside, open_inside
from qk_sniffer.store.open_folder import OddFileError

_CARD = "README.md"

_STANDALONE = ".huggingface.yaml"

_FILES = (_CARD, _STANDALONE, "dataset_infos.json")

_CONFIGS = "configs"

_MOST_REPEATED = 100_000
"""The most values for which the names (`*name`) in a description may stand. Such names are rare, and stand for few."""


@contextmanager
def own_descriptions(where: str, folder: Path) -> Iterator[None]:
    """Checks the descriptions of a source before they are read in the block, and after it.

    Args:
        where: the name of the source in errors.
        folder: that of the source, or of a commit in the cache of the Hub. It may be missing.

    Raises:
        SourceError: one is a pipe or a device, or a link that leads out of the folder.
    """
    _check_descriptions(where, folder)
    try:
        yield
    finally:  # an error that the block raises may quote a file that was planted meanwhile
        _check_descriptions(where, folder)


def names_its_files(where: str, folder: Path) -> bool:
    """Whether the card of the folder, or its .huggingface.yaml, lists configs, which name their files.

    Raises:
        SourceError: one of the two cannot be read, or a link leads out of the folder.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    card = REGEX_YAML_BLOCK.search(_text(where, folder, _CARD))
    metadata: dict[str, Any] = {}
    for text in ("" if card is None else card.group(2), _text(where, folder, _STANDALONE)):
        metadata |= _metadata(where, text)  # in the order of `datasets`
    return bool(metadata.get(_CONFIGS))


def _text(where: str, folder: Path, name: str) -> str:
    try:
        with open_inside(folder, name) as file:
            return file.read().decode(errors="replace")
    except (FileNotFoundError, OddFileError):
        return ""
    except (OSError, StoreError) as error:
        raise SourceError(f"{where}: its {name} cannot be read: {reason(error)}") from error


def _metadata(where: str, text: str) -> dict[str, Any]:
    import yaml

    try:
        with yaml_limited(where):
            found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {_CONFIGS: True} if _CONFIGS in text else {}  # `datasets` reads it too, and says what is wrong
    return found if isinstance(found, dict) else {}


def _check_descriptions(where: str, folder: Path) -> None:
    for name in _FILES:
        try:
            refuse_special(inside(folder, name))
        except StoreError as error:
            raise SourceError(f"{where}: {error}") from None


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
