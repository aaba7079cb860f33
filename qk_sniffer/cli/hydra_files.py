"""Checks where Hydra writes the files of a run or a sweep, and what it would write there.

`outputs` may be a link, such as one to another disk. `.runs` and `.sweeps` in it, and what is in these, may not: Hydra
follows links, so that a person who may write there could have it overwrite any file of the user. The log of a job
checks what is in the job's own folder (`logs.py`).
"""

import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from qk_sniffer.cli.environment import PROXIES
from qk_sniffer.errors import StoreError
from qk_sniffer.hub.endpoint import LOGINS
from qk_sniffer.store.disk import explained
from qk_sniffer.store.open_folder import OpenFolder
from qk_sniffer.store.own_files import contains
from qk_sniffer.store.places import refuse_inside
from qk_sniffer.text import path_problem

_OWN = (".runs", ".sweeps")
"""The folders of Hydra in `output.folder`."""

_OF_SUBMITIT = ".submitit"

_OF_A_SWEEP = re.compile(r"multirun\.yaml|\.submitit|\d+")
"""The names that Hydra and submitit write in the folder of a sweep. A number is the folder of a job."""

_IS_OF_HYDRA = contains(rb"(?m)^hydra:")

_SECRETS = sorted({*LOGINS, "HF_ENDPOINT", *PROXIES} - {"no_proxy", "NO_PROXY"})

_OF_SECRET = re.compile(rf"\$\{{\s*oc\.env\s*:[^}}]*?\b({'|'.join(_SECRETS)})\b")
"""An interpolation of the login, or of an address that may hold one."""

_OF_ANY = re.compile(r"\$\{\s*oc\.env\s*:[^}]*\$\{")
"""An interpolation of a variable whose name is a value."""


def folder_problems(folder: Path, below: Iterable[str | None] = (), *, is_sweep: bool) -> Iterator[str]:
    """Yields what is wrong with Hydra's own folder of a run or a sweep. `below` are the folders that it makes there.

    A folder that may not be written is no problem of the command line: `run_jobs` raises the error.
    """
    what = f"Hydra's own folder for this {'sweep' if is_sweep else 'run'}, {folder},"
    if (problem := path_problem(folder)) is not None:
        yield f"{what} {problem}"
        return
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        yield f"{what} cannot be made: {existing} is not a folder"
    for written in (folder, *(folder / name for name in below if name)):
        try:
            refuse_inside(written, f"hydra.{'sweep' if is_sweep else 'run'}.dir")
        except StoreError as error:
            yield f"{what} is refused: {error}"
            break
    for link in _links(folder, is_sweep):
        yield (
            f"{what} is refused: {link} is a link, which Hydra would follow. Remove it, or set "
            f"hydra.{'sweep' if is_sweep else 'run'}.dir to another folder. output.folder itself may be a link"
        )
    marked = folder / ("multirun.yaml" if is_sweep else ".hydra/hydra.yaml")
    if marked.is_file() and not marked.is_symlink():
        with explained(marked, "read"), OpenFolder.at(marked.parent) as opened:
            is_own = _IS_OF_HYDRA(opened, marked.name)
        if not is_own:
            yield (
                f"{what} is refused: {marked} was not written by Hydra, which would replace it. Move it away, or set "
                f"hydra.{'sweep' if is_sweep else 'run'}.dir to another folder"
            )


def job_problems(hydra: DictConfig) -> Iterator[str]:
    """Yields what is wrong with Hydra's settings of a job; `hydra` is Hydra's own configuration."""
    if hydra.job.chdir:
        yield (
            "hydra.job.chdir is true: a job would look for its files, and write its dataset, in the folder that Hydra "
            "makes for it; leave it false"
        )
    if names := sorted({*_SECRETS} & {*map(str, hydra.job.env_copy), *map(str, hydra.job.env_set)}):
        yield (
            f"hydra.job would store {', '.join(names)} in the files of the job: leave it out of env_copy and env_set. "
            "Jobs read it from .env in the current folder, or from the login of `hf auth login`"
        )
    if names := sorted({*_OF_SECRET.findall(OmegaConf.to_yaml(hydra))}):
        yield (
            f"a setting has the value of {', '.join(names)}, which Hydra would store in the files of the job: "
            "leave it out"
        )
    if _OF_ANY.search(OmegaConf.to_yaml(hydra)):
        yield "a setting has the value of a variable that another value names, ${oc.env:${...}}: write its name out"


def _links(folder: Path, is_sweep: bool) -> Iterator[Path]:
    parts = folder.parts
    own = next((number for number, part in enumerate(parts) if part in _OWN), len(parts))
    yield from (path for path in (Path(*parts[: number + 1]) for number in range(own, len(parts))) if path.is_symlink())
    if is_sweep and folder.is_dir():
        yield from (path for path in sorted(folder.iterdir()) if _OF_A_SWEEP.fullmatch(path.name) and path.is_symlink())
        # submitit opens its logs and pickles there, in a folder for each job, by names that can be guessed.
        found = () if (folder / _OF_SUBMITIT).is_symlink() else os.walk(folder / _OF_SUBMITIT)
        inside = (Path(at, name) for at, *names in found for name in chain(*names))
        yield from islice((path for path in inside if path.is_symlink()), 1)
