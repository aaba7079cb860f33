"""Tests that no tokenizer makes a text many times longer before it splits it."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from support.bpe import save_tokenizer
from support.tokenizers_of_kinds import PARTS, tokenizer_of
from tokenizers import Regex, normalizers, pre_tokenizers

from qk_sniffer.config import ModelConfig
from qk_sniffer.corpus.text_growth import MOST_GROWTH, growth
from qk_sniffer.corpus.tokenizer import load_tokenizer
from qk_sniffer.corpus.tokenizer_files import steps_of
from qk_sniffer.errors import SourceError

pytestmark = pytest.mark.floor

ANY = {"type": "Replace", "pattern": {"Regex": "."}, "content": "e" * 100}
USUAL = [
    normalizers.Replace("``", '"'),
    normalizers.NFKD(),
    normalizers.Replace(Regex(" {2,}"), " "),
    normalizers.Replace(" ", "\u2581"),
    normalizers.Prepend("\u2581"),
]


def precompiled(*texts: bytes) -> dict[str, Any]:
    data = (8).to_bytes(4, "little") + bytes(8) + b"\0".join(texts) + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


@pytest.mark.parametrize(
    ("step", "grown"),
    [
        (json.loads(normalizers.Sequence(USUAL).__getstate__()), 1),
        (json.loads(normalizers.Sequence([normalizers.Replace(Regex("a*"), "bb")] * 5).__getstate__()), 3**5),
        (json.loads(normalizers.Replace(Regex("(?=q)"), "q").__getstate__()), 2),
        (json.loads(normalizers.Replace(Regex(r"\p{L}+"), "q").__getstate__()), 2),
        (json.loads(normalizers.Replace(Regex("x+"), "").__getstate__()), 1),
        (json.loads(normalizers.Replace("ab", "abcde").__getstate__()), 3),
        ({"type": "Sequence", "normalizers": [ANY, {"type": "Sequence", "normalizers": [ANY]}]}, 10_000),
        (precompiled(b"a", "\ufdfa".encode() * 11, b""), 33),
        (precompiled(b"a" * 5000), 5000),
        ({"type": "Precompiled", "precompiled_charsmap": "no base64"}, 1),
        ({"type": "Sequence", "normalizers": 7}, 1),
        ({"type": "Replace"}, 1),
        (["Replace"], 1),
    ],
)
def test_the_growth_of_a_text_follows_from_the_steps(step: Any, grown: int) -> None:
    assert growth({"normalizer": step}) == grown


def test_steps_that_spell_bytes_multiply() -> None:
    steps = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 40)
    assert growth({"pre_tokenizer": json.loads(steps.__getstate__())}) > MOST_GROWTH


@pytest.mark.parametrize("kind", PARTS)
def test_published_tokenizers_grow_little(kind: str) -> None:
    steps = steps_of(tokenizer_of(kind))
    assert steps and growth(steps) <= 4


def test_a_tokenizer_that_fills_the_memory_is_refused(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path)
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text()) | {"normalizer": {"type": "Sequence", "normalizers": [ANY] * 9}}
    file.write_text(json.dumps(described))
    with pytest.raises(SourceError, match="may make a text more than 1,000 times longer"):
        load_tokenizer(ModelConfig(slug="some", name=str(folder)))
