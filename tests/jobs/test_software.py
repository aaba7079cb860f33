"""The versions of the packages that a job uses belong to its identity: it is not resumed with others."""

import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import quantized
from support.data_files import jsonl, write
from support.jobs import run, stopped_after
from support.tiny import save_tokenizer

from qk_sniffer.backbone import quantization
from qk_sniffer.backbone.quantization import StoredWeights
from qk_sniffer.config import from_dict
from qk_sniffer.errors import StoreError
from qk_sniffer.jobs.identity import Job
from qk_sniffer.jobs.loaded_code import differences_of_loaded
from qk_sniffer.jobs.software import versions_of, versions_of_loaded
from qk_sniffer.resolved import resolve
from qk_sniffer.store import manifest as manifests

SECTIONS: dict[str, Any] = {"capture": {"layers": [0], "heads": [0]}, "inference": {"batch_size": 2, "lookahead": 4}}


def other_version(patch: pytest.MonkeyPatch, package: str) -> None:
    """Makes a package look like one of version 0.0.1."""
    real = importlib.metadata.version
    patch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == package else real(name))


def test_the_settings_tell_most_packages() -> None:
    def names(**sections: Any) -> set[str]:
        return {*versions_of(resolve(from_dict({"model": {"name": "org/model"}} | sections)))}

    usual = {"torch", "transformers", "tokenizers"}
    assert names() == usual
    assert names(dataset={"messages_column": "messages"}) == {*usual, "jinja2"}
    assert names(model={"name": "org/model", "gguf_file": "a.gguf"}) == {*usual, "gguf"}
    assert names(model={"name": "org/model", "adapter": "org/adapter"}) == {*usual, "peft"}


def test_quantizers_and_kernels_are_known_once_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert StoredWeights(quantization={"load_in_4bit": True}).quantizers == ["bitsandbytes"]
    assert StoredWeights(quantization={"quant_method": "compressed-tensors"}).quantizers == ["compressed-tensors"]
    assert StoredWeights(quantization={"quant_method": "fp8"}).quantizers == StoredWeights().quantizers == []
    assert versions_of_loaded(["numpy", "no-such-package"]) == {"numpy": importlib.metadata.version("numpy")}
    kernel, commit = ModuleType("kernel"), "4a" * 20
    kernel.__file__ = f"/hub/models--org--flash-attn3/snapshots/{commit}/build/torch29-cu128/flash_attn3/__init__.py"
    monkeypatch.setitem(sys.modules, "kernel", kernel)
    assert versions_of_loaded([]) == {"kernel org/flash-attn3": commit}


def test_a_job_is_not_resumed_with_another_tokenizers_library(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "t.jsonl", jsonl([{"text": f"text {number}"} for number in range(6)]))
    stopped_after(1, checkpoint, source, tmp_path / "out", **SECTIONS)
    with pytest.MonkeyPatch.context() as patch:
        other_version(patch, "tokenizers")
        with pytest.raises(StoreError, match=r"version of tokenizers: '\S+' there, '0\.0\.1' now"):
            run(checkpoint, source, tmp_path / "out", **SECTIONS)
    root = run(checkpoint, source, tmp_path / "out", **SECTIONS)
    assert manifests.read(root)["versions"]["tokenizers"] == importlib.metadata.version("tokenizers")
    write(source, jsonl([{"text": f"text {number}"} for number in range(8)]))
    other_version(monkeypatch, "tokenizers")
    manifest = manifests.read(run(checkpoint, source, tmp_path / "out", **SECTIONS))
    assert manifest["versions"]["tokenizers"] == "0.0.1"
    assert "adding to a dataset that other versions made (tokenizers" in caplog.text


def test_a_job_is_not_resumed_with_another_quantizer(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, root = tmp_path / "tiny", tmp_path / "out"
    quantized.save_fp8(folder)
    save_tokenizer(folder)
    monkeypatch.setitem(quantization._PACKAGES, "fp8", {"safetensors": "safetensors"})  # the others are not installed
    stopped_after(1, folder, texts, root, **SECTIONS)
    with pytest.MonkeyPatch.context() as patch:
        other_version(patch, "safetensors")
        with pytest.raises(StoreError, match=r"version of safetensors: '\S+' there, '0\.0\.1' now"):
            run(folder, texts, root, **SECTIONS)
    assert "safetensors" in manifests.read(run(folder, texts, root, **SECTIONS))["versions"]


def test_a_job_is_not_continued_where_its_weights_have_another_form(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device for which transformers dequantizes a checkpoint, after one that computes with its numbers."""
    folder, root = tmp_path / "tiny", tmp_path / "out"
    quantized.save_fp8(folder)
    save_tokenizer(folder)
    sections = SECTIONS | {"dataset": {"max_samples": 4}}
    stopped_after(1, folder, texts, root, **sections)
    real = StoredWeights.describe_quantization

    def other_form(self: StoredWeights, decoder: Any) -> dict[str, Any]:
        found = real(self, decoder)
        assert found is not None
        return found | {"dequantized": not found["dequantized"]}

    with monkeypatch.context() as patch:
        patch.setattr(StoredWeights, "describe_quantization", other_form)
        with pytest.raises(StoreError, match=r"weights of the model: dequantized there, quantized now"):
            run(folder, texts, root, **sections)
    run(folder, texts, root, **sections)
    monkeypatch.setattr(StoredWeights, "describe_quantization", other_form)
    with pytest.raises(StoreError, match=r"a finished dataset of a model in another form:\n.* quantized now"):
        run(folder, texts, root, **SECTIONS)


def test_a_job_is_not_resumed_without_a_kernel_of_the_hub() -> None:
    model = {"dtype": "bfloat16", "quantization": None}
    one, other = (
        {"model": model, "tokenizer": {}, "versions": {"torch": "2"} | more} for more in ({"kernel a/b": "4a"}, {})
    )
    assert differences_of_loaded(other, one) == ["kernel a/b: 4a there, not loaded now"]
    assert differences_of_loaded(one, other) == ["kernel a/b: not loaded there, 4a now"]
    assert differences_of_loaded(one, one) == []


def test_a_job_of_an_earlier_version_that_named_fewer_packages_is_resumed() -> None:
    config = resolve(from_dict({"model": {"name": "org/model"}}))
    now = Job.of(config, {})
    earlier = Job(now.fingerprint, {}, {name: now.versions[name] for name in ("torch", "transformers")})
    assert not now.differences(earlier)
    assert Job.of(config, {}).with_loaded({"torch": "0"}).differences(earlier)
