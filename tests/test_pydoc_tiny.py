"""Tests that the shipped model predicts unseen text, and has the architecture that the default job needs."""

import importlib.util
import json
import logging
import math
import random
import re
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.functional import cross_entropy

import qk_sniffer.assets
from qk_sniffer.config import from_dict
from qk_sniffer.jobs.run import run_job

FOLDER = Path(qk_sniffer.assets.__file__).parent / "pydoc_tiny"
SCRIPT = Path(__file__).parent.parent / "scripts" / "train_pydoc_tiny.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The training script, imported for its lists of topics."""
    spec = importlib.util.spec_from_file_location("train_pydoc_tiny", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def held_out_loss(model: Any, tokenizer: Any, script: ModuleType) -> float:
    """Nats per token over the held-out topics of the running Python."""
    losses = []
    with torch.no_grad():
        for name in script.HELD_OUT:
            ids = tokenizer(topics[name], return_tensors="pt").input_ids
            losses.append(cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.slow
def test_it_predicts_held_out_text(held_out_loss: float, tokenizer: Any, script: ModuleType) -> None:
    unseen = [token for name in script.HELD_OUT for token in tokenizer(topics[name]).input_ids[1:]]
    training = set(topics) - set(script.HELD_OUT) - set(script.EARLY_STOPPING)
    counts = Counter(token for name in training for token in tokenizer(topics[name], verbose=False).input_ids[1:])
    total = counts.total() + len(tokenizer)
    unigram = -sum(math.log((counts[token] + 1) / total) for token in unseen) / len(unseen)

    assert held_out_loss < unigram - 1.5
    assert held_out_loss < math.log(len(tokenizer)) - 2.5


@pytest.mark.slow
def test_the_card_states_the_loss_of_this_checkpoint(held_out_loss: float) -> None:
    # The card states the loss for Python 3.11. Other versions of Python have slightly different texts.
    stated = re.search(r"^\| this model \| ([0-9.]+) \|", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M)
    assert stated is not None
    assert held_out_loss == pytest.approx(float(stated[1]), abs=0.1)


def test_held_out_topics_are_in_no_other_topic(script: ModuleType) -> None:
    """Some topics contain others, so that leaving out a topic by name may leave its text in the training."""

    def sequences(name: str) -> set[tuple[str, ...]]:
        words = topics[name].split()
        return {tuple(words[start : start + 8]) for start in range(len(words) - 7)}

    unseen = set().union(*map(sequences, script.HELD_OUT))
    training = set(topics) - set(script.HELD_OUT) - set(script.EARLY_STOPPING)
    seen = set().union(*map(sequences, training), *map(sequences, script.EARLY_STOPPING))
    assert len(unseen & seen) < 0.02 * len(unseen)


def hostile_texts() -> list[str]:
    draw = random.Random(0)
    return [
        "👩‍👩‍👧‍👦🏳️‍🌈 emoji",
        "漢字と仮名、한국어, العربية, हिन्दी",
        "\x00 NUL \x00\x00",
        bytes(draw.randbytes(4096)).decode("latin-1"),
        "".join(chr(draw.randrange(0x10000, 0x110000)) for _ in range(500)),
        "  leading,   inner , and trailing blanks \t\r\n\n   ",
        "don 't join n't , these .",
        "<|endoftext|> as plain text<|endoftext|>",
        "\ufeff\u200b\u2028\u0301",
        "",
    ]


@pytest.mark.parametrize("text", hostile_texts(), ids=range(len(hostile_texts())))
def test_any_text_comes_back_from_its_tokens(tokenizer: Any, text: str) -> None:
    first, *ids = tokenizer(text).input_ids
    assert first == tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.decode(ids) == text


def test_all_bytes_are_tokens(tokenizer: Any) -> None:
    assert tokenizer.unk_token is None
    assert len(set(ByteLevel.alphabet()) & set(tokenizer.get_vocab())) == 256


def test_folder_is_a_small_plain_checkpoint() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(files.values()) <= 4_000_000


def test_no_file_names_the_machine() -> None:
    for path in FOLDER.iterdir():
        text = path.read_bytes().decode("latin-1")
        assert not re.search(r"/(home|root|tmp|work|Users)/|\b20\d\d-\d\d-\d\d\b", text), path


@pytest.mark.parametrize("loader", ["AutoModelForCausalLM", "AutoModel"])
def test_it_loads_without_warnings(loader: str, caplog: pytest.LogCaptureFixture, recwarn: Any) -> None:
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    try:
        loaded, info = getattr(transformers, loader).from_pretrained(FOLDER, output_loading_info=True)
        transformers.AutoTokenizer.from_pretrained(FOLDER)
    finally:
        log.removeHandler(caplog.handler)
    assert not any(info.values()), info
    assert loaded.dtype == torch.bfloat16
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert [str(warning.message) for warning in recwarn] == []


def test_architecture(model: Any) -> None:
    config = model.config
    assert json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen3"
    assert config.num_hidden_layers == len(model.model.layers) >= 6
    assert config.num_attention_heads == 8 and config.num_key_value_heads == 2 and config.head_dim == 32
    assert config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    for layer, layer_type in zip(model.model.layers, config.layer_types, strict=True):
        attention = layer.self_attn
        assert attention.sliding_window == (128 if layer_type == "sliding_attention" else None)
        assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (32,)


@pytest.mark.slow
def test_a_longer_context_predicts_better(model: Any, tokenizer: Any) -> None:
    """Tests that 64 tokens of context predict a token of a held-out text better than 4."""
    ids = torch.tensor(tokenizer(topics["import"]).input_ids[1:])
    targets = range(64, len(ids), 8)

    def loss_after(num_tokens: int) -> float:
        contexts = torch.stack([ids[target - num_tokens : target] for target in targets])
        start = torch.full((len(targets), 1), tokenizer.bos_token_id)
        with torch.no_grad():
            logits = model(torch.cat([start, contexts], dim=1), logits_to_keep=1).logits[:, 0]
        return float(cross_entropy(logits, ids[list(targets)]))

    assert loss_after(64) < loss_after(4) - 0.3


@pytest.mark.parametrize(
    ("max_samples", "reached"),
    [
        pytest.param(3, r"2\d\d; attention itself at 8 positions to 255; from all 3 examples", id="some"),
        pytest.param(
            None,
            r"[\d,]+; attention itself at 9 positions to 4,095; from [\d,]+ of [\d,]+ examples",
            id="all",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_default_job_is_proven_in_every_layer_and_head(
    max_samples: int | None, reached: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length = 4096 if max_samples is None else 256
    values: dict[str, Any] = {
        "model": {"name": str(FOLDER), "slug": "pydoc-tiny", "dtype": "float32", "tokenizer": {"max_length": length}},
        "dataset": {"path": "pydoc", "max_samples": max_samples},
        "sampler": {"base_rate": 1.0 if max_samples is None else 16.0},
        "output": {"data_root": str(tmp_path / "out")},
    }
    run_job(from_dict(values))
    said = capsys.readouterr().out
    assert re.search(rf"Proven: [\d,]+ rows of 60 heads in all 6 layers, positions to {reached}\.", said), said
