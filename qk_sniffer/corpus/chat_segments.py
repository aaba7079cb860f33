"""Finds the segment of each token of a conversation: the role of the message that the token belongs to.

The template is rendered a second time, with marks in the messages: characters of a private use area, at the start and
at the end of each part. Without its marks, the second text must be the first one. Then the marks show where the
template puts each part. Texts are not searched for, so a message may hold what another message or the template holds
too.

A template may strip the white space at the ends of messages, which marks around it would keep. In messages of such a
role, the marks stand within the white space, and what the template writes instead is of the template. If the texts
still differ, marks change what the template writes, and the conversation is refused.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qk_sniffer.corpus.chat import ChatTemplate
from qk_sniffer.corpus.contents import ContentError
from qk_sniffer.corpus.segments import OF_CONVERSATIONS, Segments
from qk_sniffer.corpus.special_tokens import Offsets
from qk_sniffer.text import shortened

_TEMPLATE, _THINKING = OF_CONVERSATIONS.index("template"), OF_CONVERSATIONS.index("thinking")

_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"developer": "system", "model": "assistant", "function": "tool", "ipython": "tool", "observation": "tool"},
}
"""The segment of messages of each role."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
"""The fields of messages in which an assistant thinks."""

_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""The tags around the text in which an assistant thinks. They count where the template names the second one."""

_FIRST_MARK, _MOST_MARKS = 0x10_0000, 0xFFFE
"""The marks: a private use area of Unicode. Part number n begins with mark 2n and ends with mark 2n + 1."""

_MARK = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_FIRST_MARK + _MOST_MARKS - 1)}]")

_AMBIGUOUS = (
    "has messages whose place in the text cannot be told: with marks in them, the chat template writes another text. "
    "Set dataset.chat.template to one that writes messages as they are, or capture without segments"
)


class ChatSegments:
    """Finds the segments of conversations that one chat template renders."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._tags = tuple(tags for tags in _TAGS if tags[1] in template.source)

    def of(self, messages: Sequence[Mapping[str, Any]], text: str, offsets: Offsets) -> Segments:
        """Returns the segments of the first tokens of a conversation that is rendered as `text`.

        A token may hold characters of several segments. It belongs to that of its last character that is of a message
        and no white space. If it has none, it belongs to that of its last character.

        Args:
            offsets: (num_tokens, 2), the first character of each token and the one after its last.

        Raises:
            ContentError: a message of an unknown role, or whose place in the text cannot be told.
        """
        return Segments(OF_CONVERSATIONS, _of_tokens(self._of_characters(messages, text), text, offsets))

    def _of_characters(self, messages: Sequence[Mapping[str, Any]], text: str) -> NDArray[np.int32]:
        """Returns the segment of each character of `text`."""
        if _MARK.search(text):
            raise ContentError(
                "has characters from U+100000 on, which the search for segments puts into messages itself: capture "
                "without segments"
            )
        every = range(len(OF_CONVERSATIONS))
        codes, padded = self._marked(messages, text, every)
        if codes is None and padded:
            whole: list[int] = []
            codes, _ = self._marked(messages, text, whole)
            for code in padded:
                wider, _ = self._marked(messages, text, [*whole, code])
                if wider is not None:
                    codes, whole = wider, [*whole, code]
        if codes is None:
            raise ContentError(_AMBIGUOUS)
        return codes

    def _marked(
        self, messages: Sequence[Mapping[str, Any]], text: str, whole: Collection[int]
    ) -> tuple[NDArray[np.int32] | None, list[int]]:
        """Returns the segment of each character of `text`, and the segments with white space at ends of messages.

        The first is None if marks change the text.

        Args:
            whole: the segments in which white space at the ends of messages is between the marks.
        """
        marker = _Marker(whole, self._tags)
        marked = [marker.message(message) for message in messages]
        try:
            rendered = self._template.render(marked)
        except ContentError:  # without marks, it was not refused
            return None, marker.padded
        calls = chain.from_iterable(_calls(message) for message in marked)
        return _read_marks(marker.around_json(rendered, calls), text, marker.codes, marker.of_calls), marker.padded


