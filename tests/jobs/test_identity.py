"""The settings and the code that decide vectors belong to a job's identity; the places where it runs do not."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support.jobs import captured_only, run, stopped_after, write_texts

from qk_sniffer import resolved
from qk_sniffer.config import ModelConfig, TokenizerConfig, from_dict
from qk_sniffer.errors import ConfigError, SourceError, StoreError
from qk_sniffer.jobs import capture_examples
from qk_sniffer.jobs import run as run_module
from qk_sniffer.jobs.identity import ROLES, Job, unchanged_files
from qk_sniffer.jobs.loaded_code import check_code, class_and_code, code_of
from qk_sniffer.resolved import fingerprint, public_files, resolve
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store import stored
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.record import read_record, write_record

SECTIONS: dict[str, Any] = {
    "dataset": {"max_samples": 4},
    "capture": {"layers": [0], "heads": [0]},
    "inference": {"batch_size": 2, "lookahead": 4},
    "verify": {"examples": 0},
}
REMOTE = SECTIONS | {"model": {"trust_remote_code": True}}


def test_a_job_is_not_resumed_with_the_code_of_another_class(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    stopped_after(1, checkpoint, texts, root, **REMOTE)
    with pytest.raises(StoreError, match=r"trust_remote_code: true there, false now(.|\n)*trust_remote_code=true"):
        run(checkpoint, texts, root, **SECTIONS)
    run(checkpoint, texts, root, **REMOTE)
    assert manifests.read(root)["fingerprint"]["model.trust_remote_code"] is True


@pytest.mark.parametrize("role", ROLES)
def test_a_folder_that_appears_is_not_loaded_for_a_repository(role: str, in_tmp: Path) -> None:
    """Loaders take a folder of the name, and the identity would name the commit of the Hub."""
    names = {other: f"org/{other}" for other in ROLES}
    model = ModelConfig(
        name=names["model"], adapter=names["adapter"], tokenizer=TokenizerConfig(name=names["tokenizer"])
    )
    commits: dict[str, str | None] = dict.fromkeys(ROLES, "a" * 40)
    folder = in_tmp / names[role]
    with unchanged_files(model, commits) as files:
        assert files == {}
    match = rf"the {role} org/{role} is a repository of the Hub, and there is {folder} by now"
    with pytest.raises(SourceError, match=match), unchanged_files(model, commits):
        folder.mkdir(parents=True)
    with pytest.raises(SourceError, match=match), unchanged_files(model, commits):
        raise AssertionError("nothing is loaded")


def test_earlier_versions_have_it_among_the_settings_only() -> None:
    for trusted in (True, False):
        config = from_dict({"model": {"name": "org/model", "trust_remote_code": trusted}, "dataset": {"path": "pydoc"}})
        now = fingerprint(resolve(config))
        earlier = {key: value for key, value in now.items() if key != "model.trust_remote_code"}
        record = {"fingerprint": earlier, "config": config.to_dict(), "commits": {}, "versions": {}}
        assert Job.from_record(record).fingerprint == now


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("sampler.seed", {"sampler": {"type": "uniform", "seed": 9}}),
        ("capture.capture_pre_rope", {"capture": {"layers": [1], "capture_pre_rope": True}}),
        ("model.tokenizer.max_length", {"model": {"tokenizer": {"max_length": 30}}}),
        ("model.config_overrides", {"model": {"config_overrides": {"rms_norm_eps": 0.1}}}),
    ],
)
def test_a_setting_that_a_fingerprint_lacks_is_that_of_the_config(
    key: str, sections: dict[str, Any], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    """Its default would have a job of default settings add its rows to a received dataset of others."""
    root = tmp_path / "out"
    run(checkpoint, texts, root, **sections, dataset={"max_samples": 2})
    manifest = manifests.read(root)
    assert manifest["fingerprint"].pop(key) is not None
    Layout(root).manifest.write_text(json.dumps(manifest))
    plain: dict[str, Any] = {"sampler": {"type": "uniform"}} if "sampler" in sections else {}
    with pytest.raises(StoreError, match=rf"{re.escape(key)}: (.|\n)*there, .* now"):
        run(checkpoint, texts, root, **plain)


@pytest.mark.parametrize("key", ["decoder", "attn_implementation"])
def test_a_job_is_not_resumed_with_another_class_or_kernel(
    key: str, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    stopped_after(1, checkpoint, texts, root, **SECTIONS)
    job_id = (read_record(Layout(root)) or {})["job_id"]
    real = run_module.record_of

    def other(*args: Any) -> dict[str, Any]:
        record = real(*args)
        return record | {"model": record["model"] | {key: "other"}}

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "record_of", other)
        with pytest.raises(StoreError, match=rf"{key} of the model: '[\w.]+' there, 'other' now"):
            run(checkpoint, texts, root, **SECTIONS)
        stopped_after(0, checkpoint, texts, root, **SECTIONS, output={"overwrite": True})
    assert (read_record(Layout(root)) or {})["job_id"] != job_id


def test_code_that_no_library_pins_has_a_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert class_and_code(Layout) == "qk_sniffer.store.layout.Layout"
    monkeypatch.syspath_prepend(tmp_path)
    names = []
    for value in (1, 2, 1):
        (tmp_path / "my_code.py").write_text(f"class Mine:\n    value = {value}\n")
        sys.modules.pop("my_code", None)
        names.append(class_and_code(__import__("my_code").Mine))
    sys.modules.pop("my_code")
    assert names[0] == names[2] != names[1]
    assert names[0].startswith("Mine (sha256 of its code: ")


def test_the_digest_covers_the_modules_that_the_code_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("import numpy, my_other\nfrom my_package.steps import step\n")
    (package / "steps.py").write_text("def step(): return 1\n")
    (package / "fam.py").write_text("import json, numpy, my_package\nclass Mine:\n    pass\n")
    (tmp_path / "my_other.py").write_text("import my_package\nFACTOR = 1\n")
    names = []
    for file in (None, "my_package/steps.py", "my_other.py"):
        if file is not None:
            (tmp_path / file).write_text((tmp_path / file).read_text().replace("1", "2"))
        for module in [name for name in sys.modules if name.startswith("my_")]:
            sys.modules.pop(module)
        importlib.invalidate_caches()
        names.append(class_and_code(importlib.import_module("my_package.fam").Mine))
    assert len({*names}) == 3


def test_the_digest_covers_what_a_function_imports_when_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "later.py").write_text("from . import deep\nFACTOR = 1\n")
    (package / "deep.py").write_text("def scale(): import my_late; return 1\n")
    (tmp_path / "my_late.py").write_text("try: import not_installed.at_all\nexcept ImportError: FACTOR = 1\n")
    (package / "fam.py").write_text("class Mine:\n    def scaled(self):\n        from .later import FACTOR\n")
    names = []
    for file in (None, "my_package/later.py", "my_package/deep.py", "my_late.py"):
        if file is not None:
            (tmp_path / file).write_text((tmp_path / file).read_text().replace("1", "2"))
        for module in [name for name in sys.modules if name.startswith("my_")]:
            sys.modules.pop(module)
        importlib.invalidate_caches()
        kind = importlib.import_module("my_package.fam").Mine
        names.append(class_and_code(kind))
        assert not {"my_package.later", "my_package.deep", "my_late"} & {*sys.modules}, "nothing is imported for it"
        assert {path.name for path in code_of(kind)} == {"fam.py", "later.py", "__init__.py", "deep.py", "my_late.py"}
    assert len({*names}) == 4
    code = code_of(kind)
    check_code(code)
    (package / "later.py").write_text("FACTOR = 3\n")
    with pytest.raises(SourceError, match=r"my_package/later\.py has changed since the job loaded its code"):
        check_code(code)


FAMILY = "from qk_sniffer.families import Family\nclass Mine(Family):\n    def other(self):\n        import my_helper\n"


def test_a_job_whose_code_changes_while_it_runs_ends(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_family.py").write_text(FAMILY)
    (tmp_path / "my_helper.py").write_text("FACTOR = 1\n")
    sections = SECTIONS | {"model": {"family": "my_family:Mine"}}
    with monkeypatch.context() as patch:
        real = capture_examples.check_code

        def changed(code: Any) -> None:
            (tmp_path / "my_helper.py").write_text("FACTOR = 2\n")
            real(code)

        patch.setattr(capture_examples, "check_code", changed)
        with pytest.raises(SourceError, match=r"my_helper\.py has changed since the job loaded its code"):
            run(checkpoint, texts, tmp_path / "out", **sections)
    with pytest.raises(StoreError, match=r"what was loaded for it differs:\n  - family of the model: 'Mine \(sha256"):
        run(checkpoint, texts, tmp_path / "out", **sections)
    (tmp_path / "my_helper.py").write_text("FACTOR = 1\n")
    run(checkpoint, texts, tmp_path / "out", **sections)


@pytest.mark.slow
def test_a_dataset_is_not_added_to_with_other_code(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run(checkpoint, texts, tmp_path / "out", dataset={"max_samples": 2}, verify={"examples": 0})
    real = run_module.record_of
    other_code = "Mine (sha256 of its code: 12)"
    for part, key, code in (
        ("model", "family", other_code),
        ("tokenizer", "class", other_code),
        ("model", "family", "renamed.in.a.newer.Version"),
    ):

        def other(*args: Any, part: str = part, key: str = key, code: str = code) -> dict[str, Any]:
            record = real(*args)
            return record | {part: record[part] | {key: code}}

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "record_of", other)
            if "sha256" in code:
                with pytest.raises(StoreError, match=f"is a finished dataset of other code: {key} of the {part}: "):
                    run(checkpoint, texts, root, verify={"examples": 0})
            else:
                run(checkpoint, texts, root, verify={"examples": 0})


def test_no_path_of_this_machine_is_published(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "private-folder-of-alice"
    folder.mkdir()
    file = write_texts(folder / "t.jsonl")
    root = run(
        checkpoint, folder, tmp_path / "out", **SECTIONS | {"dataset": {"data_files": str(file), "max_samples": 4}}
    )
    manifest = manifests.read(root)
    assert manifest["config"]["dataset"]["data_files"] == "t.jsonl" == manifest["fingerprint"]["dataset.data_files"]
    for name in ("manifest.json", "README.md"):
        assert str(tmp_path) not in (root / name).read_text()


def test_a_job_of_an_earlier_version_that_stored_a_path_is_resumed_and_does_not_publish_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, root = write_texts(tmp_path / "t.jsonl"), tmp_path / "out"
    sections = SECTIONS | {"dataset": {"data_files": str(file), "max_samples": 4}}
    with monkeypatch.context() as patch:
        patch.setattr(resolved, "public_files", lambda names: names)
        captured_only(checkpoint, tmp_path / ".", root, monkeypatch, **sections)
    assert str(tmp_path) in (read_record(Layout(root)) or {})["fingerprint"]["dataset.data_files"]
    run(checkpoint, tmp_path / ".", root, **sections)
    assert str(tmp_path) not in (root / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("names", "public"),
    [
        (None, None),
        ("*.jsonl", "*.jsonl"),
        ("data/*.jsonl", "data/*.jsonl"),
        ("/home/alice/data/*.jsonl", "*.jsonl"),
        ("~/data/x.jsonl", "x.jsonl"),
        ("../alice/x.jsonl", "x.jsonl"),
        (["/a/x.jsonl", "y.jsonl"], ["x.jsonl", "y.jsonl"]),
        ({"train": ["/a/x.jsonl"]}, {"train": ["x.jsonl"]}),
        ("https://alice:secret@host/bucket/x.parquet?X-Amz-Signature=secret", "x.parquet"),
        ("s3://bucket-of-alice/x.parquet", "x.parquet"),
        ("zip://inside/*.jsonl::/home/alice/x.zip", "zip://inside/*.jsonl::x.zip"),
        ("https://host/data/x.jsonl.gz#secret", "x.jsonl.gz"),
        ("HTTP://alice:secret@[::1]:80/data/*.csv?secret", "*.csv"),
        ("http://alice:secret@host?x=a.jsonl", "address"),
        ("https://host/dl/secret/?file=a.jsonl", "address"),
        ("https://host/secret", "address"),
        ("https://host/a.jsonl;sig=secret", "address"),
        ("https://host/dl/sig=secret.jsonl", "address"),
        ("https://secret.jsonl", "address"),
        ("http://alice:secret@[::1]/secret/?x", "address"),
        ("http:/alice:secret@host/a.jsonl", "a.jsonl"),
        ("http://alice:sec/ret@a.jsonl", "address"),
        ("zip://a.jsonl::https://alice:secret@host/a.zip?secret", "zip://a.jsonl::a.zip"),
        ("simplecache::https://host/x?token=secret::y", "simplecache::address"),
        ("hf://datasets/org/name/x.parquet", "hf://datasets/org/name/x.parquet"),
    ],
)
def test_names_of_files_as_they_are_published(names: Any, public: Any) -> None:
    assert public_files(names) == public == public_files(public)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("inference", {"max_batch_tokens": 2**60}),
        ("inference", {"batch_size": 2**60}),
        ("sampler", {"type": "uniform", "base_rate": 1e16}),
        ("sampler", {"max_rows_per_example": 2**60}),
        ("dataset", {"max_samples": 2**60}),
        ("model", {"slug": "a" * 600}),
    ],
)
def test_values_that_no_reader_takes_are_refused_before_anything_is_loaded(
    section: str, values: dict[str, Any], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.{[*values][-1]} "):
        run(checkpoint, texts, tmp_path / "out", **{section: values})


def test_a_record_that_no_reader_takes_is_not_written(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    stopped_after(0, checkpoint, texts, root, **SECTIONS)
    record, before = read_record(Layout(root)), Layout(root).job_file.read_bytes()
    assert record is not None
    for key, value in (("versions", {"torch": "1" * 20_000}), ("source_rows", 2**60), ("base", {})):
        with pytest.raises(StoreError, match=rf"cannot be stored in .*job\.json: it is not understood .*{key}"):
            write_record(Layout(root), record | {key: value})
    monkeypatch.setattr("qk_sniffer.store.record.LARGE", 100)
    with pytest.raises(StoreError, match="over 100"):
        write_record(Layout(root), record)
    assert Layout(root).job_file.read_bytes() == before


def test_a_record_that_adds_to_no_repository_of_the_hub_is_replaced(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    root = tmp_path / "out"
    stopped_after(0, checkpoint, texts, root, **SECTIONS)
    layout = Layout(root)
    record = read_record(layout)
    assert record is not None
    base = {"manifest_sha256": "0" * 64, "source_rows": 1, "skipped_rows": 0, "versions": {}, "grown_from": []}
    record["base"] = base | {"hub": {"repo_id": "a/b-", "name": "b", "commit": "c" * 40}}
    layout.job_file.write_bytes(stored.encode(record | {"sha256": stored.digest(record)}))
    with pytest.raises(StoreError, match=r"job\.json .*repo_id"):
        run(checkpoint, texts, root, **SECTIONS)
    run(checkpoint, texts, root, **SECTIONS, output={"overwrite": True})


def test_a_data_root_among_the_texts_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write_texts(folder / "texts.jsonl")
    with pytest.raises(ConfigError, match=r"output\.data_root is .*inside of dataset\.path"):
        run(checkpoint, folder, folder / "out", **SECTIONS)
    assert [path.name for path in folder.iterdir()] == ["texts.jsonl"]


def test_ids_that_are_texts_are_refused_before_anything_is_captured(checkpoint: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"id": "x" * 10_001, "text": "abc"}) + "\n")
    sections = SECTIONS | {"dataset": {"id_column": "id"}}
    with pytest.raises(SourceError, match=r"id of example 0 has 10,001 characters.*dataset\.id_column=null"):
        run(checkpoint, texts, tmp_path / "out", **sections)
