"""Finds settings that a shell has split at their spaces: `sampler.type = uniform`, `capture.layers=[0, 1]`."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile

_CLOSING = {"[": "]", "{": "}", "(": ")"}


def join(
    arguments: Sequence[str],
    is_readable: Callable[[str], bool],
    takes_text: Callable[[str], bool],
    is_name: Callable[[str], bool],
) -> tuple[dict[str, str], list[str]]:
    """Returns what is wrong with each setting that was split, by the setting as it was meant, and all settings.

    Args:
        arguments: the settings of a command line.
        is_readable: whether a text can be read as one setting.
        takes_text: whether a key takes a text, which may have spaces.
        is_name: whether a word is a key or a group.
    """
    split: dict[str, str] = {}
    settings: list[str] = []
    rest = list(arguments)
    while rest:
        count, setting = 1, rest[0]
        for candidate_count, candidate in _candidates(rest, takes_text, is_name):
            if is_readable(candidate):
                count, setting = candidate_count, candidate
        if count > 1:
            rule = "a setting with spaces is quoted" if " " in setting else "a setting is one word"
            split[setting] = f"{' '.join(rest[:count])}: {rule}"
        settings.append(setting)
        del rest[:count]
    return split, settings


def with_split(problems: Sequence[str], split: Mapping[str, str]) -> list[str]:
    """Adds what `join` found wrong to the other problems.

    A setting that has another problem gets one line, whose advice is that of the other problem: the setting as it was
    meant is wrong, too.
    """
    joined, others = [], list(problems)
    for setting, what in split.items():
        same = next((problem for problem in others if problem.startswith(f"{setting}: ")), None)
        if same is None:
            joined.append(f"{what}: {shlex.quote(setting)}")
        else:
            others.remove(same)
            joined.append(f"{what}; {same.removeprefix(f'{setting}: ')}")
    return [*joined, *others]


def _candidates(
    arguments: Sequence[str], takes_text: Callable[[str], bool], is_name: Callable[[str], bool]
) -> Iterator[tuple[int, str]]:
    """Yields how many of the first arguments may be parts of one setting, and that setting."""
    key, equals, value = arguments[0].partition("=")
    after = [*arguments[1:3], "", ""]
    if not key:
        return
    if value and not is_open(value):
        if takes_text(key):
            yield _with_words(arguments, is_name)
    elif value:
        yield from _closed(1, arguments[0], arguments)
    elif equals and after[0] and "=" not in after[0]:
        yield from _closed(2, f"{key}={after[0]}", arguments)
    elif not equals and after[0] == "=" and after[1]:
        yield from _closed(3, f"{key}={after[1]}", arguments)
    elif not equals and after[0].startswith("=") and after[0] != "=":
        yield from _closed(2, f"{key}{after[0]}", arguments)


def _closed(count: int, setting: str, arguments: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yields a setting with as many further arguments as close its brackets."""
    while is_open(setting) and count < len(arguments):
        setting = f"{setting} {arguments[count]}"
        count += 1
    if not is_open(setting):
        yield count, setting


def _with_words(arguments: Sequence[str], is_name: Callable[[str], bool]) -> tuple[int, str]:
    """Returns a setting with the words after it, which have no `=` and are no names."""
    setting, *others = arguments
    words = [setting, *takewhile(lambda word: "=" not in word and not is_name(word), others)]
    return len(words), " ".join(words)


def is_open(text: str) -> bool:
    """Whether brackets are open at the end of `text`."""
    expected: list[str] = []
    for character in text:
        if character in _CLOSING:
            expected.append(_CLOSING[character])
        elif expected and character == expected[-1]:
            expected.pop()
    return bool(expected)
