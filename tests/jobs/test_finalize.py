"""`python -m qk_sniffer.finalize` does by hand what the last shard does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.jobs import captured_only, hashes, run, settings

from qk_sniffer.config import Config, from_dict
from qk_sniffer.errors import ConfigError, SourceError, StoreError
from qk_sniffer.jobs import finalize as finalize_module
from qk_sniffer.jobs.finalize import Allowed, finalize
from qk_sniffer.jobs.finish import Outcome
from qk_sniffer.jobs.run import run_job
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.files import Folder
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import InUseError, hold

EXACT: dict[str, Any] = {"inference": {"batch_size": 1}}


def shard(index: int) -> dict[str, Any]:
    """The sections of the job of one shard of two."""
    return EXACT | {"shard": {"index": index, "count": 2}}


@pytest.fixture
def captured(checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with both shards captured and no dataset."""
    for index in range(2):
        captured_only(checkpoint, texts, tmp_path / "out", monkeypatch, **shard(index))
    return tmp_path / "out"


def test_it_says_which_shards_are_missing(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    run(checkpoint, texts, root, **shard(0))
    assert finalize(root) == 1
    said = capsys.readouterr().out
    assert "shard 1 of 2: not started" in said and "shard 0" not in said
    with hold(Layout(root).shard_lock(1, 2), "capturing"):
        assert finalize(root) == 1
    assert "shard 1 of 2: running (process " in capsys.readouterr().out
    assert not (root / "manifest.json").exists()


@pytest.mark.parametrize("prove", [True, False])
def test_shards_of_other_versions_of_a_local_source_make_no_dataset(
    prove: bool, checkpoint: Path, tmp_path: Path, texts: Path
) -> None:
    root = tmp_path / "out"
    run(checkpoint, texts, root, **shard(0))
    texts.write_text(texts.read_text("utf-8").replace('"text": "', '"text": "Another '), "utf-8")
    with pytest.raises(SourceError, match="is not the text"):
        run(checkpoint, texts, root, **shard(1))
    with pytest.raises(SourceError, match="is not the text"):
        finalize(root, prove=prove)
    assert not (root / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("prove", [True, False])
def test_it_makes_the_dataset_that_a_dead_shard_did_not_make(
    prove: bool,
    captured: Path,
    undisturbed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, whole = captured, undisturbed(**EXACT)
    for lock in (Layout(root).start_lock, Layout(root).shard_lock(1, 2)):
        lock.touch()  # of a job that was killed while it held the lock
    if not prove:
        monkeypatch.setattr("qk_sniffer.jobs.components.load_backbone", None)  # no model is loaded
    assert finalize(root, prove=prove) == 0
    assert hashes(root) == hashes(whole)
    assert manifests.read(root)["proof"]["proven"] is (True if prove else None)
    assert not Layout(root).work.exists()
    capsys.readouterr()
    assert finalize(root) == 0
    assert "Nothing to do: the dataset is finished." in capsys.readouterr().out


def test_it_waits_for_nobody_who_makes_the_dataset(captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qk_sniffer.jobs.assemble.FINALIZE_PATIENCE_S", 0.1)
    with hold(Layout(captured).finalize_lock, "making the dataset"):
        assert finalize(captured) == 1
    assert finalize(captured) == 0


@pytest.mark.slow
def test_a_job_without_shards_does_not_pass_for_done_while_another_process_makes_its_dataset(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    run(checkpoint, texts, root, dataset={"max_samples": 5})
    captured_only(checkpoint, texts, root, monkeypatch)
    monkeypatch.setattr("qk_sniffer.jobs.assemble.FINALIZE_PATIENCE_S", 0.1)
    with hold(Layout(root).finalize_lock, "making the dataset"):
        for again in (lambda: run(checkpoint, texts, root), lambda: finalize(root)):
            with pytest.raises(InUseError, match="is making the dataset"):
                again()
    assert manifests.read(root)["examples"] == 5
    assert finalize(root) == 0 and manifests.read(root)["examples"] == 24


def test_a_journal_that_lost_something_is_said(captured: Path) -> None:
    for segment in Layout(captured).journal(1, 2).glob("*.safetensors"):
        segment.unlink()
    with pytest.raises(StoreError, match=r"Rerun the job of shard\.index=1"):
        finalize(captured)


def test_there_must_be_a_job(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        finalize(tmp_path / "none")
    with pytest.raises(StoreError, match=r"incomplete: no manifest\.json"):
        finalize(tmp_path)


def test_what_a_job_leaves(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    values = settings(checkpoint, texts, tmp_path / "out", shard={"index": 0, "count": 2})
    assert run_job(from_dict(values)) == Outcome()
    values["shard"]["index"] = 1
    made = run_job(from_dict(values))
    manifest, digest = manifests.with_digest(Folder(tmp_path / "out"))
    assert made == Outcome(manifest["rows"], manifest=digest) and made.rows
    assert run_job(from_dict(settings(checkpoint, texts, tmp_path / "out"))) == made


def test_a_job_that_asks_for_code_is_refused_unless_the_caller_allows_it(
    captured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = finalize_module.from_dict
    monkeypatch.setattr(finalize_module, "finish", lambda *_, **__: Outcome())
    monkeypatch.setattr(finalize_module, "find_spec", lambda name: name)  # the package `kernels` is installed
    asked: dict[str, Any]
    for asked in (
        {"trust_remote_code": True},
        {"allow_pickle": True},
        {"family": "package:Class"},
        {"attn_implementation": "org/kernel"},
        {"attn_implementation": "flash_attention_2"},  # of the Hub, if its package is not installed
    ):

        def asking(values: dict[str, Any], asked: dict[str, Any] = asked) -> Config:
            config = real(values)
            return replace(config, model=replace(config.model, **asked))

        monkeypatch.setattr(finalize_module, "from_dict", asking)
        (setting,) = asked
        with pytest.raises(ConfigError, match=rf"{setting} is .*model\.{setting}.*: give {setting}=.*prove=false"):
            finalize(captured)
        assert finalize(captured, prove=False) == 0
        assert finalize(captured, allowed=Allowed(**asked)) == 0


@pytest.mark.parametrize(("key", "value"), [("hf_branch", "main"), ("hf_branch", "../x"), ("hf_repo_id", "../../x")])
def test_the_place_in_a_stored_job_is_checked_like_one_that_is_given(
    key: str, value: str, captured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = finalize_module.from_dict

    def changed(values: dict[str, Any]) -> Config:
        config = real(values)
        output: Any = {"hf_repo_id": "alice/vectors", key: value}
        return replace(config, output=replace(config.output, **output))

    monkeypatch.setattr(finalize_module, "from_dict", changed)
    with pytest.raises(ConfigError, match=f"output.{key} is"):
        finalize(captured)
