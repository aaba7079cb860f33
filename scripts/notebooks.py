"""Runs the notebooks of examples/ in place, so that they have the outputs of the current code.

    python scripts/notebooks.py                              # all of them
    python scripts/notebooks.py examples/5_generation.ipynb

Their files go to a temporary folder. Needs the packages of the extra `notebooks`.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

TIMEOUT_S = 900
"""The longest time of a cell."""


def executed(path: Path, folder: Path) -> Any:
    """Returns the notebook at `path` with the outputs of a run in `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails, or a command in it. The message has the code of the cell.
    """
    notebook = nbformat.read(path, as_version=4)
    cells = notebook.cells
    notebook.cells = [*_with_checks(cells)]
    client = NotebookClient(
        notebook, timeout=TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    # tqdm warns of missing widgets, which would be kept as a picture of nothing.
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"})
    notebook.cells = cells
    for number, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), start=1):
        cell.metadata.pop("execution", None)  # times, which would change with each run
        cell.outputs = _joined(cell.outputs, folder)
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _with_checks(cells: list[Any]) -> Iterator[Any]:
    """Yields cells, and after each with a command one that fails if the command has: the cell itself goes on."""
    for cell in cells:
        yield cell
        if cell.cell_type == "code" and re.search("^!", cell.source, flags=re.MULTILINE):
            yield nbformat.v4.new_code_cell("assert _exit_code == 0, f'the command ends with {_exit_code}'")


def _joined(outputs: list[Any], folder: Path) -> list[Any]:
    """Returns outputs with the parts of a stream joined, the last state of each progress bar alone, and no `folder`."""
    found: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and found and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    for output in found:
        if output.output_type == "stream":
            lines = output.text.replace("\r\n", "\n").replace(f"{folder}/", "")
            output.text = re.sub(r"[^\n]*\r", "", lines)
    return found


def main(paths: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path in map(Path, paths or sorted(map(str, EXAMPLES.glob("*.ipynb")))):
            print(path, flush=True)
            nbformat.write(executed(path, Path(folder).resolve()), path)


if __name__ == "__main__":
    main(sys.argv[1:])
