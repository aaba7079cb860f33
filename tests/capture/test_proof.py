"""Tests the proof: every right dataset passes it, and every wrong one fails it with an error."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from support.backbones import FolderOf, captured, loaded
from support.jobs import captured_only, heads_of, run, stopped_after
from support.kernels import without_keys_from, wrong_kernel
from support.tiny import ALPHABET, save_checkpoint
from support.zoo import CASES, Case, ids
from torch import nn

from qk_sniffer.backbone.family import Family
from qk_sniffer.backbone.provable_types import PROVABLE_TYPES
from qk_sniffer.capture import proof as proof_module
from qk_sniffer.capture import proof_examples
from qk_sniffer.capture.proof_vectors import derive
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import CaptureError
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import Head
from qk_sniffer.store.rows import Slot

pytestmark = pytest.mark.floor

LLAMA = CASES[0]
LENGTHS = [60, 4, 90, 33]

FAILED = r"the proof of .* failed, and the dataset was not published"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Examples of 60, 4, 90 and 33 tokens. 4 is also the number of query heads; the proof must not confuse them."""
    path = tmp_path / "texts.jsonl"
    whole = "".join(ALPHABET) * 2
    path.write_text("".join(json.dumps({"text": whole[i : i + n]}) + "\n" for i, n in enumerate(LENGTHS)))
    return path


