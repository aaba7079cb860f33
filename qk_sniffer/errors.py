"""The errors that a user can mend. Each names the thing that is wrong and the way out.

QkSnifferError
├── ConfigError      the configuration cannot be right, whatever the machine holds
├── SourceError      the model or the dataset cannot be found, loaded or read
├── CaptureError     the model runs, but its vectors cannot be captured
├── StoreError       the data root cannot be written, read or continued
└── HubError         the finished dataset cannot be published
"""


class QkSnifferError(Exception):
    """Ends a job with its message alone, without a traceback, and a non-zero exit code."""


class ConfigError(QkSnifferError):
    """One or more values of the configuration are wrong; the message lists them all."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{head} in the configuration:", *(f"  - {problem}" for problem in problems)]))


class SourceError(QkSnifferError):
    """A model, tokenizer or dataset cannot be found, loaded or read."""


class CaptureError(QkSnifferError):
    """A model runs, but its query and key vectors cannot be captured as asked."""


class StoreError(QkSnifferError):
    """A data root cannot be written, read or continued."""


class HubError(QkSnifferError):
    """A dataset cannot be published to the Hub. It stays whole in its folder."""
