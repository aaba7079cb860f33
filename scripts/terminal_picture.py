"""Draws docs/terminal.svg: a job on the embedded model, as a terminal shows it.

python scripts/terminal_picture.py

Runs the commands in an empty folder, each under a terminal of 100 columns. Needs rich, which huggingface_hub installs.
"""

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PICTURE = Path(__file__).parents[1] / "docs" / "terminal.svg"
COMMANDS = ("python -m qk_sniffer", "python -m qk_sniffer.status outputs/")
COLUMNS = 100


def output_of(command: str, folder: str) -> str:
    """Returns what a command writes to a terminal, with the codes of its colours.

    Raises:
        CalledProcessError: the command failed.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    arguments = [sys.executable, *shlex.split(command)[1:]]
    process = subprocess.Popen(arguments, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    received = b""
    with suppress(OSError):  # Linux raises one when no process has the terminal open any more
        while chunk := os.read(ours, 65536):
            received += chunk
    os.close(ours)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command, received)
    return received.decode()


def at_the_end(output: str) -> str:
    """Returns what the terminal shows at the end: a bar that was redrawn is there once."""
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in output.rstrip().split("\n"))
    return "\n".join(re.sub(r"\x1b\[[0-9;]*[A-HJKSTfhl]", "", line).rstrip() for line in lines)


def draw(texts: dict[str, str]) -> str:
    """Returns an SVG of commands and their output, in a font of the reader's machine."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for command, text in texts.items():
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        console.print(Text.from_ansi(text))
    svg = console.export_svg(title="qk-sniffer", theme=MONOKAI, unique_id="terminal")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # these fonts would come from another host
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


def main() -> None:
    with TemporaryDirectory() as folder:
        texts = {command: at_the_end(output_of(command, folder)) for command in COMMANDS}
    PICTURE.write_text(draw(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
