"""Gives a training loop the vectors of several heads at one token, in any order and in bounded memory.

A row group of a Parquet file has some thousand rows, which are read and decoded together, so rows in a random order
would each cost a row group. The vectors are therefore copied once to an uncompressed file, token by token, which every
process maps into its memory:

    float32 (tokens, 2 + the head_dim of all heads together)

The first two numbers of a token are its example_id and position, as the bits of int32. A sha256 of the heads and of
their files follows, in 32 bytes. It is also the name of the file, so that a folder may hold those of several datasets.
"""

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import SamplerConfig
from qk_sniffer.errors import StoreError
from qk_sniffer.store.disk import explained, make_folder, open_file, sync_file
from qk_sniffer.store.files import Comparison
from qk_sniffer.store.layout import KEY_HEAD_KINDS, HeadKey, parse_head_name
from qk_sniffer.store.open_folder import OddFileError, OpenFolder
from qk_sniffer.store.own_files import temporary_name
from qk_sniffer.store.parquet_tables import excess, opened, read_matrix
from qk_sniffer.store.places import refuse_inside
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.text import expand_home, path_problem

_COLUMNS = ("example_id", "position", "vector")


@dataclass(frozen=True)
class Source:
    """The file of a head: its path, the schema and the number of its rows, and its sha256, which the manifest lists."""

    key: HeadKey
    path: Path
    schema: pa.Schema
    rows: int
    sha256: str

    @property
    def head_dim(self) -> int:
        """The size of the head's vectors."""
        return int(self.schema.field("vector").type.list_size)


class TokenVectors(Dataset[dict[str, torch.Tensor]]):
    """The vectors of several heads, one item a token, in the order of the dataset; a map-style dataset of torch.

    `len(tokens)` is the number of tokens. `tokens[i]` is a dict: `example_id` and `position`, int32 of shape (), and
    for each head, under its name such as `l00h00q`, its vector, float32 of shape (head_dim,). `tokens[indices]` with a
    sequence of n indices gives them with the shapes (n,) and (n, head_dim), in one read. Processes of a DataLoader
    share the file.
    """

    def __init__(self, path: Path, sources: Sequence[Source], *, temporary: bool) -> None:
        """Opens the file that `write` wrote to `path`. A `temporary` folder is removed together with this object."""
        self.path = path
        """The file that the vectors are read from."""
        self._shape = (sources[0].rows, _width(sources))
        self._places = _places(sources)
        self._digest = _digest(sources)
        if temporary:
            weakref.finalize(self, _remove, path.parent, os.getpid())

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, index: int | Sequence[int] | npt.NDArray[np.integer[Any]]) -> dict[str, torch.Tensor]:
        """Returns the vectors of one token, or of several.

        Raises:
            IndexError: there is no such token.
            StoreError: the file is missing, or another one.
        """
        rows = torch.from_numpy(np.asarray(np.take(self._map, index, axis=0)))  # a copy: the file is read-only
        ids = rows.view(torch.int32)
        found = {"example_id": ids[..., 0], "position": ids[..., 1]}
        return found | {name: rows[..., place] for name, place in self._places.items()}

    def batches(self, size: int, *, seed: int) -> "ShuffledBatches":
        """Returns a sampler of all tokens in batches of `size`. `seed` and the epoch determine the order."""
        return ShuffledBatches(len(self), size, seed)

    @cached_property
    def _map(self) -> npt.NDArray[np.float32]:
        if not self._shape[0]:  # mmap refuses an empty range
            return np.empty(self._shape, np.float32)
        # A process that gets this object opens the file itself, and at any later time.
        way_out = "call `torch` of the dataset again, which writes it"
        try:
            with open_file(self.path) as file:
                if not _holds(file, self._shape, self._digest):
                    raise UnreadableError(self.path, "does not hold the vectors of these heads", way_out)
                return np.memmap(file, np.float32, "r", shape=self._shape)
        except OSError as error:
            raise UnreadableError(self.path, f"is missing or damaged ({error.strerror})", way_out) from error

    def __getstate__(self) -> dict[str, Any]:
        # A process that gets this object maps the file itself; the map would be copied.
        return {name: value for name, value in vars(self).items() if name != "_map"}


