"""Plans a job: what it captures, and the rows, bytes and memory that this takes, without a forward pass.

The rows are counted by the sampler, over the batches that the job runs. The plan of `dry_run` counts all of them. At
the start of a job, the plan is that of the first look-ahead window, in proportion to all texts.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np

from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.backbone.outline import activation_bytes
from qk_sniffer.capture.forward_cost import ForwardCost
from qk_sniffer.capture.row_counts import Counts, Key, RowCounter
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.capture.selection import Selection
from qk_sniffer.corpus.batches import Window
from qk_sniffer.corpus.tokens import Tokens
from qk_sniffer.jobs.batch_groups import group_flops, grouped
from qk_sniffer.jobs.components import Components
from qk_sniffer.machine import num_threads
from qk_sniffer.resolved import ResolvedConfig
from qk_sniffer.store import sizes
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.disk import no_space
from qk_sniffer.store.journal import ExampleRecord
from qk_sniffer.store.layout import ATTENTION, FILE_KINDS, WIDTHS
from qk_sniffer.store.statistics import stages_of

THREAD_BYTES = 50 << 20
"""Of a thread that writes Parquet files (measured: `store/compact.py`)."""

MOST_TOKENS = 1 << 20
"""The tokens that a start counts, which takes about a second. A window may have a hundred times as many."""

MOST_DONE = 64
"""The captured examples whose rows a start counts."""

STATISTICS = "statistics"


@dataclass(frozen=True)
class Described:
    """A model before its forward passes."""

    layers: Sequence[LayerFacts]
    selection: Selection
    dtype: str
    device: str
    """The type of the device."""
    weight_bytes: int | None
    """None if it is not known, as for quantized weights that are not loaded."""
    cost: ForwardCost
    boundary: int | None
    """`Backbone.length_boundary`."""
    pairs: int
    """The rotary frequencies of a head, about."""
    activation_bytes: Callable[[Collection[tuple[int, int]]], int | None]
    """As that of `backbone.outline.Outline`."""

    def widths(self) -> dict[Key, int]:
        """Returns the size of the vectors of each (layer, kind)."""
        facts = {layer.heads.layer: layer.to_dict() for layer in self.layers}
        return {(layer, kind): facts[layer][WIDTHS[kind]] for layer, kind, _ in self.selection}


@dataclass(frozen=True)
class KindSize:
    """What a kind of file takes; all heads together."""

    name: str
    """A letter of `FILE_KINDS`, `STATISTICS`, or "others": the card, the manifest and the list of examples."""
    files: int
    rows: int
    """Rows that the job captures now."""
    journal: int
    """Bytes that the job adds to its journal."""
    dataset: int
    """Bytes in the dataset, when it is finished."""


@dataclass(frozen=True)
class Plan:
    """The plan of a job. Sizes are in bytes."""

    config: ResolvedConfig
    model: Described
    counts: Counts
    share: float
    """The counts are of this share of the texts; 1 if all are counted."""
    texts: int | None
    """The texts to capture; None for a stream of unknown length, of which only the counted part is planned."""
    kinds: Sequence[KindSize]
    activations: int | None
    there: int
    """The bytes of the dataset that the job adds to."""
    in_journal: int
    """The bytes that are in the journal already."""
    free: int
    """Of the disk of the data root."""
    base_texts: int = 0
    """The source rows of the dataset that the job adds to."""

    @property
    def rows(self) -> int:
        """Rows of vectors to capture."""
        return sum(kind.rows for kind in self.kinds if kind.name in WIDTHS)

    @property
    def journal(self) -> int:
        return sum(kind.journal for kind in self.kinds)

    @property
    def dataset(self) -> int:
        return sum(kind.dataset for kind in self.kinds) + self.there

    @property
    def needed(self) -> int:
        """The bytes that the job adds to the disk at most: journal and new dataset exist together for a while."""
        return self.journal + self.dataset

    @property
    def is_short(self) -> bool:
        """Whether the disk has less than the job needs."""
        return self.free < self.needed

    def check_space(self) -> None:
        """Checks the disk for the job.

        Raises:
            StoreError: there is not enough space.
        """
        if self.is_short:
            raise no_space(self.config.data_root, self.needed, self.free)

    @property
    def buffers(self) -> int:
        """The bytes of the host's memory between forward pass and disk, at most."""
        return min(self.config.inference.queue_mb << 20, max(self.journal, 1))

    @property
    def writers(self) -> int:
        """The bytes of the threads that write Parquet files."""
        return num_threads() * THREAD_BYTES


