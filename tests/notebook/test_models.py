"""Tests captures of adapted, compiled, offloaded, quantized, wrapped and hooked models, and the refusal of others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recording import recorded
from support.adapters import lora
from support.decoding import at_once
from support.live import BY_NAME, LLAMA, random_ids, states
from tiny_configs import VOCAB, randomized, tiny_config
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaForSequenceClassification,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

import qk_sniffer
from qk_sniffer.errors import CaptureError, QkSnifferError
from qk_sniffer.notebook.captured import Captured
from qk_sniffer.notebook.model import UserBackbone


def check(captured: Captured, decoder: nn.Module, ids: torch.Tensor) -> None:
    """Compares the last captured example with a recording of the unmodified decoder, which uses no tap."""
    example = captured.examples.num_rows - 1
    with torch.no_grad():
        calls, _ = recorded(decoder, ids)
    for layer, call in enumerate(calls):
        assert torch.equal(states(captured, layer, "q", example), call.query[0].float())
        assert torch.equal(states(captured, layer, "k", example), call.key[0].float())


def with_adapter(case: Any = LLAMA) -> Any:
    from peft import get_peft_model

    model = get_peft_model(case.model(), lora())
    torch.manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.3)
    return model.eval()


def test_an_adapter_of_peft() -> None:
    model, ids = with_adapter(), random_ids(1, 12)
    expected = model(input_ids=ids).logits
    with qk_sniffer.capture(model) as captured:
        assert torch.equal(model(input_ids=ids).logits, expected)
        output = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    with model.disable_adapter(), qk_sniffer.capture(model) as without:
        model(input_ids=ids)
    assert captured.examples["num_tokens"].to_pylist() == [12, 11 + output.shape[1] - 12]
    adapted, plain = states(captured, 1, "q", 0), states(without, 1, "q", 0)
    assert float((adapted - plain).abs().max()) > 0.1
    calls, _ = recorded(model.get_base_model().model, ids)
    assert torch.equal(adapted, calls[1].query[0])
    with model.disable_adapter():
        calls, _ = recorded(model.get_base_model().model, ids)
    assert torch.equal(plain, calls[1].query[0])


def test_an_adapter_is_saved_by_its_kind(tmp_path: Path) -> None:
    model = with_adapter()
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        model(input_ids=random_ids(1, 12))
    captured.save(tmp_path / "saved")
    assert qk_sniffer.open_dataset(tmp_path / "saved").manifest["model"]["adapter"]["kind"] == "LORA"


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile", "model.compile"])
def test_a_compiled_model_runs_uncompiled_inside_and_compiled_again_afterwards(whole: bool) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    plain: Any = LLAMA.model()
    ids = random_ids(1, 12)
    model: Any = torch.compile(plain, backend=backend) if whole else plain
    if not whole:
        plain.compile(backend=backend)
    with torch.no_grad():
        model(input_ids=ids)
        before = len(compiled)
        assert before
        with qk_sniffer.capture(model) as captured:
            model(input_ids=ids)
            model(input_ids=random_ids(2, 5))
        assert len(compiled) == before
        check_first(captured, plain.model, ids)
        torch.compiler.reset()
        model(input_ids=ids)
    assert len(compiled) > before


def check_first(captured: Captured, decoder: nn.Module, ids: torch.Tensor) -> None:
    calls, _ = recorded(decoder, ids)
    assert torch.equal(states(captured, 2, "k", 0), calls[2].key[0])


def test_an_offloaded_model(tmp_path: Path) -> None:
    LLAMA.model().save_pretrained(tmp_path / "checkpoint")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    ids = random_ids(1, 12)
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        model(input_ids=ids)
    check(captured, LLAMA.model().model, ids)
    assert {str(weight.device) for weight in model.model.layers[0].parameters()} == {"meta"}


def test_hooks_of_the_user_that_change_the_pass() -> None:
    model: Any = LLAMA.model()
    ids = random_ids(1, 12)
    model.model.layers[0].register_forward_hook(lambda _, __, output: output * 1.5)
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"input_ids": kwargs["input_ids"][:, :8]}), with_kwargs=True
    )
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with qk_sniffer.capture(model) as captured:
            assert torch.equal(model(input_ids=ids).logits, expected)
    assert captured.examples["num_tokens"].to_pylist() == [8]
    check(captured, model.model, ids)


def with_compiled_decoder() -> Any:
    model: Any = LLAMA.model()
    model.model = torch.compile(model.model, backend="eager")
    return model


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "phi3"])
def test_what_a_model_keeps_between_passes_stays_as_it_is(model_type: str) -> None:
    """The state of recurrent layers, and frequencies that depend on the length of the last pass."""
    config: Any = tiny_config(model_type)
    if model_type == "phi3":
        factors = [1.0] * (config.hidden_size // config.num_attention_heads // 2)
        config.max_position_embeddings, config.original_max_position_embeddings = 64, 16
        config.rope_parameters = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": factors,
            "long_factor": [2.0 * factor for factor in factors],
            "original_max_position_embeddings": 16,
        }
    model: Any = AutoModelForCausalLM.from_config(config).eval()

    def kept() -> dict[str, Any]:
        tensors = {
            f"{name}.{key}": (value, value.clone())
            for name, module in model.named_modules()
            for key, value in (*vars(module).items(), *module._buffers.items())
            if isinstance(value, torch.Tensor)
        }
        return tensors

    with torch.no_grad():
        model(input_ids=torch.randint(3, config.vocab_size, (1, 20)))
        before = kept()
        assert before
        qk_sniffer.capture(model)
    after = kept()
    assert after.keys() == before.keys()
    for name, (tensor, values) in before.items():
        assert after[name][0] is tensor
        assert torch.equal(tensor, values)


class Wrapper(nn.Module):
    """A module of the user's own around a model."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = LLAMA.model()
        self.head = nn.Linear(96, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.backbone(input_ids=ids).logits)
        return found


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaModel(LLAMA.config()),
        lambda: LlamaForSequenceClassification(LLAMA.config()),
        Wrapper,
        lambda: nn.DataParallel(LLAMA.model()),
        with_compiled_decoder,
    ],
    ids=["decoder", "classifier", "wrapper", "DataParallel", "compiled"],
)
def test_models_with_a_decoder_inside(make: Any) -> None:
    torch.manual_seed(0)
    model: Any = make().eval()
    ids = random_ids(1, 12)
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        model(ids)
    decoder = next(module for module in model.modules() if isinstance(module, LlamaModel))
    check(captured, decoder, ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits(dtype: torch.dtype) -> None:
    model: Any = LLAMA.model(dtype=dtype)
    ids = random_ids(1, 12)
    with torch.no_grad(), qk_sniffer.capture(model, attention=True) as captured:
        model(input_ids=ids)
    assert captured.tensor(0, "q").dtype == dtype
    assert captured.vectors(0, 0, "q").vectors.dtype == np.float32
    check(captured, model.model, ids)


def test_autocast_is_that_of_the_pass_and_changes_no_summary() -> None:
    model: Any = LLAMA.model()
    ids = random_ids(1, 12)
    in_16_bits = torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad(), in_16_bits, qk_sniffer.capture(model, kinds="qkv", attention=True) as captured:
        model(input_ids=ids)
        with pytest.raises(CaptureError, match=r"dtype of torch\.autocast"), torch.autocast("cpu", enabled=False):
            model(input_ids=ids)
    assert captured.tensor(0, "v").dtype == torch.bfloat16
    weights = captured.attention(0, 0).weights
    np.testing.assert_allclose(captured.attention_summary(0, 0).top_weight[:, 0], weights.max(axis=1), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bitsandbytes_4bit", "bitsandbytes_8bit", "torchao"])
def test_a_quantized_model(method: str, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 2}
    config = LLAMA.config()
    for name, value in sizes.items():
        setattr(config, name, value)
    config.num_key_value_heads = 1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    if method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        quantization: Any = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        quantization = BitsAndBytesConfig(load_in_4bit="4" in method, load_in_8bit="8" in method)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map="cpu")
    ids = random_ids(1, 12)
    with torch.no_grad():
        with qk_sniffer.capture(model, kinds="qkvo", attention=True, statistics=True) as captured:
            first = model(input_ids=ids).logits
            output = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert torch.equal(model(input_ids=ids).logits, first)
    assert captured.examples["num_tokens"].to_pylist() == [12, output.shape[1] - 1]
    calls, _ = recorded(model.model, ids)
    assert torch.equal(states(captured, 2, "k", 0), calls[2].key[0].float())
    quantized = captured._facts.model["quantization"]
    assert quantized["method"] == method
    assert not quantized["dequantized"]


def tiny_t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def tiny_bert() -> nn.Module:
    return BertModel(
        BertConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_t5, "T5ForConditionalGeneration has a decoder that attends to an encoder"),
        (tiny_bert, "not causal"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1)), "no softmax"),
        (lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=96, d_model=16, n_layer=1, n_head=2, d_inner=16)), "XLNet"),
        (lambda: LLAMA.model().double(), "weights in float64: vectors in bfloat16, float16 or float32"),
        (lambda: nn.Linear(2, 2), "Linear has no model of transformers inside"),
        (lambda: nn.ModuleList([LLAMA.model(), BY_NAME["qwen3"].model()]), "several models inside"),
        (lambda: "meta-llama/Llama-3.2-1B", "str is not a model"),
    ],
    ids=["T5", "BERT", "Mamba", "XLNet", "float64", "Linear", "two", "name"],
)
def test_models_that_cannot_be_captured_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(QkSnifferError, match=message):
        qk_sniffer.capture(make())


def test_a_kind_that_a_model_does_not_show_is_refused_by_name() -> None:
    model = BY_NAME["llama"].model()
    with pytest.raises(QkSnifferError, match=r"family=|model\.family="):
        qk_sniffer.capture(model, family="qk_sniffer.errors:CaptureError")


def test_a_model_that_computes_layers_for_the_last_token_alone_names_the_way_out() -> None:
    """Gemma 4 shares keys: generate computes the layers that receive them for the last token of a prompt."""
    config = tiny_config("gemma4_text")
    torch.manual_seed(0)
    model: Any = randomized(AutoModelForCausalLM.from_config(config)).eval()
    ids = torch.randint(5, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    with (
        pytest.raises(CaptureError, match="whose logits are wanted: then leave it out"),
        qk_sniffer.capture(model),
    ):
        model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    own = range(config.num_hidden_layers - config.num_kv_shared_layers)
    with qk_sniffer.capture(model, layers=own) as captured:
        output = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    whole = at_once(UserBackbone(model), output, "qk")
    for layer in own:
        for kind in "qk":
            found = states(captured, layer, kind, 1)
            torch.testing.assert_close(found, whole[layer, kind][1][:, : found.shape[1]], rtol=1e-3, atol=1e-4)
