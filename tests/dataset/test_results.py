"""The results of the reader in a notebook: data frames, arrays for torch, and reprs."""

import builtins
import shutil
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars
import pyarrow as pa
import pytest
import torch
from support.jobs import run
from support.segmented import COLUMNS, write

import qk_sniffer
from qk_sniffer.errors import QkSnifferError, StoreError

HEAD = (0, 1, "q")


@pytest.fixture(scope="module")
def dataset(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> qk_sniffer.Dataset:
    folder = tmp_path_factory.mktemp("results")
    capture: dict[str, Any] = {
        "capture_segments": True,
        "layers": [0, 1],
        "heads": [1],
        "attention": {"enabled": True},
        "statistics": {"enabled": True, "stages": ["pre", "post"]},
    }
    texts = write(folder / "texts.jsonl", 4)
    return qk_sniffer.open_dataset(run(checkpoint, texts, folder / "made", dataset=COLUMNS, capture=capture))


@pytest.mark.slow
def test_data_frames_have_the_rows_of_the_table(dataset: qk_sniffer.Dataset) -> None:
    table = dataset.table(*HEAD, position=range(9))
    frame, other = dataset.to_pandas(*HEAD, position=range(9)), dataset.to_polars(*HEAD, position=range(9))
    assert isinstance(frame, pandas.DataFrame) and isinstance(other, polars.DataFrame)
    assert [*frame.columns] == other.columns == table.column_names
    assert frame["segment"].dtype == "category" and frame["segment"].tolist() == table["segment"].to_pylist()
    np.testing.assert_array_equal(np.stack(frame["vector"].to_list()), dataset.vectors(*HEAD, position=range(9))[0])
    assert other["vector"].dtype == polars.Array(polars.Float32, 16)
    assert other.drop("segment").equals(polars.DataFrame(table.drop_columns("segment")))
    assert dataset.to_polars(*HEAD, ["position"])["position"].to_list() == dataset.vectors(*HEAD).positions.tolist()
    assert [*dataset.to_pandas(*HEAD, ["bucket"], example_id=2).columns] == ["bucket"]


def test_data_frames_of_vectors_and_summaries(dataset: qk_sniffer.Dataset) -> None:
    rows = dataset.vectors(*HEAD)
    expected = dataset.table(*HEAD, ["example_id", "position", "vector"])
    assert rows.to_polars().equals(polars.DataFrame(expected))
    pandas.testing.assert_frame_equal(rows.to_pandas(), expected.to_pandas())
    empty = dataset.vectors(*HEAD, position=10_000)
    assert empty.to_pandas().shape == empty.to_polars().shape == (0, 3)
    summary = dataset.attention_summary(0, 1)
    frame = summary.to_pandas()
    np.testing.assert_array_equal(frame["position"], summary.positions)
    np.testing.assert_array_equal(np.stack(frame["top_weight"].to_list()), summary.top_weight)
    assert len(frame.columns) == len(fields(summary)) and summary.to_polars().columns == [*frame.columns]


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_a_missing_package_is_named(package: str, dataset: qk_sniffer.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for made in (dataset, dataset.vectors(*HEAD), dataset.attention_summary(0, 1)):
        arguments = HEAD if made is dataset else ()
        with pytest.raises(QkSnifferError, match=f"needs {package}, which is not installed: pip install {package}"):
            getattr(made, f"to_{package}")(*arguments)


def test_arrays_are_writable_and_torch_does_not_warn(dataset: qk_sniffer.Dataset) -> None:
    logits, attention = dataset.logits(0, 1, 2), dataset.attention(0, 1, 2)
    summary, statistics = dataset.attention_summary(0, 1), dataset.statistics(0, "q", "pre")
    arrays = [*dataset.vectors(*HEAD), *dataset.vectors(*HEAD, example_id=1)]
    for result in (logits, attention, summary, statistics):
        values = (getattr(result, field.name) for field in fields(result))
        arrays += [value for value in values if isinstance(value, np.ndarray)]
    assert len(arrays) > 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for array in arrays:
            assert array.flags.writeable
            torch.from_numpy(array)
    names = dataset.segments(*HEAD)
    assert names.flags.writeable
    dataset.vectors(*HEAD).vectors[:] = 0
    assert dataset.vectors(*HEAD).vectors.any()


def test_reprs_tell_what_there_is(dataset: qk_sniffer.Dataset) -> None:
    rows = dataset.vectors(*HEAD)
    tokens = dataset.manifest["tokens"]
    assert repr(dataset) == (
        f"<Dataset {dataset.folder}: {4 * tokens:,} rows of 4 examples, 4 heads (q, k of layers 0-1), "
        "attention summaries, statistics (pre, post)>"
    )
    last = max(dataset.examples["num_tokens"].to_pylist()) - 1
    assert repr(rows) == f"<HeadVectors: {tokens} rows of 4 examples, positions 0-{last}, 16 numbers in each>"
    assert repr(dataset.vectors(*HEAD, position=[])) == "<HeadVectors: 0 rows of 0 examples, 16 numbers in each>"
    length = dataset.examples["num_tokens"][2].as_py()
    pairs = f"{length} stored queries, positions 0-{length - 1}, x {length} stored keys, positions 0-{length - 1}"
    assert repr(dataset.logits(0, 1, 2)) == f"<Logits: {pairs}>"
    assert repr(dataset.attention(0, 1, 2)) == f"<Attention: {pairs}>"
    assert repr(dataset.attention_summary(0, 1)) == (
        f"<AttentionSummary: {tokens} rows of 4 examples, positions 0-{last}, 13 bins of distances, 8 top keys>"
    )
    of_tokens = f"mean, covariance and ranges of 16 numbers over {tokens} tokens"
    assert repr(dataset.statistics(0, "k", "post")) == f"<Statistics of head 0: {of_tokens}>"
    assert repr(dataset.statistics(0, "q", "pre")) == f"<Statistics of head 1: {of_tokens}, 8 rotary frequencies>"
    assert repr(dataset.heads[0]) == "HeadKey(layer=0, head=1, kind='q')"


def test_the_stage_is_named_where_there_are_two(dataset: qk_sniffer.Dataset) -> None:
    with pytest.raises(StoreError, match="statistics of the stages pre, post: name one"):
        dataset.statistics(0, "q")


def test_the_path_in_a_repr_is_printable(dataset: qk_sniffer.Dataset, tmp_path: Path) -> None:
    assert dataset.folder is not None
    copy = shutil.copytree(dataset.folder, tmp_path / "a\nb")
    assert "\n" not in repr(qk_sniffer.open_dataset(copy))


def test_tables_stay_tables_of_pyarrow(dataset: qk_sniffer.Dataset) -> None:
    assert isinstance(dataset.table(*HEAD, position=0), pa.Table)
