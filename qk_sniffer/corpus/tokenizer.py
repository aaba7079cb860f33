"""Examples -> tokens -> batches of about equal length.

A window of examples is looked ahead at, tokenised in one go, and cut into batches by length, so that nearly nothing
is padded. What is in a batch follows from the lengths alone: a job that is started again cuts the same batches, and
takes the lengths of the examples that it has finished from its records.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qk_sniffer.config import ModelConfig, TokenizerConfig
from qk_sniffer.corpus.examples import Example
from qk_sniffer.errors import SourceError
from qk_sniffer.hub.revisions import HubUnreachableError, cached_commit, hub_commit, is_hub_id
from qk_sniffer.store.journal import ExampleRecord

_CALL_CHARACTERS = 1 << 22
"""Texts of so many characters go to the tokenizer at once: its working memory is some hundred bytes a token."""


@dataclass(frozen=True)
class Tokens:
    """One tokenised example."""

    index: int
    example_id: int
    source_id: str
    ids: NDArray[np.int32]
    """(num_tokens,)"""
    truncated: bool
    """Whether tokens were cut off at the end."""
    text_hash: str

    @property
    def num_tokens(self) -> int:
        """At least 1."""
        return len(self.ids)

    def record(self) -> ExampleRecord:
        """What the journal and `examples/data.parquet` keep of the example."""
        return ExampleRecord(
            index=self.index,
            example_id=self.example_id,
            source_id=self.source_id,
            num_tokens=self.num_tokens,
            truncated=self.truncated,
            text_hash=self.text_hash,
        )


def text_hash(text: str) -> str:
    """What identifies a text: 128 bits of Blake2b of its UTF-8, in hex."""
    return blake2b(text.encode(), digest_size=16).hexdigest()


def load_tokenizer(config: ModelConfig, commit: str | None = None) -> "TextTokenizer":
    """The tokenizer of `config.tokenizer`, by default the model's own.

    Args:
        commit: of a Hub repository, as an earlier start of the job found it; null pins the revision now.

    Raises:
        SourceError: it is not found or cannot be loaded, or `max_length` has no room for text.
    """
    from transformers import AutoTokenizer

    name = config.tokenizer.name or config.name
    if name is None:
        raise SourceError("There is no tokenizer to load: set model.name.")
    own = name == config.name
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if own and config.gguf_file is not None:
        options["gguf_file"] = config.gguf_file
    local = Path(name)
    if not local.exists():
        if not is_hub_id(name):
            raise SourceError(f"tokenizer {name}: there is no such folder (looked for {local.absolute()}).")
        revision = config.tokenizer.revision or (config.revision if own else None)
        try:
            commit = hub_commit("model", name, commit or revision)
        except HubUnreachableError as unreachable:
            commit = commit or cached_commit("model", name, revision)
            if commit is None:
                raise SourceError(
                    f"tokenizer {name}: {unreachable}, and there is no copy of revision {revision or 'main'} in the "
                    "cache. Start once where the Hub can be reached, or give a local folder as model.tokenizer.name."
                ) from unreachable
            options["local_files_only"] = True
        options["revision"] = commit
    else:
        commit = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(local), **options)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(
            f"The tokenizer of {name} cannot be loaded: {reason[:500].rstrip('.')}. Another one can be given as "
            "model.tokenizer.name."
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up by the library where there are no files for it
        raise SourceError(f"{name} has no tokenizer: give one, a Hub id or a folder, as model.tokenizer.name.")
    return TextTokenizer(tokenizer, config.tokenizer, name=name, commit=commit)


class TextTokenizer:
    """Tokenises examples: cut at the right end to `max_length`, whatever the tokenizer says; never padded."""

    def __init__(self, tokenizer: Any, config: TokenizerConfig, *, name: str, commit: str | None = None) -> None:
        special = tokenizer.num_special_tokens_to_add(pair=False) if config.add_special_tokens else 0
        if config.max_length <= special:  # the library would cut nothing at all
            raise SourceError(
                f"model.tokenizer.max_length={config.max_length} leaves no room for text: the tokenizer of {name} adds "
                f"{special} special tokens."
            )
        tokenizer.truncation_side = "right"
        self._tokenizer = tokenizer
        self._options = {
            "add_special_tokens": config.add_special_tokens,
            "truncation": True,
            "max_length": config.max_length,
            "padding": False,
            "return_attention_mask": False,
        }
        self._skipped = 0
        self.name = name
        self.commit = commit
        """The commit of a Hub repository, else null."""

    @property
    def skipped(self) -> int:
        """Texts so far of which no token was left."""
        return self._skipped

    @property
    def class_name(self) -> str:
        """The library's class that does the work, which may depend on what else is installed."""
        return type(self._tokenizer).__name__

    def __call__(self, examples: Sequence[Example]) -> list[Tokens]:
        """The tokens of each example, in their order; an example of no token is left out and counted."""
        tokens = []
        for part in _by_characters(examples):
            for example, (ids, truncated) in zip(part, self._encode([each.text for each in part]), strict=True):
                if len(ids) == 0:
                    self._skipped += 1
                    continue
                tokens.append(
                    Tokens(
                        example.index,
                        example.example_id,
                        example.source_id,
                        np.asarray(ids, np.int32),
                        truncated,
                        text_hash(example.text),
                    )
                )
        return tokens

    def token_strings(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> list[str]:
        """The tokens as the vocabulary spells them, from which the text can be had back."""
        strings: list[str] = self._tokenizer.convert_ids_to_tokens([int(token) for token in ids])
        return strings

    def _encode(self, texts: list[str]) -> Iterator[tuple[list[int], bool]]:
        if getattr(self._tokenizer, "is_fast", False):
            encodings = self._tokenizer(texts, **self._options).encodings
            yield from ((encoding.ids, bool(encoding.overflowing)) for encoding in encodings)
            return
        for text in texts:  # in a batch, these do not say which of the texts overflowed
            encoded = self._tokenizer(text, return_overflowing_tokens=True, **self._options)
            yield encoded["input_ids"], bool(encoded.get("overflowing_tokens"))


def _by_characters(examples: Sequence[Example]) -> Iterator[list[Example]]:
    part: list[Example] = []
    characters = 0
    for example in examples:
        if part and characters + len(example.text) > _CALL_CHARACTERS:
            yield part
            part, characters = [], 0
        part.append(example)
        characters += len(example.text)
    if part:
        yield part
