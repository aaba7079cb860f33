"""Jobs that split long texts: the parts are examples, whatever shards, kills and growth do to the texts."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.forked import Server
from support.jobs import TEXTS, hashes, heads_of, keys, run, settings, stopped_after, tokens_of, vectors
from support.verify_cases import edit, rewrite, verified, with_values, wrong

from qk_sniffer import open_dataset
from qk_sniffer.capture.sampling import Sampler, counter_hash
from qk_sniffer.config import SamplerConfig
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.jobs import batch_groups
from qk_sniffer.store import manifest as manifests

LENGTH = 20

SPLIT: dict[str, Any] = {"model": {"tokenizer": {"max_length": LENGTH, "overlong": "split"}}}

ALONE: dict[str, Any] = SPLIT | {"inference": {"batch_size": 1}}


def parts_of(texts: list[str]) -> list[tuple[int, int, str]]:
    """The index, the part and the text of each part."""
    return [
        (index, start // LENGTH, text[start : start + LENGTH])
        for index, text in enumerate(texts)
        for start in range(0, len(text), LENGTH)
    ]


PARTS = parts_of(TEXTS)


@pytest.fixture(scope="module")
def parts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose texts are the parts."""
    path = tmp_path_factory.mktemp("parts") / "parts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for _, _, text in PARTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def split(undisturbed: Callable[..., Path]) -> Path:
    """The dataset of the parts of `TEXTS`, every token of them."""
    return undisturbed(**ALONE)


def test_parts_have_the_vectors_of_texts_of_their_own(
    split: Path, checkpoint: Path, parts_file: Path, tmp_path: Path
) -> None:
    alone = heads_of(run(checkpoint, parts_file, tmp_path / "alone", inference={"batch_size": 1}))
    table = pq.read_table(split / "examples" / "data.parquet")
    numbers = dict(enumerate(table["example_id"].to_pylist()))
    for head, found in heads_of(split).items():
        assert np.array_equal(vectors(found), vectors(alone[head]))
        assert keys(found) == [(numbers[number], position) for number, position in keys(alone[head])]


def test_the_list_of_examples_names_the_parts(split: Path) -> None:
    rows = open_dataset(split).examples.to_pylist()
    assert [(row["index"], row["part"]) for row in rows] == [(index, part) for index, part, _ in PARTS]
    assert [row["first_token"] for row in rows] == [part * LENGTH for _, part, _ in PARTS]
    assert [row["num_tokens"] for row in rows] == [len(text) for _, _, text in PARTS]
    assert [row["source_id"] for row in rows] == [str(index) for index, _, _ in PARTS]
    assert not any(row["truncated"] for row in rows)
    later = 0
    for row in rows:
        later += row["part"] > 0
        assert row["example_id"] == (-later if row["part"] else row["index"])
    for index in range(len(TEXTS)):
        assert len({row["text_hash"] for row in rows if row["index"] == index}) == 1
    manifest = manifests.read(split)
    assert (manifest["examples"], manifest["texts"], manifest["source_rows"]) == (len(PARTS), len(TEXTS), len(TEXTS))
    assert (manifest["truncated_examples"], manifest["truncated_tokens"]) == (0, 0)
    assert manifest["tokens"] == sum(map(len, TEXTS)) and manifest["proof"]["proven"]


