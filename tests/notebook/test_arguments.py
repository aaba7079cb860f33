"""Tests the arguments of captures: what is selected, and what is refused by name."""

from typing import Any

import numpy as np
import pytest
import torch
from support.live import BY_NAME, LLAMA, random_ids
from support.zoo import VOCAB
from transformers import GPT2Config, GPT2LMHeadModel

import qk_sniffer
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.config import AttentionConfig, SamplerConfig, StatisticsConfig
from qk_sniffer.errors import CaptureError, ConfigError
from qk_sniffer.notebook.model import UserBackbone


def test_only_the_asked_for_layers_heads_and_kinds_are_captured() -> None:
    model = LLAMA.model()
    with torch.no_grad(), qk_sniffer.capture(model, layers=np.array([0, 2]), heads=3, kinds="kv") as captured:
        model(input_ids=random_ids(1, 5))
    assert captured.heads == [(0, 1, "k"), (0, 1, "v"), (2, 1, "k"), (2, 1, "v")]
    assert captured.tensor(2, "v").shape == (5, 1, 8)
    assert captured.table(2, 1, "v").column_names == ["bucket", "example_id", "position", "vector", "sliding_window"]


def test_too_many_rows_are_refused_before_the_pass_runs() -> None:
    model: Any = LLAMA.model()
    ran: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad(), qk_sniffer.capture(model, max_rows=500) as captured:
        model(input_ids=random_ids(1, 10))  # 180 rows
        before = len(ran)
        with pytest.raises(CaptureError, match=r"would add 360 rows, 0.0 MB, 540 in all, and max_rows is 500.*to="):
            model(input_ids=random_ids(1, 20))
        assert len(ran) == before
        model(input_ids=random_ids(1, 10))
    assert captured.examples["num_tokens"].to_pylist() == [10, 10]


def test_a_pass_that_does_not_fit_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LLAMA.model()
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        monkeypatch.setattr("qk_sniffer.notebook.passes.available_memory", lambda: 1_000_000)
        monkeypatch.setattr("qk_sniffer.notebook.passes.SMALL_BYTES", 1000)
        with pytest.raises(CaptureError, match=r"1\.2 MB.*1\.0 MB of memory are available"):
            model(input_ids=random_ids(10, 200))
    assert not captured.examples.num_rows


def test_packed_texts_are_refused() -> None:
    model = LLAMA.model()
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with torch.no_grad(), qk_sniffer.capture(model) as captured, pytest.raises(CaptureError, match="Packed texts"):
        model(input_ids=random_ids(1, 7), position_ids=packed)
    assert not captured.examples.num_rows


@pytest.mark.parametrize("first", [2**32, 2**31 - 5, -3, 0.5])
def test_positions_that_no_token_has_are_refused_before_the_pass(first: float) -> None:
    model, whole = LLAMA.model(), torch.arange(10, 17)[None]
    wrong = torch.arange(7)[None] + first
    rows = torch.cat([whole.to(wrong.dtype), wrong])
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        for ids, positions, name in ((1, wrong, 0), (2, rows, 1), (1, wrong.expand(3, 1, 7), 0)):
            with pytest.raises(CaptureError, match=rf"position_ids of row {name} has -?\d.* from 0 to 2,147,483,646"):
                model(input_ids=random_ids(ids, 7), position_ids=positions)
        mask = torch.tensor([[0] * 6 + [1]])
        model(input_ids=random_ids(1, 7), attention_mask=mask, position_ids=torch.where(mask > 0, 3, wrong.long()))
    assert captured.vectors(0, 0, "q")[1].tolist() == [3], "positions of padding have no meaning"


