"""Holds the direction of imports: downward only, no circle, torch and transformers only where they are needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import qk_sniffer
from qk_sniffer.cli.programs import PROGRAMS

PACKAGE = Path(qk_sniffer.__file__).parent

FLOORS = (
    ("text", "timing", "machine", "assets"),
    ("errors", "markdown", "live"),
    ("callable_package", "logs"),
    ("config",),
    ("resolved",),
    ("store",),
    ("hub",),
    ("corpus", "backbone"),
    ("capture",),
    ("validation", "dataset"),
    ("drawing",),
    ("jobs",),
    ("notebook",),
    ("cli",),
    ("export", "plasticity"),
    ("report",),
    ("__init__", "__main__", "families", "finalize", "heads", "pictures", "status", "verify"),
)
"""Folders and single modules, from the ground up. Each imports only itself and lower floors."""

IMPORT_TORCH = {
    *(
        f"backbone.{name}"
        for name in (
            "attention_check",
            "attention_terms",
            "backbone",
            "banded_attention",
            "caches",
            "cuda_attention",
            "config_overrides",
            "devices",
            "exact_attention",
            "family",
            "gguf",
        )
    ),
    *(f"backbone.{name}" for name in ("rotary", "rotary_overrides", "tap", "trailing_layers", "unloaded")),
    *(
        f"backbone.{name}"
        for name in ("checkpoint_weights", "limits", "loaded_weights", "loading", "masks", "quantization")
    ),
    *(
        f"backbone.{name}"
        for name in (
            "adapter",
            "adapter_files",
            "implementations",
            "outline",
            "rotation",
            "spellings",
            "window_kernels",
            "wrapper",
        )
    ),
    *(f"capture.{name}" for name in ("attention_summary", "capture", "gather", "moments", "row_writer")),
    "jobs.measure",
    *(f"capture.{name}" for name in ("proof", "proof_statistics", "proof_summaries", "proof_vectors")),
    "dataset.token_vectors",
    *(f"notebook.{name}" for name in ("captured", "memory", "model", "model_state", "passes")),
    *(f"notebook.{name}" for name in ("reader", "settings", "statistics", "tokens")),
}
"""Modules that import torch or transformers when they are imported themselves."""

IMPORT_TORCH_LATE = {
    "backbone.damaged_files",
    "corpus.pinned_loads",
    "corpus.text_cuts",
    "corpus.tokenizer",
    "corpus.tokenizer_files",
    "export.triattention",
    "store.buffer",
    "store.rows",
}
"""Modules that import torch or transformers inside a function."""

HEAVY = {"torch", "transformers", "datasets", "pandas", "scipy", "matplotlib"}
"""Libraries that no program imports before it needs them."""

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Yields every module or name that a module imports, and whether it does so when it is imported itself."""
    at_import = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "relative import"
            yield from ((f"{node.module}.{alias.name}", id(node) in at_import) for alias in node.names)


def ours(tree: ast.Module) -> Iterator[str]:
    """Yields the modules of this package that a module imports, at any time."""
    for name, _ in imports(tree):
        top, _, rest = name.partition(".")
        if top == "qk_sniffer" and rest:
            module = rest if rest in MODULES else rest.rpartition(".")[0]
            yield module if module in MODULES else f"{module}.__init__".lstrip(".")


def floor(module: str) -> int:
    (number,) = (number for number, names in enumerate(FLOORS) if module.partition(".")[0] in names)
    return number


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module: str) -> None:
    folder = module.partition(".")[0]
    for other in ours(MODULES[module]):
        assert other.partition(".")[0] == folder or floor(other) < floor(module), f"{module} imports {other}"


def test_no_module_imports_itself_through_others() -> None:
    TopologicalSorter({module: set(ours(tree)) for module, tree in MODULES.items()}).prepare()


def test_torch_and_transformers_are_imported_only_where_they_belong() -> None:
    heavy: dict[bool, set[str]] = {True: set(), False: set()}
    for module, tree in MODULES.items():
        for name, at_import in imports(tree):
            if name.partition(".")[0] in ("torch", "transformers"):
                heavy[at_import].add(module)
    assert heavy[True] == IMPORT_TORCH
    assert heavy[False] - heavy[True] == IMPORT_TORCH_LATE


