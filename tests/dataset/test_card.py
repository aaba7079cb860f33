"""Tests the card of synthetic datasets: its front matter, its code and its tables."""

import ast
import itertools
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as with_settings
from support.hostile import TERMINAL, names, skeleton
from support.verify_cases import edit

from qk_sniffer.config import (
    CaptureConfig,
    Config,
    DatasetConfig,
    HeadSamplingConfig,
    KeySamplerConfig,
    ModelConfig,
    OutputConfig,
    SamplerConfig,
    StatisticsConfig,
    TokenizerConfig,
)
from qk_sniffer.dataset.card import FRONT_MATTER_BYTES, write_card
from qk_sniffer.dataset.card_facts import CardFacts, Place
from qk_sniffer.resolved import resolve
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import Head, Layout, examples_schema, schema
from qk_sniffer.text import printable

ROWS = 5


def card_head(layer: int, kind: str, head: int, head_dim: int = 4, sliding_window: int | None = None) -> Head:
    return Head(layer, head, kind, key_head=0, head_dim=head_dim, sliding_window=sliding_window, row=0)


HEADS = [card_head(2, "q", 0), card_head(2, "q", 3), card_head(2, "k", 1), card_head(11, "q", 7), card_head(11, "k", 0)]
PLACE = Place("me/vectors", "some-model-some-texts")
CONFIG = resolve(
    Config(
        model=ModelConfig(name="some-org/some-model"),
        dataset=DatasetConfig(path="some-org/some-texts", split="test"),
        output=OutputConfig(data_root="/private/data/root"),
    )
)
FACTS = CardFacts(
    config=CONFIG,
    dtype="bfloat16",
    model_commit="a" * 40,
    tokenizer_commit="a" * 40,
    dataset_commit="b" * 40,
    software={"torch": "2.13.0", "qk-sniffer": "0.1.0"},
    num_examples=20,
    num_tokens=9_000,
    num_truncated=3,
    num_skipped=1,
    longest=1_000,
    heads=HEADS,
    rows_by_bucket={"q": {7: 6, 8: 4, 9: 5}, "k": {7: 9, 8: 1}},
)


WITH_STATISTICS = CaptureConfig(statistics=StatisticsConfig(enabled=True, stages=["pre", "post"]))


def with_config(facts: CardFacts, **groups: Any) -> CardFacts:
    return replace(facts, config=replace(facts.config, **groups))


def front_matter(text: str) -> tuple[str, dict[str, Any]]:
    match = re.match(r"---\n(.*?\n)---\n", text, flags=re.DOTALL)
    assert match is not None
    return match[0], yaml.safe_load(match[1])


def vectors_of(head: Head) -> np.ndarray:
    """Returns different numbers for each head, so that a swapped head shows."""
    start = head.layer * 10_000 + head.head * 100 + (50 if head.kind == "k" else 0)
    return np.arange(start, start + ROWS * head.head_dim, dtype=np.float32).reshape(ROWS, head.head_dim)


def write_head(path: Path, head: Head) -> None:
    path.parent.mkdir(parents=True)
    columns = {
        "bucket": np.full(ROWS, 7),
        "example_id": np.full(ROWS, 1),
        "position": np.arange(ROWS),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors_of(head).ravel()), head.head_dim),
        "sliding_window": pa.array([head.sliding_window] * ROWS, pa.int32()),
    }
    pq.write_table(pa.table(columns, schema=schema(head.head_dim)), path)


def write_dataset(root: Path, facts: CardFacts, heads: Iterable[Head]) -> None:
    layout = Layout(root)
    for head in heads:
        write_head(root / head.file, head)
    layout.examples.parent.mkdir()
    row = {"example_id": 1, "source_id": "one", "num_tokens": 5, "text_hash": "00", "index": 0, "truncated": False}
    pq.write_table(pa.Table.from_pylist([row], schema=examples_schema()), layout.examples)
    layout.card.write_text(write_card(facts), encoding="utf-8")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def loaded(root: Path, *args: str, **kwargs: str) -> np.ndarray:
    rows = datasets.load_dataset(str(root), *args, split="train", **kwargs).with_format("numpy")
    return np.asarray(rows["vector"][:])


