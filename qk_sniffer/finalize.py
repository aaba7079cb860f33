"""Makes the dataset of a job whose shards are all captured, where the one that should have made it did not.

The last of a job's shards to end does this by itself. It is needed by hand when that one died before it was through, or
when a machine without a GPU shall do it; it may be called at any time, and again. A few rows are proven with the
model, which is loaded for it, unless prove=false. Says which shards are missing, if any are. A dataset that is
finished is published, where hf_repo_id says to which repo.

Exit codes: 0 the dataset is finished, 1 it is not, 2 the settings are wrong, 130 interrupted.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from qk_sniffer.cli import program
from qk_sniffer.cli.environment import read_environment
from qk_sniffer.jobs.finalize import finalize


@dataclass(frozen=True)
class Settings:
    """The settings of the program."""

    data_root: Path = field(metadata={"help": "the folder of the dataset"})
    prove: bool = field(default=True, metadata={"help": "load the model and derive a few rows again"})
    hf_repo_id: str | None = field(
        default=None, metadata={"help": "publish it to this repo of the Hub; null: where an unfinished job would have"}
    )
    hf_branch: str | None = field(default=None, metadata={"help": "the branch to publish to, with hf_repo_id"})


def main() -> int:
    """`python -m qk_sniffer.finalize`; returns the exit code."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("qk_sniffer").setLevel(logging.INFO)
    read_environment()
    return program.run("qk_sniffer.finalize", __doc__ or "", Settings, _program)


def _program(settings: Settings) -> int:
    return finalize(
        settings.data_root, prove=settings.prove, hf_repo_id=settings.hf_repo_id, hf_branch=settings.hf_branch
    )


if __name__ == "__main__":
    sys.exit(main())
