"""Makes a panic of the tokenizers library an error like its others."""

from collections.abc import Iterator
from contextlib import contextmanager


class TokenizerPanicError(Exception):
    """The tokenizers library has panicked, for instance because a pattern of the tokenizer takes too many steps."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Within it, a panic of the tokenizers library is raised as a `TokenizerPanicError`.

    The library raises it as a `BaseException`, which would pass the code that names the text or the file at fault.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the library has it in no module
            raise
        raise TokenizerPanicError(*error.args) from error
