"""Random edits of a dataset: each format is written whole, or the export ends with one clear error.

An edit is named by its seed. A failure prints it; `edit("3-17")` makes it again.
"""

import json
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.edits import Editor, copied
from support.export_cases import statistics

import qk_sniffer
from qk_sniffer.errors import QkSnifferError, StoreError
from qk_sniffer.export.formats import FORMATS
from qk_sniffer.store import manifest as manifests

pytestmark = pytest.mark.slow

NUMBERS = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 0, -1]


class Bench:
    """Datasets that all formats together accept, and the folders of one edit."""

    def __init__(self, folder: Path, datasets: list[Path]) -> None:
        self.datasets = datasets
        self.root, self.outside, self.out = folder / "root", folder / "outside", folder / "out"
        self.outside.mkdir()
        (self.outside / "file").write_text("untouched")

    def export(self) -> dict[str, str]:
        """Exports the dataset to all formats; returns the errors."""
        self.out.mkdir(exist_ok=True)
        errors = {}
        for name, format in FORMATS.items():
            output = self.out / f"a{format.suffix}"
            try:
                qk_sniffer.export(self.root, name, output, overwrite=True)
            except QkSnifferError as error:
                errors[name] = str(error)
                assert errors[name].strip(), "an error without a message"
        return errors

    def check(self) -> None:
        assert sorted(path.name for path in self.outside.iterdir()) == ["file"], "written outside"
        assert (self.outside / "file").read_text() == "untouched", "written outside"
        expected = {f"a{format.suffix}" for format in FORMATS.values()} | {f"a{FORMATS['tria'].suffix}.json"}
        assert {path.name for path in self.out.iterdir()} <= expected
        for file in self.out.rglob("*.json"):
            json.loads(file.read_bytes().decode(), parse_constant=lambda name: pytest.fail(f"JSON has {name}"))


@pytest.fixture(scope="module")
def bench(undisturbed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    sections: dict[str, Any] = {"sampler": {"type": "none"}, "verify": {"examples": 0}}
    datasets = [undisturbed(capture=statistics(skip_tokens=skip), **sections) for skip in (0, 4)]
    return Bench(tmp_path_factory.mktemp("exports"), datasets)


def edit_numbers(path: Path, editor: Editor) -> None:
    """Puts an odd number into a random place of a file of statistics."""
    arrays = {name: np.array(values) for name, values in load_file(path).items()}
    name = editor.random.choice(sorted(arrays))
    values = arrays[name].reshape(-1)
    number = editor.random.choice(NUMBERS)
    at = editor.random.randrange(len(values))
    if values.dtype == np.float32 or np.isfinite(number):
        values[at] = np.clip(number, -(2**62), 2**62) if values.dtype != np.float32 else number
    editor.what = f"{number} in {name} at {at}"
    save_file(arrays, path)


def edit(bench: Bench, seed: str) -> None:
    """Makes one edit of a dataset, and exports it to every format."""
    editor = Editor(f"export-{seed}", bench.outside)
    copied(editor.random.choice(bench.datasets), bench.root)
    files = sorted(path for path in bench.root.rglob("*.safetensors"))
    if editor.random.random() < 0.2:
        edit_numbers(editor.random.choice(files), editor)
    else:
        editor.edit(bench.root / "manifest.json")
    try:
        bench.export()
        bench.check()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        pytest.fail(f"edit({seed!r}): {editor.what}\n{traceback.format_exc()[-3000:]}", pytrace=False)


def edits(bench: Bench, seeds: Iterable[str]) -> None:
    for seed in seeds:
        edit(bench, seed)


def test_the_datasets_are_exported_to_every_format(bench: Bench) -> None:
    refused: list[set[str]] = []
    for dataset in bench.datasets:
        copied(dataset, bench.root)
        refused.append(set(bench.export()))
        bench.check()
    assert not set.intersection(*refused)


@pytest.mark.parametrize("part", range(10))
def test_many_edits(part: int, bench: Bench) -> None:
    edits(bench, (f"{part}-{number}" for number in range(220)))


@pytest.mark.parametrize(
    ("keys", "value", "problem"),
    [
        (("fingerprint", "model.name"), "\ud800", "a text is not valid Unicode"),
        (("fingerprint", "dataset.split"), "\udc80", "a text is not valid Unicode"),
        (("versions", "torch"), "2\ud800", "a text is not valid Unicode"),
        (("model", "rotary", "rope_parameters", "rope_type"), "\udfff", "a text is not valid Unicode"),
        (("model", "rotary", "rope_parameters", "rope_theta"), 10**400, "more than 64 bits"),
        (("fingerprint", "dataset.name"), 1, "dataset.name"),
        (("model", "rotary", "frequencies", "rotary_emb", "attention_scaling"), float("nan"), "attention_scaling"),
        (("model", "rotary", "frequencies", "rotary_emb", "attention_scaling"), 1e300, "attention_scaling"),
        (("model", "rotary", "frequencies", "rotary_emb", "inv_freq"), [float("inf")], "inv_freq"),
        (("model", "layers", 0, "softmax_scale"), 1e300, "softmax_scale"),
        (("model", "layers", 0, "head_dim"), 4097, "head_dim"),
        (("config", "capture", "statistics", "skip_tokens"), -1, "skip_tokens"),
        (("config", "capture", "statistics", "stages"), ["post", "mid"], "stages"),
        (("timings", "forward"), -1, "timings"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_values_that_no_manifest_has(keys: tuple[Any, ...], value: Any, problem: str, bench: Bench) -> None:
    copied(bench.datasets[0], bench.root)
    manifest = manifests.read(bench.root)
    above: Any = manifest
    for key in keys[:-1]:
        above = above[key]
    above[keys[-1]] = value
    (bench.root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"manifest\.json is not understood") as error:
        qk_sniffer.open_dataset(bench.root)
    assert problem in str(error.value)
    assert bench.export().keys() == FORMATS.keys()


def test_a_rope_theta_that_fits_no_float32_is_refused(bench: Bench) -> None:
    copied(bench.datasets[0], bench.root)
    manifest = manifests.read(bench.root)
    manifest["model"]["rotary"]["rope_parameters"]["rope_theta"] = 1e300
    f = len(manifest["model"]["rotary"]["frequencies"]["rotary_emb"]["inv_freq"])
    powers = [1e300 ** -(i / f) for i in range(f)]
    manifest["model"]["rotary"]["frequencies"]["rotary_emb"]["inv_freq"] = powers
    (bench.root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="not the powers of one rope_theta"):
        qk_sniffer.export(bench.root, "tria", bench.out / "a.tria", overwrite=True)
