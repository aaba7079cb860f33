"""Texts of odd pieces, and the tokenizers that split them."""

from functools import cache
from typing import Any

from hypothesis import strategies as st

from qk_sniffer.corpus.text_cuts import TextCuts
from support.tokenizers_of_kinds import tokenizer_of

PIECES = (
    *("a", "the", "of the", "is", "statement", "I'll", "it's", "Xy", "naïve", "nai\u0308ve", "straße", "Привет"),
    *(" ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "     ", "\u00a0", "\u3000", "▁", " ▁"),
    *(".", ", ", "...\n", "?!", "//", "'", " '", "12", "3456789", "x1", "_", "\ufb01", "\ufdfa", "\u0130"),
    *("漢字", "漢", "。", "、", "\uff0c", "か\u3099", "\uff76\uff9e", " \uff9e", "한국어", "ไทยำ", "\u0600", "\u0301"),
    *("\U0001f600", "👩\u200d💻", "<s>", "</s>", "<gap>", " <gap> ", "<unk>", "\u200b", "\x00"),
)

texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=60).map("".join)
safe = texts.map(lambda text: text.encode("utf-8", "ignore").decode())


@cache
def parts_of(kind: str) -> tuple[Any, TextCuts]:
    tokenizer = tokenizer_of(kind)
    return tokenizer, TextCuts(tokenizer)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
