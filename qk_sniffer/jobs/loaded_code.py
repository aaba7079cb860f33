"""Names the class of a loaded object and the code that it is of, and refuses to continue work of other code."""

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.jobs.software import KERNEL
from qk_sniffer.store.disk import sha256_of

_PINNED = ("builtins", "qk_sniffer", "torch", "transformers")
"""The packages whose code a version pins, and Python's own."""

DIGEST = "sha256 of its code"
"""Stands in the name of a class whose code no version pins."""

_LIBRARIES = ("site-packages", "dist-packages")


def class_and_code(kind: type) -> str:
    """Returns the name of a class, with a digest of the files of its code that no version of a library pins.

    These are files of a checkpoint (`model.trust_remote_code`), or of a family of the user's own (`model.family`).
    """
    modules = _modules(kind)
    if kind.__module__ not in modules:
        return f"{kind.__module__}.{kind.__qualname__}"
    code = hashlib.sha256()
    for content in sorted(path.read_bytes() for path in _files(modules)):
        code.update(hashlib.sha256(content).digest())
    return f"{kind.__qualname__} ({DIGEST}: {code.hexdigest()[:16]})"


def code_of(kind: type) -> dict[Path, str]:
    """Returns the sha256 of each file of the code of a class that no version of a library pins.

    The files are those of the class, of its base classes, and of all modules that they import and that are not
    installed. Modules that the code loads by a computed name are not seen.
    """
    return {path: sha256_of(path) for path in _files(_modules(kind))}


def check_code(code: Mapping[Path, str]) -> None:
    """Checks that files of code are those whose sha256 was taken.

    Raises:
        SourceError: one has changed.
    """
    for path, digest in code.items():
        if not path.is_file() or sha256_of(path) != digest:
            raise SourceError(
                f"{path} has changed since the job loaded its code: a part of the work may be of other code. Restore "
                "the file and rerun the command, or start over with output.overwrite=true"
            )


def _modules(kind: type) -> set[str]:
    """Returns the modules of a class and of its base classes, without those that a version pins."""
    modules = {each.__module__ for each in kind.__mro__}
    return {name for name in modules if name.partition(".")[0] not in _PINNED and not _is_standard(_file_of(name))}


def _is_standard(file: Path | None) -> bool:
    """Whether a file is of the standard library."""
    standard = sysconfig.get_path("stdlib")
    return file is not None and file.is_relative_to(standard) and not {*_LIBRARIES} & {*file.parts}


