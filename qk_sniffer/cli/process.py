"""Gives all programs the same start and the same end: `--version`, their errors and their exit codes."""

import errno
import os
import sys
from collections.abc import Callable

import qk_sniffer
from qk_sniffer.errors import RIGHTS, QkSnifferError
from qk_sniffer.logs import escape_libraries
from qk_sniffer.text import flush, hide_in_addresses, say, say_error, unwritten

VERSION = "--version"

_OF_PATHS = dict.fromkeys((errno.EACCES, errno.EPERM), RIGHTS) | {
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "give a path without links that lead to themselves",
}
"""The errors of a path for which a program needs no words of its own, with their way out."""


def run(body: Callable[[list[str]], int], *, interrupted: str = "interrupted") -> int:
    """Runs a program with the arguments of this process.

    Args:
        body: gets the arguments, and returns the exit code.
        interrupted: what to print for an interrupt without words of its own.

    Returns:
        the exit code: that of `body`, or of the error that ended it; 128 and the number of a signal, which is 130 for
        Ctrl-C. A reader of the output that goes away, such as `head`, changes nothing, and neither does an output that
        was closed from the start (`>&-`). An output that cannot be written changes nothing but a zero, to 1.
    """
    open_closed_streams()
    escape_libraries()
    arguments = sys.argv[1:]
    hide_in_addresses(" ".join(arguments))
    try:
        code = _version() if VERSION in arguments else body(arguments)
    except BrokenPipeError:
        code = 0
    except QkSnifferError as error:
        say_error(error)
        code = error.exit_code
    except OSError as error:  # of a folder that is listed or passed on the way
        if error.filename is None or error.errno not in _OF_PATHS:
            raise
        say_error(f"{error.filename}: {error.strerror}: {_OF_PATHS[error.errno]}")
        code = 1
    except KeyboardInterrupt as error:
        code = say_interrupted(error, interrupted)
    for stream in (sys.stdout, sys.stderr):
        flush(stream)
    if unwritten:
        say_error(f"the output of this program is not complete, because it cannot be written: {unwritten[0]}")
        code = code or 1
    return code


def open_closed_streams() -> None:
    """Opens the null device for each standard stream that is closed.

    Otherwise, the next file that is opened gets the number of the stream. What a library prints would be written into
    it: into a lock, or into a file of the dataset.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def say_interrupted(error: KeyboardInterrupt, words: str = "interrupted") -> int:
    """Prints that the program was interrupted; returns the exit code."""
    say(str(error) or words, to=sys.stderr)
    return getattr(error, "exit_code", 130)


def _version() -> int:
    say(f"qk-sniffer {qk_sniffer.__version__}")
    return 0
