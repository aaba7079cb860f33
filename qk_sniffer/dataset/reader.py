"""Reads a dataset in Python, from a folder or from a branch of the Hub, where each file is fetched on its first use.

dataset = qk_sniffer.open_dataset("me/my-vectors", revision="qwen3-8b-pydoc")
queries, positions, example_ids = dataset.vectors(*dataset.heads[0])
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import AttentionConfig, from_dict
from qk_sniffer.dataset.attention_summary import AttentionSummary
from qk_sniffer.dataset.heads import captured_heads, key_head
from qk_sniffer.dataset.recomputed_attention import Attention, Logits, attention_of, logits_of, unknown_logits
from qk_sniffer.errors import StoreError
from qk_sniffer.hub.branch import Branch, open_branch
from qk_sniffer.hub.revisions import is_hub_id
from qk_sniffer.resolved import safe_name
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.disk import sha256_of
from qk_sniffer.store.files import Comparison, Files, Folder, difference
from qk_sniffer.store.layout import ATTENTION, EXAMPLES, OFFSET_COLUMNS, HeadKey, head_file, schema, statistics_file
from qk_sniffer.store.parquet_tables import read_examples, read_matrix, read_table
from qk_sniffer.store.rows import NO_CHARACTER
from qk_sniffer.store.statistics import Statistics, stages_of
from qk_sniffer.store.statistics_file import read_statistics
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.text import compact_ranges, shortened

if TYPE_CHECKING:
    from qk_sniffer.dataset.token_vectors import TokenVectors


class HeadVectors(NamedTuple):
    """The rows of a head, by the order of the examples and then by position."""

    vectors: npt.NDArray[np.float32]
    """(rows, d): d is head_dim for queries and keys; values and outputs may have another width."""
    positions: npt.NDArray[np.int32]
    """(rows,): the position of the token in its example, from 0."""
    example_ids: npt.NDArray[np.int32]
    """(rows,): the example of the token; `Dataset.examples` describes it."""


WAY_OUT = "restore the file, or fetch the dataset again"


class Dataset:
    """A finished dataset, which `open_dataset` returns. Each method reads the files that it needs.

    A file is read only if it has the size, the columns and the number of rows that the manifest says, and if its rows
    fit in memory. `is_intact` also compares its sha256. `python -m qk_sniffer.verify` checks every row.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self.manifest: dict[str, Any] = manifests.of(files)
        """The content of `manifest.json`: settings, commits, the layout of the heads, probabilities, files."""
        self.commit: str | None = getattr(files, "commit", None)
        """The commit on the Hub; None for a folder."""
        self.heads: list[HeadKey] = manifests.heads(self.manifest)
        """The captured heads as (layer, head, kind), by layer: first the queries ("q"), then keys ("k"), values ("v")
        and outputs ("o")."""
        self._comparison = Comparison()
        self._captured = {head.file: head for head in captured_heads(self.manifest)}
        config = from_dict(self.manifest["config"])
        self._capture = config.capture
        self._attention = AttentionTable.of(config)
        statistics = self._capture.statistics
        self.stages: list[str] = [*statistics.stages] if statistics.enabled else []
        """The stages of the statistics, "pre" and "post": before and after RoPE; empty without statistics."""

    @cached_property
    def examples(self) -> pa.Table:
        """The examples: example_id, source_id, num_tokens, text_hash, index in the source, truncated; and the segments
        of their tokens where they were captured, as JSON: `[["user",0],["assistant",12]]`.

        With `model.tokenizer.overlong=split`, also part and first_token: see `store.layout.examples_schema`.

        Raises:
            StoreError: the file is missing or damaged, or has other examples than the manifest says.
            HubError: the file cannot be fetched.
        """
        return read_examples(self._path(EXAMPLES), self.manifest, way_out=WAY_OUT)

    def key_head(self, layer: int, head: int) -> int:
        """Returns the number of the key head that query head `head` of a layer attends with, captured or not.

        Raises:
            StoreError: the dataset has nothing of this layer, or the layer has no such head.
        """
        found = next((one for one in self.manifest["model"]["layers"] if one["layer"] == layer), None)
        if found is None:
            layers = compact_ranges(one["layer"] for one in self.manifest["model"]["layers"])
            raise StoreError(f"{self} has no layer {layer}; it has layers {layers}")
        if not 0 <= head < found["num_q_heads"]:
            raise StoreError(f"{self}: layer {layer} has no query head {head}; it has 0-{found['num_q_heads'] - 1}")
        return key_head(found, head)

    def vectors(self, layer: int, head: int, kind: str, *, intact: bool = False) -> HeadVectors:
        """Returns the rows of a head.

        `head` is the number of a query head for the kinds "q" and "o", of a key head for "k" and "v". Where both were
        captured, the rows of an output are those of its query, and the rows of a value those of its key.

        With `intact`, the file must have the sha256 that the manifest lists. One of another dataset may have its size.

        Raises:
            StoreError: the head was not captured, or its file is missing, damaged or, with `intact`, another one.
            HubError: the file cannot be fetched.
        """
        self._head_file(HeadKey(layer, head, kind))
        with self._intact(head_file(layer, head, kind)) if intact else nullcontext():
            table = self.table(layer, head, kind, ["vector", "position", "example_id"])
        if any(chunk.flatten().null_count for chunk in table["vector"].chunks):
            raise UnreadableError(self._files.path(head_file(layer, head, kind)), "has vectors with nulls", WAY_OUT)
        return HeadVectors(
            read_matrix(table["vector"]),
            table["position"].to_numpy(),
            table["example_id"].to_numpy(),
        )

    def segments(self, layer: int, head: int, kind: str) -> npt.NDArray[np.object_]:
        """Returns the segment of each row of a head, row for row as `vectors`: an array (rows,) of str.

        Raises:
            StoreError: the dataset has no segments of rows (`capture.capture_segments=true` adds them), or a reason of
                `table`.
            HubError: the file cannot be fetched.
        """
        if not self._capture.capture_segments:
            raise StoreError(f"{self} has no segments of rows: capture.capture_segments=true adds them")
        column = self.table(layer, head, kind, ["segment"])["segment"].unify_dictionaries().combine_chunks()
        names = np.array(column.dictionary.to_pylist(), np.object_)
        found: npt.NDArray[np.object_] = names[column.indices.to_numpy()]
        return found

    def offsets(self, layer: int, head: int, kind: str) -> npt.NDArray[np.int32]:
        """Returns the characters of the token of each row of a head, row for row as `vectors`.

        The array (rows, 2) has the first character and the one after the last, counted in the text from 0; -1 for a
        special token that no character belongs to.

        Raises:
            StoreError: the dataset has no offsets (`capture.capture_offsets=true` adds them), or a reason of `table`.
            HubError: the file cannot be fetched.
        """
        if not self._capture.capture_offsets:
            raise StoreError(f"{self} has no offsets: capture.capture_offsets=true adds them")
        table = self.table(layer, head, kind, [*OFFSET_COLUMNS])
        return np.stack([pc.fill_null(table[name], NO_CHARACTER).to_numpy() for name in OFFSET_COLUMNS], axis=1)

    def table(self, layer: int, head: int, kind: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the rows of a head with all columns or the named ones. The card describes the columns.

        Raises:
            StoreError: the head or a column was not captured, or the file is missing or damaged, has other columns or
                rows than the manifest says, or does not fit in memory.
            HubError: the file cannot be fetched.
        """
        path, expected = self._head_file(HeadKey(layer, head, kind))
        if unknown := set(columns or ()) - set(expected.names):
            has = ", ".join(expected.names)
            raise StoreError(f"{path} has no column {', '.join(sorted(unknown))}; it has {has}")
        rows = self.manifest["files"][head_file(layer, head, kind)].get("rows")
        return read_table(path, expected, way_out=WAY_OUT, rows=rows, columns=columns)

    def _head_file(self, key: HeadKey) -> tuple[Path, pa.Schema]:
        """Returns the path of a head's file, and its columns."""
        if key not in self.heads:
            names = [key.name for key in self.heads]
            raise StoreError(
                f"{self} has no rows of layer {key.layer}, head {key.head}, kind {key.kind!r}; it has "
                f"{shortened(names, 6)} (`.heads`)"
            )
        file = head_file(*key)
        path, listed = self._path(file), self._captured.get(file)
        if listed is None:
            raise UnreadableError(path, "is of a head that no layer in manifest.json has", WAY_OUT)
        return path, schema(listed.head_dim, self._capture)

    def torch(
        self, heads: Sequence[HeadKey | tuple[int, int, str] | str], cache: str | Path | None = None
    ) -> "TokenVectors":
        """Returns the vectors of several heads, one item a token, as a dataset of torch for a training loop.

        A head is `(layer, head, kind)`, or its name, such as `l00h00q`, under which the items have its vectors.
        The vectors are copied once to an uncompressed file, which takes 4 bytes a number on disk. Memory does not
        grow with the number of heads. It is in the folder `cache`, where later calls with the same heads find it again.
        Without `cache` it is in a temporary folder, which is removed together with the result.

        Raises:
            StoreError: a head was not captured, or a text is not the name of one; the heads were not captured at the
                same tokens (`sampler.share=example` does so in all layers), a file is missing or damaged, or `cache`
                cannot be written.
            HubError: a file cannot be fetched.
        """
        from qk_sniffer.dataset.token_vectors import (
            Source,
            check_same_tokens,
            head_keys,
            token_vectors,
        )  # imports torch

        keys = head_keys(heads)
        sampler = from_dict({"sampler": self.manifest["config"]["sampler"]}).sampler
        check_same_tokens(keys, sampler)
        self.fetch(keys)
        sources = []
        for key in keys:
            (path, columns), listed = self._head_file(key), self.manifest["files"][head_file(*key)]
            if listed.get("rows") is None:
                raise UnreadableError(path, "has no number of rows in manifest.json", WAY_OUT)
            sources.append(Source(key, path, columns, listed["rows"], listed["sha256"]))
        return token_vectors(sources, None if cache is None else Path(cache), WAY_OUT)

    def attention_summary(self, layer: int, head: int) -> AttentionSummary:
        """Returns the attention of the captured queries of a query head, row for row as `vectors(layer, head, "q")`.

        Raises:
            StoreError: the dataset has no attention summaries, the head was not captured, or its file is missing or
                damaged.
            HubError: the file cannot be fetched.
        """
        if self._attention is None:
            raise StoreError(f"{self} has no attention summaries: capture.attention.enabled=true makes them")
        key = HeadKey(layer, head, "q")
        if key not in self.heads:
            names = [key.name for key in self.heads if key.kind == "q"]
            raise StoreError(
                f"{self} has no queries of layer {layer}, head {head}; it has {shortened(names, 6)} (`.heads`)"
            )
        name = head_file(layer, head, ATTENTION)
        with self._intact(name) as path:
            rows = self.manifest["files"][name].get("rows")
            table = read_table(path, self._attention.schema, way_out=WAY_OUT, rows=rows)
        for column in table.columns:
            if any(chunk.flatten().null_count for chunk in column.chunks if pa.types.is_fixed_size_list(column.type)):
                raise UnreadableError(path, "has lists with nulls", WAY_OUT)
        return AttentionSummary.of(table)

    @property
    def attention_settings(self) -> AttentionConfig:
        """The settings of the attention summaries.

        Raises:
            StoreError: the dataset has none.
        """
        if self._attention is None:
            raise StoreError(f"{self} has no attention summaries: capture.attention.enabled=true makes them")
        return self._capture.attention

    def logits(self, layer: int, head: int, example_id: int) -> Logits:
        """Returns the logits of the stored queries of a query head and the stored keys of its key head in an example.

        Raises:
            StoreError: the dataset has no such example, queries or keys, their files are missing or damaged, or the
                logits do not follow from them: they are from before RoPE, or the layer has a bias or sparse attention.
            HubError: a file cannot be fetched.
        """
        key_head = self.key_head(layer, head)
        described = next(one for one in self.manifest["model"]["layers"] if one["layer"] == layer)
        if (reason := unknown_logits(described, pre_rope=self._capture.capture_pre_rope)) is not None:
            raise StoreError(f"{self}: the logits of layer {layer} cannot be computed: {reason}")
        if example_id not in self.examples["example_id"].to_numpy():
            raise StoreError(f"{self} has no example {example_id} (`.examples`)")
        # They are multiplied with each other, and compared with the summaries.
        queries, keys = self.vectors(layer, head, "q", intact=True), self.vectors(layer, key_head, "k", intact=True)
        of_query, of_key = queries.example_ids == example_id, keys.example_ids == example_id
        return logits_of(
            described,
            head,
            (queries.vectors[of_query], queries.positions[of_query]),
            (keys.vectors[of_key], keys.positions[of_key]),
        )

    def attention(self, layer: int, head: int, example_id: int) -> Attention:
        """Returns the attention weights of the stored queries of a query head for the stored keys in an example.

        If all keys are stored that the queries see, the weights follow from the logits. Otherwise the sum of the
        softmax is that of the attention summaries.

        Raises:
            StoreError: a reason of `logits`, or some keys are not stored and there are no attention summaries.
            HubError: a file cannot be fetched.
        """
        found = self.logits(layer, head, example_id)
        summary = None if self._attention is None else self.attention_summary(layer, head)
        try:
            return attention_of(found, example_id, summary)
        except StoreError as error:
            raise StoreError(f"{self}, layer {layer}, head {head}, example {example_id}: {error}") from error

    def statistics(self, layer: int, kind: str, stage: str | None = None) -> Statistics:
        """Returns the statistics of the captured heads of a layer over all tokens, for a kind of vectors.

        `stage` is "pre" or "post": before or after RoPE. None is the stage of the dataset's statistics of the kind, if
        they have one alone. Values and outputs ("v" and "o") are not rotated, and have the stage "post" alone.

        Raises:
            StoreError: the dataset has no such statistics, or the file is missing or damaged.
            HubError: the file cannot be fetched.
        """
        stages = self.stages
        if not stages:
            raise StoreError(f"{self} has no statistics: capture.statistics.enabled=true makes them")
        of_kind = stages_of(kind, stages)
        if stage is None and len(of_kind) > 1:
            raise StoreError(f"{self} has statistics of the stages {', '.join(of_kind)}: name one")
        of_stage = (of_kind or stages)[0] if stage is None else stage
        found = self.find_statistics(layer, kind, of_stage)
        if found is None:
            raise StoreError(
                f"{self} has no statistics of layer {layer}, kind {kind!r}, stage {of_stage!r}; it has those of layers "
                f"{compact_ranges(sorted({key.layer for key in self.heads}))}, kinds "
                f"{', '.join(sorted({key.kind for key in self.heads}))}, stages {', '.join(stages)}"
                f"{'; values and outputs have the stage post alone' if of_stage in {*stages} - {*of_kind} else ''}"
            )
        return found

    def find_statistics(self, layer: int, kind: str, stage: str, *, covariance: bool = True) -> Statistics | None:
        """Returns the statistics of a layer, kind and stage, as `statistics` does; None if the dataset has none.

        Without `covariance`, covariances are not read: they are most of the file.

        Raises:
            StoreError: the file is missing or damaged.
            HubError: the file cannot be fetched.
        """
        name = statistics_file(layer)
        if stage not in self.stages or name not in self.manifest["files"]:
            return None
        with self._intact(name) as path:
            return read_statistics(path, kind, stage, way_out=WAY_OUT, covariance=covariance)

    def is_intact(self, layer: int, head: int, kind: str) -> bool:
        """Whether the file of a head has the sha256 that the manifest lists.

        Raises:
            StoreError: the file is missing, or has another size than the manifest lists.
            HubError: the file cannot be fetched.
        """
        name = head_file(layer, head, kind)
        path = self._path(name)
        try:
            return bool(sha256_of(path) == self.manifest["files"][name]["sha256"])
        except OSError as error:
            raise UnreadableError(path, f"is missing or damaged ({error.strerror})", WAY_OUT) from error

    def fetch(self, heads: Sequence[HeadKey]) -> None:
        """Fetches the files of several heads in parallel, if the dataset is on the Hub.

        Raises:
            HubError: a file cannot be fetched.
        """
        listed = self.manifest["files"]
        names = [head_file(*key) for key in heads]
        self._files.fetch({name: listed[name]["bytes"] for name in names if name in listed})

    def _path(self, name: str) -> Path:
        """Returns the path of a file, which is fetched if needed and has the size that the manifest lists."""
        entry = self.manifest["files"].get(name)
        if entry is None:
            raise UnreadableError(name, f"of {self} is not listed in manifest.json", WAY_OUT)
        path = self._files.path(name, entry["bytes"])
        if (problem := difference(path, entry["bytes"])) is not None:
            raise UnreadableError(path, f"is missing or damaged (it {problem})", WAY_OUT)
        return path

    def _intact(self, name: str) -> AbstractContextManager[Path]:
        """Yields the path of a file for a block that reads it. A file of another model's dataset has the same size."""
        return self._comparison.intact(self._path(name), self.manifest["files"][name]["sha256"], way_out=WAY_OUT)

    @property
    def folder(self) -> Path | None:
        """The folder of the dataset; None for a dataset on the Hub."""
        return self._files.root if isinstance(self._files, Folder) else None

    def beside(self, ending: str) -> Path:
        """Returns a path for results: `<folder>ending`, or `outputs/<branch>ending` for a dataset on the Hub."""
        if isinstance(self._files, Folder):
            root = self._files.root
            # "." and ".." have no last part to append to.
            root = root.resolve() if root.name in ("", "..") else root
            return root.with_name(root.name + ending)
        assert isinstance(self._files, Branch)
        name = self._files.repo_id.rpartition("/")[2] if self._files.name == "main" else self._files.name
        return Path("outputs", safe_name(name) + ending)

    def __str__(self) -> str:
        return str(self._files)

    def __repr__(self) -> str:
        return f"<{len(self.heads)} heads, {self.manifest['rows']:,} rows: {self}>"


def open_dataset(root_or_repo: str | Path, revision: str | None = None) -> Dataset:
    """Opens the dataset in a folder, or in a repository of the Hub at `revision`: a branch, a tag or a commit.

    Opening a dataset on the Hub fetches only its manifest. huggingface_hub caches fetched files, so that they can be
    read again without a network.

    Raises:
        StoreError: the folder does not exist, or has no finished dataset.
        HubError: the repository or revision does not exist or has no dataset, or the Hub cannot be reached.
    """
    root = Path(root_or_repo).expanduser()
    if root.is_dir() or not is_hub_id(str(root_or_repo)):
        if revision is not None:
            raise StoreError(f"{root} is a folder: it has no revision {revision!r}; leave it out")
        return Dataset(Folder(root))
    return Dataset(open_branch(str(root_or_repo), revision))


def sampler_of(manifest: dict[str, Any]) -> Sampler:
    """Returns the sampler that chose the rows of a dataset."""
    return Sampler(from_dict({"sampler": manifest["config"]["sampler"]}).sampler)
