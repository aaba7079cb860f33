"""Opens what makes tokens of a job's examples: a tokenizer, or nothing but their own ids."""

from collections.abc import Callable, Mapping
from functools import cache, partial

from qk_sniffer.corpus.token_ids import GivenTokens
from qk_sniffer.corpus.tokenizer import TextTokenizer, load_tokenizer
from qk_sniffer.corpus.tokens import Tokenizer
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


def tokenizer_once(config: ResolvedConfig, commits: Mapping[str, str | None]) -> Callable[[], Tokenizer]:
    """Returns a function that opens the tokenizer of a job at its first call."""
    return cache(partial(open_tokenizer, config, commits))


def _loaded(config: ResolvedConfig, commits: Mapping[str, str | None]) -> TextTokenizer:
    chat = None if config.dataset.messages_column is None else config.dataset.chat
    return load_tokenizer(
        config.located,
        hub_commit_of(commits["tokenizer"]),
        chat,
        offsets=config.capture.capture_offsets,
        segments=config.has_segments,
    )
