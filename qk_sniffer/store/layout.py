"""Defines every file name of a dataset and the schema of its files.

<root>/l00h00q/data.parquet     one folder a head
<root>/l00h00a/data.parquet     with capture.attention: the attention of the queries in l00h00q, row for row
<root>/examples/data.parquet    the examples that the rows come from
<root>/statistics/layer-00.safetensors  with capture.statistics: the heads of a layer over all tokens, one file a layer
<root>/README.md                the card
<root>/manifest.json            written last: a root without it is incomplete
<root>/pictures/*.png, *.svg    optional figures of the vectors; the card shows them on the Hub
<root>/.sniff_snapshot.json     with output.resume_from_hub: the branch's commit that this root matches
<root>/.sniff_private.json      exists if the dataset is to be published in private repositories alone
<root>/.qk_sniffer/             work state, removed once the dataset is whole
    job.json                    the record of the job, with its identity; a job with another record is refused
    *.lock                      held by running jobs
    shard-00000-of-00001.done   exists once the journal of this shard is complete
    shard-00000-of-00001.progress   the progress of the shard's job, for people
    journal/shard-00000-of-00001/00000001-1a2b3c4d5e6f7081.safetensors
    staging/                    the next version of the root, until it is whole
    unpublished.json            exists from the promotion of a dataset until it is published
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypedDict

from msgspec import Meta

from qk_sniffer.config import CaptureConfig
from qk_sniffer.errors import StoreError
from qk_sniffer.store import stored
from qk_sniffer.store.disk import paths_in, type_of
from qk_sniffer.store.open_folder import WORK

if TYPE_CHECKING:  # checking a command line needs names of files, and not this library
    import pyarrow as pa

FORMAT = "qk-sniffer/1"
"""The manifest's `format`, which identifies a dataset of this package."""

KIND_NAMES = {"q": "query", "k": "key", "v": "value", "o": "output"}
"""The kinds of vectors, in the order of lists, with their names for people. Each kind is one letter.

File names, journal, manifest, columns, card and the report of verify follow from this table. To add a kind, name it
here, in the tables below and in `KIND_SETTINGS` of `config.py`, and define its heads (`capture/selection.py`), its
sampling rule (`capture/sampling.py`), its states in an attention call (`capture/capture.py`) and its proof
(`capture/proof.py`).
"""

KIND_PLURALS = {"q": "queries", "k": "keys", "v": "values", "o": "outputs"}

KINDS = tuple(KIND_NAMES)

KEY_HEAD_KINDS = ("k", "v")
"""The kinds that have one file for each key head. The others have one for each query head."""

WIDTHS = {"q": "head_dim", "k": "head_dim", "v": "value_dim", "o": "output_dim"}
"""The entry of a layer in the manifest that gives the size of the vectors of each kind."""

UNROTATED_KINDS = ("v", "o")
"""The kinds that no rotary embedding changes: they are the same before it and after it."""

ATTENTION = "a"
"""The letter of attention summaries (`attention_table.py`): one file for each query head, with the rows of its queries.
They are no vectors, and so no kind of them."""

FILE_NAMES = {**KIND_NAMES, ATTENTION: "attention"}
"""The letters of a head's files, in the order of lists, with their names for people."""

FILE_KINDS = tuple(FILE_NAMES)

MANIFEST = "manifest.json"
CARD = "README.md"
EXAMPLES = "examples/data.parquet"
PICTURES = "pictures"
PICTURE_SUFFIXES = (".png", ".svg")
"""The formats of every picture. Pages show the first."""

PICTURE_MARK = "qk-sniffer"
"""The program that the metadata of a picture names if this package has drawn it."""

STATISTICS = "statistics"

KEY_COLUMNS = ("bucket", "example_id", "position")
"""The columns of int32 that name a row."""

OFFSET_COLUMNS = ("char_start", "char_end")
"""The columns of the characters of a row's token."""

LIST_PATH = ".list.element"
"""The end of the name of the Parquet column of a list's numbers: pyarrow's name for a list whose field is unnamed."""


class HeadKey(NamedTuple):
    """Names a head's file. `head` counts key heads for the `KEY_HEAD_KINDS`, and query heads for the others."""

    layer: int
    head: int
    kind: str

    @property
    def name(self) -> str:
        """The folder and config name of the head: `l00h00q`."""
        return head_name(*self)

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts heads by layer, then by kind as in `FILE_KINDS`, then by number."""
        return self.layer, FILE_KINDS.index(self.kind), self.head


@dataclass(frozen=True)
class Head:
    """A captured head. `head` counts query heads for the kinds "q" and "o", and key heads for "k" and "v"."""

    layer: int
    head: int
    kind: str
    key_head: int
    """The key head that its queries attend with, or the head itself for the kinds "k" and "v"."""
    head_dim: int
    """The size of its vectors."""
    sliding_window: int | None
    """w where a query at position p sees only keys from position p - w + 1 on; None without a window."""
    row: int
    """The index of the head among the heads of the journal's vectors."""
    metadata: dict[str, str] = field(default_factory=dict, hash=False)
    """The key-value metadata of the head's file."""
    attention_chunk: int | None = None
    """c where a query at position p sees only keys from position p - p % c on; None without chunks."""
    sparse_attention: bool = False
    """Whether a query sees only some of the keys before it, selected by their content."""
    full_attention: bool | None = None
    """Whether a query sees all earlier keys; None if the dataset does not say."""

    @property
    def key(self) -> HeadKey:
        return HeadKey(self.layer, self.head, self.kind)

    @property
    def name(self) -> str:
        """The folder and config name of the head: `l00h00q`."""
        return self.key.name

    @property
    def file(self) -> str:
        """The name of the head's file, relative to the root: `l00h00q/data.parquet`."""
        return head_file(*self.key)


