"""Tests that vocabularies whose merges would take hours to make are refused before transformers reads them."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qk_sniffer.config import ModelConfig
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.pinned_loads import pinned_loads
from qk_sniffer.corpus.tokenizer import TextTokenizer, load_tokenizer
from qk_sniffer.corpus.vocabulary_files import refuse_long_tokens
from qk_sniffer.errors import SourceError

pytestmark = pytest.mark.floor

LONG = b"ab" * 600_000
"""A token whose merges take minutes to make. A file with it has less than two megabytes."""

BYTES = [bytes([number]) for number in range(256)]


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def sentencepiece(*tokens: bytes, charsmap: bytes = b"") -> bytes:
    """Returns a model of sentencepiece with its pieces, their scores, and a normalizer."""
    scored = (field(1, token) + b"\x15" + struct.pack("<f", -1.5) + b"\x18\x01" for token in tokens)
    return b"".join(field(1, piece) for piece in scored) + field(3, field(2, charsmap))


def tiktoken(*tokens: bytes) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def tekken(*tokens: bytes, special: int = 3) -> bytes:
    described: dict[str, Any] = {
        "config": {"pattern": r"\S+|\s+", "default_num_special_tokens": special},
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for rank, token in enumerate(tokens)],
        "special_tokens": [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(["<unk>", "<s>", "</s>"])
        ],
    }
    return json.dumps(described).encode()


def load(folder: Path, name: str, content: bytes) -> TextTokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / name).write_bytes(content)
    return load_tokenizer(ModelConfig(name=str(folder)))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tekken.json", lambda: tekken(*BYTES, LONG), "has a token of 1,200,000 bytes"),
        ("tekken.json", lambda: tekken(*BYTES, special=10**10), "asks for 10,000,000,000 special tokens"),
        ("tokenizer.model", lambda: sentencepiece(b"a", LONG, b"b"), "has a token of 1,200,0"),
        ("tokenizer.model", lambda: tiktoken(*BYTES, LONG), "has a token of 1,200,000 bytes"),
        ("tiktoken.model", lambda: tiktoken(LONG, *BYTES), "has a token of 1,200,000 bytes"),
    ],
)
def test_a_token_whose_merges_take_long_is_refused(
    name: str, content: Callable[[], bytes], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=rf"{name} is refused: it {problem}.*\. Restore the file, or set model\.tok"):
        load(tmp_path / "folder", name, content())


@pytest.mark.parametrize(
    ("name", "content"), [("tekken.json", tekken(*BYTES, LONG)), ("tokenizer.model.v3", sentencepiece(b"a", LONG))]
)
def test_what_the_package_of_mistral_reads_is_checked_too(
    name: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers gives it files with no other check, if it is installed."""
    from transformers.tokenization_mistral_common import MistralCommonBackend

    monkeypatch.setattr("transformers.utils.import_utils.is_mistral_common_available", lambda: True)
    path = tmp_path / name
    path.write_bytes(content)
    backend: Any = MistralCommonBackend
    with pinned_loads(str(tmp_path), None), pytest.raises(SourceError, match=rf"{name} is refused: it has a token"):
        backend(tokenizer_path=str(path))


def test_a_vocabulary_larger_than_any_is_refused(tmp_path: Path) -> None:
    for name in ("tekken.json", "tokenizer.model", "weights.gguf"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(64_000_001)
    refuse_long_tokens(tmp_path / "weights.gguf")
    for name in ("tekken.json", "tokenizer.model"):
        with pytest.raises(
            SourceError, match=rf"{name} is refused: it has 64.0 MB, which would take hours or fill the mem"
        ):
            refuse_long_tokens(tmp_path / name)


def test_a_vocabulary_of_mistral_loads(tmp_path: Path) -> None:
    loaded = load(tmp_path / "folder", "tekken.json", tekken(*BYTES, b"ab", b" " * 128))
    [tokens] = loaded([Example(0, 0, "0", "ab c")])
    assert loaded.token_strings(tokens.ids) == ["ab", "\u0120", "c"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", lambda: sentencepiece(b"a" * 9_000, *BYTES, charsmap=b"\xff" * 300_000)),
        ("tokenizer.model", lambda: sentencepiece(b"a", LONG)[:-1]),
        ("tokenizer.model", lambda: sentencepiece(b"a") + b"\x80" * 20_000),
        ("qwen.tiktoken", lambda: tiktoken(b"a" * 9_000, *BYTES)),
        ("qwen.tiktoken", lambda: base64.b64encode(LONG)),
        ("vocab.txt", lambda: b"a" * 300_000),
        ("tokenizer.json", lambda: tekken(LONG)),
        ("tekken.json", lambda: b"{"),
        ("tekken.json", lambda: b'{"vocab": [1, {"token_bytes": 2}], "config": []}'),
    ],
)
def test_what_is_short_or_damaged_or_no_vocabulary_is_left_to_its_reader(
    name: str, content: Callable[[], bytes], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content())
    refuse_long_tokens(tmp_path / name)
