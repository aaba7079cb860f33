"""Tests how statistics in journals become those of a dataset, and which of them are refused."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.store_cases import HEAD_DIM, HEADS, LAYERS, NUM_HEADS, Captured

from qk_sniffer.config import StatisticsConfig
from qk_sniffer.errors import StoreError
from qk_sniffer.store.compact_statistics import compact_statistics
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.segment import Place
from qk_sniffer.store.segment_facts import SegmentFacts
from qk_sniffer.store.statistics import Part, PartKey, Statistics, part_tensors
from qk_sniffer.store.statistics_file import read_statistics

CORPUS = Captured()
CONFIG = StatisticsConfig(enabled=True, stages=["pre", "post"])
KEYS = [PartKey(layer, kind, stage) for layer in LAYERS for kind in "qk" for stage in CONFIG.stages]
ROTATIONS = {layer: {"pairs": "halves", "first": 4} for layer in LAYERS}
NUM_TOKENS = sum(map(CORPUS.length, range(12)))

Parts = dict[PartKey, Part]


def vectors_of(key: PartKey, indices: Sequence[int]) -> np.ndarray:
    """Returns vectors (heads, tokens of the examples, HEAD_DIM)."""
    rng = [np.random.default_rng([index, key.layer, ord(key.kind), len(key.stage)]) for index in indices]
    shapes = [(NUM_HEADS[key.kind], CORPUS.length(index), HEAD_DIM) for index in indices]
    return np.concatenate([each.normal(3, 2, shape) for each, shape in zip(rng, shapes, strict=True)], axis=1)


def part_of(vectors: np.ndarray, *, frequencies: int) -> Part:
    count = np.full(len(vectors), vectors.shape[1])
    mean = vectors.mean(axis=1)
    centered = vectors - mean[:, None]
    norms = np.linalg.norm(vectors, axis=2)
    modulus = np.hypot(vectors[..., 4 : 4 + frequencies], vectors[..., 4 + frequencies : 4 + 2 * frequencies])
    return Part(
        count,
        np.zeros_like(count),
        mean,
        np.einsum("hnd,hne->hde", centered, centered),
        vectors.min(axis=1),
        vectors.max(axis=1),
        np.stack([norms.mean(axis=1), norms.var(axis=1) * count], axis=1),
        modulus.mean(axis=1),
    )


def written(folder: Path, change: Callable[[int, Parts], object] = lambda group, parts: None) -> Journal:
    """Returns a journal of groups of two batches. `change` changes the parts of a group."""
    batches = list(CORPUS.batches())
    with JournalWriter(Journal(folder), queue_bytes=1 << 20, segment_bytes=1 << 20) as writer:
        for group in range(len(batches) // 2):
            first, second = batches[2 * group : 2 * group + 2]
            parts = {
                key: part_of(vectors_of(key, [*first, *second]), frequencies=5 if key.stage == "pre" else 0)
                for key in KEYS
            }
            change(group, parts)
            writer.complete([CORPUS.record(index) for index in first], ends_group=False)
            writer.complete([CORPUS.record(index) for index in second], statistics=part_tensors(parts))
    return Journal(folder)


def staged(folder: Path, *journals: Journal, num_tokens: int = NUM_TOKENS) -> Path:
    layout = Layout(folder)
    layout.staging.root.mkdir(parents=True)
    compact_statistics(layout.staging, journals, HEADS, CONFIG, ROTATIONS, num_tokens=num_tokens)
    return layout.staging.root


@pytest.mark.slow
def test_a_journal_keeps_no_places_and_no_facts_of_what_it_has_compared(tmp_path: Path) -> None:
    written(tmp_path)

    def alive(kind: type) -> int:
        gc.collect()
        return sum(type(each) is kind for each in gc.get_objects())

    places, facts = alive(Place), alive(SegmentFacts)
    journal = Journal(tmp_path, verify=False)
    assert len(journal.statistics) == 2
    assert (alive(Place), alive(SegmentFacts)) == (places, facts + len(journal.segments))
    journal.verify()
    assert alive(SegmentFacts) == facts


def test_groups_merge_to_the_statistics_of_all_tokens(tmp_path: Path) -> None:
    journal = written(tmp_path / "journal")
    assert journal.is_whole and len(journal.statistics) == 2
    root = staged(tmp_path / "out", journal)
    for key in KEYS:
        path = root / f"statistics/layer-{key.layer:02d}.safetensors"
        found = read_statistics(path, key.kind, key.stage, way_out="")
        part = part_of(vectors_of(key, range(12)), frequencies=5 if key.stage == "pre" else 0)
        pairs = [(4 + i, 9 + i) for i in range(5)] if key.stage == "pre" else None
        expected = Statistics.of(range(NUM_HEADS[key.kind]), part, pairs)
        assert found is not None
        for name, values in vars(expected).items():
            if values is None:
                assert getattr(found, name) is None
            else:
                assert getattr(found, name) == pytest.approx(values, rel=1e-5, abs=1e-5), name


def drop(group: int, parts: Parts) -> None:
    if group == 1:
        del parts[PartKey(3, "k", "post")]


def drop_everywhere(group: int, parts: Parts) -> None:
    del parts[PartKey(3, "k", "post")]


def fewer_heads(group: int, parts: Parts) -> None:
    key = PartKey(0, "q", "pre")
    if group == 1:
        parts[key] = Part(**{name: values[:1] for name, values in vars(parts[key]).items()})


def diagonal(group: int, parts: Parts) -> None:
    key = PartKey(0, "q", "pre")
    parts[key] = replace(parts[key], moment=np.diagonal(parts[key].moment, axis1=1, axis2=2))


def other_frequencies(group: int, parts: Parts) -> None:
    key = PartKey(0, "q", "pre")
    if group == 1:
        parts[key] = replace(parts[key], modulus=parts[key].modulus[:, :2])


def too_many_frequencies(group: int, parts: Parts) -> None:
    key = PartKey(0, "q", "pre")
    parts[key] = replace(parts[key], modulus=np.ones((4, 9)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, f"layer 3, kind k, stage post are not those of all {NUM_TOKENS:,} tokens; capture the dataset again"),
        (drop_everywhere, "layer 3, kind k, stage post are not those of all"),
        (fewer_heads, "layer 0, kind q, stage pre are of other heads or have other shapes"),
        (diagonal, "layer 0, kind q, stage pre are of other heads or have other shapes"),
        (other_frequencies, "layer 0, kind q, stage pre are of other heads or have other shapes"),
        (too_many_frequencies, "layer 0, kind q, stage pre have more rotary frequencies than a head"),
    ],
)
def test_parts_that_do_not_make_the_statistics_of_the_job(
    change: Callable[[int, Parts], object], message: str, tmp_path: Path
) -> None:
    journal = written(tmp_path / "journal", change)
    assert journal.is_whole
    with pytest.raises(StoreError, match=message):
        staged(tmp_path / "out", journal)


def test_statistics_of_other_tokens_are_refused(tmp_path: Path) -> None:
    journal = written(tmp_path / "journal")
    with pytest.raises(StoreError, match=f"are not those of all {NUM_TOKENS + 1:,} tokens"):
        staged(tmp_path / "out", journal, num_tokens=NUM_TOKENS + 1)


@pytest.mark.parametrize("number", [-1, 1, 10**6, 2**62])
def test_a_segment_with_counts_that_cannot_be_is_damaged(number: int, tmp_path: Path) -> None:
    def change(group: int, parts: Parts) -> None:
        if group == 1:
            parts[KEYS[0]].count[1] += number

    journal = written(tmp_path / "journal", change)
    assert len(journal.damaged) == 1 and len(journal.records) == 6
    assert len(journal.statistics) == 1


def empty(shape: tuple[int, ...]) -> Callable[[int, Parts], object]:
    """Returns a change to a part without numbers, whose arrays claim any size."""

    def change(group: int, parts: Parts) -> None:
        if group == 1:
            nothing, vectors = np.zeros(0, np.int64), np.broadcast_to(np.zeros(()), (0, shape[-1]))
            parts[KEYS[0]] = Part(
                nothing, nothing, vectors, np.empty(shape), vectors, vectors, np.empty((0, 2)), np.empty((0, 0))
            )

    return change


@pytest.mark.parametrize("shape", [(0, 16), (0, 16, 16)])
def test_a_part_of_no_heads_is_damage(shape: tuple[int, ...], tmp_path: Path) -> None:
    journal = written(tmp_path / "journal", empty(shape))
    assert len(journal.damaged) == 1 and len(journal.statistics) == 1


@pytest.mark.parametrize("change", [fewer_heads, diagonal, too_many_frequencies])
def test_parts_of_other_shapes_are_not_read(
    change: Callable[[int, Parts], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = written(tmp_path / "journal", change)
    monkeypatch.setattr("qk_sniffer.store.compact_statistics.read_parts", lambda *_: pytest.fail("it is read"))
    with pytest.raises(StoreError, match=r"have other shapes|more rotary frequencies"):
        staged(tmp_path / "out", journal)


class Earlier:
    """Gives the statistics of an earlier version, as `PreviousVersion` does."""

    def __init__(self, root: Path, **changes: np.ndarray) -> None:
        self.root, self.changes = root, changes

    def statistics(self, key: PartKey) -> Statistics | None:
        path = self.root / f"statistics/layer-{key.layer:02d}.safetensors"
        found = read_statistics(path, key.kind, key.stage, way_out="")
        assert found is not None
        return replace(found, **self.changes) if key == KEYS[0] else found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"heads": np.array([0, 1, 2, 9])}, "are of other heads"),
        ({"count": np.full(4, -1), "nonfinite": np.full(4, NUM_TOKENS + 1)}, "have a negative count"),
    ],
)
def test_statistics_of_an_earlier_version_that_cannot_be_are_refused(
    changes: dict[str, np.ndarray], message: str | None, tmp_path: Path
) -> None:
    journal = written(tmp_path / "journal")
    earlier: Any = Earlier(staged(tmp_path / "first", journal), **changes)
    staging = Layout(tmp_path / "out").staging
    staging.root.mkdir(parents=True)

    def grow() -> None:
        compact_statistics(staging, [journal], HEADS, CONFIG, ROTATIONS, num_tokens=2 * NUM_TOKENS, previous=earlier)

    if message is None:
        grow()
    else:
        with pytest.raises(StoreError, match=f"layer 0, kind q, stage pre {message}"):
            grow()
