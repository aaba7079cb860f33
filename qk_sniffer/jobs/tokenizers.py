"""Opens what makes tokens of a job's examples: a tokenizer, or nothing but their own ids."""

from collections.abc import Mapping
from functools import cache

from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.token_ids import GivenTokens
from qk_sniffer.corpus.tokenizer import TextTokenizer, load_tokenizer
from qk_sniffer.corpus.tokens import HashOf, Tokenizer, plain_hash
from qk_sniffer.hub.revisions import hub_commit_of
from qk_sniffer.resolved import ResolvedConfig


def open_tokenizer(config: ResolvedConfig, commits: Mapping[str, str | None]) -> Tokenizer:
    """Opens the tokenizer of a job at its commit. Loads none if the examples are token ids, unless for their strings.

    Raises:
        SourceError: it is not found or cannot be loaded.
    """
    if config.dataset.tokens_column is None:
        return _loaded(config, commits)
    strings = _loaded(config, commits) if config.capture.capture_token_strings else None
    tokenizer = config.model.tokenizer
    return GivenTokens(tokenizer.max_length, strings, segments=config.has_segments, split=tokenizer.overlong == "split")


def hasher_of(config: ResolvedConfig, commits: Mapping[str, str | None]) -> HashOf:
    """Returns the function that identifies contents. It loads the tokenizer for the first conversation."""
    if config.dataset.messages_column is None:
        return plain_hash

    @cache
    def tokenizer() -> TextTokenizer:
        return _loaded(config, commits)

    def content_hash(example: Example) -> str:
        return tokenizer().content_hash(example)

    return content_hash


def _loaded(config: ResolvedConfig, commits: Mapping[str, str | None]) -> TextTokenizer:
    chat = None if config.dataset.messages_column is None else config.dataset.chat
    return load_tokenizer(
        config.located,
        hub_commit_of(commits["tokenizer"]),
        chat,
        offsets=config.capture.capture_offsets,
        segments=config.has_segments,
    )
