"""A path may hold any bytes, in any locale: a job works there from start to end, or ends before it loads the model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.jobs import run, write_texts

from qk_sniffer.config import Config, DatasetConfig, ModelConfig, TokenizerConfig
from qk_sniffer.corpus import sources
from qk_sniffer.corpus.examples import open_corpus
from qk_sniffer.dataset.reader import open_dataset
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import HubError, SourceError
from qk_sniffer.hub.client import require_uploads_from
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.jobs.status import look
from qk_sniffer.resolved import public_name, public_values
from qk_sniffer.store import manifest as manifests
from qk_sniffer.text import is_surrogate, is_utf8_path, utf8_way_out
from qk_sniffer.validation import problems

NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder whose name is not valid UTF-8."""
    folder = tmp_path / NOT_UTF8
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    return folder


@pytest.mark.slow
def test_a_job_works_in_a_folder_whose_name_is_not_utf8(
    checkpoint: Path,
    odd: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(odd)
    root, alone = odd / "out", {"batch_size": 1}
    for most in (5, None):  # the second job grows the dataset of the first
        run(checkpoint, write_texts(odd / "texts.jsonl"), root, dataset={"max_samples": most}, inference=alone)
    assert 'pd.read_parquet(open("' in capsys.readouterr().out
    whole = undisturbed(inference=alone)
    file = Path("l00h00q", "data.parquet")
    assert (root / file).read_bytes() == (whole / file).read_bytes()
    assert verify(root).problems == 0
    assert finalize(root) == 0
    assert [line.status.data_root for line in look(odd)] == [str(root)]
    dataset = open_dataset(str(root))
    assert dataset.vectors(0, 0, "q")[0].shape == open_dataset(str(whole)).vectors(0, 0, "q")[0].shape


@pytest.mark.slow
def test_names_that_are_published_are_valid_unicode(checkpoint: Path, odd: Path) -> None:
    (odd / "texts").mkdir()
    texts = write_texts(odd / "texts" / f"{NOT_UTF8}.jsonl")
    root, sections = odd / "out", {"verify": {"examples": 0}, "capture": {"layers": [0]}}
    for dataset in ({"max_samples": 2}, {"max_samples": 2, "path": str(texts.parent), "data_files": texts.name}):
        run(checkpoint, texts, root, dataset=dataset, output={"overwrite": True}, **sections)
        for file in ("manifest.json", "README.md"):
            assert (root / file).read_bytes().decode()
        assert not any(map(is_surrogate, json.dumps(manifests.read(root), ensure_ascii=False)))
        config = manifests.read(root)["config"]["dataset"]
        assert "caf\\udce9.jsonl" in (config["path"], config["data_files"])
        run(checkpoint, texts, root, dataset=dataset, **sections)
    assert public_name(str(texts)) == "caf\\udce9.jsonl"
    assert public_values({"a": [NOT_UTF8, "é", 1]}) == {"a": ["caf\\udce9", "é", 1]}


def test_a_checkpoint_that_its_libraries_cannot_open_is_refused_before_it_is_loaded(odd: Path) -> None:
    config = Config(model=ModelConfig(name=str(odd), tokenizer=TokenizerConfig(name=str(odd))))
    for key in ("model.name", "model.tokenizer.name"):
        (problem,) = (problem for problem in problems(config) if problem.startswith(key + " "))
        assert "caf\\udce9" in problem and "rename it" in problem
    gguf = Config(model=ModelConfig(name=str(odd), gguf_file="model.gguf"))
    assert not any(problem.startswith("model.") for problem in problems(gguf))


def test_a_cache_that_libraries_cannot_open_is_refused_before_the_model_is_loaded(
    checkpoint: Path, texts: Path, odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", odd)
    monkeypatch.setattr("qk_sniffer.jobs.components.load_components", None)
    xml = texts.parent / "xml" / "train.xml"
    xml.parent.mkdir()
    xml.touch()
    with pytest.raises(SourceError, match=r"cannot write its cache to .*caf\\udce9: rename it.*HF_HOME"):
        run(checkpoint, xml.parent, odd / "out", dataset={"data_files": "*.xml"})
    assert open_corpus(DatasetConfig(path=str(texts))).num_rows, "files that the library does not read need no cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(odd))
    with pytest.raises(SourceError, match=r"the Hub's cache in .*caf\\udce9: rename it.*HF_HUB_CACHE"):
        run(Path("some/model"), texts, odd / "out")


def test_a_folder_that_cannot_be_uploaded_is_refused_at_the_start(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match=r"caf\\udce9 cannot be uploaded.*HF_HUB_DISABLE_XET=1"):
        finalize(odd, hf_repo_id="me/vectors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    require_uploads_from(odd)


def test_another_encoding_of_names_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a locale with ISO 8859-1: the bytes of "é" are not UTF-8, and "Ã©" has the bytes of an "é" in UTF-8.
    names = SimpleNamespace(fsencode=lambda text: str(text).encode("latin-1"))
    monkeypatch.setattr("qk_sniffer.text.os", names)
    assert is_utf8_path("cafe") and not is_utf8_path("café")
    assert "rename it" in utf8_way_out("café") and "PYTHONUTF8=1" in utf8_way_out("cafÃ©")
    with pytest.raises(SourceError, match=r"folder .*café: datasets cannot read a folder of this name"):
        sources._folder(sources.DatasetConfig(path="café"), tmp_path / "café")


@pytest.mark.slow
@pytest.mark.parametrize("name", [b"caf\xe9", "café".encode()], ids=["not UTF-8", "UTF-8"])
def test_every_program_works_in_the_locale_c(name: bytes, tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    Path(folder).mkdir()
    write_texts(Path(folder, "texts.jsonl"))
    variables = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "HF_DATASETS_CACHE": str(tmp_path / "hf"),
    }

    def qk(program: str, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
        command = [sys.executable, "-m", "qk_sniffer" + program, *arguments]
        done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True)
        assert b"Traceback" not in done.stderr and b"Logging error" not in done.stderr, done.stderr
        return done

    job = [f'dataset.path="{folder}/texts.jsonl"', f'output.data_root="{folder}/out"', "dataset=hf", "sampler=all"]
    assert qk("", *job, "dataset.text_column=absent").returncode == 2
    assert qk("", *job, "--cfg", "job").returncode == 0
    job += ["dataset.max_samples=4", "capture.layers=[0]"]
    assert qk("", *job).returncode == 0
    for program in (".verify", ".finalize"):
        assert qk(program, f"data_root={folder}/out").returncode == 0
    status = qk(".status", folder, "format=json")
    assert status.returncode == 0 and b'"done"' in status.stdout
    assert qk(".plasticity", f'data_root="{folder}/out"', f'output_dir="{folder}/plasticity"').returncode == 0
    root = Path(folder, "out")
    assert any(root.glob("l*h*/data.parquet"))