def test_a_split_dataset_is_whole_and_says_what_it_is(split: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wrong(verified(split)) == {}
    card = (split / "README.md").read_text()
    assert f"each text is split into parts of at most {LENGTH} tokens" in card
    assert f"| examples | {len(PARTS)} (parts of {len(TEXTS)} texts; 0 texts left out as empty) |" in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("part", 2, 0), "the parts of a text do not follow each other"),
        pytest.param(("index", 2, 5), "the parts of a text do not follow each other", marks=pytest.mark.slow),
        (("first_token", 2, 19), "first_token is not the number of the text's tokens before the part"),
        pytest.param(
            ("first_token", 0, 1),
            "first_token is not the number of the text's tokens before the part",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("num_tokens", 1, 19), "a part that is not the last has not max_length tokens", marks=pytest.mark.slow
        ),
        (("example_id", 2, -99), "the numbers of later parts are not -1, -2"),
        pytest.param(("example_id", 0, -99), "the number of a text is negative", marks=pytest.mark.slow),
        pytest.param(
            ("text_hash", 2, "0" * 32), "the parts of a text have different ids or hashes", marks=pytest.mark.slow
        ),
        pytest.param(("source_id", 2, "x"), "the parts of a text have different ids or hashes", marks=pytest.mark.slow),
        pytest.param(
            ("truncated", 0, True), "an example is truncated, although texts are split", marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_an_edited_list_of_parts_is_noticed(
    change: tuple[str, int, Any], message: str, split: Path, tmp_path: Path
) -> None:
    root = tmp_path / "out"
    shutil.copytree(split, root)
    name, row, value = change
    assert [part for _, part, _ in PARTS[:3]] == [0, 0, 1]
    rewrite(root, "examples/data.parquet", lambda table: with_values(table, name, {row: value}))
    assert message in wrong(verified(root))["examples"]


def test_an_edited_number_of_texts_is_noticed(split: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    shutil.copytree(split, root)
    edit(root, lambda manifest: manifest.update(texts=7))
    found = wrong(verified(root))
    assert "texts: 24, not 7" in found["examples"] and "texts is 7" in found["manifest"]
    edit(root, lambda manifest: manifest.pop("texts"))
    assert "manifest" in wrong(verified(root))


def test_the_rows_of_a_part_follow_from_its_text_and_its_number(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {"type": "uniform", "base_rate": 4.0, "min_bucket_size": 16}
    root = run(checkpoint, texts, tmp_path / "out", **SPLIT, sampler=config)
    assert wrong(verified(root)) == {}
    sampler = Sampler(SamplerConfig(**config))
    rows = open_dataset(root).examples.to_pylist()
    found = keys(heads_of(root)["l01h00q"])
    for row in rows:
        number = row["index"]
        if row["part"]:
            number = int(counter_hash(row["index"], row["part"]).view(np.int64)[0])
        expected = sampler.positions(number, 1, "q", row["num_tokens"]).tolist()
        assert [position for example, position in found if example == row["example_id"]] == expected
    card = (root / "README.md").read_text()
    assert "hash(example_id of the text, part)" in card


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 5])
def test_shards_make_the_parts_of_one_job(
    count: int, split: Path, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    for index in reversed(range(count)):
        run(checkpoint, texts, tmp_path / "out", **ALONE, shard={"index": index, "count": count})
    assert {**hashes(tmp_path / "out"), "README.md": ""} == {**hashes(split), "README.md": ""}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batches", "lookahead"),
    [(7, 3), (1, 3), (1, None), (7, None)],
)
def test_a_stopped_job_continues_within_a_text(
    batches: int, lookahead: int | None, checkpoint: Path, texts: Path, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    sections = SPLIT | {"inference": {"batch_size": 2, "lookahead": lookahead}}
    stopped_after(batches, checkpoint, texts, tmp_path / "out", **sections)
    root = run(checkpoint, texts, tmp_path / "out", **sections)
    assert hashes(root) == hashes(undisturbed(**sections))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("forked")) as server:
        yield server


@pytest.mark.slow
def test_a_killed_job_makes_the_same_parts_and_statistics(
    server: Server, checkpoint: Path, texts: Path, tmp_path: Path, undisturbed: Callable[..., Path], monkeypatch: Any
) -> None:
    monkeypatch.setattr(batch_groups, "GROUP", 1e-5)
    small = "from qk_sniffer.jobs import batch_groups; batch_groups.GROUP = 1e-5"
    sections: dict[str, Any] = SPLIT | {
        "inference": {"batch_size": 2, "lookahead": 6, "segment_mb": 1, "queue_mb": 1},
        "capture": {"statistics": {"enabled": True, "stages": ["pre", "post"]}},
    }
    job, whole = settings(checkpoint, texts, tmp_path / "out", **sections), hashes(undisturbed(**sections))
    for number in (2, 5, 9, 14):
        child = server.start(job, held={"forward": number}, before=small)
        assert child.reaches("forward", number)
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    child = server.start(job, before=small)
    assert child.wait() == 0, child.stderr
    assert hashes(tmp_path / "out") == whole
    assert manifests.read(tmp_path / "out")["statistics"]["tokens"] == sum(map(len, TEXTS))
    assert wrong(verified(tmp_path / "out")) == {}


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_dataset_grows(streaming: bool, split: Path, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    for count in (3, 8, None):
        dataset = {"max_samples": count, "streaming": streaming}
        run(checkpoint, texts, tmp_path / "out", **ALONE, dataset=dataset)
        assert wrong(verified(tmp_path / "out")) == {}
    assert hashes(tmp_path / "out") | {"README.md": ""} == hashes(split) | {"README.md": ""}


@pytest.mark.slow
def test_a_truncated_dataset_is_not_continued_with_parts(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", model={"tokenizer": {"max_length": LENGTH}}, verify={"examples": 0})
    with pytest.raises(StoreError, match=r"model\.tokenizer\.overlong"):
        run(checkpoint, texts, root, **SPLIT)


@pytest.mark.slow
def test_a_split_text_that_changed_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"

    def write(first: str) -> None:
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in (first, *TEXTS[1:6])))

    write(TEXTS[0] * 5)
    stopped_after(3, checkpoint, texts, tmp_path / "out", **ALONE)
    write(TEXTS[0] * 6)
    with pytest.raises(SourceError, match=r"example 0 of the dataset .* is not the text that was captured"):
        run(checkpoint, texts, tmp_path / "out", **ALONE)
    write(TEXTS[0] * 5)
    root = run(checkpoint, texts, tmp_path / "out", **ALONE)
    write(TEXTS[0] * 6)
    with pytest.raises(SourceError, match=r"example 0 of the dataset .* is not the text that"):
        run(checkpoint, texts, root, **ALONE)


def test_the_proof_of_a_late_part_makes_the_parts_before_it_alone(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    root = run(checkpoint, texts, tmp_path / "out", **SPLIT, verify={"examples": 3})
    proof = manifests.read(root)["proof"]
    ids = {row["example_id"] for row in open_dataset(root).examples.to_pylist()}
    assert proof["proven"] and len(proof["examples"]) == 3 and {*proof["examples"]} <= ids


@pytest.mark.slow
def test_token_ids_and_their_segments_are_split_too(split: Path, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    of_text = [[["first", 0], *([["second", 25]] if len(text) > 25 else [])] for text in TEXTS]
    rows = [{"ids": tokens_of(text)[0].tolist(), "named": named} for text, named in zip(TEXTS, of_text, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns: dict[str, Any] = {"tokens_column": "ids", "segments_column": "named"}
    sections: dict[str, Any] = ALONE | {"dataset": columns, "capture": {"capture_segments": True}}
    root = run(checkpoint, path, tmp_path / "out", **sections)
    assert wrong(verified(root)) == {}
    for head, table in heads_of(root).items():
        assert table.drop(["segment"]) == heads_of(split)[head]
    examples = open_dataset(root).examples.to_pylist()
    of_example = {row["example_id"]: row["first_token"] for row in examples}
    for row in heads_of(root)["l00h00q"].to_pylist():
        place = of_example[row["example_id"]] + row["position"]
        assert row["segment"] == ("first" if place < 25 else "second")
    some = sections | {"sampler": {"segments": ["second"]}, "capture": {"statistics": {"enabled": True}}}
    kept = run(checkpoint, path, tmp_path / "some", **some)
    assert wrong(verified(kept)) == {}
    assert manifests.read(kept)["statistics"]["tokens"] == sum(max(0, len(text) - 25) for text in TEXTS)