@dataclass(frozen=True)
class Layout:
    """Names the files of the dataset at `root`, without reading or creating any."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / MANIFEST

    @property
    def card(self) -> Path:
        return self.root / CARD

    @property
    def examples(self) -> Path:
        return self.root / EXAMPLES

    def head_file(self, layer: int, head: int, kind: str) -> Path:
        return self.root / head_file(layer, head, kind)

    def pictures(self) -> list[Path]:
        """Returns the pictures that exist and whose names a manifest may list."""
        paths = sorted((self.root / PICTURES).glob("*.*"))
        return [path for path in paths if is_picture(f"{PICTURES}/{path.name}")]

    @property
    def snapshot(self) -> Path:
        return self.root / ".sniff_snapshot.json"

    @property
    def private(self) -> Path:
        """The mark of a dataset that is to stay private (`store/privacy.py`)."""
        return self.root / ".sniff_private.json"

    @property
    def work(self) -> Path:
        return self.root / WORK

    @property
    def job_file(self) -> Path:
        return self.work / "job.json"

    @property
    def unpublished(self) -> Path:
        """The mark of a dataset that its job has yet to publish (`store/record.py`)."""
        return self.work / "unpublished.json"

    @property
    def journal_folder(self) -> Path:
        return self.work / "journal"

    def journal(self, shard_index: int, shard_count: int) -> Path:
        return self.journal_folder / f"shard-{shard_index:05d}-of-{shard_count:05d}"

    def shard_done(self, shard_index: int, shard_count: int) -> Path:
        """The file that exists once this shard's journal is complete.

        It is next to the locks. A job that takes a lock creates a file in this folder, so that a network file system
        looks up again which files other machines have created there.
        """
        return self.work / f"shard-{shard_index:05d}-of-{shard_count:05d}.done"

    def journals(self) -> list[Path]:
        """Returns the journals that exist, of all shards."""
        return sorted(self.journal_folder.glob("shard-*-of-*"))

    def progress(self, shard_index: int, shard_count: int) -> Path:
        """The file with the progress of this shard's job (`jobs/progress.py`)."""
        return self.work / f"shard-{shard_index:05d}-of-{shard_count:05d}.progress"

    def shard_lock(self, shard_index: int, shard_count: int) -> Path:
        """The lock of the job that writes this shard's journal."""
        return self.work / f"shard-{shard_index:05d}-of-{shard_count:05d}.lock"

    @property
    def start_lock(self) -> Path:
        """The lock that each job holds briefly at its start, so that the shards of one job agree on its record."""
        return self.work / "start.lock"

    @property
    def finalize_lock(self) -> Path:
        """The lock held from the start of compaction to the end of promotion."""
        return self.work / "finalize.lock"

    def locks(self) -> list[Path]:
        """Returns the lock files that exist. A lock file may exist while nobody holds the lock."""
        return sorted(self.work.glob("*.lock"))

    @property
    def staging(self) -> "Layout":
        """The next version of the dataset. It is whole once it has a manifest."""
        return Layout(self.work / "staging")


def head_name(layer: int, head: int, kind: str) -> str:
    """Returns the folder and config name of a head: `l00h00q`."""
    return f"l{layer:02d}h{head:02d}{kind}"


def head_file(layer: int, head: int, kind: str) -> str:
    """Returns the name of a head's file, relative to the root: `l00h00q/data.parquet`."""
    return f"{head_name(layer, head, kind)}/data.parquet"


def statistics_file(layer: int) -> str:
    """Returns the name of the file of a layer's statistics, relative to the root."""
    return f"{STATISTICS}/layer-{layer:02d}.safetensors"


def is_statistics_file(name: str) -> bool:
    """Whether `name` is that of a file of statistics."""
    match = _STATISTICS_FILE.fullmatch(name)
    return match is not None and name == statistics_file(int(match[1]))


_STATISTICS_FILE = re.compile(rf"{STATISTICS}/layer-([0-9]{{2,6}})\.safetensors")


def parse_head_name(name: str) -> HeadKey | None:
    """Returns the head whose `head_name` is `name`, None for any other name."""
    match = _HEAD_NAME.fullmatch(name)
    if match is None:
        return None
    key = HeadKey(int(match[1]), int(match[2]), match[3])
    return key if key.name == name else None