@pytest.mark.slow
def test_the_other_modules_load_neither() -> None:
    needs_torch = set(IMPORT_TORCH)
    order = TopologicalSorter({module: set(ours(tree)) for module, tree in MODULES.items()}).static_order()
    for module in order:
        body = [node for node in MODULES[module].body if isinstance(node, ast.Import | ast.ImportFrom)]
        if needs_torch & set(ours(ast.Module(body, []))):
            needs_torch.add(module)
    light = [f"qk_sniffer.{module}" for module in MODULES if module not in needs_torch and "__" not in module]
    code = f"import sys, {', '.join(light)}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def loaded_by(*arguments: str, cwd: Path, code: int = 0) -> set[str]:
    """Runs `python -m qk_sniffer` in a process; returns the modules that it has imported at its end."""
    run = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: open('modules', 'w', encoding='utf-8').write(' '.join(sys.modules)))\n"
        "runpy.run_module('qk_sniffer', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", run, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return {*(cwd / "modules").read_text(encoding="utf-8").split()}


@pytest.mark.slow
def test_programs_start_without_the_libraries_that_they_do_not_need(tmp_path: Path) -> None:
    """These libraries take most of the time of a start. No timing here: a busy machine changes it."""
    for name in PROGRAMS:
        assert not HEAVY & loaded_by(name, "--help", cwd=tmp_path), name
    assert not (HEAVY | {"pyarrow"}) & loaded_by("--help", cwd=tmp_path)
    assert not (HEAVY | {"pyarrow"}) & loaded_by("status", "--help", cwd=tmp_path)
    assert not (HEAVY | {"pyarrow"}) & loaded_by("model=nope", cwd=tmp_path, code=2)
    assert not (HEAVY | {"pyarrow", "hydra"}) & loaded_by("--version", cwd=tmp_path)


@pytest.mark.slow
def test_a_finished_job_and_the_programs_that_look_at_it_load_no_model(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "A list is a sequence."}\n' * 2)
    job = [
        "dataset=hf",
        "dataset.path=texts.jsonl",
        "dataset.max_samples=1",
        "model.tokenizer.max_length=64",
        "output.data_root=outputs/mine",
    ]
    assert loaded_by(*job, cwd=tmp_path) >= {"torch", "transformers"}, "this test sees what a program imports"
    assert not HEAVY & loaded_by(*job, cwd=tmp_path)
    assert not HEAVY & loaded_by("verify", "outputs/mine", cwd=tmp_path)
    assert not (HEAVY | {"pyarrow"}) & loaded_by("status", cwd=tmp_path)


def test_packages_import_nothing() -> None:
    for module, tree in MODULES.items():
        if module in ("capture.__init__", "export.__init__"):  # they can be called
            assert {name.split(".")[1] for name, _ in imports(tree)} == {"callable_package"}
        elif module.endswith(".__init__"):
            assert not list(imports(tree)), module


def test_families_of_models_build_on_public_modules() -> None:
    for path in (PACKAGE.parent / "models").glob("*.py"):
        for name, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if name.startswith("qk_sniffer"):
                assert name.startswith(("qk_sniffer.families", "qk_sniffer.errors", "qk_sniffer.models")), (
                    f"{path.name} imports {name}"
                )


def test_no_module_imports_a_file_of_models() -> None:
    for module, tree in MODULES.items():
        assert not any(name.startswith("qk_sniffer.models.") for name, _ in imports(tree)), module


@pytest.mark.parametrize(
    ("call", "only"),
    [("print", "text"), ("logging.getLogger", "logs"), ("HfApi", "hub.client")],
)
def test_what_is_shown_and_sent_goes_through_one_module(call: str, only: str) -> None:
    """It escapes what is printed and logged, and announces an unusual Hub."""
    callers = {
        module
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == call and module != "finalize"
    }
    assert callers == {only}