def test_every_head_loads_by_its_name(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_dataset(root, FACTS, HEADS)
    names = [head.name for head in HEADS]
    assert datasets.get_dataset_config_names(str(root)) == [*names, "examples"]
    for head, name in zip(HEADS, names, strict=True):
        np.testing.assert_array_equal(loaded(root, name), vectors_of(head))
    np.testing.assert_array_equal(loaded(root), vectors_of(HEADS[0]))
    examples = datasets.load_dataset(str(root), "examples", split="train")
    assert examples["source_id"][:] == ["one"]


def test_front_matter() -> None:
    text, values = front_matter(write_card(FACTS))
    assert values["size_categories"] == ["n<1K"]
    assert values["source_datasets"] == ["some-org/some-texts"]
    assert values["pretty_name"] == "Q and K vectors of some-org/some-model on some-org/some-texts"
    assert (values["license"], values["license_name"]) == ("other", "terms-of-the-model-and-the-texts")
    assert values["tags"][0] == "qk-sniffer" and "language" not in values
    stated = replace(FACTS, languages=["en", "no"], licenses={"model": ["apache-2.0"], "dataset": []})
    assert front_matter(write_card(stated))[1]["language"] == ["en", "no"]  # without quotes YAML reads `no` as false
    assert "derive from `some-org/some-model` (licence: `apache-2.0`) and from `some-org/some-texts`." in write_card(
        stated
    )
    assert values["configs"][0] == {"config_name": "l02h00q", "data_files": "l02h00q/data.parquet", "default": True}
    assert values["configs"][1] == {"config_name": "l02h03q", "data_files": "l02h03q/data.parquet"}
    assert text.count("default:") == 1
    assert "source_datasets" not in front_matter(write_card(replace(FACTS, dataset_commit=None)))[1]


@pytest.mark.parametrize(
    ("rows", "category"),
    [(999, "n<1K"), (1_000, "1K<n<10K"), (10**6 - 1, "100K<n<1M"), (10**12 - 1, "100B<n<1T"), (10**12, "n>1T")],
)
def test_size_category(rows: int, category: str) -> None:
    facts = replace(FACTS, heads=[card_head(0, "q", 0)], rows_by_bucket={"q": {7: rows - 1, 8: 1}, "k": {}})
    assert front_matter(write_card(facts))[1]["size_categories"] == [category]


@pytest.mark.slow
def test_1920_heads_stay_within_the_limit_and_load(tmp_path: Path) -> None:
    # All heads of Qwen3-14B, whose file names alone would take 111 kB.
    heads = [
        card_head(layer, kind, head) for layer in range(40) for kind in "qk" for head in range(40 if kind == "q" else 8)
    ]
    assert len(heads) == 1920
    facts = replace(FACTS, heads=heads)
    text, values = front_matter(write_card(facts))
    assert len(text.encode()) < FRONT_MATTER_BYTES
    assert len(values["configs"]) == 1921
    assert values["configs"][0]["default"]
    some = [heads[0], heads[777], heads[-1]]
    write_dataset(tmp_path / "data", facts, some)
    for head in some:
        np.testing.assert_array_equal(loaded(tmp_path / "data", head.name), vectors_of(head))


def test_more_heads_than_fit_load_by_their_files(tmp_path: Path) -> None:
    heads = [
        card_head(layer, kind, head) for layer in range(80) for kind in "qk" for head in range(64 if kind == "q" else 8)
    ]
    facts = replace(FACTS, heads=heads)
    card = write_card(facts)
    text, values = front_matter(card)
    assert len(text.encode()) < FRONT_MATTER_BYTES
    assert [config["config_name"] for config in values["configs"]] == ["l00h00q", "examples"]
    assert "A card cannot list 5,760 heads" in card
    some = [heads[0], heads[-1]]
    root = tmp_path / "data"
    write_dataset(root, facts, some)
    np.testing.assert_array_equal(loaded(root), vectors_of(some[0]))
    for head in some:
        np.testing.assert_array_equal(loaded(root, data_files=head.file), vectors_of(head))
    assert 'load_dataset(root, data_files="l00h00q/data.parquet"' in card
    on_hub = write_card(replace(facts, place=PLACE))
    assert 'load_dataset("me/vectors", data_files="l00h00q/data.parquet"' in on_hub and "cannot list 5,760" in on_hub


@pytest.mark.parametrize("kinds", ["qk", "k"])
def test_the_code_of_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: str) -> None:
    facts = replace(FACTS, heads=[head for head in HEADS if head.kind in kinds])
    root = tmp_path / "data"
    write_dataset(root, facts, facts.heads)
    monkeypatch.chdir(root)
    first = next(head for head in HEADS if head.kind in kinds)
    expected = vectors_of(first)
    number_of_kind = sum(head.kind == first.kind for head in HEADS)

    blocks = re.findall(r"```python\n(.*?)```", Layout(root).card.read_text(), flags=re.DOTALL)
    results = []
    for block in blocks:
        names: dict[str, Any] = {}
        exec(compile(block, "README.md", "exec"), names)
        results.append(names)
    assert len(results) == 5
    folder, pandas, polars, duckdb, pyarrow = results
    for names in (folder, pandas, polars):
        np.testing.assert_array_equal(names["vectors"], expected)
        assert names["vectors"].dtype == np.float32
    assert polars["counts"]["len"].to_list() == [ROWS] * number_of_kind
    assert [row[1:] for row in duckdb["counts"]] == [(7, ROWS)] * number_of_kind
    np.testing.assert_array_equal(np.concatenate(pyarrow["vectors"]), expected)
    assert all(vectors.base is not None for vectors in pyarrow["vectors"])


