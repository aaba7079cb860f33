"""Tests that no tokenizer makes a text many times longer."""

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


def described(part: Any) -> Any:
    return json.loads(part.__getstate__())


def template(*pieces: str, pair: tuple[str, ...] = ("A", "B")) -> dict[str, Any]:
    """A post-processor that puts "<s>" (ten tokens) and the texts A and B together."""
    lists = [
        [{"Sequence" if len(each) == 1 else "SpecialToken": {"id": each, "type_id": 0}} for each in some]
        for some in (pieces, pair)
    ]
    special = {"<s>": {"id": "<s>", "ids": [0] * 10, "tokens": ["<s>"] * 10}}
    return {"type": "TemplateProcessing", "single": lists[0], "pair": lists[1], "special_tokens": special}


@pytest.mark.parametrize(
    ("step", "grown"),
    [
        (described(normalizers.Sequence(USUAL)), 2),
        (described(normalizers.Sequence([normalizers.Replace(Regex("a*"), "bb")] * 5)), 2 * 3**5 - 1),
        (described(normalizers.Replace("ab", "abcde")), 3),
        ({"type": "Sequence", "normalizers": [ANY, {"type": "Sequence", "normalizers": [ANY]}]}, 10_000),
        ({"normalizers": [ANY | {"type": "Unknown"}, {"prepend": "abc"}]}, 103),
        (precompiled(b"a", "\ufdfa".encode() * 11, b""), 18 * 11),
        (precompiled(b"a" * 5000), 5000),
        ({"type": "Precompiled", "precompiled_charsmap": "no base64"}, 1),
        ({"type": "Sequence", "normalizers": 7}, 1),
        ({"type": "Replace"}, 1),
        (["Replace"], 1),
    ],
)
def test_the_growth_of_a_text_follows_from_the_steps(step: Any, grown: int) -> None:
    assert growth({"normalizer": step}) == grown


@pytest.mark.parametrize(
    "step",
    [
        *(
            normalizers.Replace(Regex(pattern), "x")
            for pattern in ("b{2}?", "b{2,0}", "b{2}{0}", "b??", "(?=a)", "", "$")
        ),
        normalizers.Replace(Regex(r"\s+"), "  "),
        normalizers.Sequence([normalizers.Replace(Regex("."), "\ufdfa"), normalizers.NFKD()]),
        normalizers.Sequence([normalizers.Replace(" ", "\u6f22"), normalizers.BertNormalizer()]),
        normalizers.Sequence(
            [normalizers.Replace(Regex("."), "\U0001d11e"), normalizers.ByteLevel(), normalizers.NFKC()]
        ),
        pre_tokenizers.Sequence([pre_tokenizers.Metaspace("a"), pre_tokenizers.Metaspace("b")]),
        pre_tokenizers.ByteLevel(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("text", ["a", "a \u6f22", "\U0001f600"])
def test_no_text_grows_more_than_its_bound(step: Any, text: str) -> None:
    is_normalizer = isinstance(step, normalizers.Normalizer)
    for times in (1, 2, 3):
        steps = [step] * times
        whole: Any = normalizers.Sequence(steps) if is_normalizer else pre_tokenizers.Sequence(steps)
        if is_normalizer:
            grown = len(whole.normalize_str(text))
        else:
            grown = sum(len(piece) for piece, _ in whole.pre_tokenize_str(text))
        bound = growth({"normalizer" if is_normalizer else "pre_tokenizer": described(whole)})
        assert grown <= bound * len(text) or bound > MOST_GROWTH


@pytest.mark.parametrize(
    ("pattern", "grown"),
    [("  +", 1), (" {2,}", 1), (r"[\r\n]+", 1), (r"\p{L}\s{3}", 1), (".", 1), ("a*", 3), ("a|b", 3), ("[a&&[b]]", 3)],
)
def test_usual_patterns_match_a_character(pattern: str, grown: int) -> None:
    assert growth({"normalizer": described(normalizers.Replace(Regex(pattern), "x"))}) == grown


@pytest.mark.parametrize(
    ("step", "grown"),
    [
        (template("<s>", "A", "<s>"), 21),
        (template("A", pair=("<s>", "A", "B")), 11),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel", "trim_offsets": True}, template("<s>", "A")]}, 11),
        ({"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]}, 3),
        (template("A", "A"), MOST_GROWTH + 1),
        (template("A", pair=("A", "A", "B")), MOST_GROWTH + 1),
        ({"type": "TemplateProcessing", "single": ["A", {"Sequence": "A"}], "special_tokens": 7}, 1),
    ],
)
def test_a_template_counts_what_it_adds_and_repeats(step: Any, grown: int) -> None:
    assert growth({"post_processor": step}) == grown


def test_steps_that_spell_bytes_multiply() -> None:
    steps = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 40)
    assert growth({"pre_tokenizer": described(steps)}) > MOST_GROWTH


@pytest.mark.parametrize("kind", PARTS)
def test_published_tokenizers_grow_little(kind: str) -> None:
    steps = steps_of(tokenizer_of(kind))
    assert "post_processor" in steps and growth(steps) <= 120


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [ANY] * 9}},
        {"normalizer": {"normalizers": [{"pattern": {"Regex": "b{2}?"}, "content": "x"}] * 34}},
        {"post_processor": template("A", "A")},
    ],
)
def test_a_tokenizer_that_fills_the_memory_is_refused(part: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | part))
    with pytest.raises(SourceError, match=r"of its tokenizer\.json may make a text more than 1,000 times longer"):
        load_tokenizer(ModelConfig(slug="some", name=str(folder)))
