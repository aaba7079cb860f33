"""How the datasets and jobs below a folder stand: what waits, runs, is finished, or failed and why.

It reads files only, so it tells of jobs on any machine that writes to this file system, whether or not the command that
began them still runs.

States: queued, running, requeued (its time was up, and it is queued again), done (with shard.count > 1: this shard is
captured), published, failed, interrupted (by a person or by SLURM, which may begin it again), not started (its sweep
ended before).
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from qk_sniffer.cli import program
from qk_sniffer.errors import ConfigError, StoreError
from qk_sniffer.jobs.status import look, table

EVERY_S = 5.0


@dataclass(frozen=True)
class Settings:
    """The settings of the program."""

    folder: Path = field(default=Path("outputs"), metadata={"help": "what to look through", "positional": True})
    watch: bool = field(default=False, metadata={"help": f"look again every {EVERY_S:.0f} s, until Ctrl-C"})
    format: str = field(default="table", metadata={"help": "table, or json: a list of objects, one a line"})


def main() -> int:
    """`python -m qk_sniffer.status`; returns the exit code."""
    return program.run("qk_sniffer.status", __doc__ or "", Settings, show)


def show(settings: Settings) -> int:
    """Prints how everything below the folder stands.

    Raises:
        ConfigError: there is no such format.
        StoreError: there is no such folder.
    """
    if settings.format not in ("table", "json"):
        raise ConfigError([f"format is {settings.format!r}; valid: table, json"])
    if not settings.folder.is_dir():
        raise StoreError(f"there is no folder {settings.folder}")
    try:
        while True:
            lines = look(settings.folder)
            if settings.format == "json":
                said = json.dumps([line.to_dict() for line in lines], indent=None if settings.watch else 2)
            else:
                said = table(lines) if lines else f"no datasets or jobs below {settings.folder}"
                if settings.watch:
                    said = f"\x1b[H\x1b[J{time.strftime('%H:%M:%S')}, every {EVERY_S:.0f} s, Ctrl-C ends\n{said}"
            print(said, flush=True)
            if not settings.watch:
                return 0
            time.sleep(EVERY_S)
    except KeyboardInterrupt:
        if not settings.watch:
            raise
        return 0


if __name__ == "__main__":
    sys.exit(main())
