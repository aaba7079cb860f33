"""Captures the segments of tokens, and only the tokens of some segments."""

import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from support.jobs import TEXTS, captured_only, hashes, heads_of, keys, run, stopped_after
from support.plasticity_cases import measure, metrics
from support.segmented import COLUMNS, NAMES, names_of, runs_of, write
from support.verify_cases import edit, rewrite, verified, with_values, wrong

import qk_sniffer
from qk_sniffer.capture.capture import Capture
from qk_sniffer.config import from_dict
from qk_sniffer.errors import ConfigError, SourceError, StoreError
from qk_sniffer.jobs import segment_names
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store import parquet_tables
from qk_sniffer.validation import problems

FEW: dict[str, Any] = {"layers": [0, 1], "heads": [0, 3]}
SEGMENTS: dict[str, Any] = {"dataset": COLUMNS, "capture": FEW | {"capture_segments": True}}
ALONE: dict[str, Any] = {"inference": {"batch_size": 1}}


def restricted(names: list[str], **sections: dict[str, Any]) -> dict[str, Any]:
    """Returns sections that keep the tokens in segments of `names` alone."""
    merged = {name: SEGMENTS.get(name, {}) | sections.get(name, {}) for name in {*SEGMENTS, *sections}}
    return merged | {"sampler": merged.get("sampler", {}) | {"segments": names}}


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("segmented") / "ids.jsonl")


