"""Compares tiny GGUF files with the same weights in safetensors, and runs a real pretrained model on real text."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from support.fake_hub import FakeHub
from support.gguf_files import write_gguf
from support.jobs import heads_of, keys, vectors
from support.smollm2 import FILE
from support.zoo import CASES
from transformers import AutoModelForCausalLM, AutoTokenizer

import qk_sniffer.assets
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.loading import check_model, load_backbone
from qk_sniffer.config import ModelConfig, TokenizerConfig
from qk_sniffer.corpus.tokenizer import load_tokenizer
from qk_sniffer.errors import ConfigError, SourceError
from qk_sniffer.hub.revisions import current_commit
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import parse_head_name

pytestmark = pytest.mark.floor

ASSET = Path(qk_sniffer.assets.__file__).parent / "pydoc_tiny"

LLAMA = next(case for case in CASES if case.name == "llama")


def of(folder: Path, file: str = "tiny.gguf", **settings: Any) -> ModelConfig:
    return ModelConfig(name=str(folder), gguf_file=file, dtype=settings.pop("dtype", "float32"), **settings)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gguf_file_gives_the_weights_that_safetensors_give(name: str, dtype: str, tmp_path: Path) -> None:
    model = next(case for case in CASES if case.name == name).model()
    model.save_pretrained(tmp_path)
    write_gguf(model, tmp_path / "tiny.gguf")
    expected = load_backbone(ModelConfig(name=str(tmp_path), dtype=dtype))
    backbone = load_backbone(of(tmp_path, dtype=dtype))
    weights = backbone.decoder.state_dict()
    assert weights.keys() == expected.decoder.state_dict().keys()
    for key, weight in expected.decoder.state_dict().items():
        assert weights[key].dtype == getattr(torch, dtype) and torch.equal(weights[key], weight), key
    assert backbone.rotary_parameters() == expected.rotary_parameters()
    assert backbone.probe() == [replace(facts, module=None) for facts in expected.probe()]  # names of the checkpoint


def test_a_weight_that_the_file_lacks_is_an_error_that_names_it(tmp_path: Path) -> None:
    write_gguf(LLAMA.model(), tmp_path / "tiny.gguf", leave_out="layers.1.self_attn.k_proj.weight")
    with pytest.raises(SourceError, match=r"lacks.* 1 weights .*layers\.1\.self_attn\.k_proj\.weight"):
        load_backbone(of(tmp_path))


@pytest.mark.parametrize(
    "further",
    [
        {"tensors": {"rope_freqs.weight": [1.0, 1.0, 2.0, 8.0]}},
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0},
        {"rope__scale_linear": 2.0},
    ],
    ids=["a tensor", "keys", "an old key"],
)
def test_rotary_scaling_that_is_not_read_is_refused_until_it_is_given(further: dict[str, Any], tmp_path: Path) -> None:
    write_gguf(LLAMA.model(), tmp_path / "tiny.gguf", **further)
    with pytest.raises(ConfigError, match=r"rope[._]\w+.*model\.config_overrides\.rope_parameters"):
        check_model(of(tmp_path))
    given = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert load_backbone(of(tmp_path, config_overrides=given)).config.rope_parameters["factor"] == 2.0


def test_a_rotary_base_that_is_not_read_is_refused_until_it_is_given(tmp_path: Path) -> None:
    # transformers reads no base from StableLM files, and would use its default, 10000.
    stablelm: dict[str, Any] = {"architecture": "stablelm", "rope__dimension_count": 2}
    write_gguf(LLAMA.model(), tmp_path / "default.gguf", **stablelm, rope__freq_base=10000.0)
    check_model(of(tmp_path, "default.gguf"))
    write_gguf(LLAMA.model(), tmp_path / "tiny.gguf", **stablelm, rope__freq_base=123456.0)
    with pytest.raises(
        ConfigError, match=r"stablelm\.rope\.freq_base=123456.*model\.config_overrides\.rope_parameters"
    ):
        check_model(of(tmp_path))
    check_model(of(tmp_path, config_overrides={"rope_theta": 123456.0}))


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("further", "message", "given"),
    [
        (
            {"rope__dimension_count": 4},
            r"qwen2\.rope\.dimension_count=4\): give .*rope_parameters\.partial_rotary_factor as",
            {"rope_parameters": {"rope_type": "linear", "factor": 1.0, "partial_rotary_factor": 0.5}},
        ),
        (
            {"attention__sliding_window": 16.0},
            r"qwen2\.attention\.sliding_window=16\.0\): give model\.config_overrides\.sliding_window as",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        ),
        ({"attention__scale": 0.9}, r"qwen2\.attention\.scale=0\.89.*attention_multiplier .* or load that model", None),
        ({"attn_logit_softcapping": 30.0}, r"attn_logit_softcapping=30\.0.* or load that model", None),
        (
            {"rope__scaling__attn_factor": 1.5},
            r"qwen2\.rope\.scaling\.attn_factor=1\.5\): give model\.config_overrides\.rope_parameters as",
            {"rope_scaling": {"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.5}},
        ),
        (
            {"rope__dimension_count": 4, "rope__scaling__attn_factor": 1.5},
            r"partial_rotary_factor and model\.config_overrides\.rope_parameters as|"
            r"rope_parameters and model\.config_overrides\.rope_parameters\.partial_rotary_factor as",
            None,
        ),
    ],
)
def test_what_else_of_attention_is_not_read_is_refused_until_it_is_given(
    further: dict[str, Any], message: str, given: dict[str, Any] | None, tmp_path: Path
) -> None:
    write_gguf(LLAMA.model(), tmp_path / "tiny.gguf", architecture="qwen2", **further)
    with pytest.raises(ConfigError, match=message):
        check_model(of(tmp_path))
    # Another override does not replace it.
    with pytest.raises(ConfigError, match=message):
        check_model(of(tmp_path, config_overrides={"rms_norm_eps": 0.5, "rope_theta": 10000.0}))
    if given is not None:
        check_model(of(tmp_path, config_overrides=given))


def test_what_the_config_does_anyway_is_not_refused(tmp_path: Path) -> None:
    anyway = {"attention__scale": 8**-0.5, "attention__sliding_window": 256.0, "rope__scaling__attn_factor": 1.0}
    write_gguf(LLAMA.model(), tmp_path / "tiny.gguf", architecture="qwen2", **anyway)
    check_model(of(tmp_path))
    # StableLM rotates a quarter of each head by default.
    write_gguf(LLAMA.model(), tmp_path / "quarter.gguf", architecture="stablelm", rope__dimension_count=2)
    check_model(of(tmp_path, "quarter.gguf"))
    write_gguf(LLAMA.model(), tmp_path / "whole.gguf", architecture="stablelm", rope__dimension_count=8)
    with pytest.raises(ConfigError, match=r"stablelm\.rope\.dimension_count=8"):
        check_model(of(tmp_path, "whole.gguf"))
    whole = {"rope_parameters": {"partial_rotary_factor": 1.0}}
    check_model(of(tmp_path, "whole.gguf", config_overrides=whole))


def test_biases_of_attention_that_the_config_does_not_ask_for_are_refused_until_it_does(tmp_path: Path) -> None:
    model = replace(LLAMA, options={"attention_bias": True}).model()
    with torch.no_grad():  # llama.cpp's converter reorders only the rows of weights
        for layer in model.get_decoder().layers:
            layer.self_attn.q_proj.bias.fill_(0.5)
            layer.self_attn.k_proj.bias.fill_(0.25)
    write_gguf(model, tmp_path / "tiny.gguf")
    with pytest.raises(ConfigError, match=r"blk\.0\.attn_k\.bias.*model\.config_overrides\.attention_bias"):
        check_model(of(tmp_path))
    decoder = load_backbone(of(tmp_path, config_overrides={"attention_bias": True})).decoder
    for key, weight in model.get_decoder().state_dict().items():
        assert torch.equal(decoder.state_dict()[key], weight), key


@pytest.mark.parametrize(
    ("architecture", "tensor"),
    [
        ("stablelm", "blk.1.attn_q_norm.weight"),
        ("llama", "blk.2.ffn_gate_inp.weight"),
        ("llama", "blk.0.attn_q.scale"),
        ("llama", "token_embd_norm.weight"),
    ],
)
def test_a_tensor_that_is_not_read_is_an_error_that_names_it(architecture: str, tensor: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"architecture": architecture, "rope__dimension_count": 2, "rope__freq_base": 10000.0}
    settings = settings if architecture == "stablelm" else {}
    write_gguf(LLAMA.model(), tmp_path / "tiny.gguf", tensors={tensor: [1.0, 1.0]}, **settings)
    with pytest.raises(SourceError, match=rf"has 1 tensors that transformers does not read.*: {re.escape(tensor)}\."):
        check_model(of(tmp_path))


def test_tensors_of_the_head_and_of_further_layers_may_be_left_unread(tmp_path: Path) -> None:
    further = {"output.weight": np.ones((96, 32)), "output.bias": [1.0], "blk.3.nextn.eh_proj.weight": [1.0]}
    write_gguf(LLAMA.model(), tmp_path / "tiny.gguf", tensors=further)
    load_backbone(of(tmp_path), layers=[0])


def test_the_attention_scale_that_a_gemma_file_implies_is_asked_for_if_it_is_not_that_of_the_config(
    tmp_path: Path,
) -> None:
    case = next(case for case in CASES if case.name == "gemma2")
    model = replace(case, options=case.options | {"query_pre_attn_scalar": 16}).model()
    write_gguf(model, tmp_path / "tiny.gguf", attention__key_length=16, attention__sliding_window=12)
    with pytest.raises(ConfigError, match=r"scale of 16 \*\* -0\.5 for its 3 layers\): give .*_scalar=16 as"):
        check_model(of(tmp_path))
    backbone = load_backbone(of(tmp_path, config_overrides={"query_pre_attn_scalar": 16}))
    assert {layer.softmax_scale for layer in backbone.probe()} == {0.25}
    for key, weight in model.get_decoder().state_dict().items():
        assert torch.allclose(backbone.decoder.state_dict()[key], weight, atol=1e-6), key


@pytest.mark.parametrize(
    ("architecture", "layers", "scalar"),
    [
        ("gemma2", 46, 144),
        pytest.param("gemma3", 62, 168, marks=pytest.mark.slow),
        pytest.param("gemma2", 42, None, marks=pytest.mark.slow),
    ],
)
def test_a_gemma_file_of_27b_has_a_scale_of_its_own(
    architecture: str, layers: int, scalar: int | None, tmp_path: Path
) -> None:
    writer = GGUFWriter(tmp_path / "tiny.gguf", architecture)
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_embedding_length(32 * (scalar or 112))
    writer.add_head_count(32)
    writer.add_key_length(256)
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    if scalar is None:
        check_model(of(tmp_path))
    else:
        with pytest.raises(ConfigError, match=rf"give model\.config_overrides\.query_pre_attn_scalar={scalar} as"):
            check_model(of(tmp_path))
        check_model(of(tmp_path, config_overrides={"query_pre_attn_scalar": scalar}))


def test_a_type_with_one_projection_for_all_is_read_whole(tmp_path: Path) -> None:
    phi3 = next(case for case in CASES if case.name == "phi3")
    # The config of a Phi-3 file has the padding token of the original model.
    options = {"vocab_size": 32064, "pad_token_id": 32000, "eos_token_id": 32000}
    model = replace(phi3, options=options).model()
    write_gguf(model, tmp_path / "tiny.gguf")
    backbone = load_backbone(of(tmp_path))
    assert not any("lm_head" in name for name, _ in backbone.decoder.named_modules())
    for key, weight in model.get_decoder().state_dict().items():
        assert torch.equal(backbone.decoder.state_dict()[key], weight), key
    assert len(backbone.probe()) == 3


def test_the_file_in_the_current_directory_does_not_take_its_place(in_tmp: Path) -> None:
    write_gguf(LLAMA.model(), in_tmp / "tiny.gguf")
    other = LLAMA.model()
    with torch.no_grad():
        other.get_decoder().embed_tokens.weight.zero_()
    (in_tmp / "model").mkdir()
    write_gguf(other, in_tmp / "model" / "tiny.gguf")
    for folder in (Path("model"), in_tmp / "model"):
        assert not load_backbone(of(folder)).decoder.state_dict()["embed_tokens.weight"].any()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("other.gguf", r"'other\.gguf', which is not in .*; it has tiny\.gguf"),
        ("deeper/tiny.gguf", "a file in the folder model.name itself"),
        ("../tiny.gguf", "a file in the folder model.name itself"),
        ("/etc/passwd.gguf", "a file in the folder model.name itself"),
        ("notes.txt", r"must be the name of a \.gguf file"),
    ],
)
def test_a_wrong_file_name_is_refused_with_the_names_of_the_folder(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    for name in ("tiny.gguf", "deeper/tiny.gguf", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=message):
        check_model(of(tmp_path, file))


def test_a_folder_without_gguf_files_and_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has no \.gguf file$"):
        check_model(of(tmp_path))
    (tmp_path / "tiny.gguf").write_text("a text")
    with pytest.raises(SourceError, match="not a GGUF file"):
        check_model(of(tmp_path))


def test_without_the_extra_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(LLAMA.model(), tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)  # the import system's mark of a missing package
    with pytest.raises(ConfigError, match=r"needs the package gguf: run pip install gguf$"):
        check_model(of(tmp_path))


ON_THE_HUB = """
import sys
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import SourceError
from qk_sniffer.backbone.loading import load_backbone
def of(file):
    return ModelConfig(name="org/name", gguf_file=file, dtype="float32")