def test_sections_of_the_card_on_the_hub() -> None:
    """tests/jobs/test_job_on_hub.py runs the code of a card on the Hub."""
    proof = {"proven": True, "tolerance": 0.1, "examples": [7], "largest_difference_by_layer": {"2": 1e-3, "11": 4e-3}}
    on_hub = replace(FACTS, place=PLACE, proof=proof, pictures=["pictures/plasticity_by_bucket.png"])
    card = write_card(on_hub)
    assert "they differ by 0.004 at\nmost, in any layer; up to 0.1 counts as rounding in bfloat16" in card
    assert "![plasticity by bucket](pictures/plasticity_by_bucket.png)" in card
    assert "@misc{some-model-some-texts," in card
    assert "--revision some-model-some-texts --local-dir some-model-some-texts" in card
    unproven = write_card(replace(on_hub, proof={"proven": None, "reason": "turned off"}))
    assert "Not proven: turned off." in unproven
    for heading in ("From the Hub", "## Proof", "## Pictures", "## How to cite"):
        assert heading in card and heading not in write_card(FACTS)


@pytest.mark.slow
def test_1300_heads_are_under_the_limit_on_the_hub() -> None:
    heads = [
        card_head(layer, kind, h) for layer in range(26) for kind in "qk" for h in range(40 if kind == "q" else 10)
    ]
    proof = {"proven": True, "tolerance": 0.1, "examples": [7], "largest_difference_by_layer": {"2": 1e-3}}
    card = write_card(replace(FACTS, heads=heads, place=PLACE, proof=proof))
    assert len(front_matter(card)[1]["configs"]) == 1301 and len(card.encode()) < 100_000


def table(card: str, section: str, number: int = 0) -> list[list[str]]:
    """The cells of the numbered table of a section, below its header."""
    body = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", card, flags=re.DOTALL | re.MULTILINE)
    assert body is not None
    tables = [
        list(group) for is_row, group in itertools.groupby(body[1].splitlines(), lambda s: s.startswith("|")) if is_row
    ]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[number][2:]]


