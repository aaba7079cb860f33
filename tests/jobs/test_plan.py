"""The plan of a job (`dry_run`) is what the job then does, and showing it changes nothing."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.jobs import TEXTS, captured_only, run, settings, stopped_after
from support.tiny import saved
from support.zoo import CASES, Case

from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.backbone.outline import outline
from qk_sniffer.cli.app import main
from qk_sniffer.config import ASSETS, from_dict
from qk_sniffer.errors import StoreError
from qk_sniffer.jobs.dry_run import show_plan
from qk_sniffer.jobs.plan import Plan
from qk_sniffer.jobs.run import run_job
from qk_sniffer.store import manifest as manifests
from qk_sniffer.validation import problems

EVERYTHING: dict[str, Any] = {
    "capture": {
        "capture_values": True,
        "capture_outputs": True,
        "capture_token_ids": True,
        "attention": {"enabled": True, "top_k": 4},
        "statistics": {"enabled": True, "stages": ["pre", "post"]},
    },
    "sampler": {"type": "uniform", "base_rate": 8},
}


def planned(checkpoint: Path, texts: Path, root: Path, **sections: Any) -> Plan:
    values = settings(checkpoint, texts, root, **sections) | {"dry_run": True}
    found = show_plan(from_dict(values))
    assert found is not None
    return found


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def bytes_of(root: Path) -> Counter[str]:
    """The bytes of a dataset by kind of file."""
    found: Counter[str] = Counter()
    for name, entry in manifests.read(root)["files"].items():
        kind = name.split("/")[0]
        found[kind[-1] if name.endswith("/data.parquet") and kind != "examples" else kind] += entry["bytes"]
    return found


def journal_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / ".qk_sniffer").rglob("*.safetensors"))


@pytest.mark.slow
def test_it_has_the_rows_and_the_bytes_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    job: tuple[Any, ...] = (ASSETS / "pydoc_tiny", Path("pydoc"), root)
    sections = EVERYTHING | {"dataset": {"max_samples": 3}, "verify": {"examples": 0}}
    plan = planned(*job, **sections)
    captured_only(*job, monkeypatch, **sections)
    assert plan.journal == pytest.approx(journal_bytes(root), rel=0.05)
    run(*job, **sections)
    manifest, whole = manifests.read(root), bytes_of(root)
    assert (plan.rows, plan.counts.texts, plan.counts.tokens) == (manifest["rows"], 3, manifest["tokens"])
    rows: Counter[str] = Counter()
    for name, entry in manifest["files"].items():
        if "rows" in entry and not name.startswith("examples"):
            rows[name.split("/")[0][-1]] += entry["rows"]
    assert rows == {kind.name: kind.rows for kind in plan.kinds if kind.rows}
    for kind in plan.kinds:
        if kind.name != "others":
            assert kind.dataset == pytest.approx(whole[kind.name], rel=0.05), kind
    size = sum(whole.values()) + (root / "manifest.json").stat().st_size
    assert plan.dataset == pytest.approx(size, rel=0.05)


def test_it_writes_nothing(checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_in(tmp_path)
    planned(checkpoint, texts, tmp_path / "root", **EVERYTHING)
    assert files_in(tmp_path) == before and not (tmp_path / "root").exists()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) <= 80  # the first one has the path
    assert any("q 0-3, k 0-1" in line for line in lines)


def test_an_unfinished_job(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root, sections = tmp_path / "root", {"inference": {"batch_size": 2, "lookahead": 6}}
    whole = planned(checkpoint, texts, root, **sections)
    stopped_after(4, checkpoint, texts, root, **sections)
    before = files_in(tmp_path)
    plan = planned(checkpoint, texts, root, **sections)
    assert files_in(tmp_path) == before
    assert plan.counts.done_texts >= 4 and plan.counts.done_texts + plan.counts.texts == len(TEXTS)
    heads = {(layer, kind): len(numbers) for layer, kind, numbers in plan.model.selection}
    assert plan.rows + sum(plan.counts.done_rows[key] * heads[key] for key in heads) == whole.rows
    assert plan.in_journal == journal_bytes(root) > 0
    assert plan.dataset == pytest.approx(whole.dataset, rel=0.05)


@pytest.mark.slow
def test_a_grown_dataset(checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run(checkpoint, texts, tmp_path / "root", dataset={"max_samples": 10})
    same = settings(checkpoint, texts, root, dataset={"max_samples": 10}) | {"dry_run": True}
    assert show_plan(from_dict(same)) is None
    assert "Nothing to do" in capsys.readouterr().out
    plan = planned(checkpoint, texts, root)
    run(checkpoint, texts, root)
    rows = manifests.read(root)["rows"]
    assert plan.rows == rows - sum(plan.model.selection.num_heads * len(text) for text in TEXTS[:10])
    assert plan.dataset == pytest.approx(sum(bytes_of(root).values()), rel=0.05)


def test_vectors_before_rope_need_no_weights_either(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qk_sniffer.jobs.dry_run.load_components", lambda *_: pytest.fail("it loads the weights"))
    plan = planned(checkpoint, texts, tmp_path / "root", capture={"capture_pre_rope": True})
    assert plan.activations and plan.rows


@pytest.mark.slow
def test_a_shard(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    whole = planned(checkpoint, texts, tmp_path / "root")
    parts = [planned(checkpoint, texts, tmp_path / "root", shard={"index": i, "count": 3}) for i in range(3)]
    assert [part.counts.texts for part in parts] == [8, 8, 8]
    assert sum(part.rows for part in parts) == whole.rows


@pytest.mark.slow
def test_other_settings_are_refused_as_by_the_job(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "root", dataset={"max_samples": 3})
    with pytest.raises(StoreError, match=r"sampler\.seed"):
        planned(checkpoint, texts, root, sampler={"seed": 1})


def test_a_value_that_is_no_choice() -> None:
    (problem,) = problems(from_dict({"model": {"name": "a/b"}, "dataset": {"path": "a/b"}, "dry_run": "yes"}))
    assert problem == "dry_run is 'yes'; valid: false, true, measure"


def test_a_wrong_column_is_a_wrong_setting(
    checkpoint: Path,
    texts: Path,
    in_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["model=hf", f"model.name={checkpoint}", "dataset=hf", f"dataset.path={texts}", "dataset.text_column=nope"]
    monkeypatch.setattr("sys.argv", ["qk_sniffer", *given, "dry_run=true"])
    assert main() == 2
    assert "has no column 'nope'. Set dataset.text_column" in capsys.readouterr().err


@pytest.mark.parametrize("dry_run", ["true", "measure"])
def test_too_small_a_disk_fails_the_command(
    dry_run: str,
    checkpoint: Path,
    texts: Path,
    in_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("qk_sniffer.jobs.plan.free_bytes", lambda _: 10)
    monkeypatch.setattr("qk_sniffer.jobs.dry_run.measure", lambda *_: pytest.fail("it measures what cannot run"))
    given = ["model=hf", f"model.name={checkpoint}", "model.dtype=float32", "dataset=hf", f"dataset.path={texts}"]
    monkeypatch.setattr("sys.argv", ["qk_sniffer", *given, f"dry_run={dry_run}"])
    assert main() == 1
    shown = capsys.readouterr()
    assert "NOT ENOUGH" in " ".join(shown.out.split()) and "output.data_root" in shown.err
    with pytest.raises(StoreError, match="not enough disk space"):
        run_job(from_dict(settings(checkpoint, texts, in_tmp / "root") | {"dry_run": True}))


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in ("llama", "gemma3_multimodal", "gpt_oss", "deepseek_v3", "gpt_neox")],
    ids=lambda case: case.name,
)
def test_a_model_is_described_without_its_weights(case: Case, tmp_path: Path) -> None:
    config = saved(case, tmp_path)
    found, backbone = outline(config), load_backbone(config)
    assert found is not None
    of_model = [(one.heads, one.value_dim, one.output_dim, one.attention_chunk) for one in backbone.probe()]
    assert [(one.heads, one.value_dim, one.output_dim, one.attention_chunk) for one in found.layers] == of_model
    assert found.weight_bytes == sum(one.numel() * one.element_size() for one in backbone.decoder.parameters())
    few, many = found.activation_bytes([(1, 64)]), found.activation_bytes([(4, 64), (1, 64)])
    assert few is not None and many is not None and few < many < 5 * few


@pytest.mark.slow
def test_a_command_line_launches_nothing(
    checkpoint: Path, texts: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["model=hf", f"model.name={checkpoint}", "model.dtype=float32", "dataset=hf", f"dataset.path={texts}"]
    before = files_in(in_tmp)
    monkeypatch.setattr("sys.argv", ["qk_sniffer", "--multirun", *given, "sampler.seed=0,1", "dry_run=true"])
    assert main() == 2  # both would be in one folder
    assert "output.data_root" in capsys.readouterr().err
    names = "output.data_root=${model.slug}-${sampler.seed}"
    monkeypatch.setattr("sys.argv", ["qk_sniffer", "-m", *given, "sampler.seed=0,1", "dry_run=true", names])
    assert main() == 0
    out = capsys.readouterr().out
    assert "Plan of job 1 (sampler.seed=1)" in out and "All jobs together need" in out
    monkeypatch.setattr("sys.argv", ["qk_sniffer", "-m", *given, "dry_run=true,false"])
    assert main() == 2
    assert files_in(in_tmp) == before and not [*in_tmp.glob("*")][1:]


@pytest.mark.usefixtures("tells_memory")
def test_a_start_tells_the_plan_in_three_lines(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root, sections = tmp_path / "root", {"inference": {"batch_size": 2, "lookahead": 12}}
    plan = planned(checkpoint, texts, root, **sections)
    monkeypatch.setattr("qk_sniffer.jobs.plan.MOST_TOKENS", 100)  # counts some batches of the first 12 texts
    with caplog.at_level("INFO"):
        run(checkpoint, texts, root, **sections)
    lines = [record.message for record in caplog.records if record.message.startswith(("plan:", "disk:", "memory:"))]
    assert len(lines) == 3 and max(map(len, lines)) <= 80 and "activations about " in lines[2]
    numbers = re.fullmatch(r"plan: 24 texts, about ([\d,]+) tokens, about ([\d,]+) rows, of 18 heads", lines[0])
    assert numbers is not None
    tokens, rows = (int(number.replace(",", "")) for number in numbers.groups())
    assert tokens == pytest.approx(plan.counts.tokens, rel=0.3) and rows == pytest.approx(plan.rows, rel=0.3)
