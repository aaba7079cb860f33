"""A folder that is swapped for that of another dataset, and swapped back, does not mix the two."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.export_cases import statistics

import qk_sniffer
from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.errors import StoreError
from qk_sniffer.report.unchanged import Unchanged
from qk_sniffer.report.vectors import Sample
from qk_sniffer.store import disk, files
from qk_sniffer.store.files import Comparison

READS: dict[str, Callable[[Dataset], object]] = {
    "statistics": lambda dataset: dataset.statistics(0, "q", "post"),
    "summaries": lambda dataset: dataset.attention_summary(0, 0),
    "examples": lambda dataset: dataset.examples,
    "vectors": lambda dataset: dataset.vectors(0, 0, "q", intact=True),
    "copy": lambda dataset: dataset.torch(["l00h00q"]),
}


@pytest.fixture
def swap(undisturbed: Callable[..., Path], tmp_path: Path) -> Callable[[], None]:
    """Swaps the folder `here` with that of a dataset of the same texts and shapes, but of other numbers."""
    capture = statistics() | {"attention": {"enabled": True}}
    for name, dtype in (("here", "float32"), ("other", "bfloat16")):
        shutil.copytree(undisturbed(capture=capture, verify={"examples": 0}, model={"dtype": dtype}), tmp_path / name)
    here, other, aside = (tmp_path / name for name in ("here", "other", "aside"))

    def swapped() -> None:
        here.rename(aside)
        other.rename(here)
        aside.rename(other)

    return swapped


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_no_file_is_read_that_was_not_compared(
    read: Callable[[Dataset], object], swap: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, intact = qk_sniffer.open_dataset(tmp_path / "here"), Comparison.intact

    @contextmanager
    def swapped(*args: Any, **options: Any) -> Iterator[Path]:
        with intact(*args, **options) as path:
            swap()
            try:
                yield path
            finally:
                swap()

    # A file of another size is refused by it: the size is not what this test is about.
    monkeypatch.setattr("qk_sniffer.dataset.dataset_files.difference", lambda *_: None)
    monkeypatch.setattr(Comparison, "intact", swapped)
    with pytest.raises(StoreError, match="was changed while it was read"):
        read(dataset)
    monkeypatch.setattr(Comparison, "intact", intact)
    read(dataset)


def test_a_dataset_that_has_been_replaced_is_not_read_further(
    swap: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = qk_sniffer.open_dataset(tmp_path / "here")
    monkeypatch.setattr("qk_sniffer.dataset.dataset_files.difference", lambda *_: None)
    queries = dataset.vectors(0, 0, "q").vectors
    swap()
    with pytest.raises(StoreError, match=r"another dataset has replaced the one in .*here since it was opened"):
        dataset.vectors(0, 0, "k")
    assert (qk_sniffer.open_dataset(tmp_path / "here").vectors(0, 0, "q").vectors != queries).any()
    swap()
    manifest = tmp_path / "here" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes())  # as a copy of the same dataset does
    assert (dataset.vectors(0, 0, "q").vectors == queries).all()
    manifest.unlink()  # as a job does first
    with pytest.raises(StoreError, match=r"manifest\.json"):
        dataset.vectors(0, 0, "k")


def test_a_part_of_a_file_is_not_read_from_another_dataset(
    swap: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, vectors = qk_sniffer.open_dataset(tmp_path / "here"), Dataset.vectors

    def swapped(*args: Any, **options: Any) -> Any:
        swap()
        try:
            return vectors(*args, **options)
        finally:
            swap()

    monkeypatch.setattr("qk_sniffer.dataset.dataset_files.difference", lambda *_: None)
    monkeypatch.setattr("qk_sniffer.report.vectors.MOST_BYTES", 4096)
    sample = Sample(dataset, Unchanged(dataset))
    whole = sample.vectors(dataset.heads[0], 16)
    monkeypatch.setattr(Dataset, "vectors", swapped)
    with pytest.raises(StoreError, match="was changed while it was read"):
        sample.vectors(dataset.heads[0], 16)
    monkeypatch.setattr(Dataset, "vectors", vectors)
    assert (sample.vectors(dataset.heads[0], 16).vectors == whole.vectors).all()


def test_the_file_that_is_compared_is_the_one_whose_state_counts(
    swap: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, digest_of = qk_sniffer.open_dataset(tmp_path / "here"), disk.digest_of

    def swapped(file: Any) -> str:
        digest = digest_of(file)
        swap()  # from here on, the path is that of the other dataset
        return digest

    monkeypatch.setattr(files, "digest_of", swapped)
    with pytest.raises(StoreError, match="was changed while it was read"):
        dataset.statistics(0, "q", "post")