class _Marker:
    """Puts marks into messages.

    Attributes:
        codes: the segment of each part with marks.
        of_calls: the numbers of the parts that are of tool calls.
        padded: the segments with white space at the ends of messages.
    """

    def __init__(self, whole: Collection[int], tags: Sequence[tuple[str, str]]) -> None:
        self.codes: list[int] = []
        self.of_calls: set[int] = set()
        self.padded: list[int] = []
        self._whole = whole
        self._tags = tags

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a message with marks in its content, its reasoning and its tool calls."""
        segment = _ROLES.get(message["role"])
        if segment is None:
            raise ContentError(
                f"has a message of the role {message['role'][:50]!r}, whose segment is not known. Roles that have one: "
                f"{shortened([*_ROLES], 20)}"
            )
        code = OF_CONVERSATIONS.index(segment)
        tags = self._tags if segment == "assistant" else ()
        marked = dict(message)
        content = message.get("content")
        if isinstance(content, str):
            marked["content"] = self._text(content, code, tags)
        elif isinstance(content, list):
            marked["content"] = [part | {"text": self._text(part["text"], code, tags)} for part in content]
        for field in _REASONING:
            if isinstance(message.get(field), str):
                marked[field] = self._text(message[field], _THINKING)
        if isinstance(message.get("tool_calls"), list):
            first = len(self.codes)
            marked["tool_calls"] = [self._call(call, code) for call in message["tool_calls"]]
            self.of_calls.update(range(first, len(self.codes)))
        return marked

    def around_json(self, rendered: str, calls: Iterator[Mapping[str, Any]]) -> str:
        """Returns a rendered text in which the JSON of tool calls is whole parts, with its brackets and commas."""
        for call in calls:
            function = call.get("function")
            inner = function if isinstance(function, dict) else call
            for value in (call, function, inner.get("arguments")):
                if not isinstance(value, dict):
                    continue
                written = json.dumps(value, ensure_ascii=False)
                if (mark := _MARK.search(written)) and written in rendered:
                    code = self.codes[(ord(mark[0]) - _FIRST_MARK) // 2]
                    rendered = rendered.replace(written, self._between_marks(_MARK.sub("", written), code))
                    break
        return rendered

    def _call(self, call: Any, code: int) -> Any:
        if not isinstance(call, dict):
            return call
        marked = {key: self._values(value, code) for key, value in call.items() if key in ("name", "arguments")}
        if isinstance(function := call.get("function"), dict):
            marked["function"] = self._call(function, code)
        return call | marked

    def _values(self, value: Any, code: int) -> Any:
        if isinstance(value, dict):
            return {self._text(key, code): self._values(each, code) for key, each in value.items()}
        if isinstance(value, list):
            return [self._values(each, code) for each in value]
        return self._text(value, code) if isinstance(value, str) else value

    def _text(self, text: str, code: int, tags: Sequence[tuple[str, str]] = ()) -> str:
        """Returns a text with marks around its parts: all of it, or the parts around and between tags."""
        pieces, at = [], 0
        for first, stop, of_part in _parts(text, code, tags):
            part = text[first:stop]
            begin, end = first + len(part) - len(part.lstrip()), first + len(part.rstrip())
            if begin >= end:
                continue
            wide_begin, wide_end = 0 if first == 0 else begin, len(text) if stop == len(text) else end
            if (begin, end) != (wide_begin, wide_end):
                self.padded += [of_part] if of_part not in self.padded else []
                if of_part in self._whole:
                    begin, end = wide_begin, wide_end
            pieces += [text[at:begin], self._between_marks(text[begin:end], of_part)]
            at = end
        return "".join([*pieces, text[at:]])

    def _between_marks(self, text: str, code: int) -> str:
        mark = _FIRST_MARK + 2 * len(self.codes)
        self.codes.append(code)
        if 2 * len(self.codes) > _MOST_MARKS:
            raise ContentError(f"has messages of more than {_MOST_MARKS // 2:,} parts: capture without segments")
        return f"{chr(mark)}{text}{chr(mark + 1)}"


def _parts(text: str, code: int, tags: Sequence[tuple[str, str]]) -> Iterator[tuple[int, int, int]]:
    """Yields start, stop and segment of each part of a text. What an assistant thinks is between the first tags.

    A text without the first tag thinks from its start, and one without the second tag to its end.
    """
    for opening, closing in tags:
        first, last = text.find(opening), text.find(closing)
        if first < 0 and last < 0:
            continue
        if first > last >= 0:
            first = -1
        if first > 0:
            yield 0, first, code
        yield (first + len(opening) if first >= 0 else 0), (last if last >= 0 else len(text)), _THINKING
        if last >= 0:
            yield last + len(closing), len(text), code
        return
    yield 0, len(text), code


def _calls(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    return (call for call in calls if isinstance(call, dict)) if isinstance(calls, list) else iter(())


def _read_marks(rendered: str, text: str, codes: Sequence[int], of_calls: Collection[int]) -> NDArray[np.int32] | None:
    """Returns the segment of each character of `text`; None if `rendered` is not that text with whole parts.

    The assistant says a part of a tool call once. A template that repeats the name of a tool does so for its answer.
    """
    pieces, segments, at = [], [], 0
    part: int | None = None
    said: set[int] = set()
    for mark in _MARK.finditer(rendered):
        number, ends = divmod(ord(mark[0]) - _FIRST_MARK, 2)
        if part != (number if ends else None):
            return None
        pieces.append(rendered[at : mark.start()])
        segments.append(_TEMPLATE if part is None or (part in said and part in of_calls) else codes[part])
        if part is not None:
            said.add(part)
        part, at = None if ends else number, mark.end()
    pieces.append(rendered[at:])
    if part is not None or "".join(pieces) != text:
        return None
    return np.repeat(np.array([*segments, _TEMPLATE], np.int32), [len(piece) for piece in pieces])


def _of_tokens(codes: NDArray[np.int32], text: str, offsets: Offsets) -> NDArray[np.int32]:
    """Returns the segment of each token, from those of characters. White space between two tokens is of the second."""
    if not len(offsets):
        return np.zeros(0, np.int32)
    is_said = (codes != _TEMPLATE) & ~np.array([character.isspace() for character in text])
    last_said = np.maximum.accumulate(np.where(is_said, np.arange(len(text)), -1))
    stops = np.clip(offsets[:, 1], 1, len(text))
    starts = np.minimum(np.maximum(offsets[:, 0], 0), np.r_[0, np.maximum.accumulate(stops)[:-1]])
    said = last_said[stops - 1]
    found: NDArray[np.int32] = codes[np.where(said >= starts, said, stops - 1)]
    return found
