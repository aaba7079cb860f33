"""Defines the errors that a user can resolve. The message of each names the problem and the way out.

QkSnifferError
├── ConfigError      settings are invalid on any machine
├── SourceError      the model or the dataset cannot be found, loaded or read
│   └── ColumnError  a setting names a column that the dataset does not have
├── CaptureError     the model runs, but its vectors cannot be captured
├── StoreError       the data root cannot be written, read or resumed
└── HubError         the finished dataset cannot be published
"""

from typing import ClassVar

from qk_sniffer.text import printable

RIGHTS = "change its rights, or run the command as a user who has them"
"""The way out of a permission that this user lacks."""


class QkSnifferError(Exception):
    """Ends a job with a message instead of a traceback, and with a non-zero exit code.

    The message consists of `lines`. Names and errors in them may come from files, so each is escaped to one line.
    """

    exit_code: ClassVar[int] = 1
    """The exit code of a program that the error ends: 2 if the user must change a setting, whatever the machine."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        return "\n".join(map(printable, self.args))


class ConfigError(QkSnifferError):
    """Settings are wrong. The message lists all `problems`."""

    exit_code = 2

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{head} in the configuration:", *(f"  - {problem}" for problem in problems))


class SourceError(QkSnifferError):
    """A model, tokenizer or dataset cannot be found, loaded or read."""


class ColumnError(SourceError):
    """A setting names a column that a dataset does not have, or one that holds values of another type."""

    exit_code = 2


class CaptureError(QkSnifferError):
    """A model runs, but its vectors cannot be captured as the settings require."""


class StoreError(QkSnifferError):
    """A data root cannot be written, read or resumed."""


class HubError(QkSnifferError):
    """A dataset cannot be published to the Hub. Its folder stays whole."""
