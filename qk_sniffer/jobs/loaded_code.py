"""Names the class of a loaded object, and the code that it is of."""

import hashlib
import sys
from pathlib import Path

_PINNED = ("builtins", "qk_sniffer", "torch", "transformers")
"""The packages whose code a version pins, and Python's own."""


def class_and_code(kind: type) -> str:
    """Returns the name of a class, with a digest of the files of its code that no version of a library pins.

    These are files of a checkpoint (`model.trust_remote_code`), or of a family of the user's own (`model.family`). The
    files are those of the class and of its base classes.
    """
    modules = {each.__module__ for each in kind.__mro__ if each.__module__.partition(".")[0] not in _PINNED}
    files = [getattr(sys.modules.get(module), "__file__", None) for module in sorted(modules)]
    code = hashlib.sha256()
    for file in files:
        if file is not None and Path(file).is_file():
            code.update(Path(file).read_bytes())
    if kind.__module__ not in modules:
        return f"{kind.__module__}.{kind.__qualname__}"
    return f"{kind.__qualname__} (sha256 of its code: {code.hexdigest()[:16]})"