def describe(components: Components) -> Described:
    """Describes a loaded model."""
    backbone = components.backbone
    weights = list(backbone.decoder.parameters())
    return Described(
        components.layers,
        components.selection,
        str(backbone.dtype).removeprefix("torch."),
        backbone.device.type,
        sum(weight.numel() * weight.element_size() for weight in weights),
        components.cost,
        backbone.length_boundary,
        max((len(one.inv_freq) for one in backbone.frequencies.values()), default=0),
        lambda shapes: activation_bytes(backbone, shapes),
    )


def make_plan(
    config: ResolvedConfig,
    model: Described,
    windows: Iterable[Window],
    *,
    wanted: int | None,
    done: Iterable[ExampleRecord] = (),
    in_journal: int = 0,
    there: int = 0,
    base_texts: int = 0,
    is_whole: bool = True,
) -> Plan:
    """Plans the batches of `windows`.

    Args:
        config: of the job.
        model: the model.
        windows: the look-ahead windows to count.
        wanted: the texts to capture, finished ones included; None if their number is not known.
        done: the examples that are in the journal.
        in_journal: its bytes.
        there: the bytes of the dataset that the job adds to.
        base_texts: the source rows of that dataset.
        is_whole: whether `windows` are all.
    """
    sampler, forms = Sampler(config.sampler), _forms(config, model)
    counter = RowCounter(
        sampler,
        [(layer, kind) for layer, kind, _ in model.selection],
        {group[0]: 2 * sizes.rows_per_group(width) for (_, width, _, _), group in forms.items()},
    )
    counter.add_done(list(done), most=None if is_whole else MOST_DONE)
    counts, share, new_texts = counter.counts, 1.0, 0
    for window in windows:
        counted = window if is_whole else replace(window, batches=_some(window.batches))
        for batch, ends_group in grouped([counted], model.cost, group_flops(config, model.cost)):
            counter.add(batch, ends_group=ends_group)
        if not is_whole:
            new_texts += sum(example.part == 0 for batch in window.batches for example in batch)
            tokens = sum(counter.add_tokens(batch) for batch in window.batches)
            share = counts.tokens / tokens if tokens else 1.0
    if not is_whole and wanted is not None and new_texts:
        share *= new_texts / max(wanted - counts.done_texts, new_texts)
    texts = counts.texts if is_whole else None if wanted is None else max(wanted - counts.done_texts, new_texts)
    return Plan(
        config,
        model,
        counts,
        share,
        texts,
        _kinds(config, model, counts, sampler, forms, share, grows=there > 0),
        model.activation_bytes({counts.largest, counts.longest} - {(0, 0)}),
        there,
        in_journal,
        free_bytes(config.data_root),
        base_texts,
    )


def _some(batches: Sequence[Sequence[Tokens]]) -> Sequence[Sequence[Tokens]]:
    """Returns evenly spaced batches of a window, of at most about `MOST_TOKENS` tokens together."""
    tokens = sum(example.num_tokens for batch in batches for example in batch)
    return batches[:: max(1, ceil(tokens / MOST_TOKENS))]


def free_bytes(root: Path) -> int:
    """Returns the free bytes of the disk of `root`, which need not exist."""
    folder = next(path for path in (root.absolute(), *root.absolute().parents) if path.is_dir())
    return shutil.disk_usage(folder).free


_Form = tuple[str, int, int | None, bool]
"""Kind, width and sliding window of files, and whether their vectors follow from the token alone."""


def _forms(config: ResolvedConfig, model: Described) -> dict[_Form, list[Key]]:
    """Returns the (layer, kind) of each form of file."""
    windows = {layer.heads.layer: layer.heads.sliding_window for layer in model.layers}
    found: dict[_Form, list[Key]] = {}
    for key, width in model.widths().items():
        layer, kind = key
        of_token = layer == 0 and (kind == "v" or (kind in "qk" and config.capture.capture_pre_rope))
        found.setdefault((kind, width, windows[layer], of_token), []).append(key)
    return found


