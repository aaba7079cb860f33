"""The data dictionary names every column, array and field of a dataset, with its type, and no other."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.jobs import run, write_texts

from qk_sniffer.config import AttentionConfig, CaptureConfig, Config
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.forms import Manifest
from qk_sniffer.store.layout import examples_schema, schema
from qk_sniffer.store.statistics_file import FIELDS

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")

OPEN = ("config", "fingerprint", "model.quantization.config", "model.rotary.rope_parameters", "model.rotary.embeddings")
"""Fields whose content is not ours to list: settings have a page of their own, the others are in other words."""

UNTIL_PROMOTED = {"job_id", "replaces", "replaces.*", "sha256"}
"""Fields that no finished dataset has."""

ALL_COLUMNS = CaptureConfig(
    capture_segments=True,
    capture_token_ids=True,
    capture_token_strings=True,
    capture_offsets=True,
    attention=AttentionConfig(enabled=True),
)


def rows(section: str) -> dict[str, list[str]]:
    """Returns the other cells of each name in the tables of a section."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert text is not None
    lines = (line.strip("| ").split(" | ") for line in text[1].splitlines() if line.startswith("| `"))
    return {name: cells for first, *cells in lines for name in re.findall(r"`([^`]+)`", first)}


def columns(found: pa.Schema) -> dict[str, str]:
    """Returns the types by column, as the page writes them."""
    return {field.name: type_name(field.type) for field in found}


def type_name(found: pa.DataType) -> str:
    if pa.types.is_dictionary(found):
        return type_name(found.value_type)
    if pa.types.is_fixed_size_list(found):
        return f"list of {type_name(found.value_type)}"
    return {"float": "float32"}.get(str(found), str(found))


def test_columns_of_vectors() -> None:
    assert {name: cells[0] for name, cells in rows("Vectors").items()} == columns(schema(1, ALL_COLUMNS))


def test_columns_of_examples() -> None:
    expected = columns(examples_schema(split=True, segments=True, from_python=True))
    assert {name: cells[0] for name, cells in rows("Examples").items()} == expected


def test_columns_of_attention_summaries() -> None:
    table = AttentionTable.of(Config(capture=ALL_COLUMNS))
    assert table is not None
    assert {name: cells[0] for name, cells in rows("Attention summaries").items()} == columns(table.schema)


def test_arrays_of_statistics() -> None:
    assert {*rows("Statistics")} == {*FIELDS}


def fields(form: Any, path: str) -> Iterator[str]:
    """Yields the fields of a form by their paths, as the page writes them."""
    if path in OPEN:
        yield path
    elif get_origin(form) in (Annotated, NotRequired):
        yield from fields(get_args(form)[0], path)
    elif get_origin(form) in (Union, UnionType):
        for one in get_args(form):
            yield from fields(one, path) if is_typeddict(one) else [path]
    elif get_origin(form) is dict:
        yield from fields(get_args(form)[1], f"{path}.*")
    elif get_origin(form) is list and is_typeddict(get_args(form)[0]):
        yield from fields(get_args(form)[0], f"{path}[]")
    elif is_typeddict(form):
        for name, each in get_type_hints(form, include_extras=True).items():
            yield from fields(each, f"{path}.{name}".lstrip("."))
    else:
        yield path


def values(value: Any, path: str, names: set[str]) -> Iterator[str]:
    """Yields the paths of the values in a manifest, with `*` for the keys that `names` does not list."""
    if path in OPEN or not value or not isinstance(value, dict | list):
        yield path
    elif isinstance(value, list):
        for each in value:
            yield from values(each, f"{path}[]" if isinstance(each, dict) else path, names)
    else:
        for key, each in value.items():
            inner = f"{path}.{key}".lstrip(".")
            is_listed = any(name == inner or name.startswith((f"{inner}.", f"{inner}[")) for name in names)
            yield from values(each, inner if is_listed else f"{path}.*", names)


def with_parents(paths: set[str]) -> set[str]:
    """Returns the paths, and those of the values that hold theirs."""
    return paths | {path[: place.start()] for path in paths for place in re.finditer(r"\.|\[\]", path)}


def test_fields_of_the_manifest_are_those_of_its_form() -> None:
    expected = set(fields(Manifest, "")) - UNTIL_PROMOTED
    listed = {*rows("Manifest")} - {"model.rotary.rope_parameters", "model.rotary.embeddings"}
    assert listed - with_parents(expected) == set(), "the page has what no manifest has"
    assert expected - listed == set(), "the page lacks fields"


@pytest.fixture(scope="module")
def dataset(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with every optional part that its texts can give."""
    folder = tmp_path_factory.mktemp("data")
    return run(
        checkpoint,
        write_texts(folder / "texts.jsonl"),
        folder / "out",
        capture={
            "attention": {"enabled": True},
            "statistics": {"enabled": True, "stages": ["pre", "post"]},
            "capture_values": True,
            "capture_outputs": True,
            "capture_token_strings": True,
        },
        dataset={"id_column": "id", "max_samples": 4},
        sampler={"type": "uniform"},
    )


@pytest.mark.slow
def test_a_manifest_has_no_other_fields(dataset: Path) -> None:
    listed = {*rows("Manifest")}
    found = set(values(json.loads((dataset / "manifest.json").read_text()), "", listed))
    assert found - with_parents(listed) == set()
    assert {"model.rotary.rope_parameters", "model.rotary.embeddings", "proof.largest_difference_by_layer.*"} <= found


@pytest.mark.slow
def test_the_metadata_of_a_file(dataset: Path) -> None:
    found = {key.decode() for key in pq.read_schema(dataset / "l00h00q" / "data.parquet").metadata}
    sentence = re.search(r"^The key-value metadata.*?\n\n", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert sentence is not None
    named = {*re.findall(r"`(\w+)`", sentence[0])}
    assert found - {"ARROW:schema"} == named - {"adapter", "adapter_revision"}
