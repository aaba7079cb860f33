"""Tests what the programs print and write about a dataset or a job of someone else, whose names are hostile."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from support.fake_hub import FakeHub
from support.hostile import SECRET, TERMINAL, skeleton
from support.hub_cases import REPO, held
from support.plasticity_cases import measure
from support.verify_cases import edit

from qk_sniffer.config import from_dict
from qk_sniffer.dataset.card import write_card
from qk_sniffer.dataset.card_facts import CardFacts
from qk_sniffer.dataset.summary import show
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import StoreError
from qk_sniffer.hub.catalogue import update_catalogue
from qk_sniffer.jobs import job_status, status, sweep
from qk_sniffer.resolved import resolve
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.files import Folder
from qk_sniffer.store.locks import hold
from qk_sniffer.text import printable

NAME = f"org/{SECRET}{TERMINAL}`|</a>"
"""A name that leaks a secret where it is interpolated, controls a terminal, and leaves its place on a page."""


@pytest.fixture
def theirs(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of someone else, in a folder with a hostile name, on the machine of a user with a login."""
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")

    def rename(manifest: dict[str, object]) -> None:
        for section, key in (("model", "name"), ("model", "attn_implementation"), ("dataset", "split")):
            manifest["config"][section][key] = NAME  # type: ignore[index]
            manifest["fingerprint"][f"{section}.{key}"] = NAME  # type: ignore[index]
        manifest["proof"] = {"proven": None, "reason": NAME}
        manifest["commits"] = {"model": "a" * 40, "tokenizer": "a" * 40, "dataset": "a" * 40}

    edit(root, rename)
    return root.rename(root.with_name(TERMINAL))


def assert_harmless(text: str) -> None:
    """Asserts that a text has no secret, controls no terminal, and has no line that a name of someone else began."""
    assert "hf_s3cret" not in text
    assert printable(text.replace("\n", "")) == text.replace("\n", "")
    assert not [line for line in text.splitlines() if line.startswith("whole: 2 heads")]


def test_reports_and_summaries(
    theirs: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    edit(theirs, lambda manifest: manifest["config"]["model"].update(dtype=NAME))  # one problem to report
    report = str(verify(theirs))
    assert_harmless(report)
    assert printable(NAME) in report and report.splitlines()[0].startswith(f"Dataset: {printable(theirs)}")
    show(Folder(theirs), manifests.read(theirs), f"Time: {NAME}")
    summary = capsys.readouterr().out
    assert_harmless(summary)
    assert f"Not proven: {printable(NAME)}." in summary.splitlines()
    (call,) = [line.strip() for line in summary.splitlines() if "read_parquet" in line]
    assert eval(call.partition("read_parquet")[2]) == str(theirs / "l00h00q" / "data.parquet")
    assert measure(theirs, tmp_path / f"results {TERMINAL}", num_pairs_per_bucket=8) == 0
    shown = capsys.readouterr().out
    assert "12 heads measured" in shown
    assert_harmless(shown + caplog.text)
    assert "hf_s3cret" not in (tmp_path / f"results {TERMINAL}" / "plasticity.json").read_text()


def test_the_card_and_the_list_of_branches(
    theirs: Path, hub: FakeHub, api: HfApi, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    facts = CardFacts.of(manifests.read(theirs))
    card = write_card(facts)
    assert_harmless(card)
    assert f"org/{SECRET}" in card and "oc.env&#58;HF_TOKEN" in card
    model = replace(facts.config.model, name="n", attn_implementation="n")
    texts = replace(facts.config.dataset, split="n")
    harmless = replace(facts, config=replace(facts.config, model=model, dataset=texts))
    assert skeleton(card.partition("\n---\n")[2]) == skeleton(write_card(harmless).partition("\n---\n")[2])

    branch = "a`|<b>](x)$"
    hub.create(REPO)
    manifest = (theirs / "manifest.json").read_bytes()
    hub.repositories[REPO].add(branch, "by hand", {"manifest.json": manifest})
    hub.repositories[REPO].add("forged", "by hand", {"notes.txt": b"no dataset"})
    update_catalogue(api, REPO)
    page = held(hub, "main")["README.md"].decode()
    assert_harmless(page)
    rows = [line for line in page.splitlines() if line.startswith("| [")]
    assert len(rows) == 1 and "/tree/a%60%7C%3Cb%3E%5D%28x%29%24)" in rows[0] and "oc.env&#58;HF_TOKEN" in rows[0]
    assert {kind for kind, _, _ in skeleton(page)} >= {"table_open", "code_inline", "fence"}
    assert [kind for kind, _, _ in skeleton(page)].count("link_open") == 3, "branch, texts and date"
    before = page
    update_catalogue(api, REPO)
    assert held(hub, "main")["README.md"].decode() == before, "the row is recognised"
    assert "damaged" not in caplog.text


def test_tables_and_messages_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"model": {"name": "org/m"}, "output": {"data_root": str(tmp_path / TERMINAL)}}
    job = sweep.PlannedJob(0, (f"model.name={NAME}",), resolve(from_dict(settings)))
    found = job_status.Status.of(0, job.config, state=job_status.FAILED)
    found.host, found.error, found.url = TERMINAL, NAME, f"https://hub/{TERMINAL}"
    tables = [sweep.table([job], {0: found}), status.table([status.Line(found)])]
    for text in tables:
        assert_harmless(text)
        assert len(text.splitlines()) == 3 and text.endswith(f": {printable(NAME.partition(chr(13))[0])} ...")

    lock = tmp_path / "job.lock"
    with hold(lock, "capturing"):
        content = json.loads(lock.read_text())
        lock.write_text(json.dumps(content | {"host": TERMINAL}))
        with pytest.raises(StoreError) as error, hold(lock, "capturing"):
            pass
    assert_harmless(str(error.value))
    assert printable(TERMINAL) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_json_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qk_sniffer.status import Settings
    from qk_sniffer.status import show as show_status

    root = tmp_path / os.fsdecode(b"caf\xe9\x7f\x1b")
    job = sweep.PlannedJob(0, (), resolve(from_dict({"model": {"name": "m"}, "output": {"data_root": str(root)}})))
    with sweep.announced(tmp_path / "1", [job], outlive=True):
        pass
    assert show_status(Settings(tmp_path, format="json")) == 0
    text = capsys.readouterr().out
    assert printable(text.replace("\n", "")) == text.replace("\n", "")
    assert json.loads(text)[0]["data_root"] == str(root)
