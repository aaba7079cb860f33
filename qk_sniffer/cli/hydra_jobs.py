"""Has Hydra run jobs, and turns what the disk or SLURM refuses it into one clear error.

Hydra writes the folder of each job (`.hydra/`, the log) before the job starts. A full disk or a folder that cannot be
written ends Hydra there, with its own traceback. So does a job that sbatch does not accept.
"""

import errno
from collections.abc import Callable
from subprocess import CalledProcessError
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn
from hydra.types import RunMode

from qk_sniffer.cli.launching import protect_jobs
from qk_sniffer.errors import RIGHTS, QkSnifferError, StoreError

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
_OF_A_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


def run_jobs(config_name: str, task: Callable[[Any], Any], arguments: list[str], *, is_sweep: bool) -> list[JobReturn]:
    """Runs `task` for each job of a command line. Hydra is initialized.

    Raises:
        StoreError: Hydra cannot write the folder of a job.
        QkSnifferError: SLURM does not accept the jobs.
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
    except RuntimeError as error:  # submitit's
        cause = error.__cause__
        if not (isinstance(cause, CalledProcessError) and "sbatch" in cause.cmd):
            raise
        raise QkSnifferError(
            f"SLURM does not accept the jobs: {cause.stderr.strip() or 'sbatch failed without a message'}. Change the "
            "settings of hydra.launcher that it names, and rerun the command"
        ) from error
    except (OSError, ValueError) as error:  # a ValueError: of the configuration of the log
        cause = _of_the_disk(error)
        if cause is None:
            raise
        where = cause.filename or "the folder of the job (hydra.run.dir or hydra.sweep.dir)"
        solution = RIGHTS if cause.errno in (errno.EACCES, errno.EPERM) else "free some space"
        raise StoreError(
            f"cannot write {where}: {cause.strerror}. {solution.capitalize()}; or give Hydra another folder with "
            "hydra.run.dir=... (of a sweep: hydra.sweep.dir=...). Then rerun the command, which keeps what is complete"
        ) from error


def _of_the_disk(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError) and (error.errno in _OF_THE_DISK | _OF_A_PATH):
            return error
        error = error.__cause__ or error.__context__
    return None
