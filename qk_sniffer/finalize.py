"""Makes the dataset of a job whose shards are all captured.

Normally the last shard of a job does this. Run this program if that shard died before the dataset was finished, or to
make the dataset on a machine without a GPU. It is safe to run at any time, and more than once.

It loads the model to prove a few rows, unless prove=false. The folder may come from someone else. A job that asks for
code (model.trust_remote_code, model.allow_pickle, model.family, a kernel of the Hub in model.attn_implementation) is
refused, unless the setting of that name here allows it too. It names the shards that are missing. It publishes a
finished dataset, with hf_repo_id to that repository.

Exit codes: 0 the dataset is finished, 1 it is not, 2 the settings are wrong, 130 interrupted.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from qk_sniffer.cli import program
from qk_sniffer.cli.environment import read_environment


@dataclass(frozen=True)
class Settings:
    """The settings of the program."""

    data_root: Path = field(metadata={"help": "the folder of the dataset"})
    prove: bool = field(default=True, metadata={"help": "load the model and derive a few rows a second time"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "the job may run Python code from the checkpoint, if it asks for it"}
    )
    allow_pickle: bool = field(default=False, metadata={"help": "the job may load pickled weights, if it asks for it"})
    family: str | None = field(
        default=None, metadata={"help": "the family, package.module:Class, that the job may import if it asks for it"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "the kernel of the Hub, org/name, that the job may load if it asks for it"}
    )
    hf_repo_id: str | None = field(
        default=None,
        metadata={"help": "repository on the Hub to publish to; null: that of the job, if the job is unfinished"},
    )
    hf_branch: str | None = field(
        default=None, metadata={"help": "branch to publish to, with hf_repo_id; null: <model slug>-<dataset slug>"}
    )
    private: bool | None = field(
        default=None, metadata={"help": "publish to a private repository alone; null: if the job asked for it"}
    )


def main() -> int:
    """Runs `python -m qk_sniffer.finalize`; returns the exit code."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("qk_sniffer").setLevel(logging.INFO)
    return program.run("qk_sniffer.finalize", __doc__ or "", Settings, _program)


def _program(settings: Settings) -> int:
    read_environment()
    # This import loads torch, which a wrong command line must not wait for.
    from qk_sniffer.jobs.finalize import Allowed, finalize

    return finalize(
        settings.data_root,
        prove=settings.prove,
        allowed=Allowed(
            settings.trust_remote_code, settings.allow_pickle, settings.family, settings.attn_implementation
        ),
        hf_repo_id=settings.hf_repo_id,
        hf_branch=settings.hf_branch,
        private=settings.private,
    )


if __name__ == "__main__":
    sys.exit(main())
