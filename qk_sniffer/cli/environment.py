"""Reads the file `.env` of the current folder, which holds tokens and other variables for the processes of a run.

A folder may come from someone else, with its `.env`. So the file sets only the variables in `ALLOWED`, which neither
run code nor send the login to another address. SECURITY.md gives the reason for each.
"""

import os
import re
import stat
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

from dotenv import dotenv_values

from qk_sniffer.errors import ConfigError, StoreError
from qk_sniffer.hub.endpoint import check_address, is_encrypted, note_proxies
from qk_sniffer.logs import logger
from qk_sniffer.machine import own_compiled_code
from qk_sniffer.store.disk import open_regular, real_path, walk
from qk_sniffer.store.open_folder import OddFileError
from qk_sniffer.text import counted, shortened

log = logger(__name__)

PROXIES = frozenset(
    spelling(name)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    for spelling in (str.lower, str.upper)
)

_NO_PROXY = {"no_proxy", "NO_PROXY"}
"""Those of the proxies that name none."""

ALLOWED = PROXIES | {
    # the login
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    # the folders of downloads
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_XET_CACHE",
    "HF_DATASETS_CACHE",
    # what is asked of the Hub, and how
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    "HF_HUB_DISABLE_TELEMETRY",
    "HF_HUB_DISABLE_XET",
    "HF_HUB_DOWNLOAD_TIMEOUT",
    "HF_HUB_ETAG_TIMEOUT",
    "HF_XET_HIGH_PERFORMANCE",
    # what is shown and how files are stored
    "HF_DATASETS_DISABLE_PROGRESS_BARS",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_HUB_DISABLE_SYMLINKS",
    "HF_HUB_DISABLE_SYMLINKS_WARNING",
    # the devices and threads of the machine
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
}
"""The variables that `.env` may set."""

_SECONDS = {"HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"}
"""Those that huggingface_hub reads as integers when it is imported."""

_CACHES = {"HF_HUB_CACHE": "hub", "HF_XET_CACHE": "xet", "HF_DATASETS_CACHE": "datasets"}
"""The variables of the folders of downloads, and the folder in `HF_HOME` that each one replaces."""

_FOLDERS = {"HF_HOME", *_CACHES}
"""The variables that name folders."""

_OLD_CACHES = {"HUGGINGFACE_HUB_CACHE": "HF_HUB_CACHE"}
"""Other names of these variables, which huggingface_hub knows too."""

_LARGEST = 65_536
"""The largest size of the file, in bytes."""

_MOST_NAMES = 10

_PLAIN_NAME = re.compile("[A-Z][A-Z0-9_]{0,63}|[a-z][a-z0-9_]{0,63}")

_told: set[str] = set()
"""The warnings that this process has logged."""


def read_environment() -> None:
    """Sets the variables of `.env` in the current folder that are in `ALLOWED` and not set already.

    Logs one warning that names the variables that it ignores. Their values never appear in a message. Values are
    literal: `${NAME}` is not replaced. `HF_HOME` sets the folders of downloads alone, by their own variables: libraries
    also read logins in it, write to other files, and follow links there, which would lead to any file of the user.
    Names a folder of this user for compiled code too, if the environment names none.

    Call this where a job runs, before the import of a library that reads the variables. Do not call it where a job is
    submitted: SLURM would store them with the job.

    Raises:
        ConfigError: the file cannot be read, is too large or is not UTF-8 text; a value holds a dollar sign, or is not
            a number where one is expected; or a folder of downloads is of a user who does not exist, or leads
            elsewhere.
        SourceError: `HF_ENDPOINT` in the environment is no address.
    """
    path = Path(".env").absolute()
    given = dotenv_values(stream=StringIO(_text(path)), interpolate=False)
    wanted = {name: value for name, value in given.items() if not _is_set(name)}
    names = ALLOWED if is_encrypted() else ALLOWED - PROXIES
    if ignored := {name: value for name, value in wanted.items() if name not in names}:
        _warn_once(
            f"{path}: {_named(ignored)} ignored: .env sets only the variables that SECURITY.md lists"
            + ("" if PROXIES.isdisjoint(ignored) else ", and no proxy while HF_ENDPOINT is not https")
            + ". Set others in the environment"
        )
    values = _checked(path, {name: value or "" for name, value in wanted.items() if name in names})
    caches = _caches(path, values)
    for name, folder in caches.items():
        _check_cache(path, name, folder)
    others = {name: value for name, value in values.items() if name not in _FOLDERS}
    os.environ.update(others | {name: str(folder) for name, folder in caches.items()})
    note_proxies(PROXIES & values.keys() - _NO_PROXY)
    check_address()
    own_compiled_code()