_HEAD_NAME = re.compile(rf"l([0-9]{{2,6}})h([0-9]{{2,6}})([{''.join(FILE_KINDS)}])")


def is_picture(name: str) -> bool:
    """Whether `name` is that of a picture."""
    return _PICTURE.fullmatch(name) is not None


_PICTURE = re.compile(rf"{PICTURES}/[A-Za-z0-9_][A-Za-z0-9_.-]{{0,200}}({'|'.join(map(re.escape, PICTURE_SUFFIXES))})")


def is_dataset_file(name: str) -> bool:
    """Whether a manifest may list a file of this name: its card, examples, a head, a picture or statistics."""
    if name in (CARD, EXAMPLES) or is_statistics_file(name) or is_picture(name):
        return True
    key = parse_head_name(name.partition("/")[0])
    return key is not None and name == head_file(*key)


def schema(head_dim: int, capture: CaptureConfig | None = None) -> "pa.Schema":
    """Returns the columns of a head's file with the settings `capture`; None for the defaults.

    The vector's numbers are nullable, as in every list type of pyarrow.
    """
    import pyarrow as pa

    fields = [
        *(pa.field(name, pa.int32(), nullable=False) for name in KEY_COLUMNS),
        pa.field("vector", pa.list_(pa.float32(), head_dim), nullable=False),
        pa.field("sliding_window", pa.int32()),
    ]
    if capture is None:
        return pa.schema(fields)
    if capture.capture_segments:
        fields.append(pa.field("segment", pa.dictionary(pa.int32(), pa.string()), nullable=False))
    if capture.capture_token_ids:
        fields.append(pa.field("token_id", pa.int32(), nullable=False))
    if capture.capture_token_strings:
        fields.append(pa.field("token_str", pa.string(), nullable=False))
    if capture.capture_offsets:
        fields += [pa.field(name, pa.int32()) for name in OFFSET_COLUMNS]
    return pa.schema(fields)


def examples_schema(*, split: bool = False, segments: bool = False, from_python: bool = False) -> "pa.Schema":
    """Returns the columns of `examples/data.parquet`: one row an example, in the order of the source.

    With `split`, for `model.tokenizer.overlong=split`, an example is a part of a text: `part` counts those of a text
    from 0, and `first_token` is the number of the text's own tokens before the part. With `from_python`, for a capture
    from Python, the capture saw the tokens of an example from position `first_position` on. With `segments`, the last
    column has those of the example's tokens (`text_segments.py`).
    """
    import pyarrow as pa

    fields = [
        pa.field("example_id", pa.int32(), nullable=False),
        pa.field("source_id", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("text_hash", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
    ]
    if split:
        fields += [pa.field("part", pa.int32(), nullable=False), pa.field("first_token", pa.int64(), nullable=False)]
    if from_python:
        fields.append(pa.field("first_position", pa.int32(), nullable=False))
    return pa.schema([*fields, pa.field("segments", pa.string(), nullable=False)] if segments else fields)


def is_ours(layout: Layout) -> bool:
    """Whether the root has the work folder of a job, the snapshot of a branch, or a manifest of this package.

    The work folder comes first: a job removes it when the manifest is in place.
    """
    return _is_of_a_job(layout) or layout.snapshot.is_file() or manifest_problem(layout) is None


def _is_of_a_job(layout: Layout) -> bool:
    """Whether the work folder has a file that a job makes there. A file or an empty folder of its name is anyone's."""
    if type_of(layout.work) != "folder":
        return False
    signs = {layout.job_file, layout.unpublished, layout.staging.root}
    return any(path in signs or path.suffix == ".lock" for path in paths_in(layout.work))


def manifest_problem(layout: Layout, way_out: str = "") -> str | None:
    """Returns why the manifest in the root, if there is one, is none of this package, and the way out; else None."""
    try:
        stored.read(layout.manifest, _Format, way_out=way_out, most_bytes=stored.LARGE, follow_links=True)
    except (OSError, StoreError) as error:
        return str(error)
    return None


class _Format(TypedDict):
    format: Annotated[str, Meta(pattern=rf"\A{FORMAT}\Z")]


def missing_manifest(root: Path) -> StoreError:
    """Returns the error of a reader for a root without a manifest."""
    if not root.is_dir():
        return StoreError(f"there is no dataset at {root}: no such folder")
    if Layout(root).work.is_dir():
        return StoreError(
            f"the dataset at {root} is incomplete: no manifest.json. Its job has not finished; rerun the command "
            "that started it"
        )
    if Layout(root).snapshot.is_file():
        return StoreError(
            f"the dataset of {root} is on the Hub and not here: {Layout(root).snapshot.name} says on which branch. "
            "qk_sniffer.open_dataset(repo, revision=branch) reads it there"
        )
    return StoreError(f"the dataset at {root} is incomplete: no manifest.json")
