"""Refuses what would change the meaning of the batch script that submitit writes for SLURM.

submitit quotes values for a shell, but a line `#SBATCH ...` is a comment of bash, which ends with the line: the rest of
a value with a line break is a command. SLURM itself replaces `%a` and other patterns in the paths of logs.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

_COMMANDS = ("setup", "teardown")
"""The keys of the launcher whose values are lines of the script."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def problems(hydra: DictConfig) -> Iterator[str]:
    """Yields what a script cannot contain in the folder and the launcher's settings of a sweep.

    `hydra` is Hydra's own configuration.
    """
    folder = Path(str(hydra.sweep.dir)).absolute()
    if found := re.search(r"[%\\\x00-\x1f\x7f]", str(folder)):
        yield (
            f"Hydra's own folder for this sweep, {folder}, has the character {found[0]!r} in its path, which SLURM or "
            "its script would not take as a part of it; start in another folder, or set hydra.sweep.dir"
        )
        return  # the launcher has this folder in its settings
    try:
        launcher = OmegaConf.to_container(hydra.launcher, resolve=True)
    except OmegaConfBaseException:  # the launch reports it
        return
    assert isinstance(launcher, dict)
    for key, value in launcher.items():
        if key not in _COMMANDS and any(_CONTROL.search(text) for text in _texts(value)):
            yield f"hydra.launcher.{key!s} has a line break or another control character; the script of a job has none"


def _texts(value: Any) -> Iterator[str]:
    """Yields the texts in a setting, keys included."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value