print(load_backbone(of("deeper/tiny.gguf"), commit=sys.argv[1]).decoder.embed_tokens.weight.abs().sum().item())
try:
    load_backbone(of("other.gguf"))
except SourceError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_file_of_a_repository_is_that_of_the_commit(tmp_path: Path) -> None:
    model = LLAMA.model()
    content = write_gguf(model, tmp_path / "tiny.gguf").read_bytes()
    with FakeHub() as hub:
        commit = hub.commit("org/name", {"deeper/tiny.gguf": content})
        hub.commit("org/name", {"deeper/tiny.gguf": b"a later state"})
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", ON_THE_HUB, commit], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    total, error = done.stdout.splitlines()
    assert float(total) == pytest.approx(model.get_decoder().embed_tokens.weight.abs().sum().item(), rel=1e-5)
    assert "model org/name" in error and "other.gguf" in error


def write_vocabulary(path: Path, swap: tuple[str, str] | None = None) -> None:
    """Writes a GGUF file with the vocabulary of pydoc-tiny and no weights; two tokens may swap their ids."""
    described = json.loads((ASSET / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].get)
    if swap is not None:
        one, other = (tokens.index(token) for token in swap)
        tokens[one], tokens[other] = tokens[other], tokens[one]
    writer = GGUFWriter(path, "qwen2")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in described["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_vocabulary_in_a_file_of_a_repository_is_that_of_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commits = "1" * 40, "2" * 40
    repository = tmp_path / "models--org--name"
    for commit, swap in zip(commits, (None, ("1", "2")), strict=True):
        (repository / "snapshots" / commit).mkdir(parents=True)
        write_vocabulary(repository / "snapshots" / commit / "tiny.gguf", swap)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[1])
    model = ModelConfig(name="org/name", gguf_file="tiny.gguf")
    first, last = (load_tokenizer(model, commit).token_strings(range(256)) for commit in commits)
    assert (first.index("1"), first.index("2")) == (last.index("2"), last.index("1"))