def test_a_token_is_padding_only_where_the_mask_is_zero() -> None:
    with torch.no_grad(), qk_sniffer.capture(model := LLAMA.model()) as captured:
        for mask in ([[0.0, 0.5, 1.0]], [[0, 2**32, 1]]):
            model(input_ids=random_ids(1, 3), attention_mask=torch.tensor(mask))
    assert captured.vectors(0, 0, "q")[1].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": 5}, r"to is 5; give the path of a folder, or '\.' for the current one"),
        ({"to": ""}, "to is ''; give the path of a folder"),
        ({"pre_rope": "yes"}, "pre_rope is 'yes'; give True or False"),
        ({"layers": [True]}, r"layers is \[True\]; give numbers"),
        ({"heads": np.array([True])}, r"heads is array\(\[ True\]\); give numbers"),
        ({"max_rows": True}, "max_rows is True; give a number of rows, or None"),
        ({"layers": ["a"]}, r"layers is \['a'\]; give numbers"),
        ({"attention": 8}, r"attention is 8; give True, False or a qk_sniffer\.config\.AttentionConfig"),
        ({"sampler": 3}, r"give the name of a sampler or a qk_sniffer\.config\.SamplerConfig"),
        ({"sampler": SamplerConfig("all", segments=["user"])}, "knows no segments"),
        ({"layers": [0, 7]}, r"- layers: the model has no layer 7; the layers with attention are 0-2"),
        ({"heads": [9]}, r"- heads: no eligible layer has query head 9"),
        ({"kinds": "qx"}, r"kind 'x', which does not exist; valid: 'q' \(query\)"),
        ({"kinds": ""}, "names no kind"),
        ({"kinds": None}, "kinds=None names no kind"),
        ({"max_rows": "many"}, "max_rows is 'many'; give a number of rows, or None"),
        ({"sampler": "unifrom"}, "valid: uniform"),
        ({"sampler": SamplerConfig("uniform", base_rate=-1)}, "base_rate is -1"),
        ({"attention": True, "kinds": "k"}, "attention is true, but kinds has no 'q': its rows are the queries'"),
        (
            {"statistics": StatisticsConfig(stages=["pre"]), "kinds": "v"},
            r"kinds has 'v', and statistics\.stages is \[pre\]",
        ),
        ({"family": "nowhere:Family"}, r"- family=nowhere:Family: No module"),
        ({"layers": [], "attention": AttentionConfig(top_k=0)}, r"- layers is \[\].*\n  - attention\.top_k is 0"),
    ],
)
def test_wrong_arguments_name_the_valid_ones(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        qk_sniffer.capture(LLAMA.model(), **arguments)


def test_a_save_needs_a_path() -> None:
    with torch.no_grad(), qk_sniffer.capture(model := LLAMA.model()) as captured:
        model(input_ids=random_ids(1, 5))
    for folder in ("", " ", 5):
        with pytest.raises(ConfigError, match=f"folder is {folder!r}; give the path of a folder"):
            captured.save(folder)  # type: ignore[arg-type]


def test_attention_without_rows_is_refused() -> None:
    with torch.no_grad(), qk_sniffer.capture(model := LLAMA.model(), sampler="none", statistics=True) as captured:
        model(input_ids=random_ids(1, 5))
    for read in (captured.logits, captured.attention):
        with pytest.raises(CaptureError, match=r"no rows of kind query and key are captured.*such as sampler='all'"):
            read(0, 0)


def test_a_pass_that_skips_layers_is_refused() -> None:
    model: Any = LLAMA.model()
    ids = random_ids(1, 5)
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        model.model.layers[2].forward = lambda states, *_, **__: states
        with pytest.raises(
            CaptureError, match="showed no query and no key of layers 2, as if it ended early or skipped"
        ):
            model(input_ids=ids)
        del model.model.layers[2].forward
        model(input_ids=ids)
    assert captured.examples["num_tokens"].to_pylist() == [5]


def test_reading_what_was_not_captured_names_what_was() -> None:
    with torch.no_grad(), qk_sniffer.capture(LLAMA.model(), layers=[1]) as captured:
        pass
    assert len(captured.vectors(1, 0, "q").vectors) == 0
    for read in (
        lambda: captured.vectors(0, 0, "q"),
        lambda: captured.table(1, 4, "q"),
        lambda: captured.tensor(1, "v"),
        lambda: captured.vectors(1, 0, "v"),
    ):
        with pytest.raises(CaptureError, match=r"was not captured; there are l01h00q, "):
            read()
    with pytest.raises(CaptureError, match="attention=True"):
        captured.attention_summary(1, 0)
    with pytest.raises(CaptureError, match="statistics=True"):
        captured.statistics(1, "q")
    with pytest.raises(CaptureError, match="no example 0: 0 examples captured so far"):
        captured.logits(1, 0, 0)
    with pytest.raises(CaptureError, match="entered once"), captured:
        pass


def test_vectors_before_rope_of_a_model_without_it_are_refused_in_words_of_python() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    with pytest.raises(CaptureError, match=r"set pre_rope=False and statistics\.stages=\[post\]"):
        qk_sniffer.capture(model, pre_rope=True)


def test_backbone_of_user_is_described_as_that_of_a_job() -> None:
    model = BY_NAME["gemma3"].model()
    user = UserBackbone(model)
    assert user.described_layers(both_stages=False) == Backbone(user.decoder, user.family).probe()


def replace_attention(model: Any) -> None:
    model.model.layers[0].self_attn = LLAMA.model().model.layers[0].self_attn  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda model: model.to(torch.float16), "dtype"),
        (lambda model: model.set_attn_implementation("eager"), "attention implementation"),
        (lambda model: model.model.rotary_emb.inv_freq.mul_(0.5), "rotary frequencies"),
        (replace_attention, "attention layers"),
    ],
)
def test_a_model_that_changed_before_the_block_is_refused(change: Any, name: str) -> None:
    model = LLAMA.model()
    captured = qk_sniffer.capture(model)
    change(model)
    with pytest.raises(CaptureError, match=rf"{name}.* of \w+ changed .* call qk_sniffer\.capture again"), captured:
        raise AssertionError("the block runs")
    with torch.no_grad(), qk_sniffer.capture(model) as again:
        model(input_ids=random_ids(1, 5))
    assert again.examples.num_rows == 1


def test_a_model_may_be_trained_before_the_block() -> None:
    model = LLAMA.model()
    captured = qk_sniffer.capture(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.train()
    with torch.no_grad(), captured:
        model(input_ids=random_ids(1, 5))
    assert captured.examples.num_rows == 1


def test_errors_in_a_pass_name_the_arguments() -> None:
    model: Any = LLAMA.model()
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        seeing_all = torch.zeros(1, 1, 5, 5, dtype=model.dtype)
        with pytest.raises(CaptureError, match=r"set from_pretrained's attn_implementation=eager"):
            model(input_ids=random_ids(1, 5), attention_mask=seeing_all)
        model(input_ids=random_ids(1, 4))
    assert captured.examples["num_tokens"].to_pylist() == [4]
