"""Identifies a local checkpoint by its files, and notices when they change while a model uses them.

Weights on the CPU may be a view of their file: a program that writes into the file changes the loaded model. A file
that takes the place of another one does not.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.hub.config_limits import refuse_large_config
from qk_sniffer.hub.file_trails import Trails
from qk_sniffer.store.disk import open_regular
from qk_sniffer.store.files import inside
from qk_sniffer.text import is_possible

TEXTS = frozenset({".json", ".model", ".py", ".txt", ".jinja", ".tiktoken", ".codes", ".spm", ".tokenizer"})
"""The suffixes of the files of a checkpoint that hold no weights. The last three are those of rare vocabularies."""

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".gguf"})
"""Those of files that hold weights."""

TEMPLATES = "additional_chat_templates"
"""The folder in a checkpoint that transformers reads chat templates from."""

_NOT_READ = frozenset(
    {
        *(".md", ".log", ".out", ".err", ".yaml", ".yml", ".sh", ".html", ".pdf", ".csv", ".tsv", ".ipynb", ".lock"),
        *(
            ".png",
            ".jpg",
            ".jpeg",
            ".gif",
            ".svg",
            ".webp",
            ".mp4",
            ".wav",
            ".zip",
            ".gz",
            ".tar",
            ".parquet",
            ".imatrix",
        ),
        *(".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".tflite", ".npz", ".npy", ".pkl", ".distcp"),
    }
)
"""The suffixes that no file has from which a checkpoint is loaded. A file of any other name may be a vocabulary."""

WEIGHTS, PICKLE, INDEX = "model.safetensors", "pytorch_model.bin", ".index.json"

MODEL_WEIGHTS = (WEIGHTS, WEIGHTS + INDEX, PICKLE, PICKLE + INDEX)
"""The files of weights that transformers tries, in its order, and the indexes of several."""

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Those of an adapter."""

_Facts = tuple[int, int, int, int, int]
"""Device, inode, size, and the times of the last changes of content and of attributes. The last one cannot be set."""

_TICK_NS = 2_000_000_000
"""A file may change again within this time without another time of its change."""


class CheckpointFiles:
    """The files that a checkpoint in `folder` is loaded from. Thread-safe: `check` may compute a digest twice.

    Attributes:
        digest: `sha256:` and the digest of the names and contents of the files.
        trails: the ways to the files, as they were before any was read.
    """

    def __init__(self, folder: Path, weights: Sequence[str] = MODEL_WEIGHTS) -> None:
        """Reads the files, except for those that are known from before and have not changed since.

        Args:
            folder: the folder of the checkpoint.
            weights: the files of weights that its loader tries, in its order. It reads the first one there.

        Raises:
            SourceError: the config is too large.
        """
        self.folder = folder
        paths = sorted(_files(folder, weights))
        self.trails = Trails(folder, paths)
        self._facts = {path: _facts_of(path) for path in paths}
        with ThreadPoolExecutor() as pool:
            self._digests = dict(zip(paths, pool.map(_digest_of, paths), strict=True))
        whole = hashlib.sha256()
        for path in paths:
            name = Path(os.path.relpath(path, folder)).as_posix()
            whole.update(os.fsencode(name) + b"\0" + self._digests[path])
        self.digest = f"sha256:{whole.hexdigest()}"

    def check(self, *, replaced: bool = False) -> None:
        """Checks that no program has written into a file since it was read. Costs a few lookups of attributes.

        With `replaced`, another file may not have taken its place either: a model that is not in memory reads it again.

        Raises:
            SourceError: a file has other content.
        """
        for path, before in self._facts.items():
            now = _facts_of(path)
            if now is None or before is None or now == before or (now[:2] != before[:2] and not replaced):
                continue
            if _digest_of(path) != self._digests[path]:
                raise SourceError(
                    f"{path} was changed while the job computed with it, and the loaded model may have changed with "
                    "it: restore the file and rerun the command, which keeps what was captured before. Give a "
                    "checkpoint that is written again and again a copy of its own"
                )
            self._facts[path] = now


def folder_digest(folder: Path, weights: Sequence[str] = MODEL_WEIGHTS) -> str:
    """Returns `sha256:` and the digest of the names and contents of the files that a checkpoint is loaded from.

    `weights` are the files of weights that its loader tries.
    """
    return CheckpointFiles(folder, weights).digest