def test_heads_by_layer() -> None:
    heads = [
        card_head(layer, kind, head, 8, 512) if layer < 3 else card_head(layer, kind, head)
        for layer in (0, 1, 2, 5)
        for kind, count in (("q", 4), ("k", 2))
        for head in range(count)
    ]
    heads += [card_head(7, "q", 2), card_head(7, "q", 9)]
    rows = {"q": {7: 18 * ROWS}, "k": {7: 7 * ROWS, 8: ROWS}}
    card = write_card(replace(FACTS, heads=heads, rows_by_bucket=rows))
    assert table(card, "Heads") == [
        ["0-2", "sliding, 512 tokens", "8", "0-3", "0-1"],
        ["5", "full", "4", "0-3", "0-1"],
        ["7", "full", "4", "2, 9", "none"],
    ]
    assert "18 query heads and 8 key heads, 130 rows" in card
    assert "were drawn" not in card
    drawn = with_config(FACTS, capture=CaptureConfig(head_sampling=HeadSamplingConfig(300, 5)))
    assert "were drawn: 300 of the eligible ones (seed 5)" in write_card(drawn)


def test_rows_and_probability_by_bucket() -> None:
    assert table(write_card(FACTS), "Sampling") == [
        ["7", "0 to 254", "0.00392157", "6", "9"],
        ["8", "255 to 510", "0.00390625", "4", "1"],
        ["9", "511 to 999", "0.00195312", "5", "0"],
    ]


def test_many_buckets_share_lines() -> None:
    sampler = SamplerConfig(type="uniform", min_bucket_size=128)
    rows = dict.fromkeys(range(1_024), 2)
    facts = replace(with_config(FACTS, sampler=sampler), longest=131_070, rows_by_bucket={"q": rows, "k": rows})
    lines = table(write_card(facts), "Sampling")
    assert lines[0] == ["0-31", "0 to 4,095", "0.0078125", "64", "64"]
    assert lines[-1] == ["992-1023", "126,976 to 131,069", "0.0078125", "64", "64"]
    assert len(lines) == 32


def test_keys_with_a_sampler_of_their_own_have_a_table_of_their_own() -> None:
    sampler = SamplerConfig(keys=KeySamplerConfig(type="all"))
    facts = replace(with_config(FACTS, sampler=sampler), rows_by_bucket={"q": {7: 6}, "k": {0: 128}})
    card = write_card(facts)
    assert "Sampler: `log_uniform`, base_rate 1 (keys: `all`), min_bucket_size 128, seed 0." in card
    assert table(card, "Sampling", 0)[0] == ["7", "0 to 254", "0.00392157", "6"]
    assert table(card, "Sampling", 1)[0] == ["0", "0 to 127", "1", "128"]


def test_the_sampling_text_follows_the_settings() -> None:
    plain = write_card(FACTS)
    assert "(seed, example_id, layer, kind, position)" in plain and "smallest hashes" not in plain
    sampler = SamplerConfig(share="example", max_rows_per_example=1_500)
    card = write_card(with_config(FACTS, sampler=sampler))
    assert "(seed, example_id, position)" in card and "more than 1,500 are kept" in card


@pytest.mark.parametrize("columns", list(itertools.product([False, True], repeat=4)))
def test_columns_are_those_of_the_schema(columns: tuple[bool, ...]) -> None:
    names = ("segments", "token_ids", "token_strings", "offsets")
    capture = CaptureConfig(**{f"capture_{name}": value for name, value in zip(names, columns, strict=True)})
    lines = table(write_card(with_config(FACTS, capture=capture)), "Columns")
    fields = schema(4, capture)
    assert [name for name, _, _ in lines] == [f"`{field.name}`" for field in fields]
    assert lines[3][1] == "list of 4 float32" and "bfloat16" in lines[3][2]


def test_stage() -> None:
    after = write_card(FACTS)
    before = write_card(with_config(FACTS, capture=CaptureConfig(capture_pre_rope=True)))
    assert ["stage", "after RoPE"] in table(after, "Run") and ["stage", "before RoPE"] in table(before, "Run")
    assert "first apply the layer's rotary embedding" in before
    assert "first apply the layer's rotary embedding" not in after


