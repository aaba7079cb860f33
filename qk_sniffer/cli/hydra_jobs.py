"""Has Hydra run jobs, and turns what ends it outside of a job into one clear error.

Hydra writes the folder of each job (`.hydra/`, the log) before the job starts. A full disk or a folder that cannot be
written ends Hydra there, with its own traceback. So does a job that sbatch does not accept, and a setting of Hydra, of
its launcher or of its log that `hydra_settings` does not check.
"""

import errno
import os
import re
from collections.abc import Callable
from subprocess import CalledProcessError
from traceback import walk_tb
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn
from hydra.types import RunMode

from qk_sniffer.cli.launching import protect_jobs
from qk_sniffer.errors import RIGHTS, ConfigError, QkSnifferError, StoreError

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
_OF_A_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


def run_jobs(config_name: str, task: Callable[[Any], Any], arguments: list[str], *, is_sweep: bool) -> list[JobReturn]:
    """Runs `task` for each job of a command line. Hydra is initialized.

    Raises:
        ConfigError: Hydra fails with its own settings.
        StoreError: Hydra cannot write the folder of a job.
        QkSnifferError: SLURM does not accept the jobs.
        Exception: of a job; or as Hydra raises it, with HYDRA_FULL_ERROR=1 in the environment.
    """
    hydra_object = GlobalHydra.instance().hydra
    assert hydra_object is not None
    if is_sweep:
        protect_jobs()
    # Hydra's own start adds this too: a job of a sweep finds by its mode that it is one.
    arguments = [*arguments, f"hydra.mode={(RunMode.MULTIRUN if is_sweep else RunMode.RUN).name}"]
    try:
        if not is_sweep:
            return [hydra_object.run(config_name, task, arguments)]
        return [job for batch in hydra_object.multirun(config_name, task, arguments) for job in batch]
    except QkSnifferError:
        raise
    except Exception as error:
        found = _slurm_error(error) or _disk_error(error)
        if found is None and (_is_of_a_job(error) or os.environ.get("HYDRA_FULL_ERROR") == "1"):
            raise
        raise found or ConfigError([_of_settings(error)]) from error


def _slurm_error(error: Exception) -> QkSnifferError | None:
    cause = error.__cause__
    if not (isinstance(error, RuntimeError) and isinstance(cause, CalledProcessError) and "sbatch" in cause.cmd):
        return None
    return QkSnifferError(
        f"SLURM does not accept the jobs: {cause.stderr.strip() or 'sbatch failed without a message'}. Change the "
        "settings of hydra.launcher that it names, and rerun the command"
    )


def _disk_error(error: Exception) -> QkSnifferError | None:
    # A ValueError is of the configuration of the log.
    cause = _of_the_disk(error) if isinstance(error, OSError | ValueError) else None
    if cause is None:
        return None
    where = cause.filename or "the folder of the job (hydra.run.dir or hydra.sweep.dir)"
    solution = RIGHTS if cause.errno in (errno.EACCES, errno.EPERM) else "free some space"
    start = f"{solution.capitalize()}; or give" if cause.errno in _OF_THE_DISK else "Give"
    return StoreError(
        f"cannot write {where}: {cause.strerror}. {start} Hydra another folder with hydra.run.dir=... (of a sweep: "
        "hydra.sweep.dir=...). Then rerun the command, which keeps what is complete"
    )


_RESULT = JobReturn.return_value.fget.__code__  # type: ignore[attr-defined]
"""The code that raises the error of a job of this process."""


def _is_of_a_job(error: Exception) -> bool:
    """Whether a job has raised the error, or submitit one that tells the end of a job."""
    if isinstance(error, RuntimeError) and type(error).__module__.startswith("submitit."):
        return True
    return any(frame.f_code is _RESULT for frame, _ in walk_tb(error.__traceback__))


def _of_settings(error: Exception) -> str:
    """Words an error of Hydra, of its plug-ins or of the log. No job has begun, so that it follows from settings."""
    said = [_words(error)]
    if error.__cause__ is not None and (why := _words(error.__cause__)) not in said[0]:
        said.append(why)
    if key := re.search(r"full_key: (\S+)", str(error)):
        where = key[1]
    elif said[0].startswith("Unable to configure"):
        where = "hydra.job_logging or hydra.hydra_logging"
    else:
        where = "Hydra's own settings"
    return (
        f"{where}: {': '.join(said)}; correct this setting, or leave it out (HYDRA_FULL_ERROR=1 shows where it fails)"
    )


_MOST_WORDS = 500
"""The most characters that are shown of an error. submitit lists all its parameters."""


def _words(error: BaseException) -> str:
    text = re.sub(r"full_key: \S+|, set env var HYDRA_FULL_ERROR=1 to see chained exception", "", str(error))
    return " ".join(text.split())[:_MOST_WORDS].rstrip(".") or type(error).__name__


def _of_the_disk(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError) and (error.errno in _OF_THE_DISK | _OF_A_PATH):
            return error
        error = error.__cause__ or error.__context__
    return None
