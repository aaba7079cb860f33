"""The pages: runs, composes or loads every fenced command, YAML and Python block."""

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hydra._internal.utils import get_args

import qk_sniffer
from qk_sniffer.cli import app, preflight, program
from qk_sniffer.export import cli as export
from qk_sniffer.export.formats import FORMATS
from qk_sniffer.jobs.run import run_job
from qk_sniffer.jobs.sweep import PlannedJob
from qk_sniffer.plasticity import cli as plasticity
from qk_sniffer.report import cli as report
from qk_sniffer.resolved import fingerprint

ROOT = Path(__file__).parents[1]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "models/ADDING.md", "examples/README.md"),
    *sorted(page.relative_to(ROOT).as_posix() for page in ROOT.glob("docs/**/*.md")),
]


DIAGRAMS = {
    "docs/recipes/jobs.md": ("model      pydoc-tiny",),
    "docs/data.md": ("outputs/pydoc-tiny-pydoc/",),
    "docs/inside.md": ("python -m qk_sniffer --multirun",),
    "CONTRIBUTING.md": ("text ─ examples ─ token batches",),
}
"""How the blocks begin that are neither a program nor a file. A command in the first line is checked as any other."""

PYTHON_RUN_ELSEWHERE = {"models/ADDING.md": "tests/backbone/test_adding.py"}
"""Pages with Python that a test of their own runs."""

COMPOSED_ONLY = {
    "model": "the model is on the Hub or the reader's own; tests/backbone/test_adding.py and test_gguf.py run such",
    "+experiment": "the models are on the Hub",
    "output": "the job publishes to the Hub; tests/jobs/test_job_on_hub.py runs such",
}
"""A group in a job's command, and why the command is composed instead of run."""

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

