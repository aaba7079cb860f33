"""Reads a dataset in Python, from a folder or from a branch of the Hub, where each file is fetched on its first use.

dataset = qk_sniffer.open_dataset("me/my-vectors", revision="qwen3-8b-pydoc")
queries, positions, example_ids = dataset.vectors(*dataset.heads[0])
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import pyarrow as pa

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import AttentionConfig, from_dict
from qk_sniffer.dataset.array_facts import further_facts, head_facts
from qk_sniffer.dataset.attention_summary import AttentionSummary
from qk_sniffer.dataset.dataset_files import WAY_OUT
from qk_sniffer.dataset.head_reader import HeadReader
from qk_sniffer.dataset.heads import key_head
from qk_sniffer.dataset.place import folder_of
from qk_sniffer.dataset.recomputed_attention import Attention, Logits, attention_of, logits_of, unknown_logits
from qk_sniffer.errors import StoreError
from qk_sniffer.hub.branch import open_branch
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.files import Files, Folder
from qk_sniffer.store.layout import (
    ATTENTION,
    EXAMPLES,
    HeadKey,
    head_file,
    statistics_file,
)
from qk_sniffer.store.parquet_tables import read_examples, read_table
from qk_sniffer.store.row_filter import RowValues
from qk_sniffer.store.statistics import Statistics, stages_of
from qk_sniffer.store.statistics_file import read_statistics
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.text import compact_ranges, counted, printable, shortened

if TYPE_CHECKING:
    from qk_sniffer.dataset.token_vectors import TokenVectors


class Dataset(HeadReader):
    """A finished dataset, which `open_dataset` returns. Each method reads the files that it needs.

    A file is read only if it has the size, the columns and the number of rows that the manifest says, and if its rows
    fit in memory. `is_intact` also compares its sha256. `python -m qk_sniffer.verify` checks every row.

    The methods that return rows of a head take values of bucket, example_id, position and segment, and return the rows
    that have them: `dataset.vectors(0, 0, "q", example_id=[3, 7], position=range(1024))`. A value is one number or
    name, several of them, or a range of numbers. Row groups of a file without such rows are not read. All arrays of
    numpy are writable.
    """

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self._attention = AttentionTable.of(self._config)
        statistics = self._config.capture.statistics
        self.stages: list[str] = [*statistics.stages] if statistics.enabled else []
        """The stages of the statistics, "pre" and "post": before and after RoPE; empty without statistics."""

    @cached_property
    def examples(self) -> pa.Table:
        """The examples: example_id, source_id, num_tokens, text_hash, index in the source, truncated; and the segments
        of their tokens where they were captured, as JSON: `[["user",0],["assistant",12]]`.

        With `model.tokenizer.overlong=split`, also part and first_token: see `store.layout.examples_schema`.

        Raises:
            StoreError: the file is missing, damaged or of another dataset.
            HubError: the file cannot be fetched.
        """
        with self._files.intact(EXAMPLES) as path:
            return read_examples(path, self.manifest, way_out=WAY_OUT)

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

    def attention_summary(self, layer: int, head: int, **rows: Unpack[RowValues]) -> AttentionSummary:
        """Returns the attention of the captured queries of a query head, row for row as `vectors(layer, head, "q")`.

        Raises:
            StoreError: the dataset has no attention summaries, the head was not captured, its file is missing or
                damaged, or rows are chosen by segment, which the file does not have.
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
        only = self._filter(rows)
        if "segment" in only.wanted:
            raise StoreError(
                f"{self}: attention summaries have no segments; choose their rows with "
                f"segments({layer}, {head}, 'q') == ..."
            )
        name = head_file(layer, head, ATTENTION)
        with self._files.intact(name) as path:
            listed = self.manifest["files"][name].get("rows")
            table = read_table(path, self._attention.schema, way_out=WAY_OUT, rows=listed, only=only)
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
        return self._config.capture.attention

    def logits(self, layer: int, head: int, example_id: int) -> Logits:
        """Returns the logits of the stored queries of a query head and the stored keys of its key head in an example.

        Raises:
            StoreError: the dataset has no such example, queries or keys, their files are missing or damaged, or the
                logits do not follow from them: they are from before RoPE, or the layer has a bias or sparse attention.
            HubError: a file cannot be fetched.
        """
        key_head = self.key_head(layer, head)
        described = next(one for one in self.manifest["model"]["layers"] if one["layer"] == layer)
        if (reason := unknown_logits(described, pre_rope=self._config.capture.capture_pre_rope)) is not None:
            raise StoreError(f"{self}: the logits of layer {layer} cannot be computed: {reason}")
        if example_id not in self.examples["example_id"].to_numpy():
            raise StoreError(f"{self} has no example {example_id} (`.examples`)")
        # They are multiplied with each other, and compared with the summaries.
        queries = self.vectors(layer, head, "q", intact=True, example_id=example_id)
        keys = self.vectors(layer, key_head, "k", intact=True, example_id=example_id)
        return logits_of(described, head, queries[:2], keys[:2])

    def attention(self, layer: int, head: int, example_id: int) -> Attention:
        """Returns the attention weights of the stored queries of a query head for the stored keys in an example.

        If all keys are stored that the queries see, the weights follow from the logits. Otherwise the sum of the
        softmax is that of the attention summaries.

        Raises:
            StoreError: a reason of `logits`, or some keys are not stored and there are no attention summaries.
            HubError: a file cannot be fetched.
        """
        found = self.logits(layer, head, example_id)
        summary = None if self._attention is None else self.attention_summary(layer, head, example_id=example_id)
        try:
            return attention_of(found, summary)
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
        with self._files.intact(name) as path:
            return read_statistics(path, kind, stage, way_out=WAY_OUT, covariance=covariance)

    def __repr__(self) -> str:
        manifest = self.manifest
        facts = [
            f"{counted(manifest['rows'], 'row')} of {counted(manifest['examples'], 'example')}",
            head_facts(self.heads),
            *further_facts(summaries=self._attention is not None, stages=self.stages),
        ]
        return f"<Dataset {printable(self)}: {', '.join(facts)}>"


def open_dataset(root_or_repo: str | Path, revision: str | None = None) -> Dataset:
    """Opens the dataset in a folder, or in a repository of the Hub at `revision`: a branch, a tag or a commit.

    A name such as `outputs/texts` means the folder if its parent exists, and a repository with a revision. Opening a
    dataset on the Hub fetches only its manifest. huggingface_hub caches fetched files, so that they can be
    read again without a network.

    Raises:
        StoreError: the folder does not exist, or has no finished dataset.
        HubError: the repository or revision does not exist or has no dataset, or the Hub cannot be reached.
    """
    root = folder_of(root_or_repo, revision)
    return Dataset(open_branch(str(root_or_repo), revision) if root is None else Folder(root))


def sampler_of(manifest: dict[str, Any]) -> Sampler:
    """Returns the sampler that chose the rows of a dataset."""
    return Sampler(from_dict({"sampler": manifest["config"]["sampler"]}).sampler)