LAYERS = [0, 14, 29]
Q_HEADS = [0, 8]
HEAD_DIM = 64
MAX_LENGTH = 400


def perplexity(backbone: Backbone, ids: torch.Tensor) -> float:
    """Returns the perplexity of token ids (n,). The embedding is also the model's head."""
    with torch.inference_mode():
        states = backbone.decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        logits = states[:-1] @ backbone.decoder.get_input_embeddings().weight.T
        return torch.nn.functional.cross_entropy(logits, ids[1:]).exp().item()


@pytest.mark.slow
def test_a_real_model_reads_real_text_as_it_should(smollm2: Path) -> None:
    config = of(smollm2, FILE, tokenizer=TokenizerConfig(max_length=2048))
    tokenizer = load_tokenizer(config)
    ids = torch.tensor(tokenizer._tokenizer("\n\n".join(topics.values()))["input_ids"][:2048])
    backbone = load_backbone(config)
    assert backbone.rotary_parameters()["rope_parameters"]["rope_theta"] == 100000.0
    # 11.88 on the topics of Python 3.11; those of other versions differ a little.
    assert 10.5 < perplexity(backbone, ids) < 13.5
    shuffled = ids[torch.randperm(2048, generator=torch.Generator().manual_seed(0))]
    assert perplexity(backbone, shuffled[:512]) > 500


