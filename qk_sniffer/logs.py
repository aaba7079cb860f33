"""Makes the loggers of this package. What they write may hold names and errors from files of someone else."""

import errno
import logging
import os
import stat
import sys
import traceback
import warnings
from contextlib import nullcontext
from io import TextIOWrapper
from numbers import Number
from pathlib import Path
from textwrap import indent
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from qk_sniffer.errors import QkSnifferError
from qk_sniffer.live import above_live_lines
from qk_sniffer.text import RED, YELLOW, painted, printable, printable_lines, say_text


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """Escapes the arguments of a message, so that none can control a terminal or imitate another line of the log."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if not self.isEnabledFor(level):
            return
        shown = [*map(_shown, args)]
        if kwargs.pop("exc_info", False):
            msg, shown = f"{msg}\n%s", [*shown, indent(printable_lines(traceback.format_exc().rstrip()), "  ")]
        super().log(level, msg, *shown, stacklevel=kwargs.pop("stacklevel", 1) + 1, **kwargs)


class JobLog(logging.FileHandler):
    """Writes the log of a job. On a full disk its lines are lost; the terminal still has them, and the job's error.

    It is the first file in the job's folder. Hydra writes its own files there next, and follows links. So the log
    raises an OSError that names a file or folder through which Hydra would write elsewhere.
    """

    def _open(self) -> TextIOWrapper:
        log = Path(self.baseFilename)
        for path in (log, *(log.parent / ".hydra" / name for name in _OF_HYDRA)):
            _refuse_odd(path)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        return os.fdopen(descriptor, "a", encoding=self.encoding, errors=self.errors)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class TerminalHandler(logging.StreamHandler[TextIO]):
    """Writes above the lines that are redrawn on the terminal (`live.py`), and above the bars of tqdm."""

    def emit(self, record: logging.LogRecord) -> None:
        bars = tqdm.external_write_mode(file=self.stream) if self.stream.isatty() else nullcontext()
        with above_live_lines(), bars:
            super().emit(record)


class TerminalFormatter(logging.Formatter):
    """Shows warnings and errors in colours where stderr is a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        return painted(text, RED if record.levelno >= logging.ERROR else YELLOW, sys.stderr)


_OF_HYDRA = ("", "config.yaml", "hydra.yaml", "overrides.yaml")
"""Its folder in that of a job, and the files there."""


def _refuse_odd(path: Path) -> None:
    """Refuses a link, a second name of a file, a pipe and a device."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if not (stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)):
        raise OSError(errno.ELOOP, "it is a link, or is no file", str(path))


class _Record(logging.LogRecord):
    """A record of any library, which no text in it can use to control a terminal or to imitate another record."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = indent(printable_lines("".join(traceback.format_exception(*self.exc_info)).rstrip()), "  ")

    def getMessage(self) -> str:  # noqa: N802
        text = super().getMessage()
        return printable_lines(text) if self.name.split(".")[0] == _PACKAGE else _indented(text)


def escape_libraries() -> None:
    """Escapes what libraries log, their warnings, and an error that ends this process. They quote files and addresses.

    Programs call it, because it changes the whole process.
    """
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _printable_warning
    sys.excepthook = _print_error


def logger(name: str) -> logging.LoggerAdapter[logging.Logger]:
    """Returns the logger of a module, as `logging.getLogger` does, with arguments that are escaped."""
    return _Logger(logging.getLogger(name), {})


_PACKAGE = __name__.split(".")[0]
_formatwarning = warnings.formatwarning


def _printable_warning(*args: Any, **kwargs: Any) -> str:
    return _indented(_formatwarning(*args, **kwargs).rstrip("\n")) + "\n"


def _print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    say_text(_indented("".join(traceback.format_exception(kind, error, trace)).rstrip("\n")), to=sys.stderr)


def _indented(text: str) -> str:
    """Returns a text whose lines after the first cannot be taken for others."""
    return printable_lines(text).replace("\n", "\n  ")


def _shown(argument: object) -> object:
    if isinstance(argument, Number):
        return argument
    # The lines of our own errors are escaped already.
    return str(argument) if isinstance(argument, QkSnifferError) else printable(argument)
