"""Makes a PATH on which SLURM's programs are not found.

For a shell: `PATH=$(python3 tests/support/hide_slurm.py FOLDER)`. Uses the standard library alone: CI runs it before
it installs anything.
"""

import os
import sys
from pathlib import Path

PROGRAMS = {
    *("munged", "sacct", "sacctmgr", "salloc", "sattach", "sbatch", "sbcast", "scancel", "scontrol"),
    *("scrontab", "sdiag", "sinfo", "slurmctld", "slurmd", "slurmdbd", "slurmrestd", "slurmstepd", "sprio"),
    *("squeue", "sreport", "srun", "sshare", "sstat", "strigger", "sview"),
}
"""What Debian's slurmctld, slurmd, slurm-client and munge install, and the programs of a larger SLURM."""


def path_without_slurm(path: str, folder: Path) -> str:
    """Returns a PATH that finds every program that `path` finds, except SLURM's.

    Replaces a directory that has a program of SLURM by a subfolder of `folder` with links to its other programs.
    """
    directories = []
    for number, directory in enumerate(path.split(os.pathsep)):
        if any(os.path.lexists(Path(directory) / program) for program in PROGRAMS):
            links = folder / str(number)
            links.mkdir(parents=True)
            for program in Path(directory).absolute().iterdir():
                if program.name not in PROGRAMS:
                    (links / program.name).symlink_to(program)
            directory = str(links)
        directories.append(directory)
    return os.pathsep.join(directories)


if __name__ == "__main__":
    print(path_without_slurm(os.environ["PATH"], Path(sys.argv[1]).absolute()))
