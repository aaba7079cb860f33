"""Tests the file of TriAttention with a reader of its format, against float64 over the rows before RoPE."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from support.backbones import FolderOf
from support.export_cases import edited, halves, rows_of, statistics, without_rows
from support.jobs import TEXTS, run, settings
from support.zoo import CASES
from transformers import AutoModelForCausalLM, AutoTokenizer

import qk_sniffer
from qk_sniffer import assets
from qk_sniffer.config import from_dict
from qk_sniffer.errors import StoreError
from qk_sniffer.jobs.run import run_job

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def pre(undisturbed: Callable[..., Path]) -> Path:
    """A dataset of every row before RoPE."""
    return undisturbed(capture=statistics() | {"capture_pre_rope": True})


def read(path: Path) -> tuple[dict[str, Any], dict[tuple[int, int], dict[str, np.ndarray]]]:
    """Reads the file as TriAttention does: the metadata, and the arrays of each head that it lists."""
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"metadata", "stats"}
    heads = {}
    for layer, head in content["metadata"]["sampled_heads"]:
        tensors = content["stats"].pop(f"layer{layer:02d}_head{head:02d}")
        assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors.values())
        heads[layer, head] = {name: tensor.numpy() for name, tensor in tensors.items()}
    assert not content["stats"]
    return content["metadata"], heads


def test_the_numbers_are_those_of_the_queries_before_rope(pre: Path, tmp_path: Path) -> None:
    dataset = qk_sniffer.open_dataset(pre)
    path = qk_sniffer.export(dataset, "triattention", tmp_path / "new" / "stats.pt")
    metadata, heads = read(path)
    assert [*heads] == [(layer, head) for layer in range(3) for head in range(4)]
    for (layer, head), found in heads.items():
        expected = halves(rows_of(dataset, layer, head))
        assert found.keys() == {"q_mean_real", "q_mean_imag", "q_abs_mean"}
        assert found["q_mean_real"] == pytest.approx(expected.mean(axis=0).real, abs=1e-5)
        assert found["q_mean_imag"] == pytest.approx(expected.mean(axis=0).imag, abs=1e-5)
        assert found["q_abs_mean"] == pytest.approx(np.abs(expected).mean(axis=0), rel=1e-5)
        assert found["q_abs_mean"].shape == (8,)
    assert metadata["head_dim"] == 16 and metadata["num_traces"] == len(TEXTS)
    assert metadata["rope_style"] == "half" and metadata["rope_type"] == "default"
    provenance = metadata["provenance"]
    assert provenance["model_commit"] == dataset.manifest["commits"]["model"]
    assert provenance["tokens"] == sum(map(len, TEXTS)) and provenance["skip_tokens"] == 0
    assert metadata["use_chat_template"] is False and provenance["segments"] is None is provenance["chat_template"]
    assert [path.name for path in path.parent.iterdir()] == ["stats.pt"], "the provenance is in the file"


def test_texts_of_a_chat_template_are_told(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "ask" * 9}]}) + "\n")
    sections = {"dataset": {"messages_column": "messages"}, "sampler": {"type": "none"}, "verify": {"examples": 0}}
    run(folder, tmp_path / "chats.jsonl", tmp_path / "out", capture=statistics(), **sections)
    metadata, _ = read(qk_sniffer.export(tmp_path / "out", "triattention"))
    assert metadata["use_chat_template"] is True and len(metadata["provenance"]["chat_template"]) == 64


def test_heads_that_were_not_captured_are_not_listed(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    dataset = without_rows(checkpoint, texts, tmp_path / "out", layers=[0, 2], heads=[1, 3])
    _, heads = read(qk_sniffer.export(dataset, "triattention"))
    assert [*heads] == [(0, 1), (0, 3), (2, 1), (2, 3)]
    assert (tmp_path / "out-triattention.pt").is_file()


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("glm4", r"layers 0-2 rotate neighbouring components \(neighbours\)"),
        ("phi3", r"layers 0-2 rotate 4 of 8 components, and the method needs RoPE over whole heads"),
        ("smollm3", r"layers 2 have no RoPE, .*leave them out with capture\.layers"),
        pytest.param("llama4", r"layers 0, 2 rotate neighbouring .*\n.*layers 1 have no RoPE", marks=pytest.mark.slow),
        pytest.param("gpt_neox", r"layers 0-2 rotate 2 of 8 components", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("format", ["triattention", "tria"])
def test_other_rotations_are_refused(
    name: str, reason: str, format: str, folder_of: FolderOf, texts: Path, tmp_path: Path
) -> None:
    dataset = without_rows(folder_of(BY_NAME[name]), texts, tmp_path / "out", layers=None)
    with pytest.raises(StoreError, match=f"(?s)cannot be exported as {format}:\n.*{reason}"):
        qk_sniffer.export(dataset, format, tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"position_bias": True}, "layers 2 add a bias by position"),
        ({"rotation": "not recorded: it is odd"}, "layers 2 have a rotation that is not recorded: it is odd"),
        ({"head_dim": 8}, r"its layers differ in head_dim \(8, 16\), .*\n.* layers 2 rotate 16 of 8 components"),
    ],
)
def test_layers_that_it_cannot_express_are_refused(
    changes: dict[str, Any], reason: str, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    without_rows(checkpoint, texts, tmp_path / "out")
    with pytest.raises(StoreError, match=reason):
        qk_sniffer.export(edited(tmp_path / "out", **changes), "triattention")


def test_queries_that_change_after_rope_are_refused(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    dataset = without_rows(checkpoint, texts, tmp_path / "out")
    rotation = dataset.manifest["model"]["layers"][-1]["rotation"]
    for change, reason in [({"changed_after": True}, "normalize queries after RoPE"), ({"direction": -1}, "direction")]:
        with pytest.raises(StoreError, match=reason):
            qk_sniffer.export(edited(tmp_path / "out", rotation=rotation | change), "triattention")


@pytest.mark.slow
def test_the_norm_of_the_queries_counts(tmp_path: Path) -> None:
    """Compares with the method's own script, which takes the outputs of q_proj. docs/kv_cache.md has these numbers."""
    chosen = [*topics.values()][:20]
    (tmp_path / "topics.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    folder = Path(assets.__file__).parent / "pydoc_tiny"
    long = {"model": {"tokenizer": {"max_length": 1024}}, "sampler": {"type": "none"}, "verify": {"examples": 0}}
    values = settings(folder, tmp_path / "topics.jsonl", tmp_path / "out", capture=statistics(), **long)
    run_job(from_dict(values))
    _, heads = read(qk_sniffer.export(tmp_path / "out", "triattention"))

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen: dict[tuple[int, str], list[np.ndarray]] = {}
    for number, layer in enumerate(model.model.layers):
        for name in ("q_proj", "q_norm"):
            kept = seen[number, name] = []
            getattr(layer.self_attn, name).register_forward_hook(
                lambda module, inputs, output, kept=kept: kept.append(output.double().numpy().reshape(-1, 8, 32))
            )
    with torch.inference_mode():
        for text in chosen:
            model(tokenizer(text, return_tensors="pt")["input_ids"][:, :1024])
    moduli = {key: np.abs(halves(np.concatenate(outputs))).mean(axis=0) for key, outputs in seen.items()}
    ratios = np.stack([moduli[layer, "q_proj"] / moduli[layer, "q_norm"] for layer in range(6)])
    ours = np.array([[heads[layer, head]["q_abs_mean"] for head in range(8)] for layer in range(6)])
    assert ours == pytest.approx(np.stack([moduli[layer, "q_norm"] for layer in range(6)]), rel=1e-4)
    assert (ratios.min(), ratios.max()) == pytest.approx((0.73, 1.29), abs=0.03)
