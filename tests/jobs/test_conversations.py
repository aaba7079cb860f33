"""Runs jobs over conversations: they resume, grow and are proven as jobs over texts."""

import json
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from support.jobs import captured_only, hashes, heads_of, keys, run, stopped_after
from support.smollm2 import FILE
from transformers import AutoTokenizer

from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.stored import UnreadableError

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
MESSAGES = {"messages_column": "messages"}
ALONE: dict[str, Any] = {"inference": {"max_batch_tokens": 40}, "capture": {"capture_token_ids": True}}


def turns(count: int) -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": f"{'ask' * (1 + i % 4)}{i}"}, {"role": "assistant", "content": f"say{i}"}]
        for i in range(count)
    ]


def write(path: Path, conversations: list[list[dict[str, str]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in conversations), encoding="utf-8")
    return path


@pytest.fixture
def chat_model(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint with a chat template in its tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.mark.slow
def test_a_job_over_conversations(chat_model: Path, tmp_path: Path) -> None:
    conversations = turns(6)
    root = run(chat_model, write(tmp_path / "c.jsonl", conversations), tmp_path / "out", dataset=MESSAGES, **ALONE)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    rows = heads_of(root)["l00h00q"].to_pylist()
    for index, messages in enumerate(conversations):
        expected = tokenizer.apply_chat_template(messages)["input_ids"]
        assert [row["token_id"] for row in rows if row["example_id"] == index] == expected
    manifest = manifests.read(root)
    assert manifest["proof"]["proven"] is True and not verify(root).problems
    assert len(manifest["tokenizer"]["chat_template"]) == 64
    card = (root / "README.md").read_text()
    assert "| messages column | messages |" in card and "| text column |" not in card
    assert f"| chat template | sha256 {manifest['tokenizer']['chat_template'][:16]} |" in card
    assert "| special tokens | those of the chat template |" in card


def test_the_sampler_keeps_what_the_assistant_says(chat_model: Path, tmp_path: Path) -> None:
    conversations = turns(4)
    sections: dict[str, Any] = {"sampler": {"segments": ["assistant"]}, "capture": {"capture_segments": True}}
    root = run(chat_model, write(tmp_path / "c.jsonl", conversations), tmp_path / "out", dataset=MESSAGES, **sections)
    rows = heads_of(root)["l00h00q"].to_pylist()
    assert {row["segment"] for row in rows} == {"assistant"}
    for index, messages in enumerate(conversations):
        question, answer = (message["content"] for message in messages)
        start = len(f"u:{question};a:")
        positions = [row["position"] for row in rows if row["example_id"] == index]
        assert positions == [*range(start, start + len(answer))]


def test_characters_are_those_of_the_rendered_text(chat_model: Path, tmp_path: Path) -> None:
    conversations, capture = turns(3), {"capture_offsets": True, "capture_token_ids": True, "layers": [0]}
    root = run(
        chat_model, write(tmp_path / "c.jsonl", conversations), tmp_path / "out", dataset=MESSAGES, capture=capture
    )
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    rendered = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    for row in heads_of(root)["l00h00q"].to_pylist():
        characters = rendered[row["example_id"]][row["char_start"] : row["char_end"]]
        assert characters and tokenizer.decode([row["token_id"]]) == characters


@pytest.mark.slow
def test_it_resumes_and_grows(chat_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "c.jsonl", turns(9))
    undisturbed = run(chat_model, file, tmp_path / "undisturbed", dataset=MESSAGES, **ALONE)
    stopped_after(2, chat_model, file, tmp_path / "out", dataset=MESSAGES, **ALONE)
    assert hashes(run(chat_model, file, tmp_path / "out", dataset=MESSAGES, **ALONE)) == hashes(undisturbed)
    root = tmp_path / "grown"
    run(chat_model, write(tmp_path / "d.jsonl", turns(4)), root, dataset=MESSAGES, **ALONE)
    run(chat_model, write(tmp_path / "d.jsonl", turns(9)), root, dataset=MESSAGES, **ALONE)
    for index in (0, 1):
        run(chat_model, file, tmp_path / "shards", dataset=MESSAGES, shard={"index": index, "count": 2}, **ALONE)
    expected = heads_of(undisturbed)
    for found in (heads_of(root), heads_of(tmp_path / "shards")):
        assert all(keys(found[name]) == keys(expected[name]) for name in expected)
    changed = turns(9)
    changed[2][1]["content"] += "!"
    with pytest.raises(SourceError, match=r"example 2 of the dataset \(id 2\) is not the text"):
        run(chat_model, write(tmp_path / "d.jsonl", changed), root, dataset=MESSAGES, **ALONE)


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_roles_of_the_same_text_are_noticed(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_finished: bool
) -> None:
    template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    sections: dict[str, Any] = {
        "dataset": MESSAGES | {"chat": {"template": template}},
        "capture": {"capture_segments": True, "layers": [0]},
        "inference": {"max_batch_tokens": 40},
        "verify": {"examples": 0},
    }
    conversations, file, root = turns(3), tmp_path / "c.jsonl", tmp_path / "out"
    if is_finished:
        run(chat_model, write(file, conversations), root, **sections)
    else:
        captured_only(chat_model, write(file, conversations), root, monkeypatch, **sections)
    conversations[1][1]["role"] = "tool"
    with pytest.raises(SourceError, match=r"example 1 of the dataset \(id 1\) has other segments"):
        run(chat_model, write(file, conversations), root, **sections)


@pytest.mark.slow
def test_another_template_is_another_dataset(chat_model: Path, tmp_path: Path) -> None:
    file, root = write(tmp_path / "c.jsonl", turns(3)), tmp_path / "out"
    template = tmp_path / "own.jinja"
    template.write_text(TEMPLATE)
    given = MESSAGES | {"chat": {"template": str(template)}}
    run(chat_model, file, root, dataset=given, **ALONE)
    run(chat_model, file, root, dataset=given, **ALONE)
    template.write_text(TEMPLATE.replace(";", "."))
    with pytest.raises(StoreError, match=r"dataset\.chat\.template: 'sha256:[0-9a-f]{64}' there, 'sha256:") as caught:
        run(chat_model, file, root, dataset=given, **ALONE)
    assert "{%" not in str(caught.value)
    other = MESSAGES | {"chat": {"add_generation_prompt": True, "template": TEMPLATE}}
    with pytest.raises(StoreError, match=r"dataset\.chat\.add_generation_prompt: false there, true now"):
        run(chat_model, file, root, dataset=other, **ALONE)

    # No settings of someone else lead to a file of this machine.
    manifest = manifests.read(root)
    assert manifest["config"]["dataset"]["chat"]["template"] == TEMPLATE
    manifest["config"]["dataset"]["chat"]["template"] = str(template)
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / "manifest.json").write_bytes(manifests.encode(manifest))
    with pytest.raises(UnreadableError, match="names a file of this machine as chat template, which is not read"):
        manifests.read(copy)

    # The tokenizer's own: the digest of its files, or of the loaded template, differs.
    own = tmp_path / "own"
    stopped_after(1, chat_model, file, own, dataset=MESSAGES, **ALONE)
    (chat_model / "chat_template.jinja").write_text(TEMPLATE.replace(";", "."))
    with pytest.raises(StoreError, match="commit of the tokenizer"):
        run(chat_model, file, own, dataset=MESSAGES, **ALONE)


def test_what_the_template_refuses_ends_the_job_with_the_row(chat_model: Path, tmp_path: Path) -> None:
    (chat_model / "chat_template.jinja").write_text(
        "{{ raise_exception('no') if messages[0].role == 'tool' else 'a' }}"
    )
    conversations = [*turns(2), [{"role": "tool", "content": "x"}]]
    with pytest.raises(
        SourceError, match=r"example 2 of the dataset \(id 2\) is refused by the chat template of .*: no\."
    ):
        run(chat_model, write(tmp_path / "c.jsonl", conversations), tmp_path / "out", dataset=MESSAGES)


@pytest.mark.slow
def test_conversations_of_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """Its template writes contents as they are, and a system message of its own where there is none."""
    asked, told = {"role": "user", "content": "What is a tuple?\n"}, {"role": "assistant", "content": "A sequence."}
    conversations = [[asked, told, {"role": "user", "content": "user\nassistant<|im_end|>"}]]
    conversations += [[{"role": "system", "content": "Be brief."}, asked, told]]
    root = run(
        smollm2,
        write(tmp_path / "c.jsonl", conversations),
        tmp_path / "out",
        model={"gguf_file": FILE},
        dataset=MESSAGES,
        capture={"capture_segments": True, "capture_token_strings": True, "layers": [0], "heads": [0]},
    )
    tokenizer = AutoTokenizer.from_pretrained(smollm2, gguf_file=FILE)
    found = []
    for index in (0, 1):
        rows = [row for row in heads_of(root)["l00h00q"].to_pylist() if row["example_id"] == index]
        expected = tokenizer.apply_chat_template(conversations[index])["input_ids"]
        assert [row["token_str"] for row in rows] == tokenizer.convert_ids_to_tokens(expected)
        runs = [(name, [row["token_str"] for row in run]) for name, run in groupby(rows, lambda row: row["segment"])]
        found.append([(name, tokenizer.convert_tokens_to_string(strings)) for name, strings in runs])
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    between = "<|im_end|>\n<|im_start|>"
    common = [("user", "What is a tuple?\n"), ("template", f"{between}assistant\n"), ("assistant", "A sequence.")]
    assert found[0] == [
        ("template", f"<|im_start|>system\n{system}{between}user\n"),
        *common,
        ("template", f"{between}user\n"),
        ("user", "user\nassistant<|im_end|>"),
        ("template", "<|im_end|>\n"),
    ]
    assert found[1] == [
        ("template", "<|im_start|>system\n"),
        ("system", "Be brief."),
        ("template", f"{between}user\n"),
        *common,
        ("template", "<|im_end|>\n"),
    ]
    assert manifests.read(root)["proof"]["proven"] is True


@pytest.mark.slow
def test_conversations_are_split_with_their_segments(chat_model: Path, tmp_path: Path) -> None:
    conversations = turns(4)
    capture: dict[str, Any] = {"capture_token_ids": True, "capture_segments": True, "capture_offsets": True}
    sections: dict[str, Any] = {"dataset": MESSAGES, "capture": capture, "sampler": {"type": "all"}}
    file = write(tmp_path / "c.jsonl", conversations)
    whole = run(chat_model, file, tmp_path / "whole", **sections)
    split = {"model": {"tokenizer": {"max_length": 7, "overlong": "split"}}}
    root = run(chat_model, file, tmp_path / "split", **sections, **split)
    assert not verify(root).problems
    columns = ["token_id", "segment", "char_start", "char_end"]
    found, expected = (heads_of(each)["l00h00q"].select(columns).to_pylist() for each in (root, whole))
    assert found == expected and manifests.read(root)["texts"] == 4 < manifests.read(root)["examples"]