SMALL = ["dataset.max_samples=1", "model.tokenizer.max_length=160"]


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    before: str
    """The page up to the block."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place} {self.text.removeprefix('python -m ')[:60]}"

    def words(self) -> list[str]:
        """Returns the words that bash makes of the command in the current directory."""
        code = f"for word in {self.text}\ndo printf '%s\\0' \"$word\"; done"
        done = subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True)
        return done.stdout.split("\0")[:-1]


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, found.start()) + 1
            yield Block(page, line, found[1], found[2], text[: found.start()])


def commands() -> Iterator[Command]:
    """Yields the commands in blocks, and those that a sentence quotes without placeholders."""
    for block in BLOCKS:
        if block.language == "bash":
            lines = block.text.replace("\\\n", "").splitlines()
            yield from (Command(str(block), line) for line in lines if line.strip())
        elif block.text.startswith("python "):
            yield Command(str(block), block.text.partition("\n")[0])
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        quoted = re.findall(r"`((?:python|make|pip)\s[^`]+)`", prose)
        yield from (
            Command(page, " ".join(text.split())) for text in quoted if not re.search(r"\.\.\.|<|[A-Z]{3}", text)
        )


BLOCKS = list(blocks())
COMMANDS = list(dict.fromkeys(commands()))
JOBS = [command for command in COMMANDS if re.match(r"python -m qk_sniffer( |$)", command.text)]
OTHERS = [command for command in COMMANDS if command not in JOBS]


def jobs_of(words: list[str]) -> list[PlannedJob]:
    """Returns the jobs that `python -m qk_sniffer` would run."""
    args = get_args(words[3:])
    args.multirun = args.multirun or args.cfg is not None  # the settings of a launcher are shown without a sweep
    return preflight.planned(args, app.APPLICATION)


def composed_only(command: Command) -> str | None:
    """Returns why a job's command does not run here; None if it does."""
    settings = {word.partition("=")[0] for word in command.text.split()}
    if {"--help", "--cfg"} & settings:
        return "prints text"
    return next((reason for group, reason in COMPOSED_ONLY.items() if group in settings), None)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who has the files that the pages name, and the outputs of ten checkpoints."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "texts.jsonl").write_text('{"text": "The first text."}\n{"text": "And the second, a longer one."}\n')
    (folder / "book.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely.")
    said = [("user", "What is a tuple? " * 10), ("assistant", "A sequence. " * 20)]
    chat = [{"role": role, "content": content} for role, content in said]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}. {% endfor %}")
    segments = [{"name": "prompt", "start": 0}, {"name": "answer", "start": 70}]
    answers = [{"input_ids": [*range(100, 250)], "segments": segments}]
    pq.write_table(pa.Table.from_pylist(answers), folder / "answers.parquet")
    (folder / "my-folder").mkdir()
    (folder / "my-folder" / "rows.jsonl").write_text('{"body": "Some words.", "id": 7}\n')
    for block in BLOCKS:
        if named := re.match(r"# (\S+\.(?:py|yaml))\n", block.text):
            (folder / named[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / named[1]).write_text(block.text)
    (folder / "bin").mkdir()
    (folder / "bin" / "srun").touch(mode=0o755)
    with chdir(folder):
        for job in jobs_of(["python", "-m", "qk_sniffer", "+experiment=smollm3_checkpoints", "output=local"]):
            root = Path(str(job.config.output.data_root))
            root.mkdir(parents=True)
            root.with_name(f"{root.name}-plasticity").mkdir()
    return folder


@pytest.fixture
def at_readers(reader: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the current directory, on a login node of SLURM."""
    monkeypatch.chdir(reader)
    monkeypatch.setenv("PATH", str(reader / "bin"), prepend=os.pathsep)
    return reader


@pytest.fixture(scope="module")
def demo(reader: Path) -> Path:
    """The dataset of the default settings, in the reader's folder, with fewer rows."""
    with chdir(reader):
        (job,) = jobs_of(["python", "-m", "qk_sniffer", *SMALL])
        run_job(job.config)
    return reader / str(job.config.output.data_root)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_has_a_language_or_is_a_known_diagram(block: Block) -> None:
    if block.language:
        assert block.language in ("bash", "python", "yaml")
    else:
        assert block.text.startswith(DIAGRAMS.get(block.page, ()))


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_the_site_checks_the_pictures_of_a_page(page: str) -> None:
    assert "<img" not in (ROOT / page).read_text(), "mkdocs does not look for the file of a tag"


@pytest.mark.parametrize("page", [*PAGES, "SECURITY.md", "benchmarks/README.md", "models/SUPPORTED.md"])
def test_links_of_a_page_lead_to_files_and_headings_of_the_repository(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        name, _, heading = "".join(target).partition("#")
        if ":" in name:  # another host
            continue
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.is_file(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


def test_the_api_has_every_public_name() -> None:
    described = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert {*qk_sniffer.__all__} - {"__version__"} <= {name.rpartition(".")[2] for name in described}


def test_the_overview_of_the_api_names_what_there_is() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    table = "".join(re.findall(r"^\| (`.*?) \| ", text, flags=re.MULTILINE))
    names = re.findall(r"`(qk_sniffer|Captured|Dataset|)\.(\w+)", table)
    assert len(names) >= 15
    for owner, name in names:
        if owner == "qk_sniffer":
            assert name in qk_sniffer.__all__
            continue
        for each in [getattr(qk_sniffer, owner)] if owner else [qk_sniffer.Captured, qk_sniffer.Dataset]:
            source = "".join(map(inspect.getsource, each.__mro__[:-1]))
            assert re.search(rf"(def |self\.){name}\b", source), (each, name)


@pytest.mark.slow
@pytest.mark.usefixtures("at_readers")
@pytest.mark.parametrize(
    "command",
    JOBS,
    ids=str,
)
def test_jobs(command: Command) -> None:
    jobs = jobs_of(command.words())
    for job in jobs:
        repo = job.config.output.hf_repo_id
        assert repo is None or repo.startswith("me/"), f"publishes to {repo}, which is not the reader's"


@pytest.mark.slow
@pytest.mark.usefixtures("at_readers")
def test_no_job_of_a_page_refuses_another_in_the_same_folder(tmp_path: Path) -> None:
    """Runs the jobs one after another; compares the folders and the settings of those that are not run here."""
    seen: dict[Path, tuple[Command, dict[str, Any]]] = {}
    for command in JOBS:
        if {"--help", "--cfg"} & {*command.text.split()}:
            continue
        for job in jobs_of([*command.words(), *SMALL, f"output.folder={tmp_path}"]):
            if not job.config.dry_run:
                asked = {key: value for key, value in fingerprint(job.config).items() if not key.startswith("shard.")}
                other, found = seen.setdefault(job.config.data_root, (command, asked))
                assert asked == found, f"{command} and {other} have one folder, {job.config.data_root}"
            if composed_only(command) is None:
                rows = run_job(job.config).rows
                is_none = job.config.sampler.type == "none"
                assert rows is None if job.config.dry_run else (rows > 0) != is_none, command


@pytest.mark.slow
def test_the_recipes_of_the_readme_run_one_after_another_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs them after `make demo`. Those of a name that the reader has to give are composed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "The first text."}\n{"text": "And the second, a longer one."}\n')
    assert re.search(
        r"^demo:.*\n\t\$\(BIN\)/python -m qk_sniffer$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE
    )
    (table,) = re.findall(r"^## Recipes\n.*?\n\n(\|.*?)\n\n", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    spans = [span for span in re.findall(r"`([^`]+)`", table) if "=" in span or span.startswith("python")]
    few = ["dataset.max_samples=8", "model.tokenizer.max_length=512"]
    ran = 0
    for words in map(shlex.split, ["model=pydoc_tiny", *spans]):
        if words[0] == "python":
            few_too = few if words[:3] == ["python", "-m", "qk_sniffer"] else []
            command = [sys.executable, *words[1:], *few_too]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, (words, done.stderr)
        else:
            (job,) = jobs_of(["python", "-m", "qk_sniffer", *words, *few])
            if any("org/" in word or "me/" in word for word in words):
                continue
            assert run_job(job.config).rows is not None, words
        ran += 1
    assert ran >= 8


@pytest.mark.slow
@pytest.mark.usefixtures("at_readers")
@pytest.mark.parametrize("command", OTHERS, ids=str)
def test_other_programs(command: Command) -> None:
    match command.words():
        case ["make", target]:
            subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
        case ["pip", "install", *arguments]:
            what = " ".join(word for word in arguments if word not in ("-c", "constraints.txt", "-e"))
            extra = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
            assert extra is not None, "the package is on no index: it is installed from a clone"
            assert {*(extra[1] or "dev").split(",")} <= {*EXTRAS}
        case ["python", "-m", "qk_sniffer.plasticity", *arguments]:
            args = get_args(arguments)
            jobs = preflight.planned(args, plasticity.APPLICATION)
            assert len(jobs) == (10 if "smollm3" in command.text else command.text.count(",") + 1)
        case ["python", "-m", "qk_sniffer.export", *arguments]:
            settings = program.parse(arguments, export.Settings)
            assert settings.format in FORMATS
        case ["python", "-m", "qk_sniffer.report", *arguments]:
            program.parse(arguments, report.Settings)
        case ["python", "-m", module, *arguments]:
            settings = program.parse(arguments, import_module(module).Settings)
            if "smollm3" in command.text:
                assert settings.runs.count(",") == 9
        case ["python", script, *_]:
            assert (ROOT / script).is_file() or Path(script).is_file()
        case words:
            raise AssertionError(f"no test knows how to check {words}")


@pytest.mark.usefixtures("at_readers", "demo")
@pytest.mark.parametrize("program_name", ["verify", "status"])
def test_the_small_programs_run_on_the_demo(
    program_name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = [
        each for each in OTHERS if each.place.startswith("docs/recipes/jobs.md:") and f".{program_name} " in each.text
    ]
    words = [word for word in command.words() if word != "watch=true"]
    monkeypatch.setattr(sys, "argv", words[2:])
    assert import_module(words[2]).main() == 0
    assert "pydoc-tiny-pydoc" in capsys.readouterr().out


@pytest.fixture(scope="module")
def read_datasets(reader: Path) -> None:
    """The datasets that the Python on the pages reads besides the demo, in the reader's folder, over few tokens."""
    for folder in ("statistics", "attention", "aligned", "characters", "segments"):
        command = next(each for each in JOBS if f"output.data_root=outputs/{folder}" in each.text)
        with chdir(reader):
            (job,) = jobs_of([*command.words(), *SMALL])
            run_job(job.config)
    # The other model is on the Hub; tests/jobs/test_aligned.py runs the recipe with two tokenizers.
    shutil.copytree(reader / "outputs/characters", reader / "outputs/characters-smollm2")


@pytest.mark.slow
@pytest.mark.usefixtures("at_readers", "demo", "read_datasets")
@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python(block: Block) -> None:
    if (excerpt := re.match(r"# (benchmarks/\S+\.py)\n", block.text)) is not None:
        there = {line.strip() for line in (ROOT / excerpt[1]).read_text().splitlines()}
        assert {line.strip() for line in block.text.splitlines()[1:]} <= there
    elif block.page in PYTHON_RUN_ELSEWHERE:
        assert Path(block.page).name in (ROOT / PYTHON_RUN_ELSEWHERE[block.page]).read_text()
    else:
        exec(compile(block.text, str(block), "exec"), {})


def test_the_files_of_a_dataset_are_those_of_the_page(demo: Path) -> None:
    (block,) = [each for each in BLOCKS if each.text.startswith("outputs/pydoc-tiny-pydoc/")]
    names = re.findall(r"── (\S+\.\w+)  ", block.text)
    assert len(names) == 5
    assert all((demo / name).is_file() for name in names)


@pytest.mark.parametrize("page", ["benchmarks/README.md", "docs/coming_from.md"])
def test_the_table_of_other_ways_has_the_measured_figures(page: str) -> None:
    lines = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text())["lines"]
    units = {"time_over_plain": 0.01, "peak_mb": 1.0, "mb_per_example": 0.1, "size_over_raw": 0.001}
    cells = (line.strip("| ").split(" | ") for line in (ROOT / page).read_text().splitlines())
    shown = {name: rest for name, *rest in cells if name in lines and len(rest) >= 3}
    assert [*shown] == [*lines]
    for name, measured in lines.items():
        for (key, unit), text in zip(units.items(), shown[name], strict=False):
            if measured[key] is not None:
                assert float(text.replace(",", "")) == pytest.approx(measured[key], abs=0.51 * unit), (name, key)


@pytest.mark.usefixtures("at_readers")
@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_yaml_is_chosen_from_a_folder_of_the_readers(block: Block, tmp_path: Path) -> None:
    """Takes the file's name from its first line, or else the last one that the page names before it."""
    first = block.text.splitlines()[0].removeprefix("# ")
    name = re.findall(r"`(\S+/\S+\.yaml)`", f"{block.before}`{first}`")[-1]
    folder, group, stem = re.fullmatch(r"(\w+)/(.+)/(\w+)\.yaml", name).groups()  # type: ignore[union-attr]
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(block.text)
    (job,) = jobs_of(
        ["python", "-m", "qk_sniffer", "--multirun", "--config-dir", f"{tmp_path}/{folder}", f"{group}={stem}"]
    )
    if group == "model":
        assert job.config.model.name == yaml.safe_load(block.text)["name"]


@pytest.mark.slow
def test_statistics_in_two_commands_as_they_are_written(tmp_path: Path) -> None:
    (block,) = [
        each for each in BLOCKS if each.page == "docs/recipes/statistics.md" and "qk_sniffer.export" in each.text
    ]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    code = f"set -e\n{block.text}"
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "calibration-triattention.pt").is_file()


@pytest.mark.slow
def test_the_whole_story_as_it_is_written(tmp_path: Path) -> None:
    (block,) = [each for each in BLOCKS if "outputs/story" in each.text and each.language == "bash"]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    code = f"set -e\n{block.text}"
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "story-plasticity" / "pictures" / "heads_in_order.png").is_file()
