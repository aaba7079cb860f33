"""The main job, end to end, on tiny models and real files: the dataset holds the vectors that the model computed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from support.backbones import FolderOf, captured, loaded
from support.jobs import QWEN3, TEXTS, hashes, heads_of, keys, run, tokens_of, vectors
from support.tiny import ALPHABET, save_checkpoint
from support.zoo import CASES, Case

from qk_sniffer.capture import gather, row_writer
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import from_dict
from qk_sniffer.errors import CaptureError, ConfigError, SourceError
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import parse_head_name, schema
from qk_sniffer.store.parquet_writer import check_encodings

pytestmark = pytest.mark.floor


QUICK = {"qwen3", "gemma2", "mllama", "gpt_oss", "llama4", "deepseek_v3", "gpt_neox"}
"""Grouped keys; softcaps and windows; a layer that is left out; sinks; neighbours; wide values; q, k and v in one."""


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "case",
    [case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", ["post", pytest.param("pre", marks=pytest.mark.slow)])
def test_every_stored_vector_is_bit_for_bit_the_models_own(
    case: Case, dtype: str, stage: str, folder_of: FolderOf, tmp_path: Path
) -> None:
    checkpoint = folder_of(case)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:4]))
    root = run(
        checkpoint,
        path,
        tmp_path / "out",
        model={"dtype": dtype},
        inference={"batch_size": 1},
        capture={"capture_pre_rope": stage == "pre", "capture_values": True, "capture_outputs": True},
    )
    backbone = loaded(checkpoint, dtype=dtype, pre_rope=stage == "pre")
    expected = [captured(backbone, tokens_of(text), "qkvo") for text in TEXTS[:4]]
    tables = heads_of(root)
    assert len(tables) == 2 * len(case.layers) * (4 + case.config().get_text_config().num_key_value_heads)
    for name, table in tables.items():
        key = parse_head_name(name)
        assert key is not None
        whole = torch.cat([seen[key.layer, key.kind][0, key.head] for seen in expected]).float().numpy()
        assert np.array_equal(vectors(table), whole)
        assert keys(table) == [(i, p) for i in range(4) for p in range(len(TEXTS[i]))]
        window = case.sliding_windows[key.layer]
        assert table["sliding_window"].to_pylist() == [window] * len(table)


def test_the_files_are_as_the_contract_says(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", capture={"layers": [0, 1]})
    manifest = manifests.read(root)
    tables = heads_of(root)
    assert len(tables) == 12
    for name, table in tables.items():
        key = parse_head_name(name)
        assert key is not None
        path = root / name / "data.parquet"
        assert table.schema.remove_metadata() == schema(16)
        assert table.schema.names == ["bucket", "example_id", "position", "vector", "sliding_window"]
        assert table.schema.field("vector").type == pa.list_(pa.float32(), 16)
        assert table.schema.field("sliding_window").type == pa.int32()
        check_encodings(path, pq.read_metadata(path))
        assert table["bucket"].to_pylist() == [position // 16 for position in table["position"].to_pylist()]
        metadata = {k.decode(): v.decode() for k, v in pq.read_schema(path).metadata.items()}
        expected = {
            "model": checkpoint.name,
            "revision": manifest["commits"]["model"],
            "layer": str(key.layer),
            "head": str(key.head),
            "key_head": str(key.head // 2 if key.kind == "q" else key.head),
            "kind": key.kind,
            "rope_stage": "post",
            "sliding_window": "12" if key.layer == 0 else "null",
            "softmax_scale": "0.25",
            "dtype": "float32",
        }
        assert expected.items() <= metadata.items()
    examples = pq.read_table(root / "examples" / "data.parquet").to_pydict()
    assert examples["num_tokens"] == [len(text) for text in TEXTS]
    assert examples["source_id"] == [str(i) for i in range(len(TEXTS))]
    assert not (root / ".qk_sniffer").exists()


def test_the_manifest_tells_what_made_the_dataset_and_holds_for_its_files(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    root = run(checkpoint, texts, tmp_path / "out", sampler={"type": "uniform", "base_rate": 4.0})
    manifest = json.loads((root / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (root / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["bytes"] == len(data)
        if name.endswith(".parquet"):
            assert entry["rows"] == pq.read_metadata(root / name).num_rows
    assert {"README.md", "examples/data.parquet", "l00h00q/data.parquet"} <= manifest["files"].keys()
    assert manifest["rows"] == sum(len(table) for table in heads_of(root).values())
    assert manifest["inclusion"]["q"] == {str(bucket): 0.25 for bucket in range(1 + (max(map(len, TEXTS)) - 1) // 16)}
    assert manifest["config"]["sampler"]["base_rate"] == 4.0
    assert (
        manifest["versions"]["torch"] == torch.__version__.split("+")[0]
        or manifest["versions"]["torch"] == torch.__version__
    )
    layers = manifest["model"]["layers"]
    assert [layer["sliding_window"] for layer in layers] == [12, None, 12]
    assert [layer["softmax_scale"] for layer in layers] == [0.25] * 3
    assert [layer["full_attention"] for layer in layers] == [False, True, False]
    assert [layer["key_head"] for layer in layers] == [[0, 0, 1, 1]] * 3
    turns = {"frequencies": "rotary_emb", "pairs": "halves", "first": 0, "direction": 1, "changed_after": False}
    assert [layer["rotation"] for layer in layers] == [turns] * 3
    of_layers = manifest["model"]["rotary"]["frequencies"]["rotary_emb"]
    assert of_layers == manifest["model"]["rotary"]["embeddings"]["rotary_emb"]
    (rotary,) = manifest["model"]["rotary"]["embeddings"].values()
    assert rotary["attention_scaling"] == 1.0
    expected = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    assert np.allclose(rotary["inv_freq"], expected, rtol=1e-6)


@pytest.mark.slow
def test_logits_can_be_rebuilt_from_dataset_and_manifest_alone(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", inference={"batch_size": 1})
    layer = manifests.read(root)["model"]["layers"][1]
    tables = heads_of(root)
    query, key = (vectors(tables[name])[: len(TEXTS[0])] for name in ("l01h03q", "l01h01k"))
    logits = np.where(np.tri(len(query), dtype=bool), layer["softmax_scale"] * query @ key.T, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    decoder = QWEN3.model(kernel="eager").get_decoder()
    with torch.no_grad():
        attentions = decoder(input_ids=tokens_of(TEXTS[0]), output_attentions=True).attentions
    assert np.allclose(weights, attentions[1][0, 3].numpy(), atol=1e-5)


def test_every_reader_reads_it(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", capture={"layers": [0]})
    tables = heads_of(root)
    for name, table in tables.items():
        loaded = load_dataset(str(root), name, split="train").with_format("arrow")[:]
        assert loaded.column_names == table.column_names
        assert np.array_equal(vectors(loaded), vectors(table))
    default = load_dataset(str(root), split="train")
    assert default.num_rows == len(tables["l00h00q"])
    rows = sum(len(table) for table in tables.values())
    pattern = str(root / "l*" / "data.parquet")
    counted = duckdb.sql(f"select count(*), sum(len(vector)) from read_parquet('{pattern}')").fetchall()
    assert counted == [(rows, rows * 16)]
    assert pl.scan_parquet(pattern).select(pl.len()).collect().item() == rows


@pytest.mark.slow
def test_the_rows_do_not_depend_on_how_the_work_is_shared_out(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    sampler = {"type": "uniform", "base_rate": 3.0}
    whole = heads_of(run(checkpoint, texts, tmp_path / "one", sampler=sampler, inference={"batch_size": 1}))
    others = {
        "large batches": {"inference": {"max_batch_tokens": 4096}},
        "small window": {"inference": {"lookahead": 3, "batch_size": 2}},
        "masked attention": {"inference": {"banded_attention": False}},
        "small buffers": {"inference": {"queue_mb": 1, "segment_mb": 1}},
        "streamed": {"dataset": {"streaming": True}},
    }
    for name, sections in others.items():
        other = heads_of(run(checkpoint, texts, tmp_path / name, sampler=sampler, **sections))
        assert whole.keys() == other.keys()
        for head, table in whole.items():
            assert table.drop(["vector"]) == other[head].drop(["vector"]), name
            assert np.allclose(vectors(table), vectors(other[head]), rtol=1e-4, atol=1e-4), name


@pytest.mark.slow
def test_the_manifest_tells_no_path_of_this_machine(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out")
    for name in ("manifest.json", "README.md", "l00h00q/data.parquet"):
        assert str(tmp_path).encode() not in (root / name).read_bytes()
        assert str(checkpoint.parent).encode() not in (root / name).read_bytes()


@pytest.mark.slow
def test_a_name_that_looks_like_an_interpolation_is_a_name(
    checkpoint: Path, texts: Path, tmp_path: Path, undisturbed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    named = tmp_path / "a${b}${oc.env:HF_TOKEN}.jsonl"
    named.write_bytes(texts.read_bytes())
    root = run(checkpoint, named, tmp_path / "out")
    assert heads_of(root) == heads_of(undisturbed())
    assert manifests.read(root)["config"]["dataset"]["path"] == named.name
    assert named.name in (root / "README.md").read_text(encoding="utf-8")
    run(checkpoint, named, tmp_path / "out")  # reads the manifest again
    assert not any(b"hf_secret" in path.read_bytes() for path in root.rglob("*") if path.is_file())


def test_a_checkpoint_without_a_tokenizer_says_so(texts: Path, tmp_path: Path) -> None:
    QWEN3.model().save_pretrained(tmp_path / "model")
    with pytest.raises(SourceError, match=r"model\.tokenizer\.name"):
        run(tmp_path / "model", texts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_gather_that_is_cut_into_pieces_gives_the_same_files(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[..., Path]
) -> None:
    whole = undisturbed()
    monkeypatch.setattr(row_writer, "PIECE_BYTES", 1000)
    assert hashes(run(checkpoint, texts, tmp_path / "pieces")) == hashes(whole)


@pytest.mark.slow
def test_texts_that_are_copied_as_blocks_give_the_same_files_as_gathered_ones(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {"sampler": {"type": "all"}, "capture": {"heads": [0, 2]}}
    monkeypatch.setattr(gather, "MIN_RANGE", 1)
    blocks = run(checkpoint, texts, tmp_path / "blocks", **sections)
    monkeypatch.setattr(gather, "MIN_RANGE", 10**9)
    assert hashes(run(checkpoint, texts, tmp_path / "gathered", **sections)) == hashes(blocks)


@pytest.mark.slow
def test_the_sampler_decides_the_rows_of_queries_and_keys(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", sampler={"type": "log_uniform", "keys": {"type": "all"}})
    config = from_dict(manifests.read(root)["config"])
    sampler = Sampler(config.sampler)
    for name, table in heads_of(root).items():
        key = parse_head_name(name)
        assert key is not None
        expected = [
            (i, position)
            for i, text in enumerate(TEXTS)
            for position in sampler.positions(i, key.layer, key.kind, len(text)).tolist()
        ]
        assert keys(table) == expected
        assert table["bucket"].to_pylist() == sampler.bucket(key.kind, table["position"].to_numpy()).tolist()


@pytest.mark.slow
def test_only_the_heads_asked_for_are_captured(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    def names(**capture: Any) -> list[str]:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        return list(heads_of(run(checkpoint, texts, root, capture=capture)))

    assert names(layers=[2], heads=[0, 3]) == ["l02h00k", "l02h00q", "l02h01k", "l02h03q"]
    assert names(layers=[1], heads=[1], capture_keys=False) == ["l01h01q"]
    assert names(layers=[1], heads=[3], capture_queries=False) == ["l01h01k"]
    assert {name[:3] for name in names(full_attention_only=True)} == {"l01"}
    drawn = names(head_sampling={"count": 3, "seed": 5})
    assert sum(name.endswith("q") for name in drawn) == 3
    for name in drawn:
        if name.endswith("q"):
            assert f"{name[:3]}h{int(name[4:6]) // 2:02d}k" in drawn
    with pytest.raises(ConfigError, match=r"capture\.layers.*0-2"):
        names(layers=[7])


@pytest.mark.slow
def test_tokens_can_be_stored_next_to_the_vectors(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", capture={"capture_token_ids": True, "capture_token_strings": True})
    for table in heads_of(root).values():
        assert table.schema.names[-2:] == ["token_id", "token_str"]
        rows = zip(keys(table), table["token_id"].to_pylist(), table["token_str"].to_pylist(), strict=True)
        for (example, position), token_id, token in rows:
            assert token == TEXTS[example][position] == ALPHABET[token_id - 1]


def test_ids_of_the_source_are_kept_or_hashed(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", dataset={"id_column": "id", "max_samples": 3})
    examples = pq.read_table(root / "examples" / "data.parquet").to_pydict()
    assert examples["source_id"] == ["doc-0", "doc-1", "doc-2"]
    table = heads_of(root)["l00h00q"]
    assert list(dict.fromkeys(table["example_id"].to_pylist())) == examples["example_id"]


def test_negative_ids_of_the_source_are_kept_and_proven(checkpoint: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": TEXTS[i], "id": -5 - i}) + "\n" for i in range(3)))
    root = run(checkpoint, texts, tmp_path / "out", dataset={"id_column": "id"}, verify={"examples": 3})
    assert pq.read_table(root / "examples" / "data.parquet")["example_id"].to_pylist() == [-5, -6, -7]
    assert manifests.read(root)["proof"]["examples"] == [-7, -6, -5]


def test_a_text_file_is_one_example(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("a-line\nand-another\n" * 3)
    root = run(checkpoint, path, tmp_path / "out", model={"tokenizer": {"max_length": 30}})
    assert max(keys(heads_of(root)["l00h00q"])) == (0, 29)
    assert manifests.read(root)["truncated_examples"] == 1


@pytest.mark.slow
def test_a_folder_of_parquet_is_a_dataset(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for part in range(2):
        pq.write_table(pa.table({"text": TEXTS[part::2], "n": list(range(12))}), folder / f"part-{part}.parquet")
    root = run(checkpoint, folder, tmp_path / "out")
    assert pq.read_metadata(root / "examples" / "data.parquet").num_rows == len(TEXTS)


def test_a_model_whose_attention_cannot_be_seen_is_an_error(texts: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, XGLMConfig

    save_checkpoint(QWEN3, tmp_path / "xglm")
    config = XGLMConfig(vocab_size=96, d_model=32, num_layers=2, attention_heads=4, ffn_dim=48)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "xglm")
    with pytest.raises(CaptureError, match=r"\(XGLMAttention\) calls no kernel"):
        run(tmp_path / "xglm", texts, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_dataset_without_text_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n{"text": "  "}\n')
    with pytest.raises(SourceError, match="text"):
        run(checkpoint, path, tmp_path / "out")


@pytest.mark.slow
def test_rows_without_text_are_left_out_counted_and_keep_their_index(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "gaps.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", "abc", None, "defg"]))
    root = run(checkpoint, path, tmp_path / "out")
    assert keys(heads_of(root)["l00h00q"]) == [(1, 0), (1, 1), (1, 2), (3, 0), (3, 1), (3, 2), (3, 3)]
    assert manifests.read(root)["skipped_rows"] == 2


@pytest.mark.slow
def test_debug_logging_tells_where_the_time_of_each_batch_went(
    checkpoint: Path, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run(checkpoint, texts, tmp_path / "out", inference={"debug_logging": True, "batch_size": 6})
    lines = [message for message in caplog.messages if message.startswith("batch of ")]
    assert len(lines) >= 4
    for line in lines:
        for stage in ("tokenize", "plan", "forward", "gather", "transfer", "write"):
            assert f"{stage} " in line
    assert "forward 0.0000 s" not in lines[0] and "tokenize 0.0000 s" not in lines[0]


@pytest.mark.parametrize("dry_run", [False, True])
def test_more_tokens_than_a_model_has_positions_for_are_refused_at_the_start(
    texts: Path, tmp_path: Path, dry_run: bool
) -> None:
    gpt2 = Case("gpt2", "GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4, "max_position_embeddings": 50}, 8)
    checkpoint = save_checkpoint(gpt2, tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"max_length is 4096, but this model has positions for 50"):
        run(checkpoint, texts, tmp_path / "out")
    root = run(checkpoint, texts, tmp_path / "out", model={"tokenizer": {"max_length": 50}})
    assert manifests.read(root)["truncated_examples"] > 0