def _files(folder: Path, weights: Sequence[str]) -> set[Path]:
    """Returns the files that a checkpoint may be loaded from: those in `folder` itself, and those that they name.

    A link out of the folder may lead to any file, whose digest would be published. The loader refuses such links, but
    for weights (`checkpoint_links.py`): of these, only those that it reads count, which fails for any other file.
    """
    found = {path for path in files_of(folder) if path.suffix not in _NOT_READ and not path.name.startswith(".")}
    texts = {path for path in found if path.suffix in TEXTS}
    others = (found | {folder / name for name in _named(folder)}) - texts
    read = _read_weights(folder, weights)
    own = {path for path in others if path in read or is_inside(folder, path)}
    return {path for path in texts | own | read if path.is_file()}


def files_of(folder: Path) -> set[Path]:
    """Returns the files in the folder of a checkpoint, and in its folder of templates. Links may lead nowhere.

    Raises:
        SourceError: a folder cannot be listed. Its files may be read by their names all the same.
    """
    return {path for path in chain(_entries(folder), _entries(folder / TEMPLATES)) if not path.is_dir()}


def _entries(folder: Path) -> list[Path]:
    try:
        return [*folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise SourceError(
            f"{folder} cannot be listed: {error.strerror}. A link in it may lead anywhere, so nothing in it is read. "
            "Ask its owner for the right to read it, or copy the checkpoint"
        ) from None


def _read_weights(folder: Path, weights: Sequence[str]) -> set[Path]:
    """Returns the files of weights that the loader reads if it tries `weights`."""
    explicit = _read_json(folder / "config.json").get("transformers_weights")
    if isinstance(explicit, str) and weights is MODEL_WEIGHTS:
        weights = (explicit,)
    first = next((name for name in weights if (folder / name).is_file()), None)
    if first is None:
        return set()
    return {folder / name for name in (_shards(folder / first) if first.endswith(INDEX) else [first])}


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a file is one of the folder of a checkpoint or, in the Hub's cache, one of its `blobs`."""
    try:
        inside(folder, path.relative_to(folder).as_posix())
    except StoreError:
        return False
    return True


def _named(folder: Path) -> Iterator[str]:
    """Yields the files that the config and the indexes of weights name, which may be in other folders.

    Raises:
        SourceError: the config is too large, or an index names a file outside of the folder, whose digest would be
            published with that of the checkpoint.
    """
    indexes = [path.name for path in folder.glob(f"*{INDEX}")]
    refuse_large_config(folder / "config.json")
    explicit = _read_json(folder / "config.json").get("transformers_weights")
    if isinstance(explicit, str):
        yield _in_folder(folder / "config.json", explicit)
        indexes.append(explicit)
    for index in indexes:
        for name in _shards(folder / index) if index.endswith(".json") else ():
            yield _in_folder(folder / index, name)


def _shards(index: Path) -> set[str]:
    """Returns the names of the files in an index of weights."""
    named = _read_json(index).get("weight_map")
    return {name for name in named.values() if isinstance(name, str)} if isinstance(named, dict) else set()


def _in_folder(file: Path, name: str) -> str:
    """Returns a name that `file` has, if it is of a file in the folder of `file`.

    Raises:
        SourceError: it is of another file, or of none that a disk can have.
    """
    if not is_possible(name):
        raise SourceError(f"{file} names a file as no disk can, {name[:60]!r}: restore it")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise SourceError(
            f"{file} names the file {name!r}, which is not in the folder of the checkpoint: it is not read. Move the "
            "file there, and name it by its path in the folder"
        )
    return name


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one for a file that has none, which the loader reports."""
    with suppress(OSError, ValueError, RecursionError), open_regular(path) as file:
        values = json.loads(file.read())
        if isinstance(values, dict):
            return values
    return {}


def _facts_of(path: Path) -> _Facts | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _digest_of(path: Path) -> bytes:
    facts, start = _facts_of(path), time.time_ns()
    known = _known.get(path)
    if known is not None and known[0] == facts:
        return known[1]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    if facts is not None and facts == _facts_of(path) and start - facts[4] > _TICK_NS:
        _known[path] = facts, digest
    return digest


_known: dict[Path, tuple[_Facts, bytes]] = {}
"""The digests of files that have had their facts for a while."""
