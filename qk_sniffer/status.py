"""Shows the state of the datasets and jobs below a folder, and the error of each failed job in one line.

It reads files. So it shows jobs on any machine that writes to this file system, even after the command that started
them has ended. A file that cannot be read is named on stderr and left out. Where SLURM answers, it adds the scheduler's
reason to the jobs that wait: `queued: Priority`.

The state is that of the dataset, by its own files and locks: queued, running, requeued (queued again after its time
limit), done (of a shard: it is captured), published, interrupted (rerun the command to resume), not started. The last
attempt is another column: refused at its start, failed, or interrupted, as a killed job is. It changes no dataset.
Without a dataset, a job is failed or interrupted itself. A job that was refused and left no folder is shown only if it
is one of a sweep.
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from qk_sniffer.cli import program
from qk_sniffer.errors import ConfigError, StoreError
from qk_sniffer.jobs.slurm import Reasons
from qk_sniffer.jobs.status import look, table, with_reasons
from qk_sniffer.text import flush, not_a_folder, not_one_of, printable, say, say_text

EVERY_S = 5.0

FORMATS = ("table", "json")


@dataclass(frozen=True)
class Settings:
    """The settings of the program."""

    folder: Path = field(
        default=Path("outputs"),
        metadata={"help": "folder with datasets and jobs; data_root=... is the same", "also": "data_root"},
    )
    watch: bool = field(default=False, metadata={"help": f"refresh every {EVERY_S:.0f} s, until Ctrl-C"})
    format: str = field(
        default="table", metadata={"help": "table, or json: a list of objects, one for each line of the table"}
    )


def main() -> int:
    """Runs `python -m qk_sniffer.status`; returns the exit code."""
    return program.run("qk_sniffer.status", __doc__ or "", Settings, show)


def show(settings: Settings) -> int:
    """Prints the state of every dataset and job below the folder; returns the exit code.

    Raises:
        ConfigError: the format is unknown.
        StoreError: the folder does not exist, or is none.
    """
    if settings.format not in FORMATS:
        raise ConfigError([not_one_of("format", settings.format, FORMATS)])
    if not settings.folder.is_dir():
        raise StoreError(not_a_folder(settings.folder))
    reasons = Reasons()
    try:
        while True:
            unreadable: list[StoreError] = []
            lines = with_reasons(look(settings.folder, unreadable.append), reasons)
            if settings.format == "json":
                text = json.dumps([line.to_dict() for line in lines], indent=None if settings.watch else 2)
                text = text.replace("\x7f", "\\u007f")  # the only control character that JSON leaves as it is
                is_read = say_text(text)
            else:
                if settings.watch:
                    sys.stdout.write("\x1b[H\x1b[J")
                    say(f"{time.strftime('%H:%M:%S')}, every {EVERY_S:.0f} s, Ctrl-C ends")
                width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
                nothing = f"no datasets or jobs below {printable(settings.folder)}"
                is_read = say_text(table(lines, width) if lines else nothing)
            is_read = flush(sys.stdout) and is_read
            for error in unreadable:
                say(f"left out: {error}", to=sys.stderr)
            if not (settings.watch and is_read):
                return 0
            time.sleep(EVERY_S)
    except KeyboardInterrupt:
        if not settings.watch:
            raise
        return 0


if __name__ == "__main__":
    sys.exit(main())