def _named(ignored: Mapping[str, str | None]) -> str:
    """Names variables. Lines that may be something else are counted: those without a value, and those of a key."""
    names = [name for name, value in ignored.items() if value is not None and _PLAIN_NAME.fullmatch(name)]
    others = len(ignored) - len(names)
    return " and ".join(
        ([shortened(names, _MOST_NAMES)] if names else []) + ([counted(others, "other line")] if others else [])
    )


def _checked(path: Path, values: Mapping[str, str]) -> Mapping[str, str]:
    # huggingface_hub itself replaces `$NAME` in the names of its folders.
    if problems := [
        f"{path}: the value of {name} has a {what}. Write the value out, or set {name} in the environment"
        for name, value in values.items()
        for character, what in (("$", "dollar sign, and variables in values are not replaced"), ("\0", "zero byte"))
        if character in value
    ]:
        raise ConfigError(problems)
    if problems := [
        f"{path}: the value of {name} is not a whole number of seconds"
        for name, value in values.items()
        if name in _SECONDS and re.fullmatch("[0-9]{1,9}", value.strip()) is None
    ]:
        raise ConfigError(problems)
    return values


def _caches(path: Path, values: Mapping[str, str]) -> dict[str, Path]:
    """Returns the folders of downloads that `values` name, by their variables. Those without one are in `HF_HOME`.

    Raises:
        ConfigError: a folder begins with a user who does not exist.
    """
    folders = {}
    for name in _FOLDERS & values.keys():
        try:
            if values[name]:  # huggingface_hub reads "" as the current folder
                folders[name] = Path(values[name]).expanduser()
        except RuntimeError:
            problem = f"{path}: {name} is {values[name]!r}, of a user who does not exist: correct it"
            raise ConfigError([problem]) from None
    home = folders.pop("HF_HOME", None)
    if home is None:
        return folders
    has_login = values.get("HF_TOKEN") or os.environ.get("HF_TOKEN")
    if not has_login and os.path.lexists(home / "token"):
        _warn_once(
            f"{path}: HF_HOME sets the folders of downloads alone, and the login that is stored there is not used. "
            "Set HF_TOKEN in the file, or HF_HOME in the environment"
        )
    named = {_OLD_CACHES.get(name, name) for name in (*values, *os.environ)}
    return folders | {name: home / below for name, below in _CACHES.items() if name not in named}


def _check_cache(path: Path, name: str, cache: Path) -> None:
    """Checks that nothing in a folder of downloads leads out of it: libraries read and write through links there.

    Raises:
        ConfigError: a link leads out of it, it is a link itself, it holds something that is no file, or a folder in
            it cannot be listed: its files may be opened by their names all the same.
    """
    unlisted: list[OSError] = []
    root = Path(os.path.realpath(cache))
    odd = [cache] if cache.is_symlink() else []
    for folder, _, others in walk(cache, unlisted.append):
        odd += (folder / each for each in others if _leads_out(folder / each, root))
    problems = [f"{each} is a link to elsewhere, or no file" for each in odd]
    problems += [
        f"{error.filename} cannot be listed: {error.strerror}"
        for error in unlisted
        if not isinstance(error, FileNotFoundError | NotADirectoryError)
    ]
    if problems:
        raise ConfigError(
            [
                f"{path}: {name} names {cache}, and {problems[0]}: remove it, name another folder, or set {name} in "
                "the environment"
            ]
        )


def _leads_out(entry: Path, root: Path) -> bool:
    """Whether an entry of a folder is a link that leads out of `root`, a real path, or is neither a link nor a file."""
    try:
        mode = entry.lstat().st_mode
        return not (real_path(entry).is_relative_to(root) if stat.S_ISLNK(mode) else stat.S_ISREG(mode))
    except FileNotFoundError:  # it was removed meanwhile
        return False
    except (OSError, StoreError):  # a path is too long
        return True


def _is_set(name: str) -> bool:
    # Of two spellings of a proxy, the one in small letters counts.
    spellings = {name.lower(), name.upper()} if name in PROXIES else {name}
    return not spellings.isdisjoint(os.environ)


def _text(path: Path) -> str:
    """Returns the text of the file; an empty one if it does not exist or is not a file."""
    try:
        with open_regular(path) as file:
            data = file.read(_LARGEST + 1)
    except FileNotFoundError:
        return ""
    except OddFileError:
        if not path.is_dir():  # a virtual environment often has this name
            _warn_once(f"{path} is not a file, and is ignored. Set its variables in the environment")
        return ""
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}. Repair it, or move it away"]) from None
    if len(data) > _LARGEST:
        raise ConfigError([f"{path} is larger than {_LARGEST:,} bytes: it is not a list of variables. Move it away"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path} is not UTF-8: {error.reason}"]) from None


def _warn_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        log.warning("%s", message)
