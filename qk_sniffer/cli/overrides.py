"""Checks the `key=value` arguments of a Hydra command line: keys, group choices and types, all of them at once.

Hydra stops at the first unknown group or key, and does not list the valid ones. Here each argument is compared with the
schema and the groups on its own, before Hydra composes anything.
"""

import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep, ValueType
from hydra.errors import HydraException

from qk_sniffer.cli.application import Application
from qk_sniffer.cli.schema import not_a_setting
from qk_sniffer.cli.split_settings import is_open, join
from qk_sniffer.jobs.sweep import MOST_JOBS
from qk_sniffer.text import closest, did_you_mean

Groups = Callable[[str], list[str]]
"""Returns the choices of a group; none for a name that is not a group."""

EXPERIMENT = "experiment"


@dataclass(frozen=True)
class Checked:
    """The arguments, sorted. `good` holds those without a problem, in their order; `bad_keys` are those of the others.

    That a shell has split an argument is a problem, in `split` by the argument; its parts together are checked as one
    argument. `whole` is false when the choice of a group is bad: the rest may then seem wrong only because the choice
    is missing.
    """

    problems: list[str]
    split: dict[str, str]
    good: list[str]
    bad_keys: set[str]
    whole: bool


class Checker:
    """Compares arguments with the schema and the groups of a program."""

    def __init__(self, application: Application[Any], parser: OverridesParser, groups: Groups) -> None:
        self.application = application
        self.schema = application.schema
        self.parser = parser
        self.groups = groups

    def check(self, arguments: Sequence[str]) -> Checked:
        """Checks every argument, and every value of a sweep."""
        split, arguments = join(
            arguments, self._is_readable, lambda key: self.schema.plain_type(key) is str, self._is_name
        )
        problems: list[str] = []
        good: list[str] = []
        bad_keys: set[str] = set()
        whole = True
        has_experiment = any(argument.lstrip("+").startswith(f"{EXPERIMENT}=") for argument in arguments)
        for argument in arguments:
            found = list(self._problems(argument, has_experiment=has_experiment))
            if found:
                problems += found
                bad_keys.add(key_of(argument))
                whole = whole and not self._chooses_group(argument)
            else:
                good.append(argument)
        return Checked(problems, split, good, bad_keys - {""}, whole)

    def values_of(self, override: Override) -> list[Any]:
        """Returns the value of an argument, or all values of a sweep; none where they cannot be listed."""
        if not override.is_sweep_override():
            return [override.value()]
        try:
            texts = list(override.sweep_string_iterator())
        except (HydraException, ValueError):  # glob() on a name that is not a group; a range with a step of 0
            return []
        return [self.parser.parse_overrides([f"{override.key_or_group}={text}"])[0].value() for text in texts]

    def _is_readable(self, argument: str) -> bool:
        try:
            return bool(self.parser.parse_overrides([argument])[0].key_or_group)
        except HydraException:
            return False

    def _is_name(self, word: str) -> bool:
        return bool(self.groups(word)) or word in self.schema.types

    def _problems(self, argument: str, *, has_experiment: bool) -> Iterator[str]:
        try:
            override = self.parser.parse_overrides([argument])[0]
        except HydraException:
            yield self._unreadable(argument)
            return
        key = override.key_or_group
        if not key:
            yield self._word(argument)
            return
        if override.is_hydra_override() and override.is_sweep_override():
            yield f"{argument}: Hydra's own settings cannot be swept"
            return
        if (count := _length(override)) > MOST_JOBS:
            number = f"{count:,} values" if count < math.inf else "no end, or bounds that are no numbers"
            yield f"{argument}: the range has {number}; run at most {MOST_JOBS:,} jobs at a time"
            return
        if override.package is not None or (override.is_hydra_override() and "/" not in key):
            return  # Hydra checks its own settings when it composes
        if override.value_type == ValueType.INTERVAL_SWEEP:
            yield f"{argument}: an interval cannot be swept, because its values are not countable; use range(...)"
            return
        values = self.values_of(override)
        if not values and not override.is_delete():
            yield f"{argument}: nothing matches; valid: {', '.join(self.groups(key)) or 'values'}"
        if "/" in key or self.groups(key):
            yield from self._group_problems(override, values)
        elif override.is_delete():
            if not self.schema.is_free(key):
                yield f"{argument}: {key} cannot be deleted; give it a value: {key}=..."
        elif (
            len(values) > 1 and get_origin(self.schema.plain_type(key)) is list and not self.schema.fits(key, values[0])
        ):
            yield f"{argument}: a list is written in brackets: {key}=[{argument.partition('=')[2]}]"
        else:
            yield from self._respelled(override, values)
            for value in values:
                yield from self._value_problems(key, value, has_experiment=has_experiment)

    def _group_problems(self, override: Override, values: list[Any]) -> Iterator[str]:
        group, plain = override.key_or_group, (override.input_line or "").lstrip("+")
        adds = override.is_add() or override.is_force_add()
        if not self.groups(group):
            yield f"{plain}: there is no group {group}"
        elif group in self.application.other_groups:
            yield f"{plain}: the group {group} belongs to {self.application.other_groups[group]}"
        elif not override.is_delete():
            if adds and group in self.application.default_groups:
                yield f"{override.input_line}: {group} has a choice already; change it by {plain}"
            if not adds and group == EXPERIMENT:
                yield f"{override.input_line}: an experiment is added to a run: +{plain}"
            for value in values:
                yield from self._choice_problems(group, value, plain)

    def _choice_problems(self, group: str, value: Any, argument: str) -> Iterator[str]:
        if isinstance(value, dict):
            yield f"{argument}: {group} is chosen by name; give its settings one by one, as {group}.<key>=..."
            return
        for choice in value if isinstance(value, list) else [value]:
            if choice is None:
                continue
            subgroup, _, name = str(choice).rpartition("/")
            if name not in self.groups(f"{group}/{subgroup}" if subgroup else group):
                yield self._unknown_choice(group, str(choice))

    def _unknown_choice(self, group: str, choice: str) -> str:
        valid = self.groups(group)
        source = self.application.open_choices.get(group)
        name = re.sub(r"[-.]", "_", choice.lower())
        near = closest(name, valid) or [option for option in valid if name in option][:3]
        if source and ("/" in choice or (not near and "." in choice)):
            problem = f"{choice} is not a name in the group {group}; for the Hub or a path: {source}={choice}"
            return f"{group}={choice}: {problem}"
        return f"{group}={choice}: no such {group}{did_you_mean(near)}; valid: {', '.join(sorted(valid))}"

    def _respelled(self, override: Override, values: list[Any]) -> Iterator[str]:
        """Yields a problem where Hydra reads a text as a number of another spelling, such as `1.10` as 1.1."""
        if override.is_sweep_override() and override.value_type == ValueType.RANGE_SWEEP:
            return
        start, _, given = (override.input_line or "").partition("=")
        written = Counter(re.split(r"[\s,:(){}\[\]]+", given.lower()))
        for key, number in [each for value in values for each in self._texts_as_numbers(override.key_or_group, value)]:
            written[str(number)] -= 1
            if written[str(number)] >= 0:
                continue
            if key == override.key_or_group and not override.is_sweep_override():
                yield f"{start}={given} reads as the number {number}; quote it as text: '{start}=\"{given}\"'"
            else:
                yield f'{start}={given}: a value reads as the number {number}; quote the texts in it: "..."'

    def _texts_as_numbers(self, key: str, value: Any) -> Iterator[tuple[str, int | float]]:
        """Yields the numbers in `value`, each with its key, that stand for a text or are compared with one."""
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from self._texts_as_numbers(f"{key}.{name}", inner)
        elif isinstance(value, int | float) and not isinstance(value, bool) and self.schema.may_be_text(key):
            yield key, value

    def _value_problems(self, key: str, value: Any, *, has_experiment: bool) -> Iterator[str]:
        schema = self.schema
        if schema.is_free(key):
            return
        if schema.is_section(key):
            if not isinstance(value, dict):
                yield f"{key} is a section; its keys are {', '.join(schema.children(key))}"
                return
            for name, inner in value.items():
                yield from self._value_problems(f"{key}.{name}", inner, has_experiment=has_experiment)
        elif key not in schema.types:
            yield schema.unknown(key, self._experiment_meant(key))
        elif value == "???" or not schema.fits(key, value):
            yield schema.mistyped(key, value)
        elif has_experiment and key in self.application.filled_by_experiments and isinstance(value, dict):
            yield (
                f"{key} as a whole would replace the values of the experiment; give its parts one by one: "
                f"{' '.join(f'+{key}.{name}=...' for name in value)}"
            )

    def _experiment_meant(self, key: str) -> list[str]:
        has_experiments = self.groups(EXPERIMENT) and EXPERIMENT not in self.application.other_groups
        return [f"+{EXPERIMENT}=..."] if has_experiments and closest(key, [EXPERIMENT]) else []

    def _unreadable(self, argument: str) -> str:
        key, equals, value = argument.partition("=")
        if not equals:
            return self._word(argument)
        if get_origin(self.schema.plain_type(key.lstrip("+"))) is dict:
            return self.schema.mistyped(key.lstrip("+"), value)
        if is_open(value) and not self.schema.may_be_text(key.lstrip("+")):
            return f"{argument}: a bracket is not closed"
        if re.fullmatch(r"[+~]{0,2}[\w./@-]+", key):
            quote = "'" if '"' in value else '"'
            quoted = f"{key}={quote}{value}{quote}"
            if self._is_readable(quoted):
                shell = '"' if quote == "'" else "'"
                return f"{argument}: the value must be quoted, for the shell too: {shell}{quoted}{shell}"
        without_spaces = f"{key.strip()}={value.strip()}"
        if without_spaces != argument and self._is_readable(without_spaces):
            return f"{argument}: a setting has no spaces around =: {shlex.quote(without_spaces)}"
        return f"{argument}: cannot be read as key=value"

    def _word(self, word: str) -> str:
        """Words the problem of an argument without `=`, with the settings that it may be the value of."""
        meant = [f"{group}={word}" for group in self.application.default_groups if word in self.groups(group)]
        if not meant and re.search("[/.]", word):
            meant = [f"{source}={word}" for source in self.application.open_choices.values()]
        if self._is_name(word):
            meant = [f"{word}=..."]
        return f"{not_a_setting(word)}{did_you_mean(meant)}"

    def _chooses_group(self, argument: str) -> bool:
        key = key_of(argument)
        if key in self.application.other_groups:
            return False
        return "/" in key or bool(self.groups(key)) or key == EXPERIMENT


def _length(override: Override) -> float:
    """Returns the number of values of a range, which Hydra would list one by one. Zero for any other argument."""
    value = override.value()
    if not isinstance(value, RangeSweep):
        return 0
    try:
        start, stop, step = (Fraction(bound or 0) for bound in (value.start, value.stop, value.step))
        return max(math.ceil((stop - start) / step), 0)
    except (OverflowError, ValueError):  # inf or nan
        return math.inf
    except ZeroDivisionError:
        return 0


def key_of(argument: str) -> str:
    """Returns the key or group that an argument names."""
    return argument.lstrip("+~").partition("=")[0].partition("@")[0]