@pytest.fixture(scope="module")
def whole(checkpoint: Path, segmented: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of all tokens with their segments, read-only."""
    return run(checkpoint, segmented, tmp_path_factory.mktemp("whole") / "out", **SEGMENTS)


@pytest.fixture(scope="module")
def answers(checkpoint: Path, segmented: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of all tokens of the assistant, with statistics and attention summaries, read-only."""
    capture = {"statistics": {"enabled": True, "stages": ["pre", "post"], "skip_tokens": 2}}
    capture |= {"attention": {"enabled": True, "top_k": 3}}
    return run(
        checkpoint,
        segmented,
        tmp_path_factory.mktemp("answers") / "out",
        **restricted(["assistant"], capture=SEGMENTS["capture"] | capture),
    )


def segments_of(table: pa.Table) -> list[str]:
    """Returns the segment of each row by the definition of the examples."""
    names = {index: names_of(index) for index in range(len(TEXTS))}
    return [names[example][position] for example, position in keys(table)]


def test_every_row_has_the_segment_of_its_token(whole: Path) -> None:
    for table in heads_of(whole).values():
        assert table.schema.names[5:] == ["segment"] and table["segment"].to_pylist() == segments_of(table)
    counts = Counter(name for index in range(len(TEXTS)) for name in names_of(index))
    assert manifests.read(whole)["segments"] == counts and {*counts} == {*NAMES}
    examples = pq.read_table(whole / "examples" / "data.parquet")
    assert [json.loads(text) for text in examples["segments"].to_pylist()] == [
        [list(run) for run in runs_of(index)] for index in range(len(TEXTS))
    ]
    assert wrong(verified(whole)) == {} and "segment         ok " in verified(whole)
    assert manifests.read(whole)["proof"]["proven"] is True


def test_readers_have_the_segments(whole: Path) -> None:
    dataset = qk_sniffer.open_dataset(whole)
    table = dataset.table(*dataset.heads[0])
    segments = dataset.segments(*dataset.heads[0])
    assert segments.tolist() == table["segment"].to_pylist()
    rows = dataset.vectors(*dataset.heads[0])
    assert 0 < len(rows.vectors[segments == "assistant"]) < len(rows.vectors)
    assert dataset.examples.column_names[-1] == "segments"
    with pytest.raises(StoreError, match=r"has no offsets: capture\.capture_offsets=true adds them"):
        dataset.offsets(*dataset.heads[0])
    file = str(whole / "l00h00q" / "data.parquet")
    assert pl.read_parquet(file)["segment"].to_list() == segments.tolist()
    loaded = load_dataset(str(whole), "l00h00q", split="train")
    assert loaded["segment"][:] == segments.tolist()
    card = (whole / "README.md").read_text()
    assert "| `segment` | string (dictionary) | the segment of the token, see Segments |" in card
    counts = manifests.read(whole)["segments"]
    assert all(f"| {name} | {counts[name]:,} |" in card for name in NAMES)


def test_a_dataset_without_segments_says_how_to_get_them(root: Path) -> None:
    dataset = qk_sniffer.open_dataset(root)
    with pytest.raises(StoreError, match=r"has no segments of rows: capture\.capture_segments=true adds them"):
        dataset.segments(*dataset.heads[0])


@pytest.mark.parametrize(
    "sampler",
    [
        {"type": "all"},
        pytest.param({"type": "uniform", "base_rate": 6.0, "share": "example"}, marks=pytest.mark.slow),
        {"type": "uniform", "base_rate": 6.0, "keys": {"type": "all"}, "max_rows_per_example": 5},
        pytest.param({"type": "log_uniform", "base_rate": 4.0, "min_bucket_size": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kept_segments_have_the_rows_that_they_have_without_the_setting(
    sampler: dict[str, Any], checkpoint: Path, segmented: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = SEGMENTS | {"sampler": sampler, "dataset": COLUMNS | {"max_samples": 9}}
    whole = run(checkpoint, segmented, tmp_path / "whole", **sections)
    some = run(checkpoint, segmented, tmp_path / "some", **restricted(["assistant", "system"], **sections))
    kept = heads_of(some)
    for name, table in heads_of(whole).items():
        mask = [segment in ("assistant", "system") for segment in table["segment"].to_pylist()]
        assert 0 < sum(mask) < len(mask)
        assert table.filter(pa.array(mask)).to_pydict() == kept[name].to_pydict()
    text = verified(some)
    assert wrong(text) == {} and "exactly those that the sampler chooses" in text
    assert manifests.read(some)["segments"] == manifests.read(whole)["segments"]
    card = (some / "README.md").read_text()
    assert "only those in some segments are kept" in card and "| user |" in card


def test_statistics_and_summaries_are_of_the_kept_segments(answers: Path, whole: Path) -> None:
    dataset, all_tokens = qk_sniffer.open_dataset(answers), qk_sniffer.open_dataset(whole)
    tokens = sum(name == "assistant" for index in range(len(TEXTS)) for name in names_of(index)[2:])
    assert dataset.manifest["statistics"]["tokens"] == tokens
    for layer, kind in itertools.product((0, 1), "qk"):
        found = dataset.statistics(layer, kind, "post")
        assert set(found.count) == {tokens}
        for place, head in enumerate(found.heads.tolist()):
            rows = all_tokens.vectors(layer, head, kind)
            used = (all_tokens.segments(layer, head, kind) == "assistant") & (rows.positions >= 2)
            expected = rows.vectors[used].astype(np.float64)
            np.testing.assert_allclose(found.mean[place], expected.mean(axis=0), atol=1e-6)
            np.testing.assert_allclose(found.covariance[place], np.cov(expected.T), atol=1e-5)
            np.testing.assert_array_equal(found.maximum[place], expected.max(axis=0))
    summary = dataset.attention_summary(0, 0)
    positions = dataset.vectors(0, 0, "q").positions
    window = 12
    assert summary.positions.tolist() == positions.tolist()
    assert summary.num_keys.tolist() == np.minimum(positions + 1, window).tolist(), "keys of all segments count"
    text = verified(answers)
    assert wrong(text) == {}
    assert re.search(r"statistics +ok +8 heads: .* are those of the rows", text)
    proof = manifests.read(answers)["proof"]
    assert proof["proven"] is True and proof["statistics"]["heads"] == 8
    assert 0 < proof["statistics"]["tokens"] < tokens
    card = (answers / "README.md").read_text()
    assert "over all tokens in the segments that are kept, sampled or not" in card


def test_statistics_alone_are_of_the_kept_segments(
    checkpoint: Path, segmented: Path, tmp_path: Path, answers: Path
) -> None:
    statistics = {"statistics": {"enabled": True, "stages": ["pre", "post"], "skip_tokens": 2}}
    sections = restricted(["assistant"], sampler={"type": "none"}, capture=statistics)
    sections["capture"] = FEW | statistics
    root = run(checkpoint, segmented, tmp_path / "out", **sections)
    one, other = (qk_sniffer.open_dataset(each).statistics(1, "k", "post") for each in (root, answers))
    np.testing.assert_array_equal(one.mean, other.mean)
    assert wrong(verified(root)) == {} and manifests.read(root)["proof"]["proven"] is True
    assert "segment" not in heads_of(root)["l00h00q"].schema.names
    assert "segments" in pq.read_schema(root / "examples" / "data.parquet").names


@pytest.mark.slow
def test_a_killed_job_ends_with_the_same_bytes(
    checkpoint: Path, segmented: Path, tmp_path: Path, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = restricted(["assistant", "user"], **ALONE)
    undisturbed = run(checkpoint, segmented, tmp_path / "undisturbed", **sections)
    stopped_after(7, checkpoint, segmented, tmp_path / "out", **sections)
    captured_only(checkpoint, segmented, tmp_path / "out", monkeypatch, **sections)
    run(checkpoint, segmented, tmp_path / "out", **sections)
    assert hashes(tmp_path / "out") == hashes(undisturbed)


@pytest.mark.slow
def test_it_grows_and_its_shards_make_the_same_dataset(checkpoint: Path, segmented: Path, tmp_path: Path) -> None:
    sections = restricted(["assistant"], **ALONE)
    undisturbed = run(checkpoint, segmented, tmp_path / "undisturbed", **sections)
    for count in (5, 11, None):
        grown = run(
            checkpoint, segmented, tmp_path / "grown", **sections | {"dataset": COLUMNS | {"max_samples": count}}
        )
    for index in range(2):
        sharded = run(checkpoint, segmented, tmp_path / "sharded", **sections, shard={"index": index, "count": 2})
    assert hashes(grown) == hashes(sharded) == hashes(undisturbed)
    for key in ("segments", "rows_by_bucket"):
        assert manifests.read(grown)[key] == manifests.read(undisturbed)[key]
    for other in ({"segments": ["user"]}, {"segments": None}):
        with pytest.raises(StoreError, match=r"sampler\.segments: \['assistant'\] there"):
            run(checkpoint, segmented, grown, **sections | {"sampler": other})
    with pytest.raises(StoreError, match=r"capture\.capture_segments: true there, false now"):
        run(checkpoint, segmented, grown, **sections | {"capture": FEW})


def test_a_name_that_no_token_has_is_refused_before_the_first_forward_pass(
    checkpoint: Path, segmented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Capture, "run", lambda *_: pytest.fail("a forward pass runs"))
        with pytest.raises(ConfigError, match=r"names asistant, .* 24 examples .* they have assistant, system, user"):
            run(checkpoint, segmented, tmp_path / "out", **restricted(["asistant", "user"]))
        patch.setattr(segment_names, "MOST_EXAMPLES", 2)
        with pytest.raises(ConfigError, match=r"the first 2 examples"):
            run(checkpoint, segmented, tmp_path / "out", **restricted(["asistant"]))
        assert not (tmp_path / "out").exists()
    lines = segmented.read_text(encoding="utf-8").splitlines(keepends=True)
    late = tmp_path / "late.jsonl"
    late.write_text("".join([lines[3]] * 40 + [lines[0], lines[1], lines[2]]))
    root = run(checkpoint, late, tmp_path / "late", **restricted(["assistant"], **ALONE))
    assert set(heads_of(root)["l00h00q"]["example_id"].to_pylist()) <= {40, 41, 42}
    assert manifests.read(root)["skipped_rows"] == 0


def test_segments_that_have_changed_since_the_capture_prove_nothing(
    checkpoint: Path, segmented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "ids.jsonl"
    lines = segmented.read_text(encoding="utf-8")
    texts.write_text(lines)
    captured_only(checkpoint, texts, tmp_path / "out", monkeypatch, **SEGMENTS)
    texts.write_text(lines.replace('["user", 0]', '["tool", 0]'))
    with pytest.raises(SourceError, match="has other segments than the example that was captured before the job"):
        run(checkpoint, texts, tmp_path / "out", **SEGMENTS)
    texts.write_text(lines)
    run(checkpoint, texts, tmp_path / "out", **SEGMENTS)


@pytest.mark.parametrize("is_finished", [False, True])
def test_rows_of_other_segments_are_not_added(
    is_finished: bool, checkpoint: Path, segmented: Path, tmp_path: Path
) -> None:
    """The hash of token ids has no segments: a dataset had rows of both versions of its source."""
    texts, root = tmp_path / "ids.jsonl", tmp_path / "out"
    lines = segmented.read_text(encoding="utf-8")
    texts.write_text(lines)
    sections = SEGMENTS | ALONE | {"verify": {"examples": 0}}
    if is_finished:
        run(checkpoint, texts, root, **sections | {"dataset": COLUMNS | {"max_samples": 5}})
    else:
        stopped_after(7, checkpoint, texts, root, **sections)
    texts.write_text(lines.replace('["user", 0]', '["tool", 0]'))
    with pytest.raises(SourceError, match=r"has other segments than the example that .*: the source has changed"):
        run(checkpoint, texts, root, **sections)
    texts.write_text(lines)
    run(checkpoint, texts, root, **sections)


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (
            lambda root: rewrite(
                root, "l00h00q/data.parquet", lambda table: with_values(table, "segment", {2: "tool", 3: "tool"})
            ),
            "segment",
            "segments are not those of the example's tokens (2 rows in query head 0 of layer 0) l00h00q: row 2,",
        ),
        (
            lambda root: rewrite(
                root, "examples/data.parquet", lambda table: with_values(table, "segments", {0: '[["tool",1]]'})
            ),
            "examples",
            "the segments of an example are not runs of its tokens",
        ),
        (
            lambda root: rewrite(
                root, "examples/data.parquet", lambda table: with_values(table, "segments", {3: '[["tool",0]]'})
            ),
            "examples",
            "the tokens in segments differ from manifest.json",
        ),
        (
            lambda root: edit(root, lambda manifest: manifest["segments"].update(user=1)),
            "examples",
            "the tokens in segments differ from manifest.json",
        ),
    ],
)
def test_damaged_segments_are_found(change: Any, check: str, message: str, whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    shutil.copytree(whole, root)
    change(root)
    assert message in wrong(verified(root))[check]


def test_rows_of_other_segments_are_found(answers: Path, whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    shutil.copytree(answers, root)
    rows = heads_of(whole)["l01h00k"]
    rewrite(root, "l01h00k/data.parquet", lambda _: rows)
    found = wrong(verified(root))
    assert "the head has rows that the sampler does not choose" in found["sampler"]


def test_plasticity_measures_the_kept_rows(answers: Path, tmp_path: Path) -> None:
    assert measure(answers, tmp_path / "results") == 0
    assert set(metrics(tmp_path / "results")) == {(0, 0), (0, 3), (1, 0), (1, 3)}


def test_settings_of_segments_need_a_source_with_segments() -> None:
    def lines(**sections: dict[str, Any]) -> list[str]:
        model, dataset = {"name": "org/model"}, {"path": "org/texts"} | sections.pop("dataset", {})
        return problems(from_dict({"model": model, "dataset": dataset} | sections))

    way_out = "set dataset.messages_column, or dataset.tokens_column and segments_column"
    ids = {"tokens_column": "ids"}
    for dataset in ({}, ids):
        [line] = lines(capture={"capture_segments": True}, dataset=dataset)
        assert line.startswith("capture.capture_segments is true, but ") and way_out in line
        [line] = lines(sampler={"segments": ["user"]}, dataset=dataset)
        assert line.startswith("sampler.segments is ['user'], but ") and way_out in line
    for dataset in ({"messages_column": "messages"}, ids | {"segments_column": "segments"}):
        assert lines(capture={"capture_segments": True}, sampler={"segments": ["user"]}, dataset=dataset) == []
    [line] = lines(capture={"capture_offsets": True}, dataset=ids)
    assert line.startswith("capture.capture_offsets is true, but dataset.tokens_column")
    [line] = lines(sampler={"segments": []}, dataset={"messages_column": "messages"})
    assert line.startswith("sampler.segments is []")


def test_segments_that_do_not_fit_in_memory_are_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = qk_sniffer.open_dataset(whole).examples
    enough = 10 * table["segments"].nbytes
    monkeypatch.setattr(parquet_tables, "available_memory", lambda: enough - 1)
    with pytest.raises(StoreError, match="does not fit in memory: its rows take"):
        _ = qk_sniffer.open_dataset(whole).examples
    monkeypatch.setattr(parquet_tables, "available_memory", lambda: enough)
    assert qk_sniffer.open_dataset(whole).examples.equals(table)
