"""Makes the dataset of a job whose shards are all captured, where the one that should have made it did not.

The last of a job's shards to end does this by itself. It is needed by hand when that one died before it was through, or
when a machine without a GPU shall do it; it may be called at any time, and again. A few rows are proven with the
model, which is loaded for it, unless prove=false. Says which shards are missing, if any are.

Exit codes: 0 the dataset is finished, 1 it is not, 2 the settings are wrong, 130 interrupted.
"""

import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qk_sniffer import command
from qk_sniffer.assembly import finish_publication
from qk_sniffer.config import VerifyConfig, from_dict
from qk_sniffer.corpus import open_corpus
from qk_sniffer.environment import read_environment
from qk_sniffer.finish import finish, present
from qk_sniffer.job import read_record
from qk_sniffer.parts import LazyParts
from qk_sniffer.progress import Stages
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.files import Folder
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.layout import Layout, missing_manifest
from qk_sniffer.store.locks import holder, is_held


@dataclass(frozen=True)
class Settings:
    """The settings of the program."""

    data_root: Path = field(metadata={"help": "the folder of the dataset"})
    prove: bool = field(default=True, metadata={"help": "load the model and derive a few rows again"})


def main() -> int:
    """`python -m qk_sniffer.finalize`; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
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
        config = from_dict(manifests.read(layout.root)["config"])
        present(config, layout, "Nothing to do: the dataset is finished.", Folder(layout.root))
        return 0
    if missing := missing_shards(layout, record):
        print("\n".join([f"{layout.root} cannot be finished yet:", *(f"  - {line}" for line in missing)]))
        print("Run their jobs, with the command that began this one; shards that are done do nothing then.")
        return 1
    config = from_dict(record["config"])
    if not settings.prove:
        config = replace(config, verify=VerifyConfig(examples=0))
    stages = Stages()

    def corpus() -> Any:
        return open_corpus(config.dataset, record["commits"]["dataset"])

    done = finish(config, layout, corpus, LazyParts(config, record["commits"], stages), stages)
    return 1 if done is None and read_record(layout) is not None else 0


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