def test_run_settings() -> None:
    settings = dict(table(write_card(FACTS), "Run"))
    assert settings["model"] == f"`some-org/some-model`, commit `{'a' * 40}`"
    assert settings["examples"] == "20 (3 cut at max_length; 1 left out as empty)"
    assert settings["software"] == "qk-sniffer 0.1.0, torch 2.13.0"
    assert settings["split"] == "test" and "dataset config" not in settings


def test_the_text_is_fixed_by_the_facts_and_has_no_local_path() -> None:
    config = replace(
        CONFIG,
        model=ModelConfig(name="/private/models/my-model"),
        dataset=DatasetConfig(path="/private/texts/a|b.jsonl"),
    )
    local = replace(FACTS, config=resolve(config), model_commit=None, tokenizer_commit=None, dataset_commit=None)
    for facts in (FACTS, local):
        text = write_card(facts)
        assert "private" not in text
        assert write_card(replace(facts, heads=HEADS[::-1], software=dict(reversed(FACTS.software.items())))) == text
    assert "| dataset | `a\\|b.jsonl` |" in write_card(local)


def test_the_card_names_the_dtype_that_computed_that_of_the_checkpoint_and_the_quantization() -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, dtype="auto"))
    card = write_card(replace(FACTS, config=config, checkpoint_dtype="bfloat16"))
    assert "| dtype | bfloat16 |" in card and "quantization" not in card and "auto" not in card
    quantization = {"method": "fp8", "dequantized": True, "config": {}}
    card = write_card(replace(FACTS, dtype="float32", checkpoint_dtype="bfloat16", quantization=quantization))
    assert "| dtype | float32, from a checkpoint in bfloat16 |" in card
    assert "| quantization | fp8, dequantized when they were loaded |" in card
    assert "; float32, widened to float32 |" in card


def card_of(name: str) -> str:
    """The card of a dataset that someone else made, with `name` wherever it may have one."""
    tokenizer = TokenizerConfig(name=name, revision=name)
    model = ModelConfig(name=name, revision=name, dtype=name, attn_implementation=name, config_overrides={name: [name]})
    texts = DatasetConfig(path=name, name=name, revision=name, split=name, text_column=name, id_column=name)
    return write_card(
        replace(
            with_config(FACTS, model=replace(model, tokenizer=tokenizer), dataset=texts, capture=WITH_STATISTICS),
            dtype=name,
            checkpoint_dtype=f"{name}.",
            quantization={"method": name, "dequantized": True, "config": {name: name}},
            model_commit=name,
            tokenizer_commit=name,
            dataset_commit=f"{name}.",
            software={name: name},
            licenses={"model": [name], "dataset": [name]},
            languages=[name],
            proof={"proven": None, "reason": name},
            pictures=[f"pictures/{name}.png"],
            statistics={"tokens": 8_000, "nonfinite": {}},
            place=Place(name, name),
        )
    )


HARMLESS = card_of("name")


@pytest.mark.slow
@given(names)
@example(TERMINAL)
@example("a\n```\n# b")
@example("a |\n\n<script>")
@with_settings(max_examples=25, deadline=None)
def test_names_of_someone_else_stay_in_their_places(name: str) -> None:
    card = card_of(name)
    assert skeleton(card.partition("\n---\n")[2]) == skeleton(HARMLESS.partition("\n---\n")[2])
    assert card.replace("\n", "").isprintable()
    _, values = front_matter(card)
    assert values.keys() == front_matter(HARMLESS)[1].keys()
    assert values["source_datasets"] == [printable(name)] and values["language"] == [printable(name)]
    for block in re.findall(r"^```python\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE):
        compile(block, "README.md", "exec")
    (loaded,) = {line for line in card.splitlines() if line.startswith("stream = ")}
    calls = ast.walk(ast.parse(loaded))
    assert {node.value for node in calls if isinstance(node, ast.Constant)} >= {name}


def test_terms_of_sources_that_are_not_known_are_left_out(root: Path) -> None:
    before = write_card(CardFacts.of(manifests.read(root)))
    edit(root, lambda manifest: manifest["stated"].update(unknown="terms"))
    assert write_card(CardFacts.of(manifests.read(root))) == before
