"""No job and no program writes where another dataset has its files, or replaces a file that no manifest lists."""

import json
from pathlib import Path

import pytest
from support.store_cases import Captured, file_bytes, make_dataset

import qk_sniffer
from qk_sniffer.errors import StoreError
from qk_sniffer.export.write import export
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.plasticity.results import Results
from qk_sniffer.store.layout import Layout, is_ours
from qk_sniffer.store.output_folder import claimed_folder
from qk_sniffer.store.places import listed_files, refuse_inside, refuse_unlisted
from qk_sniffer.store.work_folder import prepare_data_root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset in which nothing is written."""
    root = tmp_path_factory.mktemp("dataset") / "root"
    make_dataset(root, Captured(num_examples=4))
    return root


@pytest.mark.parametrize(
    "place",
    [
        *(".qk_sniffer", ".qk_sniffer/other", ".qk_sniffer/a/b", "l00h00q/other", "l00h00q", "l77h00k/x", "examples/x"),
        *("statistics", "pictures/x/y", "README.md", "manifest.json", "l00h00q/data.parquet"),
    ],
)
def test_a_place_inside_of_a_dataset_is_refused_with_its_data_root(place: str, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(dataset)
    for root in (dataset, tmp_path / "link", dataset / "x" / ".."):
        with pytest.raises(StoreError, match=rf"{dataset}.*; choose another output_dir"):
            refuse_inside(root / place, "output_dir")


def test_other_places_are_allowed(dataset: Path, tmp_path: Path) -> None:
    for place in ("other", "plasticity/results", "l00h00q.bak", "notes.md", "../l00h00q", "l00h00q-heads/x"):
        refuse_inside(dataset / place, "output_dir")
    refuse_inside(dataset, "output_dir")
    (tmp_path / "examples").mkdir()
    (tmp_path / "README.md").touch()
    refuse_inside(tmp_path / "examples" / "x", "output_dir")  # no dataset


def test_no_program_writes_into_a_work_folder_or_a_head(dataset: Path) -> None:
    before = file_bytes(dataset)
    opened = qk_sniffer.open_dataset(dataset)
    for place in (dataset / ".qk_sniffer" / "x", dataset / "l00h00q" / "x"):
        for write in (
            lambda place: prepare_data_root(place),
            lambda place: Results(place).claim().__enter__(),
            lambda place: claimed_folder(place, "testing", is_own=lambda _: True, is_default=False).__enter__(),
            lambda place: export(opened, "triattention", place, overwrite=True),
            lambda place: opened.torch([(0, 0, "q")], place),
        ):
            with pytest.raises(StoreError, match=rf"{dataset}.*; choose another (output|cache)"):
                write(place)
    assert file_bytes(dataset) == before and not (dataset / ".qk_sniffer").exists()


def test_a_staged_version_is_not_finalized(tmp_path: Path) -> None:
    make_dataset(tmp_path / ".qk_sniffer" / "staging", Captured(num_examples=4))
    with pytest.raises(StoreError, match=rf"the work folder of the data root {tmp_path}"):
        finalize(tmp_path / ".qk_sniffer" / "staging")


def test_what_a_manifest_lists(dataset: Path, tmp_path: Path) -> None:
    files = {*file_bytes(dataset)}
    assert listed_files(Layout(dataset)) == files
    manifest = json.loads((dataset / "manifest.json").read_text())
    for change, expected in (
        ({"proof": 1, "examples": None}, files),  # no reader accepts it
        ({"files": dict.fromkeys(["../x", "/etc/passwd", "notes.txt", "README.md", "l00h00q/../x"])}, {"README.md"}),
        ({"files": 3}, set()),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
        assert listed_files(Layout(tmp_path)) == expected | {"manifest.json"}
    for text in ("", "[]", '{"format": "other", "files": {"README.md": {}}}'):
        (tmp_path / "manifest.json").write_text(text)
        assert listed_files(Layout(tmp_path)) == set()


def test_what_no_manifest_lists_is_named(dataset: Path, tmp_path: Path) -> None:
    refuse_unlisted(Layout(dataset))
    refuse_unlisted(Layout(tmp_path))
    for name in ("notes.txt", "l00h00q/notes.txt", "statistics/x.txt", "pictures/norms.png", "examples.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    refuse_unlisted(Layout(tmp_path))
    names = ("README.md", "manifest.json", "l00h00q/data.parquet", "examples/data.parquet")
    for name in (*names, "statistics/layer-00.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        with pytest.raises(StoreError, match=rf"holds {name}, which no dataset .* move it away, or choose another"):
            refuse_unlisted(Layout(tmp_path))
        (tmp_path / name).unlink()


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(
        StoreError, match=r"manifest\.json is not JSON .*; choose another output\.data_root, or empty it"
    ):
        prepare_data_root(tmp_path, overwrite=True)


def test_a_work_folder_is_that_of_a_job(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    for make in (lambda work: work.touch(), lambda work: work.mkdir(), lambda work: (work / "notes.txt").touch()):
        make(tmp_path / ".qk_sniffer")
        assert not is_ours(Layout(tmp_path))
        with pytest.raises(StoreError, match=r"not empty and not a dataset of qk-sniffer \(it holds .*thesis\.tex"):
            prepare_data_root(tmp_path, overwrite=True)
        if (tmp_path / ".qk_sniffer").is_file():
            (tmp_path / ".qk_sniffer").unlink()
    for name in ("job.json", "finalize.lock", "unpublished.json"):
        (tmp_path / ".qk_sniffer" / name).touch()
        assert is_ours(Layout(tmp_path))
        (tmp_path / ".qk_sniffer" / name).unlink()
