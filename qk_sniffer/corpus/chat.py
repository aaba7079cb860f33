"""Renders conversations with the chat template of a tokenizer.

The library transformers runs a template, in the sandbox of its environment of Jinja. The text is the one that
`apply_chat_template` makes: its tokens are those of the text without further special tokens.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from hashlib import sha256
from typing import Any

from qk_sniffer.config import ChatConfig
from qk_sniffer.corpus.contents import ContentError, is_unicode
from qk_sniffer.errors import SourceError
from qk_sniffer.resolved import is_template
from qk_sniffer.text import shortened

_CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"\\{}]*)(?P=quote)\s*\)""")
"""The calls by which a template writes today's date."""

_NO_CLOCK = "the clock is not available"
"""Takes the place of the function `strftime_now`. A template that calls it fails."""

_MOST_REASON, _MOST_NAME = 300, 50
"""The most characters that are shown of the reason of a refusal, and of a role or the name of a template."""

_REPEATED = 8
"""The first conversations, which are rendered a second time to see whether the text is the same."""


class ChatTemplate:
    """A chat template, ready to render conversations.

    Attributes:
        source: the template's source.
        digest: the sha256 of the source, in hex.
    """

    def __init__(self, tokenizer: Any, config: ChatConfig, *, name: str) -> None:
        """`tokenizer` is one of transformers, and `name` is its name in errors.

        Raises:
            SourceError: there is no such template, or it writes today's date and `config` gives none.
        """
        self._tokenizer = tokenizer
        self._name = name
        self._options = {"tokenize": False, "add_generation_prompt": config.add_generation_prompt, **config.kwargs}
        self.source = _source(tokenizer, config, name)
        self.digest = sha256(self.source.encode()).hexdigest()
        self._left_to_repeat = _REPEATED
        self._template = self.source if config.date is None else _dated(self.source, date.fromisoformat(config.date))
        if "strftime_now" in self._template:
            self._check_date()

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Returns the text of a conversation, special tokens included.

        Raises:
            ContentError: the template refuses the messages, fails, or writes another text each time.
        """
        text = self._rendered(messages)
        if self._left_to_repeat:
            self._left_to_repeat -= 1
            if self._rendered(messages) != text:
                raise ContentError(
                    f"is rendered differently each time by the chat template of {self._name}, as by the filter "
                    "`random` of Jinja. Set dataset.chat.template to one that is not random"
                )
        return text

    def _rendered(self, messages: Sequence[Mapping[str, Any]]) -> str:
        options = {"strftime_now": _NO_CLOCK, **self._options, "chat_template": self._template}
        try:
            text: str = self._tokenizer.apply_chat_template([dict(message) for message in messages], **options)
        except MemoryError:
            raise
        except Exception as error:  # a template raises any class of error
            if isinstance(error, TypeError) and "strftime_now" in self._template and "not callable" in str(error):
                raise _NoDateError(
                    f"cannot be rendered: the chat template of {self._name} writes today's date, with which the tokens "
                    "would change from day to day. Set the date that it is to write: dataset.chat.date=2025-01-31"
                ) from error
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ContentError(
                f"is refused by the chat template of {self._name}: {reason[:_MOST_REASON].rstrip('.')}. The roles of "
                f"its messages are {shortened([message['role'][:_MOST_NAME] for message in messages], 6)}"
            ) from error
        if not is_unicode(text):
            raise ContentError("has half a surrogate pair, which is no character, in its messages")
        return text

    def _check_date(self) -> None:
        """Checks, before the model is loaded, that the template does not write today's date in a short conversation."""
        try:
            self.render([{"role": "user", "content": "Hello"}])
        except _NoDateError as error:
            raise SourceError(f"a conversation {error}") from error
        except ContentError:  # it may have reasons that do not apply to the conversations of the dataset
            pass


class _NoDateError(ContentError):
    """A template asks for the date."""


def _source(tokenizer: Any, config: ChatConfig, name: str) -> str:
    if config.template is not None and is_template(config.template):
        return config.template
    own = getattr(tokenizer, "chat_template", None)
    named = own if isinstance(own, dict) else {}
    has = f"Its templates are {shortened(sorted(named), 10)}" if named else "It has one template, without a name"
    if config.template is not None:
        if config.template not in named:
            shown = config.template[:_MOST_NAME]
            raise SourceError(
                f"dataset.chat.template={shown}: the tokenizer of {name} has no chat template of this name. "
                f"{has if own else 'It has none at all'}. Give a name, a file (./my.jinja), or null for its own"
            )
        return str(named[config.template])
    if not own:
        raise SourceError(
            f"the tokenizer of {name} has no chat template, which makes the texts of dataset.messages_column: set "
            "dataset.chat.template to a file with one (./my.jinja), or model.tokenizer.name to the tokenizer of a "
            "chat model"
        )
    try:
        return str(tokenizer.get_chat_template(None, config.kwargs.get("tools")))
    except ValueError as error:
        raise SourceError(
            f"the tokenizer of {name} has several chat templates, and none is the default. {has}: set "
            "dataset.chat.template to one"
        ) from error


def _dated(template: str, day: date) -> str:
    """Returns a template that writes `day` where it would write the date of today."""
    return _CLOCK.sub(lambda call: repr(day.strftime(call["format"])), template)
