"""Names the class of a loaded object and the code that it is of, and refuses to continue work of other code."""

import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from qk_sniffer.errors import StoreError

_PINNED = ("builtins", "qk_sniffer", "torch", "transformers")
"""The packages whose code a version pins, and Python's own."""

DIGEST = "sha256 of its code"
"""Stands in the name of a class whose code no version pins."""

_LIBRARIES = ("site-packages", "dist-packages")


def class_and_code(kind: type) -> str:
    """Returns the name of a class, with a digest of the files of its code that no version of a library pins.

    These are files of a checkpoint (`model.trust_remote_code`), or of a family of the user's own (`model.family`). The
    files are those of the class, of its base classes, and of all modules that they use and that are not installed.
    """
    modules = {each.__module__ for each in kind.__mro__ if each.__module__.partition(".")[0] not in _PINNED}
    if kind.__module__ not in modules:
        return f"{kind.__module__}.{kind.__qualname__}"
    code = hashlib.sha256()
    for content in sorted(path.read_bytes() for path in _files(modules)):
        code.update(hashlib.sha256(content).digest())
    return f"{kind.__qualname__} ({DIGEST}: {code.hexdigest()[:16]})"


def differences_of_loaded(record: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Lists in what the loaded model and tokenizer differ from those that the job has loaded before, one a line."""
    lines = []
    for what, key in (
        ("model", "decoder"),
        ("model", "family"),
        ("model", "attn_implementation"),
        ("tokenizer", "class"),
    ):
        now, there = record[what].get(key), stored[what].get(key)
        if key in stored[what] and now != there:  # earlier versions do not store all of them
            lines.append(f"{key} of the {what}: {there!r} there, {now!r} now")
    return lines


def check_same_loaded(record: Mapping[str, Any], stored: Mapping[str, Any], root: Path) -> None:
    """Refuses to resume a job with another model or tokenizer of the same settings.

    Raises:
        StoreError: their classes, their code or the attention kernel differ.
    """
    if lines := differences_of_loaded(record, stored):
        raise StoreError(
            f"{root} holds an unfinished job, and what was loaded for it differs:",
            *(f"  - {line}" for line in lines),
            "Restore the code and the packages that the job started with, give this job another folder "
            "(output.data_root=...), or replace the old work with output.overwrite=true.",
        )


def check_same_code(record: Mapping[str, Any], earlier: Mapping[str, Any], what: str) -> None:
    """Refuses to add to a dataset of the same settings whose model ran code of a checkpoint or user that has changed.

    Raises:
        StoreError: it has.
    """
    for key in ("decoder", "family"):
        now, there = record["model"].get(key), earlier["model"].get(key)
        if now != there and there is not None and DIGEST in f"{now} {there}":
            raise StoreError(
                f"{what} of other code: {key} of the model: {there!r} there, {now!r} now. Restore that code, give this "
                "job another folder (output.data_root=...), or replace the dataset with output.overwrite=true"
            )


def _files(names: Iterable[str]) -> set[Path]:
    """Returns the files of modules, and of the modules whose content is among theirs by name, and so on."""
    found: dict[str, Path] = {}
    waiting = [*names]
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if name in found or file is None or not Path(file).is_file():
            continue
        found[name] = Path(file)
        for value in vars(module).values():
            used = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(used, str) and _is_own(used):
                waiting.append(used)
    return set(found.values())


def _is_own(name: str) -> bool:
    """Whether a loaded module is of the user's or of a checkpoint's code: neither pinned nor installed."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if name.partition(".")[0] in _PINNED or file is None:
        return False
    is_standard = Path(file).is_relative_to(sysconfig.get_path("stdlib"))
    return not is_standard and not {*_LIBRARIES} & {*Path(file).parts}