@pytest.fixture(scope="session")
def texts_of_topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real texts; one is longer than `MAX_LENGTH`."""
    path = tmp_path_factory.mktemp("topics") / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in ("pass", "strings")))
    return path


HookedVectors = dict[tuple[str, int, str], np.ndarray]
"""(heads, n, d) by stage, layer and kind."""


@pytest.fixture(scope="session")
def hooked(smollm2: Path, texts_of_topics: Path) -> list[HookedVectors]:
    """The vectors of each text, from hooks on the whole, unmodified model."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, gguf_file=FILE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2, gguf_file=FILE)
    projected: dict[tuple[int, str], torch.Tensor] = {}

    def keep(layer: int, kind: str) -> Callable[..., None]:
        return lambda module, inputs, output: projected.update({(layer, kind): output})

    for layer in LAYERS:
        for kind in "qk":
            projection = getattr(model.model.layers[layer].self_attn, f"{kind}_proj")
            projection.register_forward_hook(keep(layer, kind))
    found = []
    for line in texts_of_topics.read_text(encoding="utf-8").splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:MAX_LENGTH]])
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
            cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(ids.shape[1])[None])
        seen: HookedVectors = {}
        for (layer, kind), output in projected.items():
            before = output[0].unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1)
            first, second = before.chunk(2, dim=-1)
            seen["pre", layer, kind] = before.numpy()
            seen["post", layer, kind] = (before * cos + torch.cat((-second, first), dim=-1) * sin).numpy()
        found.append(seen)
    return found


