"""Texts beyond the positions of the model's config are flagged; a tokenizer with too many tokens is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import TEXTS, heads_of, run
from transformers import PreTrainedTokenizerFast

from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import SourceError
from qk_sniffer.jobs import components
from qk_sniffer.store import manifest as manifests


@pytest.mark.slow
def test_texts_beyond_the_positions_of_the_model_are_captured_and_flagged(
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    undisturbed: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    most = 50
    short: dict[str, Any] = {"model": {"config_overrides": {"max_position_embeddings": most}}}
    root = run(checkpoint, texts, tmp_path / "out", **short)
    (warning,) = [line for line in caplog.messages if "max_position_embeddings" in line]
    assert f"the model's config provides for {most}" in warning and f"model.tokenizer.max_length={most}" in warning
    beyond = sum(len(text) > most for text in TEXTS)
    manifest = manifests.read(root)
    assert manifest["model"]["num_layers"] == 3
    assert (manifest["model"]["max_positions"], manifest["examples_beyond_max_positions"]) == (most, beyond)
    assert f"{beyond} examples longer than the {most} tokens that the model's config" in capsys.readouterr().out
    line = f"{most} tokens: {beyond} examples are longer, captured as the model computes them"
    assert f"| max_position_embeddings | {line} |" in (root / "README.md").read_text()
    whole = undisturbed()
    assert heads_of(root) == heads_of(whole), "as the model computes them"
    assert manifests.read(whole)["examples_beyond_max_positions"] == 0
    assert "max_position_embeddings" not in (whole / "README.md").read_text()

    manifest["examples_beyond_max_positions"] -= 1
    (root / "manifest.json").write_bytes(manifests.encode(manifest))
    assert f"examples_beyond_max_positions: {beyond}" in str(verify(root))
    del manifest["examples_beyond_max_positions"], manifest["model"]["max_positions"]  # as of an earlier version
    (root / "manifest.json").write_bytes(manifests.encode(manifest))
    assert not verify(root).problems


def with_tokens(checkpoint: Path, folder: Path, tokens: list[str], **named: Any) -> Path:
    """Copies the checkpoint. Adds tokens to its tokenizer until one is beyond the 96 rows of its embedding."""
    shutil.copytree(checkpoint, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["<95>", *tokens])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, unk_token="<unk>", **named).save_pretrained(folder)
    return folder


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused_before_the_weights_are_loaded(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "load_backbone", lambda *_, **__: pytest.fail("the weights are loaded"))
    model = with_tokens(checkpoint, tmp_path / "model", ["<96>"])
    with pytest.raises(SourceError, match=r"ids up to 96 \('<96>'\).* has 96 rows, .* model\.tokenizer\.name"):
        run(model, texts, tmp_path / "out")


def test_a_token_beyond_the_embedding_that_no_text_has_is_no_reason_to_refuse(checkpoint: Path, tmp_path: Path) -> None:
    model = with_tokens(
        checkpoint,
        tmp_path / "model",
        ["<pad>", "<image>"],
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:2]))
    root = run(model, texts, tmp_path / "out")
    assert manifests.read(root)["examples"] == 2
    with texts.open("a") as file:
        file.write(json.dumps({"text": "a<image>b"}) + "\n")
    with pytest.raises(
        SourceError, match=r"example 2 of the dataset .* the token '<image>' of the id 97, .* has 96 rows"
    ):
        run(model, texts, root)
