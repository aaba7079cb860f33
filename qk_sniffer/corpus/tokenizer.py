"""Loads a tokenizer and turns examples of texts and of conversations into tokens."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qk_sniffer.config import ChatConfig, ModelConfig, TokenizerConfig
from qk_sniffer.corpus.chat import ChatTemplate
from qk_sniffer.corpus.chat_segments import ChatSegments
from qk_sniffer.corpus.contents import ContentError, Conversation, text_hash
from qk_sniffer.corpus.encoder import Encoder
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.panics import panics_as_errors
from qk_sniffer.corpus.pinned_loads import pinned_loads
from qk_sniffer.corpus.segments import Segments
from qk_sniffer.corpus.special_tokens import Encoded, SpecialTokens
from qk_sniffer.corpus.tokenizer_files import (
    difference_from_file,
    libraries_of,
    randomness_of,
    refuse_files_elsewhere,
    refuse_growth,
    steps_of,
)
from qk_sniffer.corpus.tokens import Tokens, check_part, content_error
from qk_sniffer.errors import SourceError
from qk_sniffer.hub.checkpoint_links import own_files
from qk_sniffer.hub.gguf_header import refuse_large_header
from qk_sniffer.hub.json_files import damaged_json
from qk_sniffer.hub.lfs import refuse_pointers
from qk_sniffer.hub.revisions import HubUnreachableError, cached_commit, hub_commit, is_hub_id, refuse_gated
from qk_sniffer.logs import logger

log = logger(__name__)

_JSON_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
"""The files of a tokenizer that hold a JSON object."""

_NOT_IN_TEXTS = ("pad", "image", "audio", "video", "boi_", "eoi_", "boa_", "eoa_")
"""Parts of the names of special tokens that texts do not have."""

_CALL_CHARACTERS = 1 << 22
"""Maximum characters in one call of the tokenizer, which needs some hundred bytes of memory for each token."""


def load_tokenizer(
    config: ModelConfig,
    commit: str | None = None,
    chat: ChatConfig | None = None,
    *,
    offsets: bool = False,
    segments: bool = False,
) -> "TextTokenizer":
    """Loads the tokenizer of `config.tokenizer`, by default the model's own.

    Args:
        commit: the commit of a Hub repository that an earlier start of the job pinned; None pins the revision now.
        chat: the settings of conversations; None for a tokenizer of texts alone.
        offsets: whether to find the characters of tokens.
        segments: whether to find the segments of conversations.

    Raises:
        SourceError: the tokenizer is not found, cannot be loaded, is random or makes texts much longer, a link leads
            out of its folder, it has no chat template for conversations, or `max_length` leaves no tokens for text; or
            it cannot tell the characters of tokens, with `offsets`.
    """
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file

    name = config.tokenizer.name or config.name
    if name is None:
        raise SourceError("there is no tokenizer to load: set model.name")
    own = name == config.name
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if own and config.gguf_file is not None:
        options["gguf_file"] = config.gguf_file
    local = Path(name)
    if not local.exists():
        if not is_hub_id(name):
            raise SourceError(f"tokenizer {name}: there is no such folder (looked for {local.absolute()})")
        revision = config.tokenizer.revision or (config.revision if own else None)
        try:
            commit = hub_commit("model", name, commit or revision)
        except HubUnreachableError as unreachable:
            commit = commit or cached_commit("model", name, revision)
            if commit is None:
                raise SourceError(
                    f"tokenizer {name}: {unreachable}, and the cache has no copy of revision {revision or 'main'}. "
                    "Run once where the Hub can be reached, or set model.tokenizer.name to a local folder"
                ) from unreachable
            options["local_files_only"] = True
        options["revision"] = commit
    else:
        commit = None
    if local.exists():
        refuse_pointers(local, "*.json", "*.model", "*.txt", "*.tiktoken")
    try:
        with own_files(name, commit):
            where = {key: options[key] for key in ("revision", "local_files_only") if key in options}
            refuse_files_elsewhere(str(local), trust_remote_code=config.trust_remote_code, **where)
            if "gguf_file" in options:
                refuse_large_header(Path(str(cached_file(str(local), options["gguf_file"], **where))))
            with panics_as_errors(), pinned_loads(str(local), commit):
                tokenizer = AutoTokenizer.from_pretrained(str(local), **options)
            if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers returns an empty one without files
                raise SourceError(
                    f"{name} has no tokenizer: set model.tokenizer.name to a Hub id or a folder that has one"
                )
            refuse_growth(name, steps_of(tokenizer))
            if random := randomness_of(tokenizer):
                raise SourceError(
                    f"the tokenizer of {name} splits a text differently each time: {random}. Set model.tokenizer.name "
                    "to a copy of it without this setting"
                )
            with panics_as_errors():
                loaded = TextTokenizer(
                    tokenizer, config.tokenizer, name=name, commit=commit, chat=chat, offsets=offsets, segments=segments
                )
            loaded.libraries = libraries_of(tokenizer, str(local), commit)
    except SourceError:
        raise
    except Exception as error:
        refuse_gated("model", name, error)
        damaged = damaged_json(local / file for file in _JSON_FILES)
        reason = damaged or " ".join(str(error).split()) or type(error).__name__
        raise SourceError(
            f"the tokenizer of {name} cannot be loaded: {reason[:500].rstrip('.')}. "
            f"{'Restore the file, or set' if damaged else 'Set'} model.tokenizer.name to use another one"
        ) from error
    if "gguf_file" not in options and (found := difference_from_file(tokenizer, str(local), commit)):
        log.warning(
            "transformers reads the tokenizer of %s as %s, which does not split texts as its tokenizer.json says: %s. "
            "The tokens of transformers are captured. If they are wrong, set model.tokenizer.name to a copy of the "
            'tokenizer with "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json',
            name,
            loaded.class_name,
            found,
        )
    return loaded


class TextTokenizer:
    """Tokenizes texts and conversations. Cuts them at the right end to `max_length` tokens, and never pads.

    With `overlong=split`, a text is split into consecutive parts of at most `max_length` tokens instead. Each part is
    between the special tokens, as a text is. All parts but the last have `max_length` tokens.

    Special tokens are added to every text (`add_special_tokens=True`), to none (False), or only where the text does not
    have them already ("auto"). A chat template writes them itself, so that conversations get no further ones.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: TokenizerConfig,
        *,
        name: str,
        commit: str | None = None,
        chat: ChatConfig | None = None,
        offsets: bool = False,
        segments: bool = False,
    ) -> None:
        """Takes a tokenizer of transformers. The other arguments are those of `load_tokenizer`."""
        special = tokenizer.num_special_tokens_to_add(pair=False)
        self._special: SpecialTokens | None = None
        """The special tokens that this object adds; None if the tokenizer adds them."""
        self._splits, self._adds_always = config.overlong == "split", config.add_special_tokens is True
        if chat is not None or not config.add_special_tokens:
            self._special = SpecialTokens()
        elif self._splits or not self._adds_always:
            way_out = f"set model.tokenizer.add_special_tokens={'' if self._splits else 'true or '}false"
            self._special = SpecialTokens.of(tokenizer, name, way_out)
        if self._special is not None:
            special = len(self._special)
        if config.max_length <= special:  # the library would not cut the texts
            raise SourceError(
                f"model.tokenizer.max_length={config.max_length} leaves no tokens for text: the tokenizer of {name} "
                f"adds {special} special tokens"
            )
        if (offsets or (segments and chat is not None)) and not getattr(tokenizer, "is_fast", False):
            asked = "capture.capture_offsets is true" if offsets else "segments of conversations are asked for"
            raise SourceError(
                f"{asked}, but the tokenizer of {name}, {type(tokenizer).__name__}, does not tell the characters of "
                f"its tokens. {'Set capture.capture_offsets=false' if offsets else 'Capture without segments'}, or set "
                "model.tokenizer.name to a copy of it with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._max_length = config.max_length
        self._chat = None if chat is None else ChatTemplate(tokenizer, chat, name=name)
        self._segments = None if self._chat is None or not segments else ChatSegments(self._chat)
        self._keeps_offsets = offsets
        self._encoder = Encoder(
            tokenizer,
            self._special,
            config.max_length,
            split=self._splits,
            always=self._adds_always,
            offsets=offsets or self._segments is not None,
        )
        self._skipped = 0
        self._num_embeddings: int | None = None
        self.name = name
        self.commit = commit
        """The commit of a Hub repository; None for a local folder."""
        self.libraries: list[str] = []
        """The packages that split its texts, or have read its vocabulary, but `tokenizers`."""

    @property
    def skipped(self) -> int:
        """The number of texts so far that gave no token."""
        return self._skipped

    @property
    def kind(self) -> type:
        """The class that tokenizes: one of transformers, or of the checkpoint's own code."""
        return type(self._tokenizer)

    @property
    def class_name(self) -> str:
        """The class of transformers that tokenizes. It may depend on the installed packages."""
        return type(self._tokenizer).__name__

    @cached_property
    def largest_id(self) -> int:
        """The largest id of the vocabulary and of the added tokens.

        Padding, and what stands for an image, audio or a video, is left out: a text normally has none, and models are
        used with tokenizers that have such a token more than the model.
        """
        named = self._tokenizer.special_tokens_map
        unused = {str(named[key]) for key in named if any(part in key for part in _NOT_IN_TEXTS)}
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        return max(number for token, number in vocabulary.items() if token not in unused)

    def check_fits(self, num_embeddings: int | None, model: str) -> None:
        """Checks that the embedding of `model`, of `num_embeddings` rows, has one for each token; None: not known yet.

        Raises:
            SourceError: it has not.
        """
        if num_embeddings is None:
            return
        if self.largest_id >= num_embeddings:
            raise SourceError(
                f"the tokenizer of {self.name} has ids up to {self.largest_id} "
                f"({self.token_strings([self.largest_id])[0]!r}), and the embedding of {model} has {num_embeddings} "
                f"rows, for ids up to {num_embeddings - 1}: it is not the tokenizer of this model. Set "
                "model.tokenizer.name to the one that the model was trained with"
            )
        self._num_embeddings = num_embeddings

    def __call__(self, examples: Sequence[Example]) -> list[Tokens]:
        """Returns the tokens of each example, in their order. An example without tokens is left out and counted.

        Raises:
            SourceError: the tokenizer fails, or a text has a token that the model's embedding has no row for.
        """
        return [*chain.from_iterable(self.parts(examples))]

    def parts(self, examples: Sequence[Example]) -> Iterator[Iterator[Tokens]]:
        """Yields the parts of each example, in their order: see `Tokenizer`."""
        for some in _by_characters((example, self._text(example)) for example in examples):
            short = [(example, text) for example, text in some if not self._encoder.is_made_in_pieces(text)]
            encoded = {example.index: parts for (example, _), parts in zip(short, self._encoded(short), strict=True)}
            for example, text in some:
                parts = encoded.pop(example.index, None)
                yield self._tokens(example, text, self._pieces(example, text) if parts is None else parts)

    def _tokens(self, example: Example, text: str, parts: Iterable[Encoded]) -> Iterator[Tokens]:
        hashed, segments = None, None
        if self._segments is not None:
            parts = [*parts]
            segments = self._segments_of(example, text, parts)
        for number, encoded in enumerate(parts):
            if len(encoded.ids) == 0:
                self._skipped += 1
                return
            self._check_ids(example, encoded.ids)
            if self._splits:
                check_part(example, number, self._max_length)
            hashed = hashed or text_hash(text)
            yield Tokens(
                example.index,
                example.example_id,
                example.source_id,
                np.asarray(encoded.ids, np.int32),
                encoded.left_out,
                hashed,
                encoded.begins_special,
                encoded.ends_special,
                None if segments is None else segments[number],
                encoded.offsets if self._keeps_offsets else None,
                part=number,
                first_token=encoded.first_token,
                is_last=encoded.is_last,
            )

    def content_hash(self, example: Example) -> str:
        """Returns the `text_hash` of the example's tokens: that of its text, or of the one that the template renders.

        Raises:
            SourceError: the template refuses the conversation.
        """
        return text_hash(self._text(example))

    def token_strings(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> list[str]:
        """Returns the tokens as the vocabulary spells them; empty strings for ids without a token.

        A text can be restored from those of its tokens.
        """
        strings: list[str | None] = self._tokenizer.convert_ids_to_tokens([int(token) for token in ids])
        return [string or "" for string in strings]

    def added_tokens(self) -> dict[str, list[str]] | None:
        """Returns the special tokens `before` and `after` each text, as the vocabulary spells them.

        None if they are added to every text, or to none, whatever it begins with.
        """
        if self._adds_always or not self._special:
            return None
        return {"before": self.token_strings(self._special.before), "after": self.token_strings(self._special.after)}

    def facts(self) -> dict[str, Any]:
        """Returns what the record of a job holds of the tokenizer."""
        added = self.added_tokens()
        return (
            {"class": self.class_name}
            | ({} if added is None else {"special_tokens": added})
            | ({} if self._chat is None else {"chat_template": self._chat.digest})
        )

    def _text(self, example: Example) -> str:
        """Returns the text of an example, whose content is one, or messages."""
        if isinstance(example.content, str):
            return example.content
        assert isinstance(example.content, Conversation) and self._chat is not None
        try:
            return self._chat.render(example.content.messages)
        except ContentError as error:
            raise content_error(example, error) from error

    def _segments_of(self, example: Example, text: str, parts: Sequence[Encoded]) -> list[Segments] | None:
        """Returns the segments of the parts of a conversation; None if they were not asked for, or of a text."""
        if self._segments is None or not isinstance(example.content, Conversation):
            return None
        offsets = [part.offsets for part in parts if part.offsets is not None]
        try:
            whole = self._segments.of(example.content.messages, text, np.concatenate(offsets))
        except ContentError as error:
            raise content_error(example, error) from error
        stops = np.cumsum([len(part.ids) for part in parts]).tolist()
        return [whole.between(stop - len(part.ids), stop) for part, stop in zip(parts, stops, strict=True)]

    def _check_ids(self, example: Example, ids: Sequence[int]) -> None:
        if None in ids:  # of some tokenizers in Python
            raise SourceError(
                f"the tokenizer of {self.name} has no id for a token of example {example.index} of the dataset (id "
                f"{example.source_id}). Set model.tokenizer.name to the tokenizer that the model was trained with"
            )
        if self._num_embeddings is not None and (largest := max(ids)) >= self._num_embeddings:
            raise SourceError(
                f"example {example.index} of the dataset (id {example.source_id}) has the token "
                f"{self.token_strings([largest])[0]!r} of the id {largest}, and the embedding of the model has "
                f"{self._num_embeddings} rows. Remove the token from the text, or set model.tokenizer.name to the "
                "tokenizer that the model was trained with"
            )

    def _encoded(self, texts: "Sequence[tuple[Example, str]]") -> list[Sequence[Encoded]]:
        """Returns the parts of each text."""
        try:
            with panics_as_errors():
                return list(self._encoder([text for _, text in texts]))
        except MemoryError:
            raise
        except Exception as error:  # tokenizers raise any class of error
            for one in texts if len(texts) > 1 else ():
                self._encoded([one])
            raise self._failed(texts[0][0], error) from error

    def _pieces(self, example: Example, text: str) -> Iterator[Encoded]:
        """Yields the parts of a long text."""
        try:
            with panics_as_errors():
                yield from self._encoder.pieces(text)
        except MemoryError:
            raise
        except Exception as error:
            raise self._failed(example, error) from error

    def _failed(self, example: Example, error: Exception) -> SourceError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return SourceError(
            f"the tokenizer of {self.name} fails at example {example.index} of the dataset (id {example.source_id}): "
            f"{reason[:500].rstrip('.')}. Set model.tokenizer.name to the tokenizer that the model was trained with"
        )


def _by_characters(texts: Iterable[tuple[Example, str]]) -> Iterator[list[tuple[Example, str]]]:
    part: list[tuple[Example, str]] = []
    characters = 0
    for example, text in texts:
        if part and characters + len(text) > _CALL_CHARACTERS:
            yield part
            part, characters = [], 0
        part.append((example, text))
        characters += len(text)
    if part:
        yield part