class ShuffledBatches:
    """The indices of `num_tokens` tokens in random order, in int64 arrays of `size`; the last one may be shorter.

    A `sampler` of a DataLoader with `batch_size=None`. The order is a permutation of all tokens, and takes 8 bytes a
    token. It follows from (seed, epoch); each pass ends an epoch.
    """

    def __init__(self, num_tokens: int, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"a batch has {size} tokens; it must have at least 1")
        self._num_tokens, self._size, self._seed = num_tokens, size, seed
        self.epoch = 0
        """The number of the next pass. A training that resumes sets it."""

    def __len__(self) -> int:
        return -(-self._num_tokens // self._size)

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        order = np.random.default_rng([self._seed, self.epoch]).permutation(self._num_tokens)
        self.epoch += 1
        for start in range(0, self._num_tokens, self._size):
            yield order[start : start + self._size]


def token_vectors(sources: Sequence[Source], cache: Path | None, way_out: str) -> TokenVectors:
    """Returns the vectors of the heads of `sources`, which `cache` keeps; None for a temporary folder.

    Raises:
        StoreError: there is no head or a head twice, the heads were not captured at the same tokens, a file is damaged,
            or `cache` cannot be written.
    """
    folder = Path(tempfile.mkdtemp(prefix="qk-sniffer-")) if cache is None else Path(expand_home(str(cache)))
    if (problem := path_problem(folder)) is not None:
        raise StoreError(f"cache is {str(cache)!r}, which {problem}")
    refuse_inside(folder, "cache")
    path = folder / f"vectors-{_digest(sources)}.f32"
    try:
        if not _is_written(path, sources):
            write(path, sources, way_out)
    except BaseException:
        if cache is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return TokenVectors(path, sources, temporary=cache is None)


def head_keys(heads: Sequence[HeadKey | tuple[int, int, str] | str]) -> list[HeadKey]:
    """Returns the heads that are given as keys or as names.

    Raises:
        StoreError: a text is not the name of a head.
    """
    if isinstance(heads, str):
        heads = [heads]
    keys = [parse_head_name(head) if isinstance(head, str) else HeadKey(*head) for head in heads]
    for head, key in zip(heads, keys, strict=True):
        if key is None:
            raise StoreError(f"{head!r} is not the name of a head: give one such as l00h00q, or (layer, head, kind)")
    return [key for key in keys if key is not None]


def check_same_tokens(keys: Sequence[HeadKey], sampler: SamplerConfig) -> None:
    """Checks that the rows of the heads are of the same tokens, by the sampler of the dataset.

    Raises:
        StoreError: they are not, or there is no head or a head twice.
    """
    names = [key.name for key in keys]
    if not names or len({*names}) < len(names):
        raise StoreError(f"the heads are {', '.join(names) or 'none'}; give at least one, and each once")
    sides = {(key.layer, key.kind in KEY_HEAD_KINDS) for key in keys}
    if len(sides) == 1:
        return
    if len({is_of_keys for _, is_of_keys in sides}) == 2 and not Sampler(sampler).same_rule():
        raise StoreError(
            "the queries and the keys were captured at different tokens (sampler.keys): give heads of one of them, or "
            "capture both with the same sampler"
        )
    if sampler.share != "example" and not (sampler.type == "all" and sampler.max_rows_per_example is None):
        raise StoreError(
            "the heads are of several layers or kinds, each captured at tokens of its own "
            f"(sampler.share={sampler.share}): capture with sampler.share=example, or give heads of one layer and kind"
        )


def write(path: Path, sources: Sequence[Source], way_out: str) -> None:
    """Writes the vectors of `sources`, token by token, to the file that `TokenVectors` reads, whole or not at all.

    Memory: a row group of one head, and 8 bytes a token. The heads advance together, so that each page of the file is
    written to the disk once.

    Raises:
        StoreError: a file is not that of the manifest, has other tokens than the first, or a folder cannot be written.
    """
    size = 4 * sources[0].rows * _width(sources)
    # The ranks of a training may write the same file. In a folder of several users, a known name could be a link.
    temporary = temporary_name(path.name)
    with ExitStack() as stack:
        with explained(path, "write"):
            make_folder(path.parent)
            folder = stack.enter_context(OpenFolder.at(path.parent))
            file = stack.enter_context(folder.temporary(temporary))
            os.posix_fallocate(file.fileno(), 0, size + hashlib.sha256().digest_size)
        _copy(sources, file, way_out)
        with explained(path, "write"):
            os.pwrite(file.fileno(), bytes.fromhex(_digest(sources)), size)
            sync_file(file.fileno())
            folder.rename(temporary, folder, path.name)
            folder.sync()


def _copy(sources: Sequence[Source], file: BinaryIO, way_out: str) -> None:
    """Copies the vectors of `sources` to the start of an open file, which has their size.

    Raises:
        StoreError: a file is damaged, was replaced by that of another dataset, or has other tokens than the first.
    """
    places, rows, comparison = _places(sources), sources[0].rows, Comparison()
    with ExitStack() as stack:
        for one in sources:
            stack.enter_context(comparison.intact(one.path, one.sha256, way_out=way_out))
        readers = [stack.enter_context(opened(one.path, one.schema, way_out=way_out, rows=one.rows)) for one in sources]
        for one, reader in zip(sources, readers, strict=True):
            wanted = pa.schema([one.schema.field(name) for name in _COLUMNS])
            if problem := excess(one.path, reader, wanted, at_once=False):
                raise UnreadableError(one.path, problem, way_out)
        ids = _ids(sources[0], readers[0].read(columns=[*_COLUMNS[:2]]), way_out)
        vectors = np.memmap(file, np.float32, "r+", shape=(rows, _width(sources))) if rows else None
        done, groups = [0] * len(sources), [0] * len(sources)
        while vectors is not None and min(done) < rows:
            place = done.index(min(done))
            one, start = sources[place], done[place]
            part = readers[place].read_row_group(groups[place], columns=[*_COLUMNS])
            stop = start + len(part)
            if not np.array_equal(_ids(one, part, way_out), ids[start:stop]):
                raise UnreadableError(one.path, f"has other tokens than {sources[0].path}", way_out)
            if any(chunk.flatten().null_count for chunk in part["vector"].chunks):
                raise UnreadableError(one.path, "has vectors with nulls", way_out)
            vectors[start:stop, :2] = ids[start:stop].view(np.float32)
            vectors[start:stop, places[one.key.name]] = read_matrix(part["vector"])
            done[place], groups[place] = stop, groups[place] + 1
        if vectors is not None:
            vectors.flush()


def _ids(source: Source, part: pa.Table, way_out: str) -> npt.NDArray[np.int32]:
    """Returns the example_id and position (rows, 2) of rows."""
    columns = [part[name] for name in ("example_id", "position")]
    if any(column.null_count for column in columns):
        raise UnreadableError(source.path, "has nulls in the columns that name a row", way_out)
    return np.stack([column.to_numpy() for column in columns], axis=1)


def _width(sources: Sequence[Source]) -> int:
    return 2 + sum(source.head_dim for source in sources)


def _places(sources: Sequence[Source]) -> dict[str, slice]:
    """Returns the place of each head's vector among the numbers of a token."""
    ends = np.cumsum([2, *(source.head_dim for source in sources)]).tolist()
    return {one.key.name: slice(start, stop) for one, start, stop in zip(sources, ends[:-1], ends[1:], strict=True)}


def _digest(sources: Sequence[Source]) -> str:
    """Returns the identity of a file of vectors, in hex: a digest of the heads in their order, and of their files."""
    heads = [[one.key.name, one.head_dim, one.rows, one.sha256] for one in sources]
    return hashlib.sha256(json.dumps(heads).encode()).hexdigest()


def _is_written(path: Path, sources: Sequence[Source]) -> bool:
    """Whether the file holds the vectors of these heads whole. A link of its name is not followed, and is replaced."""
    with explained(path, "read"):
        try:
            with open_file(path) as file:
                return _holds(file, (sources[0].rows, _width(sources)), _digest(sources))
        except (FileNotFoundError, OddFileError):
            return False


def _holds(file: BufferedReader, shape: tuple[int, int], digest: str) -> bool:
    """Whether an open file has vectors of `shape`, and ends with the digest of what it holds."""
    identity, size = bytes.fromhex(digest), 4 * shape[0] * shape[1]
    found = os.fstat(file.fileno()).st_size == size + len(identity)
    return found and os.pread(file.fileno(), len(identity), size) == identity


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # and not in a worker, which has a copy of the object
        shutil.rmtree(folder, ignore_errors=True)
