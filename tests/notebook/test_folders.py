"""What `qk_sniffer.capture` writes to a folder, at once or by `save`, of generation and of passes over batches."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import QWEN3, TEXTS, hashes
from support.passes import ids_of
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

import qk_sniffer
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import CaptureError, StoreError
from qk_sniffer.jobs.finalize import finalize

IDS = torch.from_numpy(ids_of(TEXTS[5]))[None].long()
NEW_TOKENS = 9


@pytest.fixture(scope="module")
def model() -> Any:
    return QWEN3.model(dtype=torch.float32).eval()


def run_passes(model: Any) -> None:
    model.generate(IDS, max_new_tokens=NEW_TOKENS, do_sample=False)
    padded = torch.ones(2, IDS.shape[1], dtype=torch.long)
    padded[1, :7] = 0
    model(IDS.expand(2, -1), attention_mask=padded)


@pytest.mark.slow
def test_a_stream_is_what_save_writes(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"kinds": "qkvo", "attention": True, "statistics": True}
    with qk_sniffer.capture(model, **options) as in_memory:
        run_passes(model)
        in_memory.save("within")  # while a cache could go on
    in_memory.save("saved")
    (tmp_path / "elsewhere").mkdir()
    with qk_sniffer.capture(model, to="streamed", **options) as streamed:
        run_passes(model)
        os.chdir("elsewhere")
    assert hashes(tmp_path / "streamed") == hashes(tmp_path / "saved") == hashes(tmp_path / "within")
    assert verify(tmp_path / "saved").problems == 0
    lengths = qk_sniffer.open_dataset(tmp_path / "saved").examples["num_tokens"].to_pylist()
    assert lengths == [IDS.shape[1] + NEW_TOKENS - 1, IDS.shape[1], IDS.shape[1] - 7]
    one, other = streamed.vectors(1, 2, "o"), in_memory.vectors(1, 2, "o")
    assert (one.vectors == other.vectors).all() and (one.positions == other.positions).all()


def test_an_interrupted_generation_keeps_its_tokens(model: Any, tmp_path: Path) -> None:
    calls = 0

    def interrupt(module: nn.Module, *_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    root = tmp_path / "out"
    hook = model.model.layers[1].register_forward_hook(interrupt)
    with (
        pytest.raises(KeyboardInterrupt, match=None) as caught,
        qk_sniffer.capture(model, to=root, statistics=True) as captured,
    ):
        model.generate(IDS, max_new_tokens=NEW_TOKENS, do_sample=False)
    hook.remove()
    assert "of 1 whole example: python -m qk_sniffer.finalize" in caught.value.__notes__[0]
    assert finalize(root) == 0
    assert verify(root).problems == 0
    with pytest.raises(CaptureError, match="open_dataset"):
        captured.vectors(0, 0, "k")
    assert len(qk_sniffer.open_dataset(root).vectors(0, 0, "k").positions) == IDS.shape[1] + 3


def test_a_capture_that_begins_after_the_prefill_is_whole(model: Any, tmp_path: Path) -> None:
    cache = DynamicCache(config=model.config)
    model(IDS[:, :30], past_key_values=cache)
    with qk_sniffer.capture(model, statistics=True, attention=True) as captured:
        model(IDS[:, 30:], past_key_values=cache)
    captured.save(tmp_path / "out")
    assert verify(tmp_path / "out").problems == 0
    dataset = qk_sniffer.open_dataset(tmp_path / "out")
    assert dataset.examples["first_position"].to_pylist() == [30]
    assert dataset.vectors(0, 0, "q").positions.tolist() == [*range(30, IDS.shape[1])]


def test_the_manifest_names_the_adapter_on_the_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(QWEN3.model(dtype=torch.float32).eval(), LoraConfig(target_modules=["q_proj"]))
    with qk_sniffer.capture(adapted, layers=[1]) as captured:
        adapted(IDS)
    captured.save(tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["model"]["adapter"] == {"kind": "LORA", "base": None} and "peft" in manifest["versions"]
    assert "| adapter | of the kind `LORA`, on the model in memory |" in (tmp_path / "out/README.md").read_text()
    assert verify(tmp_path / "out").problems == 0


@pytest.mark.slow
def test_no_path_of_the_model_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is there, is gone, or is named from a folder that was the current one."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "customers" / "secret" / "ckpt-7"
    QWEN3.model(dtype=torch.float32).save_pretrained(folder)
    monkeypatch.chdir(tmp_path / "customers")
    named = (str(folder), "secret/ckpt-7", "../customers/secret/ckpt-7")
    models = [AutoModelForCausalLM.from_pretrained(name) for name in named]
    models += [get_peft_model(AutoModelForCausalLM.from_pretrained(name), LoraConfig(r=2)) for name in named]
    monkeypatch.chdir(tmp_path)
    for place in ("there", "gone"):
        for number, model in enumerate(models):
            with qk_sniffer.capture(model, layers=[1], to=tmp_path / f"{place}{number}"):
                model(IDS)
            texts = [(tmp_path / f"{place}{number}" / name).read_text() for name in ("manifest.json", "README.md")]
            assert "ckpt-7" in texts[0] and not any("secret" in text for text in texts), number
        if folder.exists():
            folder.rename(tmp_path / "elsewhere")


def test_a_capture_reads_its_own_dataset_alone(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with qk_sniffer.capture(model, layers=[0], to="dataset") as captured:
        model(IDS)
    with qk_sniffer.capture(model, layers=[0]) as other:
        model(IDS[:, :5])
    monkeypatch.chdir(tmp_path / "there")
    other.save("dataset")
    assert len(captured.vectors(0, 0, "q").positions) == IDS.shape[1]
    other.save(tmp_path / "here" / "dataset", overwrite=True)
    with pytest.raises(CaptureError, match=r"another dataset by now.*open_dataset"):
        captured.vectors(0, 0, "q")


@pytest.mark.parametrize("passes", [0, 1])
def test_a_capture_that_failed_does_not_read_a_later_one(model: Any, tmp_path: Path, passes: int) -> None:
    folder = tmp_path / "dataset"
    failed = qk_sniffer.capture(model, layers=[0], to=folder)
    with pytest.raises(ZeroDivisionError), failed:
        for _ in range(passes):
            model(IDS)
        raise ZeroDivisionError
    with qk_sniffer.capture(model, layers=[0]) as other:
        model(IDS[:, :5])
    other.save(folder, overwrite=True)
    with pytest.raises(CaptureError, match=r"made no dataset.*Capture again.*finalize"):
        failed.vectors(0, 0, "q")


def test_a_capture_whose_dataset_is_removed_says_so(model: Any, tmp_path: Path) -> None:
    with qk_sniffer.capture(model, layers=[0], to=tmp_path / "dataset") as captured:
        model(IDS)
    (tmp_path / "dataset").rename(tmp_path / "other")
    with pytest.raises(StoreError, match="dataset"):
        captured.vectors(0, 0, "q")