def _kinds(
    config: ResolvedConfig,
    model: Described,
    counts: Counts,
    sampler: Sampler,
    forms: Mapping[_Form, Sequence[Key]],
    share: float,
    *,
    grows: bool,
) -> list[KindSize]:
    """Returns the sizes by kind. With `grows`, a dataset is there, and its files get longer."""
    heads = {(layer, kind): len(numbers) for layer, kind, numbers in model.selection}
    itemsize = 4 if model.dtype == "float32" else 2

    def rows_of(key: Key) -> int:
        return round(counts.rows[key] / share)

    def runs_of(key: Key) -> int:
        return round(counts.runs[key] / share)

    files, rows, journal, dataset = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for form, keys in forms.items():
        kind, width, _, _ = form
        sample = _sample(config, counts, sampler, keys[0], form, sizes.MANTISSAS[model.dtype])
        for key in keys:
            files[kind] += heads[key]
            rows[kind] += rows_of(key) * heads[key]
            journal[kind] += sizes.block_bytes(
                rows_of(key), runs_of(key), heads[key], width, itemsize, config.capture, kind
            )
        # The layers of a form have about as many rows.
        mean = sum(rows_of(key) + counts.done_rows[key] for key in keys) / len(keys)
        of_form = sum(heads[key] for key in keys)
        dataset[kind] += (sample.file_bytes(round(mean)) - grows * sample.file_bytes(0)) * of_form
        if kind == "q" and config.capture.attention.enabled:
            top_k = config.capture.attention.top_k
            summaries = sample.summary_bytes(round(mean), top_k) - grows * sample.summary_bytes(0, top_k)
            dataset[ATTENTION] += summaries * of_form
    if (table := AttentionTable.of(config)) is not None:
        files[ATTENTION], rows[ATTENTION] = files["q"], rows["q"]
        journal[ATTENTION] = sum(
            sizes.block_bytes(rows_of(key), runs_of(key), heads[key], table.width, 4, config.capture, ATTENTION)
            for key in heads
            if key[1] == "q"
        )
    found = [
        KindSize(kind, files[kind], rows[kind], journal[kind], dataset[kind]) for kind in FILE_KINDS if files[kind]
    ]
    groups = ceil(counts.groups / share)
    if config.capture.statistics.enabled:
        found.append(_statistics(config, model, heads, groups, grows=grows))
    of_vectors = sum(journal.values())
    segments = max(1, groups if config.capture.statistics.enabled else 0)
    segments = max(segments, ceil(of_vectors / (config.inference.segment_mb << 20))) if counts.batches else 0
    examples = round(counts.examples / share)
    headers = sizes.headers_bytes(round(counts.records_bytes / share), len(heads), 3, segments)
    others = sizes.others_bytes(examples + counts.done_texts, sum(files.values()), len(model.layers))
    others -= grows * sizes.others_bytes(0, sum(files.values()), len(model.layers))
    return [*found, KindSize("others", 3, 0, headers, others)]


def _sample(
    config: ResolvedConfig, counts: Counts, sampler: Sampler, key: Key, form: _Form, mantissa: int
) -> sizes.Sample:
    kind, width, window, of_token = form
    ids, position, token = np.concatenate([np.zeros((3, 0), np.int32), *counts.places.get(key, [])], axis=1)
    order = np.lexsort((position, ids))
    bucket = sampler.bucket(kind, position[order])
    tokens = token[order] if of_token else None
    return sizes.Sample(kind, width, mantissa, ids[order], position[order], bucket, window, config.capture, tokens)


def _statistics(
    config: ResolvedConfig, model: Described, heads: Mapping[Key, int], groups: int, *, grows: bool
) -> KindSize:
    settings = config.capture.statistics
    dataset = journal = 0
    for (layer, kind), width in model.widths().items():
        for _ in stages_of(kind, settings.stages):
            pairs = 0 if kind in ("v", "o") else model.pairs
            of_dataset, of_group = sizes.statistics_bytes(
                heads[layer, kind], width, covariance=settings.covariance, pairs=pairs
            )
            dataset += 0 if grows else of_dataset
            journal += groups * of_group
    return KindSize(STATISTICS, len({layer for layer, _ in heads}), 0, journal, dataset)
