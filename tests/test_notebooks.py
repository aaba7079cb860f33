"""The notebooks of examples/: each runs without an error, and is kept with outputs, pictures and their explanation."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))

MOST_BYTES = 1_500_000
"""The largest size of all together."""

by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return cells


def text_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def shows(cell: dict[str, Any]) -> bool:
    """Whether a cell has an output. The warnings of libraries depend on the packages that are installed."""
    return any(output.get("name") != "stderr" for output in cell.get("outputs", ()))


def has_picture(cell: dict[str, Any]) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))


def test_there_is_one_for_each_subject() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "1_first_capture",
        "2_sinks_and_reach",
        "3_statistics_for_kv_compression",
        "4_plasticity_over_checkpoints",
        "5_generation",
    ]
    listed = re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\) \|", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE)
    assert listed == [path.stem for path in NOTEBOOKS]
    assert sum(path.stat().st_size for path in NOTEBOOKS) < MOST_BYTES


@by_name
def test_they_begin_with_a_cell_that_installs_the_package_where_it_is_missing(path: Path) -> None:
    first = text_of(next(cell for cell in cells_of(path) if cell["cell_type"] == "code"))
    assert first == text_of(next(cell for cell in cells_of(NOTEBOOKS[0]) if cell["cell_type"] == "code"))
    address, condition, refusal, install = first.splitlines()[-4:]
    assert condition == 'if importlib.util.find_spec("qk_sniffer") is None:'
    # No address is a default: the package would come from an account that somebody else may have taken.
    assert address.startswith('REPOSITORY = ""') and refusal.startswith("    assert REPOSITORY, ")
    assert install.startswith("    %pip install ") and "@ git+{REPOSITORY}" in install


@by_name
def test_they_are_kept_as_one_run_left_them(path: Path) -> None:
    code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    kinds = [output["output_type"] for cell in code for output in cell["outputs"]]
    assert kinds and set(kinds) <= {"stream", "display_data", "execute_result"}
    printed = ["".join(output["text"]) for cell in code for output in cell["outputs"] if "text" in output]
    assert not re.search(r"[\r\x1b]|/root/|/home/|/work/|/tmp/|Traceback|not found", "".join(printed))


@by_name
def test_every_picture_is_explained(path: Path) -> None:
    cells = cells_of(path)
    pictures = [number for number, cell in enumerate(cells) if has_picture(cell)]
    assert pictures
    for number in pictures:
        assert text_of(cells[number + 1]).startswith("**What to see.**"), f"cell {number} of {path.name}"


@pytest.mark.slow
@by_name
def test_they_run(path: Path, tmp_path: Path, smollm2: Path) -> None:
    from notebooks import executed

    here = tmp_path / "outputs" / "smollm2"
    here.parent.mkdir()
    here.symlink_to(smollm2)  # where those that need the model download it
    cells = executed(path, tmp_path).cells
    kept = cells_of(path)
    assert [has_picture(cell) for cell in cells] == [has_picture(cell) for cell in kept]
    assert [shows(cell) for cell in cells] == [shows(cell) for cell in kept]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["false", "no-such-program"])
def test_a_command_that_fails_ends_the_run(command: str, tmp_path: Path) -> None:
    import nbformat
    from nbclient.exceptions import CellExecutionError
    from notebooks import executed

    cells = [nbformat.v4.new_code_cell(f"!true\n!{command}"), nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "failing.ipynb")
    with pytest.raises(CellExecutionError, match="the command ends with"):
        executed(tmp_path / "failing.ipynb", tmp_path)