QUICK = {"llama", "qwen2", "gemma3_multimodal", "mllama", "llama4", "glm4", "smollm3", "deepseek_v3_yarn"}
"""Names of cases with different steps between projection and attention."""


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "case",
    [case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("stage", ["post", pytest.param("pre", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_right_dataset_is_proven(
    case: Case, stage: str, dtype: str, texts: Path, folder_of: FolderOf, tmp_path: Path
) -> None:
    root = run(
        folder_of(case),
        texts,
        tmp_path / "out",
        model={"dtype": dtype},
        capture={"capture_pre_rope": stage == "pre", "capture_values": True, "capture_outputs": True},
        verify={"examples": 2},
    )
    proof = manifests.read(root)["proof"]
    assert proof["examples"] == [1, 3], "the shortest ones"
    assert proof["proven"] is True
    differences = proof["largest_difference_by_layer"]
    assert differences.keys() == {str(layer) for layer in case.layers}
    assert max(differences.values()) < (1e-5 if dtype == "float32" else 0.03)
    assert proof["uncovered"] == [] and proof["longest_position"] == 32 and proof["heads"] == len(heads_of(root))
    outputs = 4 * len(case.layers)
    assert proof["rows"] == (4 + 33) * (proof["heads"] - outputs) + (4 + proof_examples.MOST_OUTPUTS) * outputs
    assert {check["passed"] for check in proof["attention"]} == {True}
    assert {check["tokens"] for check in proof["attention"]} == {90}


HARMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "next position": lambda states: np.roll(states, 1, axis=1),
    "other head": lambda states: np.roll(states, 1, axis=0),
    "other token of all heads": lambda states: states[:, np.arange(states.shape[1]) ^ 1],
    "half of each head": lambda states: np.roll(states, states.shape[2] // 2, axis=2),
}
"""Functions from the vectors (heads, n, head_dim) of a layer to wrong ones that a faulty capture may store."""


@pytest.mark.few(5)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("stage", ["post", pytest.param("pre", marks=pytest.mark.slow)])
def test_hooks_tell_right_vectors_from_wrong_ones_in_each_layer(case: Case, stage: str, folder_of: FolderOf) -> None:
    right, other = (loaded(folder_of(case), pre_rope=pre) for pre in (stage == "pre", stage != "pre"))
    tokens = ids(batch=1, length=300)
    seen, other_stage = captured(right, tokens, "qkvo"), captured(other, tokens)
    facts = right.probe()
    for layer in case.layers:  # one at a time: hooks of a layer must not see the calls of other layers
        specs = [
            Head(layer, head, kind, key_head=0, head_dim=case.head_dim, sliding_window=None, row=0)
            for kind in "qkvo"
            for head in range(seen[layer, kind].shape[1])
        ]
        found = derive(right, tokens[0].numpy(), dict.fromkeys(specs, np.arange(300)), facts)
        assert found is not None
        derived, _ = found
        for spec in specs:
            stored = seen[layer, spec.kind][0].numpy()
            whole, of_a_row = proof_module.differences(stored[spec.head], derived[spec])
            assert whole < 1e-5 and of_a_row < 1e-4
            few = stored[spec.head].copy()
            few[0] = few[150]
            assert proof_module.differences(few, derived[spec])[1] > proof_module.ROW_TOLERANCES["float32"]
            for name, harm in HARMS.items():
                assert proof_module.differences(harm(stored)[spec.head], derived[spec])[0] > 0.1, name
            if spec.kind in "qk":
                turned, _ = proof_module.differences(other_stage[layer, spec.kind][0, spec.head].numpy(), derived[spec])
                assert turned > 0.1 or layer in case.unrotated


def next_position(slot: Slot) -> None:
    slot.vectors.copy_(slot.vectors.roll(1, dims=1))


def other_head(slot: Slot) -> None:
    slot.vectors.copy_(slot.vectors.roll(1, dims=0))


def one_component(slot: Slot) -> None:
    slot.vectors[0, -1, 0] += 1.0 if slot.layer == 1 else 0.0


def harm_stored_vectors(monkeypatch: pytest.MonkeyPatch, harm: Callable[[Slot], None]) -> None:
    commit = JournalWriter.commit

    def harmed(self: JournalWriter, slot: Slot, event: None) -> None:
        harm(slot)
        commit(self, slot, event)

    monkeypatch.setattr(JournalWriter, "commit", harmed)


@pytest.mark.slow
def test_wrong_rows_of_a_shard_or_of_later_examples_fail(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_checkpoint(LLAMA, tmp_path / "model")
    for part in ("later", "shard"):
        lines = [json.dumps({"text": "".join(ALPHABET)[at : at + 30]}) + "\n" for at in range(20)]
        texts.write_text("".join(lines), encoding="utf-8")
        shards: list[dict[str, Any]] = [{"shard": {"index": index, "count": 2}} for index in range(2)]
        first, second = shards if part == "shard" else ({"dataset": {"max_samples": 18}}, {})
        root = tmp_path / part
        run(checkpoint, texts, root, **first)
        with monkeypatch.context() as patch, pytest.raises(CaptureError, match=FAILED):
            harm_stored_vectors(patch, next_position)
            run(checkpoint, texts, root, **second)
        proven = manifests.read(root)["proof"]["examples"]
        assert len(proven) < 20 and {18, 19} & set(proven) and {example % 2 for example in proven} == {0, 1}


@pytest.mark.parametrize("harm", [next_position, other_head, one_component])
def test_a_wrong_dataset_fails_and_stays(
    harm: Callable[[Slot], None], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_checkpoint(LLAMA, tmp_path / "model")
    harm_stored_vectors(monkeypatch, harm)
    with pytest.raises(CaptureError, match=r"the proof of .* failed, and the dataset was not published"):
        run(checkpoint, texts, tmp_path / "out", inference={"batch_size": 1})
    assert manifests.read(tmp_path / "out")["proof"]["proven"] is False
    assert len(heads_of(tmp_path / "out")) == 18
    with pytest.raises(
        CaptureError, match=r"the proof of .* failed, and the dataset was not published"
    ):  # also when the command is rerun on the finished dataset
        run(checkpoint, texts, tmp_path / "out", inference={"batch_size": 1})


def first_position(slot: Slot) -> None:
    if slot.vectors.shape[1] > 1:
        slot.vectors[:, 0] = slot.vectors[:, 1]


@pytest.mark.slow
def test_one_wrong_row_among_many_fails_where_rounding_is_large(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "long.jsonl"
    texts.write_text("".join(json.dumps({"text": ("".join(ALPHABET) * 9)[:n]}) + "\n" for n in (500, 600)))
    sections: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "inference": {"batch_size": 1}}
    right = manifests.read(run(checkpoint, texts, tmp_path / "right", **sections))["proof"]
    assert right["proven"] is True and right["row_tolerance"] == 0.5
    assert right["largest_row_difference_by_layer"].keys() == {"0", "1", "2"}
    harm_stored_vectors(monkeypatch, first_position)
    with pytest.raises(CaptureError, match=rf"{FAILED}. Single rows of vectors derived a second time"):
        run(checkpoint, texts, tmp_path / "wrong", **sections)
    proof = manifests.read(tmp_path / "wrong")["proof"]
    assert max(proof["largest_difference_by_layer"].values()) <= proof["tolerance"], "one row in 500"
    assert min(proof["largest_row_difference_by_layer"].values()) > 0.5


@pytest.mark.slow
def test_rows_without_a_finite_number_prove_nothing(texts: Path, tmp_path: Path) -> None:
    lines = texts.read_text(encoding="utf-8").splitlines()
    texts.write_text(
        "\n".join(line for line, n in zip(lines, LENGTHS, strict=True) if n > 4), encoding="utf-8"
    )  # whose outputs are finite
    lengths = [n for n in LENGTHS if n > 4]
    checkpoint = save_checkpoint(LLAMA, tmp_path / "model")
    weights = load_file(checkpoint / "model.safetensors")
    proofs = []
    for layer in (1, 0):
        weights[f"model.layers.{layer}.self_attn.k_proj.weight"][:] = np.nan
        save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
        root = run(checkpoint, texts, tmp_path / f"layer{layer}")
        proofs.append(manifests.read(root)["proof"])
    late, early = proofs
    assert late["proven"] is True and late["largest_difference_by_layer"].keys() == {"0", "1"}
    assert late["uncovered"] == [{"layer": 1, "kind": "k"}, {"layer": 2, "kind": "k"}, {"layer": 2, "kind": "q"}]
    assert late["heads"] == 4 + 2 + 4 and late["rows"] == late["heads"] * sum(lengths)
    assert early["proven"] is True and early["heads"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["post", "pre"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_large_biases_hide_nothing(
    scale: float, dtype: str, stage: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_checkpoint(next(case for case in CASES if case.name == "qwen2"), tmp_path / "model")
    weights = load_file(checkpoint / "model.safetensors")
    for name in weights:
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            weights[name] *= scale
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    sections: dict[str, Any] = {"model": {"dtype": dtype}, "capture": {"capture_pre_rope": stage == "pre"}}
    root = run(checkpoint, texts, tmp_path / "right", **sections)
    assert manifests.read(root)["proof"]["proven"] is True
    harm_stored_vectors(monkeypatch, next_position)
    with pytest.raises(CaptureError, match=r"the proof of .* failed, and the dataset was not published"):
        run(checkpoint, texts, tmp_path / "wrong", **sections, inference={"batch_size": 1})


def test_a_family_that_does_not_fit_its_model_leaves_the_dataset_unproven_without_an_error(
    texts: Path, tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(LLAMA, tmp_path / "model")
    root = run(checkpoint, texts, tmp_path / "out", model={"family": "qk_sniffer.models.phi3:Family"})
    proof = manifests.read(root)["proof"]
    assert proof["proven"] is None and "hook path does not fit this model (AttributeError" in proof["reason"]


def test_a_short_table_of_positions_is_enough(texts: Path, tmp_path: Path) -> None:
    options = {
        "vocab_size": 96,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "max_position_embeddings": 120,
        "rotary_dim": 4,
    }
    gptj = Case("gptj", "GPTJConfig", options, 8, kernels=("eager",))
    checkpoint = save_checkpoint(gptj, tmp_path / "model")
    sections: dict[str, Any] = {"model": {"tokenizer": {"max_length": 120}}, "capture": {"capture_pre_rope": True}}
    assert manifests.read(run(checkpoint, texts, tmp_path / "out", **sections))["proof"]["proven"] is True


def test_a_wrong_rotation_is_found(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_checkpoint(LLAMA, tmp_path / "model")
    monkeypatch.setattr(Family, "before_rotary", lambda self, module, calls, query, key: (query, key))
    with pytest.raises(CaptureError, match=r"the proof of .* failed, and the dataset was not published"):
        run(checkpoint, texts, tmp_path / "out", capture={"capture_pre_rope": True}, verify={"examples": 2})


def test_only_examples_with_rows_prove_anything(texts: Path, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(LLAMA, tmp_path / "model")
    sampler = {"type": "uniform", "base_rate": 2.0, "min_bucket_size": 64, "share": "example"}
    root = run(checkpoint, texts, tmp_path / "out", sampler=sampler | {"seed": 3}, verify={"examples": 1})
    with_rows = {example for table in heads_of(root).values() for example in table["example_id"].to_pylist()}
    shortest = min(with_rows, key=lambda example: LENGTHS[example])
    assert manifests.read(root)["proof"]["examples"] == [shortest] != [1]


def test_a_difference_that_is_not_a_number_proves_nothing(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_a_number(slot: Slot) -> None:
        slot.vectors[0, -1, 0] = float("nan")

    harm_stored_vectors(monkeypatch, not_a_number)
    with pytest.raises(CaptureError, match=FAILED):
        run(save_checkpoint(LLAMA, tmp_path / "model"), texts, tmp_path / "out", inference={"batch_size": 1})


@pytest.mark.slow
def test_a_kernel_that_is_wrong_for_long_texts_leaves_the_dataset_unproven(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    line = (
        r"Layer 1 \(full attention\), positions 67, 88-89 of a text of 90 tokens: the output of the attention kernel "
        r"differs by up to \S+ \(relative\) from softmax\(q K\) V .* Set model.attn_implementation to another kernel"
    )
    with wrong_kernel(without_keys_from(64)), pytest.raises(CaptureError, match=f"{FAILED}. .*{line}"):
        run(checkpoint, texts, root)  # the forward passes of the proof have the same kernel
    proof = manifests.read(root)["proof"]
    assert proof["proven"] is False
    assert max(proof["largest_difference_by_layer"].values()) < 1e-5
    assert [(check["layer"], check["passed"]) for check in proof["attention"]] == [(0, False), (1, False)]
    assert "positions 67, 88-89 of a text of 90 tokens" in str(verify(root))
    with pytest.raises(CaptureError, match=line):  # also when the command is rerun on the finished dataset
        run(checkpoint, texts, root)
    capsys.readouterr()
    run(checkpoint, texts, root, output={"overwrite": True})
    assert "Proven: 3,366 rows of 18 heads in all 3 layers, positions to 89; attention itself at " in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_the_checks_of_attention_outlast_kills_and_shards(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, alone = tmp_path / "out", {"batch_size": 1, "lookahead": 1}
    with wrong_kernel(without_keys_from(64)):
        stopped_after(3, checkpoint, texts, root, inference=alone)  # after the text of 90 tokens
    with pytest.raises(CaptureError, match=FAILED):
        run(checkpoint, texts, root, inference=alone)
    assert {check["tokens"] for check in manifests.read(root)["proof"]["attention"]} == {90}

    root = tmp_path / "shards"
    with wrong_kernel(without_keys_from(64)):
        captured_only(checkpoint, texts, root, monkeypatch, shard={"index": 0, "count": 2})  # 60 and 90 tokens
    captured_only(checkpoint, texts, root, monkeypatch, shard={"index": 1, "count": 2})
    with pytest.raises(CaptureError, match=f"{FAILED}.*a text of 90 tokens"):
        finalize(root, prove=False)


@pytest.mark.slow
def test_the_checks_of_attention_outlast_growth(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = tmp_path / "grown"
    for count in (3, 4):  # the last text has 33 tokens
        run(checkpoint, texts, root, dataset={"max_samples": count})
        checks = manifests.read(root)["proof"]["attention"]
        assert [(check["kind"], check["tokens"], check["passed"]) for check in checks] == [
            ("a sliding window of 12", 90, True),
            ("full attention", 90, True),
        ]


@pytest.mark.slow
def test_late_rows_of_a_long_text_are_compared_in_all_layers_that_cost_little(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (proof_module, proof_examples):
        monkeypatch.setattr(module, "MAX_TOKENS", 64)
    proof = manifests.read(run(checkpoint, texts, tmp_path / "right"))["proof"]
    assert proof["proven"] is True and proof["longest_position"] == 63
    assert proof["beyond"] == {"layers": [0, 1, 2], "longest_position": 89}
    compared = [min(LENGTHS[each], 64) for each in proof["examples"]]
    assert proof["rows"] == 18 * (sum(compared) + 90 - 64), "each row once"
    assert "rows of 18 heads in all 3 layers, positions to 89; attention itself" in capsys.readouterr().out

    def late_position(slot: Slot) -> None:
        if slot.layer == 2 and slot.vectors.shape[1] == 90:
            slot.vectors[:, 70:] = slot.vectors[:, 70:].roll(1, dims=1)

    harm_stored_vectors(monkeypatch, late_position)
    with pytest.raises(CaptureError, match=FAILED):
        run(checkpoint, texts, tmp_path / "wrong", inference={"batch_size": 1})


def test_it_can_be_turned_off(texts: Path, tmp_path: Path) -> None:
    root = run(save_checkpoint(LLAMA, tmp_path / "model"), texts, tmp_path / "out", verify={"examples": 0})
    assert manifests.read(root)["proof"] == {"proven": None, "reason": "turned off (verify.examples=0)"}


@pytest.mark.slow
@pytest.mark.parametrize(("boundary", "proven"), [(3, None), (32, True)])
def test_frequencies_that_depend_on_the_length_are_proven_where_they_do_not(
    boundary: int, proven: bool | None, texts: Path, tmp_path: Path
) -> None:
    if proven is None:
        texts.write_text(json.dumps({"text": ALPHABET[0] * 4}), encoding="utf-8")  # padded to more tokens than heads
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
    case = replace(LLAMA, options=LLAMA.options | dynamic | {"max_position_embeddings": boundary})
    checkpoint = save_checkpoint(case, tmp_path / "model")
    proof = manifests.read(run(checkpoint, texts, tmp_path / "out"))["proof"]
    assert proof["proven"] is proven
    assert proven or "depend on the length of texts of more than 3 tokens" in proof["reason"]


class Blind(Family):
    """A family without a hook path."""

    def projections(self, module: nn.Module) -> None:
        return None


def test_a_family_without_a_hook_path_is_named_as_the_reason(texts: Path, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(LLAMA, tmp_path / "model")
    root = run(checkpoint, texts, tmp_path / "out", model={"family": f"{__name__}:Blind"})
    proof = manifests.read(root)["proof"]
    assert proof["proven"] is None and "no hook path" in proof["reason"]


def test_every_provable_type_is_proven_in_the_table() -> None:
    table = (Path(__file__).parents[2] / "models" / "SUPPORTED.md").read_text()
    proven = set(re.findall(r"^\| (\S+) \| \w+ \| yes \| [^|]+ \| (?:yes|pre) \|", table, flags=re.MULTILINE))
    inside = {"emu3_text_model": "emu3", "mllama_text_model": "mllama"}
    assert {inside.get(model_type, model_type) for model_type in PROVABLE_TYPES} <= proven
    tested = {case.config().get_text_config().model_type for case in CASES}
    assert tested - PROVABLE_TYPES == {"deepseek_v3", "gpt_neox", "phi3"}, "their families name their projections"


def test_rows_of_an_example_are_found_in_every_row_group(tmp_path: Path) -> None:
    example_ids = np.repeat([7, 3, 9], [5, 8, 4])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(34, dtype=np.float32)), 2)
    positions = pa.array(np.concatenate([np.arange(5), np.arange(8), np.arange(4)]))
    pq.write_table(
        pa.table({"example_id": example_ids, "position": positions, "vector": vectors}),
        tmp_path / "x",
        row_group_size=4,
    )
    (found, rows), (others, _) = proof_module.rows_of_examples(
        tmp_path / "x", [(3, np.arange(3, 14)), (9, np.array([15]))]
    )
    assert others.tolist() == [2]
    assert found.tolist() == list(range(8))
    assert rows.tolist() == np.arange(10, 26, dtype=np.float32).reshape(8, 2).tolist()