def differences_of_loaded(record: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Lists in what the loaded model and tokenizer differ from those that the job has loaded before, one a line."""
    lines = []
    for what, key in (
        ("model", "decoder"),
        ("model", "family"),
        ("model", "attn_implementation"),
        ("tokenizer", "class"),
        ("tokenizer", "chat_template"),
    ):
        now, there = record[what].get(key), stored[what].get(key)
        if key in stored[what] and now != there:  # earlier versions do not store all of them
            lines.append(f"{key} of the {what}: {there!r} there, {now!r} now")
    # Of other packages, some starts do not name the version.
    kernels = {name for each in (record, stored) for name in each["versions"] if name.startswith(KERNEL)}
    for name in sorted(kernels):
        now, there = (each["versions"].get(name) for each in (record, stored))
        if now != there:
            lines.append(f"{name}: {there or 'not loaded'} there, {now or 'not loaded'} now")
    return lines + _differences_of_weights(record, stored)


def _differences_of_weights(record: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    """Lists in what the weights that the model computes with differ, of the same checkpoint and settings.

    The device, and the packages that are installed, decide whether transformers dequantizes a checkpoint.
    """
    now, there = (_weights(each["model"]) for each in (record, earlier))
    return [f"{what}: {there[what]} there, {now[what]} now" for what in now if now[what] != there.get(what, now[what])]


def _weights(model: Mapping[str, Any]) -> dict[str, Any]:
    quantization = model.get("quantization")
    found = {} if "dtype" not in model else {"dtype of the model": model["dtype"]}
    if quantization is not None and "dequantized" in quantization:
        found["weights of the model"] = "dequantized" if quantization["dequantized"] else "quantized"
    return found


def check_same_loaded(record: Mapping[str, Any], stored: Mapping[str, Any], root: Path) -> None:
    """Refuses to resume a job with another model or tokenizer of the same settings.

    Raises:
        StoreError: their classes, their code, the attention kernel or the form of the weights differ.
    """
    if lines := differences_of_loaded(record, stored):
        raise StoreError(
            f"{root} holds an unfinished job, and what was loaded for it differs:",
            *(f"  - {line}" for line in lines),
            "Restore the code and the packages that the job started with, or run it on the device that it started "
            "on; give this job another folder (output.data_root=...); or replace the old work with "
            "output.overwrite=true.",
        )


def check_same_weights(record: Mapping[str, Any], earlier: Mapping[str, Any], what: str) -> None:
    """Refuses to add to a dataset of the same checkpoint whose weights had another form: quantized or not.

    Raises:
        StoreError: they had.
    """
    if lines := _differences_of_weights(record, earlier):
        raise StoreError(
            f"{what} of a model in another form:",
            *(f"  - {line}" for line in lines),
            "Run this job on a device, and with packages, that give the model this form, give it another folder "
            "(output.data_root=...), or replace the dataset with output.overwrite=true.",
        )


def check_same_code(record: Mapping[str, Any], earlier: Mapping[str, Any], what: str) -> None:
    """Refuses to add to a dataset of the same settings whose model or tokenizer ran code that has changed.

    Only code of a checkpoint or of the user counts: versions tell that of libraries.

    Raises:
        StoreError: it has.
    """
    for part, key in (("model", "decoder"), ("model", "family"), ("tokenizer", "class")):
        now, there = record[part].get(key), earlier[part].get(key)
        if now != there and there is not None and DIGEST in f"{now} {there}":
            raise StoreError(
                f"{what} of other code: {key} of the {part}: {there!r} there, {now!r} now. Restore that code, give "
                "this job another folder (output.data_root=...), or replace the dataset with output.overwrite=true"
            )


def _files(names: Iterable[str]) -> set[Path]:
    """Returns the files of modules, and of the own modules that they name or whose content they have, and so on."""
    found: dict[str, Path] = {}
    waiting = [*names]
    while waiting:
        name = waiting.pop()
        file = None if name in found else _file_of(name)
        if file is None:
            continue
        found[name] = file
        used = _imports(name, file)
        for value in vars(sys.modules[name]).values() if name in sys.modules else ():
            used.add(value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None))
        waiting += [each for each in used if isinstance(each, str) and _is_own(each)]
    return set(found.values())


def _imports(name: str, file: Path) -> set[Any]:
    """Returns the names in the import statements of a module, those in functions too: of modules, and maybe of others.

    A function may import a module when it is called for the first time, in the middle of a job.
    """
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found: set[Any] = set()
    try:
        nodes = [*ast.walk(ast.parse(file.read_bytes()))]
    except (SyntaxError, ValueError, RecursionError):  # not Python, or too deep
        return found
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outer = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*outer, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def _is_own(name: str) -> bool:
    """Whether a module is of the user's or of a checkpoint's code: neither pinned nor installed."""
    if name.partition(".")[0] in _PINNED or (file := _file_of(name)) is None:
        return False
    return not _is_standard(file) and not {*_LIBRARIES} & {*file.parts}


def _file_of(name: str) -> Path | None:
    """Returns the file of a module, without importing it; None if there is none."""
    parent, _, last = name.rpartition(".")
    file: Any = None
    if name in sys.modules:
        file = getattr(sys.modules[name], "__file__", None)
    elif not parent:
        with suppress(ImportError, ValueError, AttributeError):
            spec = importlib.util.find_spec(name)
            file = spec.origin if spec is not None and spec.has_location else None
    elif (package := _file_of(parent)) is not None and package.name == "__init__.py":
        candidates = package.parent / last / "__init__.py", package.parent / f"{last}.py"
        file = next((each for each in candidates if each.is_file()), None)
    return Path(file) if file is not None and Path(file).is_file() else None