@pytest.mark.slow
def test_stored_vectors_of_a_real_model_are_those_of_hooks(
    smollm2: Path, texts_of_topics: Path, hooked: list[HookedVectors], in_tmp: Path
) -> None:
    job = ["model=hf", f"model.name={smollm2}", f"model.gguf_file={FILE}", "model.dtype=float32"]
    job += [f"model.tokenizer.max_length={MAX_LENGTH}", "dataset=hf", f"dataset.path={texts_of_topics}"]
    job += ["sampler=all", f"capture.layers={LAYERS}", f"capture.heads={Q_HEADS}", "inference.batch_size=1"]
    job += ["verify.examples=1"]
    for stage in ("post", "pre"):
        stage_of = [f"capture.capture_pre_rope={stage == 'pre'}", f"output.data_root={stage}"]
        command = [sys.executable, "-m", "qk_sniffer", *job, *stage_of]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        manifest = manifests.read(in_tmp / stage)
        assert manifest["proof"]["proven"] is True and len(manifest["proof"]["examples"]) == 1
        assert manifest["model"]["rope_stage"] == stage
        assert manifest["fingerprint"]["model.gguf_file"] == FILE and str(smollm2) not in json.dumps(manifest)
        tables = heads_of(in_tmp / stage)
        assert len(tables) == len(LAYERS) * (2 + 2)  # query heads 0 and 8 have key heads 0 and 2
        for name, table in tables.items():
            head = parse_head_name(name)
            assert head is not None
            expected = [seen[stage, head.layer, head.kind][head.head] for seen in hooked]
            assert [len(one) for one in expected][1:] == [MAX_LENGTH]
            assert keys(table) == [(i, position) for i, one in enumerate(expected) for position in range(len(one))]
            assert np.array_equal(vectors(table), np.concatenate(expected)), name


@pytest.mark.parametrize(("name", "folder"), [("/models/tiny.gguf", "/models"), ("tiny.gguf", ".")])
def test_a_file_given_for_the_model_is_refused_with_how_to_give_it(name: str, folder: str, in_tmp: Path) -> None:
    Path("tiny.gguf").touch()
    with pytest.raises(SourceError, match=rf"set model\.name={folder} model\.gguf_file=tiny\.gguf"):
        current_commit(name, "main")
