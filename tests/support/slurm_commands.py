"""Puts commands of SLURM in the PATH that answer with recorded output."""

import os
import shlex
from pathlib import Path

import pytest

SINFO = """\
main*|up|1:00:00|2|gpu:1|4000
short|up|5:00|2|gpu:1|4000
hid|up|1-00:00:00|2|(null)|4000
down|down|infinite|2|gpu:1|4000
"""
"""What `sinfo --noheader --all --exact --format=%P|%a|%l|%c|%G|%m` of SLURM 22.05 says."""

SQUEUE = """\
9|PENDING|PartitionDown
1|PENDING|PartitionTimeLimit
6|PENDING|PartitionConfig
10|PENDING|BeginTime
12_0|PENDING|PartitionTimeLimit
12_1|PENDING|PartitionTimeLimit
12_2|PENDING|Priority
12_3|PENDING|None
14|PENDING|Dependency
17|PENDING|ReqNodeNotAvail, UnavailableNodes:n[1-3]
7|RUNNING|None
"""
"""What `squeue --noheader --array --format=%i|%T|%r` of SLURM 22.05 says."""


class Commands:
    """A folder of commands, which is the first in the PATH. `calls` lists the arguments of every call."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def say(self, name: str, output: str, *, code: int = 0, before: str = "") -> None:
        """Makes the command `name` print `output` and exit with `code`, after the lines `before` of shell."""
        command = self.folder / name
        log = shlex.quote(str(self.folder / f"{name}.calls"))
        text = f"#!/bin/sh\necho \"$*\" >>{log}\n{before}\nprintf '%s' {shlex.quote(output)}\nexit {code}\n"
        command.write_text(text)
        command.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        """The arguments of each call of a command."""
        log = self.folder / f"{name}.calls"
        return log.read_text().splitlines() if log.exists() else []
