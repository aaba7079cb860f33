"""Makes the dataset of a job whose shards are all captured, where the one that should have made it did not.

The last of a job's shards to end does this by itself. It is needed by hand when that one died before it was through, or
when a machine without a GPU shall do it; it may be called at any time, and again. A few rows are proven with the
model, which is loaded for it, unless prove=false. Says which shards are missing, if any are. A dataset that is
finished is published, where hf_repo_id says to which repo.

Exit codes: 0 the dataset is finished, 1 it is not, 2 the settings are wrong, 130 interrupted.
"""

import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qk_sniffer import command
from qk_sniffer.assembly import finish_publication
from qk_sniffer.config import Config, VerifyConfig, from_dict, resolved
from qk_sniffer.corpus import open_corpus
from qk_sniffer.environment import read_environment
from qk_sniffer.errors import ConfigError
from qk_sniffer.finish import finish, present
from qk_sniffer.hub.client import require_access
from qk_sniffer.job import read_record
from qk_sniffer.parts import LazyParts
from qk_sniffer.progress import Stages
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.files import Folder
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.layout import Layout, missing_manifest
from qk_sniffer.store.locks import holder, is_held
from qk_sniffer.validation import output_problems


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
    return command.run("qk_sniffer.finalize", __doc__ or "", Settings, finalize)


def finalize(settings: Settings) -> int:
    """Makes the dataset at `settings.data_root`, and says what is missing where that cannot be; the exit code.

    Raises:
        QkSnifferError: there is no job; what the shards captured cannot be made a dataset; it is not published.
    """
    layout = Layout(settings.data_root)
    if not layout.root.is_dir():
        raise missing_manifest(layout.root)
    finish_publication(layout)
    record = read_record(layout)
    if record is None:
        config = _published(from_dict(manifests.read(layout.root)["config"]), settings)
        present(config, layout, "Nothing to do: the dataset is finished.", Folder(layout.root))
        return 0
    if missing := missing_shards(layout, record):
        print("\n".join([f"{layout.root} cannot be finished yet:", *(f"  - {line}" for line in missing)]))
        print("Run their jobs, with the command that began this one; shards that are done do nothing then.")
        return 1
    config = _published(from_dict(record["config"]), settings)
    if not settings.prove:
        config = replace(config, verify=VerifyConfig(examples=0))
    stages = Stages()

    def corpus() -> Any:
        return open_corpus(config.dataset, record["commits"]["dataset"])

    done = finish(config, layout, corpus, LazyParts(config, record["commits"], stages), stages)
    return 1 if done is None and read_record(layout) is not None else 0


def _published(config: Config, settings: Settings) -> Config:
    """`config` with the place on the Hub that `settings` give, if they do."""
    if settings.hf_repo_id is None:
        return config
    output = replace(config.output, hf_repo_id=settings.hf_repo_id, hf_branch=settings.hf_branch)
    if problems := list(output_problems(output)):
        raise ConfigError(problems)
    require_access(settings.hf_repo_id)
    return resolved(replace(config, output=output))


def missing_shards(layout: Layout, record: dict[str, Any]) -> list[str]:
    """A line for each shard of the job of `record` that is not captured, with what there is of it."""
    count = record["config"]["shard"]["count"]
    lines = []
    for index in range(count):
        if layout.shard_done(index, count).exists():
            continue
        lock = layout.shard_lock(index, count)
        if is_held(lock):
            state = f"running ({holder(lock)})"
        elif captured := len(Journal(layout.journal(index, count), verify=False).records):
            state = f"stopped, with {captured} examples captured"
        else:
            state = "not begun"
        lines.append(f"shard {index} of {count}: {state}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
