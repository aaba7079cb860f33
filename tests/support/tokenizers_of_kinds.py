"""Trains one small tokenizer for each way in which published ones split texts."""

from collections.abc import Callable
from functools import cache
from pydoc_data.topics import topics
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PHRASES = r"[A-Za-z]+ of|[^\s]+|\s+"
"""Takes two words together."""

TEXTS = [topics[name] for name in sorted(topics)[:8]]


@cache
def _trained(kind: str) -> Tokenizer:
    special = ["<unk>", "<s>", "</s>"]
    options: dict[str, Any] = {"vocab_size": 600, "special_tokens": special, "show_progress": False}
    if kind.startswith("unigram"):
        tokenizer = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(unk_token="<unk>", **options)
    elif kind.startswith("wordpiece"):
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        trainer = trainers.WordPieceTrainer(**options)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        if "byte" in kind:
            options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(**options)
    PARTS[kind](tokenizer)
    tokenizer.train_from_iterator(TEXTS, trainer)
    AFTER.get(kind, lambda _: None)(tokenizer)
    return tokenizer


def _byte_level(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _byte_level_split(pattern: str, behavior: str = "isolated", *, invert: bool = False) -> Callable[[Tokenizer], None]:
    def parts(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Split(Regex(pattern), behavior, invert=invert),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return parts


def _metaspace(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")


def _without_words(tokenizer: Tokenizer) -> None:
    """The normalizer of Llama 2, without a pre-tokenizer. Words are split for training alone."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")


def _drop_pre_tokenizer(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = None


def _t5(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(left=False),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])


def _bert(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()


def _add_phrase(tokenizer: Tokenizer) -> None:
    """Adds a token with a letter before a space, and one that takes the white space around it."""
    tokenizer.add_tokens(["of the", AddedToken("<gap>", lstrip=True, rstrip=True)])


def _looks_ahead(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Replace(Regex("a(?= .*z)"), "e")
    _byte_level(tokenizer)


def _whole(tokenizer: Tokenizer) -> None:
    """Without a pre-tokenizer, trained on whole texts: tokens have several words."""
    tokenizer.normalizer = normalizers.Replace(" ", "▁")


PARTS: dict[str, Callable[[Tokenizer], None]] = {
    "bpe-bytes": _byte_level,
    "bpe-bytes-gpt4": _byte_level_split(GPT4),
    "bpe-bytes-gpt4o": _byte_level_split(GPT4O, "removed", invert=True),
    "bpe-metaspace": _metaspace,
    "bpe-without-words": _without_words,
    "unigram": _t5,
    "unigram-metaspace": _metaspace,
    "wordpiece": _bert,
    "bpe-bytes-added": _byte_level,
    "bpe-bytes-phrases": _byte_level_split(PHRASES),
    "bpe-bytes-looks-ahead": _looks_ahead,
    "bpe-whole": _whole,
}

AFTER = {"bpe-without-words": _drop_pre_tokenizer, "bpe-bytes-added": _add_phrase}

SEPARATORS = {
    "bpe-bytes": " \n、。\uff0c",
    "bpe-bytes-gpt4": " \n、。\uff0c",
    "bpe-bytes-gpt4o": " \n、。\uff0c",
    "bpe-metaspace": " ",
    "bpe-without-words": " ",
    "unigram": " \n\uff0c",
    "unigram-metaspace": " ",
    "wordpiece": " \n",
    "bpe-bytes-added": "\n、。\uff0c",
    "bpe-bytes-phrases": "\n",
    "bpe-bytes-looks-ahead": "",
    "bpe-whole": "",
}
"""The characters between letters that texts can be cut at, by the kind of the tokenizer."""


def tokenizer_of(kind: str, *, special: bool = True) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a kind, which puts `<s>` before and `</s>` after a text, unless `special` is false."""
    tokenizer = Tokenizer.from_str(_trained(kind).to_str())
    tokenizer.decoder = decoders.ByteLevel()
    if special:
        ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
