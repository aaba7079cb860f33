"""Jobs with an adapter: their identity, their proof, and what the manifest and the card say."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from support.adapters import linear_in_attention, lora, save_adapter
from support.fake_hub import FakeHub
from support.jobs import QWEN3, captured_only, heads_of, run, settings, vectors
from support.zoo import CASES, Case

from qk_sniffer.config import Config, ModelConfig, from_dict
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import ConfigError, SourceError, StoreError
from qk_sniffer.hub.checkpoint_files import folder_digest
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.jobs.identity import resolve_commits
from qk_sniffer.resolved import resolve
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.record import read_record, write_record
from qk_sniffer.validation import problems

pytestmark = pytest.mark.floor


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(QWEN3, tmp_path_factory.mktemp("adapters") / "Tuned")


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "Tuned"))


def sections(adapter: Path, **model: Any) -> dict[str, Any]:
    return {"model": {"adapter": str(adapter), **model}, "capture": {"layers": [1]}, "dataset": {"max_samples": 6}}


def retrain(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(file).items()}, file)


@pytest.mark.parametrize("merge", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_dataset_of_an_adapted_model_is_proven_and_says_so(
    checkpoint: Path, texts: Path, made: Path, tmp_path: Path, merge: bool
) -> None:
    root = run(checkpoint, texts, tmp_path / "out", **sections(made, merge_adapter=merge))
    manifest = manifests.read(root)
    assert manifest["proof"]["proven"] is True
    assert manifest["fingerprint"]["model.adapter"] == manifest["config"]["model"]["adapter"] == "Tuned"
    assert manifest["fingerprint"]["model.merge_adapter"] is merge
    assert manifest["commits"]["adapter"] == folder_digest(made)
    assert manifest["model"]["adapter"] == {"kind": "LORA", "base": None} and "peft" in manifest["versions"]
    card = (root / "README.md").read_text()
    assert f"attention heads of `{checkpoint.name}` with the adapter `Tuned`" in card
    assert ("merged into the model's weights" if merge else "computed next to the model's weights") in card
    facts = pq.read_schema(root / "l01h00q" / "data.parquet").metadata
    assert facts[b"adapter"] == b"Tuned" and facts[b"adapter_revision"] == folder_digest(made).encode()
    assert not verify(root).problems
    without = run(checkpoint, texts, tmp_path / "plain", **sections(made) | {"model": {}})
    mine, plain = (vectors(heads_of(each)["l01h00q"]) for each in (root, without))
    assert mine.shape == plain.shape and np.abs(mine - plain).max() > 0.5
    assert "adapter" not in manifests.read(without)["commits"]


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_adapted_models_of_all_families_are_proven(
    case: Case, merge: bool, folder_of: Callable[[Case], Path], texts: Path, tmp_path: Path
) -> None:
    config = lora(target_modules=linear_in_attention(case))
    folder = save_adapter(case, tmp_path / "tuned", config)
    model = {"adapter": str(folder), "merge_adapter": merge}
    root = run(folder_of(case), texts, tmp_path / "out", model=model, dataset={"max_samples": 3})
    assert manifests.read(root)["proof"]["proven"] is True


def test_an_adapter_belongs_to_the_identity_of_a_job(
    checkpoint: Path, texts: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    captured_only(checkpoint, texts, root, monkeypatch, **sections(adapter))
    with pytest.raises(StoreError, match=r"model\.adapter: 'Tuned' there, null now"):
        run(checkpoint, texts, root, **sections(adapter) | {"model": {}})
    with pytest.raises(StoreError, match=r"model\.merge_adapter: false there, true now"):
        run(checkpoint, texts, root, **sections(adapter, merge_adapter=True))
    retrain(adapter)
    with pytest.raises(StoreError, match=r"commit of the adapter: 'sha256:\w+' there, 'sha256:\w+' now"):
        run(checkpoint, texts, root, **sections(adapter))
    with pytest.raises(SourceError, match=r"the adapter of the job at .* changed after the capture"):
        finalize(root)


def test_an_adapter_that_changes_while_it_is_loaded_ends_the_job(
    checkpoint: Path, texts: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def selected(*_: Any) -> Any:
        retrain(adapter)
        return real(*_)

    from qk_sniffer.jobs import components

    real = components.select
    monkeypatch.setattr(components, "select", selected)
    with pytest.raises(SourceError, match=r"the files of the adapter in .* changed while the job used them"):
        run(checkpoint, texts, tmp_path / "out", **sections(adapter))


def test_a_job_without_the_package_is_an_error_that_names_it(
    checkpoint: Path, texts: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, find = metadata.version, util.find_spec

    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(ConfigError, match="needs the package peft: run pip install peft"):
        run(checkpoint, texts, tmp_path / "out", **sections(made))


def test_a_job_that_knew_no_adapters_is_resumed(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, plain = tmp_path / "out", {"capture": {"layers": [1]}, "dataset": {"max_samples": 6}}
    captured_only(checkpoint, texts, root, monkeypatch, **plain)
    record = read_record(Layout(root))
    assert record is not None
    before = record["job_id"]
    for key in ("adapter", "merge_adapter"):
        del record["fingerprint"][f"model.{key}"], record["config"]["model"][key]
    from qk_sniffer.store import record as records

    monkeypatch.setattr(records, "_digest", lambda _: before.partition("-")[2])
    write_record(Layout(root), record)
    assert manifests.read(run(checkpoint, texts, root, **plain))["proof"]["proven"] is True


def test_an_adapter_on_the_hub_is_pinned(checkpoint: Path, made: Path, hub: FakeHub, endpoint: str) -> None:
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    first = hub.commit("alice/tuned", files)
    config = resolve(Config(model=ModelConfig(name=str(checkpoint), adapter="alice/tuned")))
    assert resolve_commits(config, None)["adapter"] == first
    from qk_sniffer.backbone.adapter_files import adapter_of

    hub.commit("alice/tuned", {"adapter_model.safetensors": b"of another training"})
    found = adapter_of(config.model, None, first)
    assert found is not None and found.weights.read_bytes() == files["adapter_model.safetensors"]
    given_as_model = replace(config.model, name="alice/tuned", adapter=None)
    with pytest.raises(Exception, match=r"is an adapter, not a model.*model\.adapter=alice/tuned"):
        adapter_of(given_as_model, first)


def test_the_branch_of_an_adapted_model_is_not_that_of_the_model() -> None:
    def branch(**model: Any) -> str | None:
        return resolve(
            from_dict(settings(Path("org/base"), Path("org/texts"), Path("out"), model=model))
        ).output.hf_branch

    assert branch() == "base-texts-all"
    assert branch(adapter="me/My-LoRA") == "base-my-lora-texts-all"
    assert branch(adapter="me/My-LoRA", slug="mine", revision="v2") == "mine-v2-my-lora-texts-all"
    assert branch(adapter="me/My-LoRA", slug="mine-my-lora") == "mine-my-lora-texts-all"


def test_wrong_settings_of_an_adapter_are_problems() -> None:
    def of(**model: Any) -> list[str]:
        return [line for line in problems(Config(model=ModelConfig(name="org/base", **model))) if "adapter" in line]

    assert of(merge_adapter=True) == [
        "model.merge_adapter is true, but model.adapter is not given; set it to a folder or to org/name"
    ]
    assert "which does not exist" in of(adapter="./nowhere")[0]
    assert of(adapter="me/tuned", merge_adapter=True) == []
