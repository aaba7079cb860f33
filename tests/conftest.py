"""Gives every test a bare machine: no network, no SLURM, caches of its own, few threads."""

import functools
import itertools
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from support.fake_hub import FakeHub
    from support.hub_cases import MakeDataset

pytest_plugins = ("support.bare_machine",)

# Set before a library reads them: tests do not reach the Hub, and two workers share two cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Gives this session a folder for all of Hugging Face instead of the user's, and files without fsync."""
    factory: pytest.TempPathFactory = config._tmp_path_factory  # type: ignore[attr-defined]
    os.environ["HF_HOME"] = str(factory.mktemp("hf-home"))
    # What a process sees does not depend on these waits for the disk, which are a third of the time of a small job.
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda _: None)
    config.add_cleanup(patch.undo)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Makes the cases of a test marked `few(n)` slow ones, but for `n` of them at even distances.

    Puts the tests that wait for SLURM first: at the end, one worker would wait for them alone.
    """
    items.sort(key=lambda item: not item.path.name.startswith("test_slurm"))
    cases: dict[tuple[pytest.Item | None, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            cases.setdefault((item.parent, getattr(item, "originalname", item.name)), []).append(item)
    for of_test in cases.values():
        (kept,) = next(of_test[0].iter_markers("few")).args
        quick = {number * len(of_test) // kept for number in range(kept)}
        for number, item in enumerate(of_test):
            if number not in quick:
                item.add_marker("slow")
                item.add_marker("further")


@pytest.fixture(scope="session")
def all_caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Iterator[int]]:
    """A folder, and numbers for the folders in it: `mktemp` looks at all of them to find the next one."""
    return tmp_path_factory.mktemp("datasets"), itertools.count()


@pytest.fixture(autouse=True)
def own_caches(all_caches: tuple[Path, Iterator[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives each test a cache of its own for the files that `datasets` converts. The library makes the folder."""
    import datasets.config

    folder, numbers = all_caches
    cache = folder / str(next(numbers))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Takes back how a test configures logging, as a job that Hydra starts in the test's process does."""
    root = logging.getLogger()
    level, handlers, factory = root.level, [*root.handlers], logging.getLogRecordFactory()
    yield
    root.setLevel(level)
    logging.setLogRecordFactory(factory)
    for handler in [*root.handlers]:
        if handler not in handlers:
            root.removeHandler(handler)


@pytest.fixture
def draws() -> None:
    """Lets the jobs of a test draw pictures."""


@pytest.fixture(autouse=True)
def few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the seconds of drawing in the jobs of all other tests, as if matplotlib were not installed."""
    if "draws" not in request.fixturenames:
        monkeypatch.setattr("qk_sniffer.jobs.pictures.can_draw", lambda: False)


@pytest.fixture
def tells_memory() -> None:
    """Lets the jobs of a test estimate the memory of their activations."""


@pytest.fixture(autouse=True)
def few_estimates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time of building each decoder a second time in the jobs of all other tests."""
    if "tells_memory" not in request.fixturenames:
        monkeypatch.setattr("qk_sniffer.jobs.plan.activation_bytes", lambda *_: None)


@pytest.fixture
def impatient() -> Iterator[None]:
    """Ends a test that hangs."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model, with sliding and full layers, and its tokenizer."""
    from support.jobs import QWEN3
    from support.tiny import save_checkpoint

    return save_checkpoint(QWEN3, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """Returns the folder of a case's checkpoint and tokenizer, which are saved once a session."""
    from support.tiny import save_checkpoint

    return functools.cache(lambda case: save_checkpoint(case, tmp_path_factory.mktemp(case.name)))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct in 4 bits (`support.smollm2.FILE`), for slow tests."""
    from support.smollm2 import smollm2_folder

    return smollm2_folder()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A jsonl file of the texts of `jobs`, with ids."""
    from support.jobs import write_texts

    return write_texts(tmp_path / "texts.jsonl")


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def make_dataset(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> "MakeDataset":
    """Copies datasets to publish; a job writes each original once a session (`hub_cases.py`)."""
    from support.hub_cases import capture, copied
    from support.jobs import TEXTS

    folder = tmp_path_factory.mktemp("datasets")
    texts = folder / "some-texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:6]))

    @functools.cache
    def made(model: str, heads: tuple[int, ...], layer: int, seed: int) -> Path:
        root = folder / f"{model}-{heads}-{layer}-{seed}"
        return capture(checkpoint, texts, root, model=model, heads=heads, layer=layer, seed=seed)

    def make(
        root: Path, model: str = "some-model", heads: tuple[int, ...] = (0, 3), layer: int = 0, seed: int = 0
    ) -> Path:
        return copied(made(model, heads, layer, seed), root)

    return make


@pytest.fixture(scope="session")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs a job over the texts of `jobs`, once a session for each set of sections; returns its dataset, read-only."""
    from support.jobs import run, write_texts

    folder = tmp_path_factory.mktemp("undisturbed")
    texts = write_texts(folder / "texts.jsonl")
    made: dict[str, Path] = {}

    def dataset(**sections: dict[str, Any]) -> Path:
        key = json.dumps(sections, sort_keys=True)
        if key not in made:
            made[key] = run(checkpoint, texts, folder / str(len(made)), **sections)
        return made[key]

    return dataset


@pytest.fixture
def hub() -> "Iterator[FakeHub]":
    from support.fake_hub import FakeHub

    with FakeHub() as hub:
        yield hub


@pytest.fixture
def api(hub: "FakeHub") -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.url, token="hf_alice")


@pytest.fixture
def waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that this process would have slept. It may use a Hub, without a login, Xet or cache of the user's."""
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants + "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants + "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.fixture
def endpoint(hub: "FakeHub", waits: list[float], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a Hub on loopback, which this process uses instead of huggingface.co."""
    as_imported = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + as_imported)
    return hub.url


@pytest.fixture(scope="session")
def verify_base(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of sampled rows: head_dim 16, windows of 12 in layers 0 and 2, 4 query and 2 key heads a layer."""
    from support.jobs import TEXTS, run

    folder = tmp_path_factory.mktemp("verify")
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return run(checkpoint, texts, folder / "out", sampler={"type": "uniform", "base_rate": 6.0})


@pytest.fixture
def root(verify_base: Path, tmp_path: Path) -> Path:
    """A copy of `verify_base` that a test may damage."""
    return Path(shutil.copytree(verify_base, tmp_path / "out"))
