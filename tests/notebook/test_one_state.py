"""Tests that the rows of a capture are of one state of the model, and that a dataset states this one."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from support.adapters import lora
from support.live import BY_NAME, LLAMA, random_ids
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import qk_sniffer
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import CaptureError

IDS = random_ids(1, 12)


def with_adapters(**settings: Any) -> Any:
    """A model with two LoRA adapters, "a" and "b", of which "a" is active. `settings` are those of "b"."""
    from peft import get_peft_model

    model: Any = get_peft_model(LLAMA.model(), lora(init_lora_weights=False), adapter_name="a")
    model.add_adapter("b", lora(init_lora_weights=False, **settings))
    model.set_adapter("a")
    return model.eval()


def set_frequencies(model: Any) -> None:
    decoder(model).rotary_emb.inv_freq.mul_(2)


def replace_frequencies(model: Any) -> None:
    rotary = decoder(model).rotary_emb
    rotary.inv_freq = rotary.inv_freq * 2


def step(model: Any, make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD) -> None:
    optimizer = make(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


def set_weight(model: Any) -> None:
    with torch.no_grad():
        decoder(model).layers[1].self_attn.q_proj.weight[0] += 1


def replace_weight(model: Any) -> None:
    projection = decoder(model).layers[1].self_attn.q_proj
    projection.weight = nn.Parameter(projection.weight.detach() * 2)


def replace_data(model: Any) -> None:
    projection = decoder(model).layers[1].self_attn.q_proj
    projection.weight.data = projection.weight.data * 2


def scale(model: Any) -> None:
    decoder(model).layers[0].self_attn.q_proj.scaling["a"] *= 2


def set_epsilon(model: Any) -> None:
    decoder(model).layers[0].input_layernorm.variance_epsilon = 0.5


def set_layer_types(model: Any) -> None:
    model.config.layer_types, model.config.sliding_window = ["sliding_attention"] * len(decoder(model).layers), 4


def set_scaling(model: Any) -> None:
    decoder(model).layers[1].self_attn.scaling = 2.0


def replace_forward(model: Any) -> None:
    norm = decoder(model).layers[0].input_layernorm
    original = norm.forward
    norm.forward = functools.wraps(original)(lambda states: 2 * original(states))


def double(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


@dataclasses.dataclass
class Adder:
    """A hook that `==` cannot compare."""

    added: torch.Tensor

    def __call__(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + self.added


def replace_hook(model: Any) -> None:
    mlp = decoder(model).layers[0].mlp
    mlp._forward_hooks.clear()
    mlp.register_forward_hook(Adder(torch.zeros(IDS.shape[1], 1)))


def with_adder() -> Any:
    model = LLAMA.model()
    decoder(model).layers[0].mlp.register_forward_hook(Adder(torch.ones(IDS.shape[1], 1)))
    return model


def borrow_forward(model: Any) -> None:
    first, second, *_ = decoder(model).layers
    first.mlp.forward = second.mlp.forward


def add_hook_of_accelerate(model: Any) -> None:
    class Doubling(ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return 2 * output

    add_hook_to_module(decoder(model).layers[0].mlp, Doubling())


def decoder(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


ADAPTED: dict[str, tuple[Callable[[Any], object], str]] = {
    "set_adapter": (lambda model: model.set_adapter("b"), "adapter"),
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), "adapter"),
    "merged": (lambda model: (model.set_adapter("b"), model.merge_adapter()), "adapter"),
    "scaled": (scale, "adapter"),
    "deleted": (lambda model: model.delete_adapter("a"), "adapter"),
}
PLAIN: dict[str, tuple[Callable[[Any], object], str]] = {
    "attention": (lambda model: model.set_attn_implementation("eager"), "attention implementation"),
    "frequencies": (set_frequencies, "rotary frequencies"),
    "other frequencies": (replace_frequencies, "rotary frequencies"),
    "dtype": (lambda model: model.bfloat16(), "dtype"),
    "step": (step, "weights"),
    # These raise the version of no weight.
    "fused step": (lambda model: step(model, functools.partial(torch.optim.AdamW, fused=True)), "weights"),
    "fused step of SGD": (lambda model: step(model, functools.partial(torch.optim.SGD, fused=True)), "weights"),
    "weight": (set_weight, "weights"),
    "other weight": (replace_weight, "weights"),
    "other data": (replace_data, "weights"),
    "layer types": (set_layer_types, "types of layers"),
    "scaling": (set_scaling, "numbers that its modules compute with"),
    "epsilon": (set_epsilon, "numbers that its modules compute with"),
    "hook": (lambda model: decoder(model).layers[0].mlp.register_forward_hook(double), "hooks"),
    "module": (lambda model: setattr(decoder(model).layers[0].mlp, "act_fn", nn.ReLU()), "modules"),
    "hook without gradients": (
        lambda model: decoder(model).layers[0].mlp.register_forward_hook(torch.no_grad()(double)),
        "hooks",
    ),
    "hook of accelerate": (add_hook_of_accelerate, "hooks"),
    "hook before": (lambda model: decoder(model).norm.register_forward_pre_hook(lambda *_: None), "hooks"),
    "training": (lambda model: model.train(), "training mode"),
    "forward": (replace_forward, "functions in the place of a module's own"),
    "forward of another module": (borrow_forward, "functions in the place of a module's own"),
    "forward of torch": (
        lambda model: setattr(decoder(model).layers[0].mlp.act_fn, "forward", nn.functional.relu),
        "functions in the place of a module's own",
    ),
    "loaded": (lambda model: model.load_state_dict({**model.state_dict()}), "weights"),
}
CHANGES = [
    *(pytest.param(with_adapters, *case, id=name) for name, case in ADAPTED.items()),
    pytest.param(lambda: with_adapters(r=8), *ADAPTED["set_adapter"], id="set_adapter of another rank"),
    *(pytest.param(LLAMA.model, *case, id=name) for name, case in PLAIN.items()),
    pytest.param(with_adder, replace_hook, "hooks", id="another hook of a dataclass"),
]


@pytest.mark.parametrize(("make", "change", "name"), CHANGES)
def test_a_pass_of_a_changed_model_is_refused_by_name(
    make: Callable[[], Any], change: Callable[[Any], object], name: str
) -> None:
    model = make()
    with torch.no_grad(), qk_sniffer.capture(model, layers=[1]) as captured:
        model(input_ids=IDS)
        before = captured.vectors(1, 0, "q").vectors.copy()
        # A step runs a pass of its own, of the weights of the first one.
        change(model)
        rows = captured.vectors(1, 0, "q").vectors
        with pytest.raises(CaptureError, match=rf"the .*{name}.* changed inside the block.*a capture of its own"):
            model(input_ids=IDS)
    assert (rows[: len(before)] == before).all()
    assert (captured.vectors(1, 0, "q").vectors == rows).all()


def test_a_step_of_another_model_changes_nothing() -> None:
    model, other = LLAMA.model(), LLAMA.model()
    with torch.no_grad(), qk_sniffer.capture(model, layers=[1]) as captured:
        model(input_ids=IDS)
        step(other, functools.partial(torch.optim.AdamW, fused=True))
        model(input_ids=IDS)
    assert len(captured.examples) == 2


@pytest.mark.parametrize(("persistent", "shape"), [(True, (4,)), (False, ())])
def test_a_changed_buffer_is_seen(persistent: bool, shape: tuple[int, ...]) -> None:
    model = LLAMA.model()
    layer = decoder(model).layers[0].mlp
    layer.register_buffer("bias_of_router", torch.ones(shape), persistent=persistent)
    layer.register_buffer("passes", torch.zeros((), dtype=torch.long))
    layer.register_forward_hook(lambda module, *_: module.passes.add_(1))
    with torch.no_grad(), qk_sniffer.capture(model, layers=[1]) as captured:
        for _ in range(2):
            model(input_ids=IDS)
        layer.bias_of_router.mul_(2)
        with pytest.raises(CaptureError, match=r"the buffers, or the numbers .* changed inside the block"):
            model(input_ids=IDS)
    assert len(captured.examples) == 2


def all_experts_but_one(model: Any) -> None:
    for module in decoder(model).modules():
        if "top_k" in vars(module):
            module.top_k = 1


SET: dict[str, tuple[str, Callable[[Any], object]]] = {
    "top_k": ("qwen3_moe", all_experts_but_one),
    "sliding_window": ("qwen3_sliding", lambda model: setattr(decoder(model).layers[1].self_attn, "sliding_window", 3)),
    "act": ("gpt_neox", lambda model: setattr(model.gpt_neox.layers[1].mlp.act, "act", torch.tanh)),
    "_experts_implementation_internal": ("qwen3_moe", lambda model: model.set_experts_implementation("eager")),
    "ways": ("llama", lambda model: decoder(model).layers[0].mlp.ways.append("up")),
}


@pytest.mark.parametrize(("name", "case", "change"), [(name, *each) for name, each in SET.items()], ids=[*SET])
def test_a_changed_setting_of_a_module_is_seen(name: str, case: str, change: Callable[[Any], object]) -> None:
    model: Any = BY_NAME[case].model().eval()
    if case == "llama":
        decoder(model).layers[0].mlp.ways = ["down"]
    with torch.no_grad(), qk_sniffer.capture(model, layers=[1]) as captured:
        model(input_ids=IDS)
        model.generate(input_ids=IDS, max_new_tokens=2, pad_token_id=0)
        count = len(captured.examples)
        change(model)
        with pytest.raises(CaptureError, match=rf"settings .*\({name}\) of .* changed inside the block"):
            model(input_ids=IDS)
    assert len(captured.examples) == count


def test_what_passes_set_themselves_and_what_changes_no_number_may_change(tmp_path: Path) -> None:
    model: Any = LLAMA.model()
    mlp = decoder(model).layers[0].mlp
    mlp.passes = 0
    mlp.register_forward_hook(lambda module, *_: setattr(module, "passes", module.passes + 1))
    with torch.no_grad(), qk_sniffer.capture(model, layers=[1]) as captured:
        model(input_ids=IDS)
        mlp.passes = 0
        model.gradient_checkpointing_enable()
        model.config.pad_token_id, model.config.use_cache = 3, False
        model.save_pretrained(tmp_path)
        mlp.notes = "mine"
        model(input_ids=IDS)
    assert len(captured.examples) == 2


def test_functions_that_hold_for_every_module_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LLAMA.model()
    attention = type(decoder(model).layers[0].self_attn)
    original = attention.forward

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)

    def rotate(q: torch.Tensor, k: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return q, k

    def changes() -> Iterator[Callable[[], object]]:
        yield lambda: monkeypatch.setattr(attention, "forward", wrapped)
        yield lambda: monkeypatch.setattr(attention, "extra_repr", wrapped)
        yield lambda: monkeypatch.setattr(decoder(model).layers[0].mlp, "extra_repr", wrapped)
        yield lambda: monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)
        yield lambda: monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", kernel)
        yield lambda: nn.modules.module.register_module_forward_hook(lambda *_: None)

    for change in changes():
        with torch.no_grad(), qk_sniffer.capture(model, layers=[1]) as captured:
            model(input_ids=IDS)
            undo = change()
            with pytest.raises(CaptureError, match=r"the hooks, or the functions .* changed inside the block"):
                model(input_ids=IDS)
            if hasattr(undo, "remove"):
                undo.remove()
            monkeypatch.undo()
        assert len(captured.examples) == 1


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_the_weights_of_virtual_tokens_are_seen(kind: str) -> None:
    import peft

    settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model: Any = peft.get_peft_model(LLAMA.model(), settings).eval()
    with torch.no_grad(), qk_sniffer.capture(model, layers=[1]) as captured:
        model(input_ids=IDS)
        model.prompt_encoder["default"].embedding.weight.mul_(2)
        with pytest.raises(CaptureError, match=r"the weights of .* changed inside the block"):
            model(input_ids=IDS)
    assert len(captured.examples) == 1


def test_a_pass_in_another_dtype_of_autocast_is_refused() -> None:
    model = LLAMA.model()
    with torch.no_grad(), qk_sniffer.capture(model, layers=[1]) as captured:
        model(input_ids=IDS)
        said = r"the dtype of torch\.autocast of .* changed inside the block"
        with pytest.raises(CaptureError, match=said), torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=IDS)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), qk_sniffer.capture(model) as captured:
        for _ in range(2):
            model(input_ids=IDS)
    assert len(captured.examples) == 2


def test_a_pass_in_another_precision_of_products_is_refused() -> None:
    model, before = LLAMA.model(), torch.get_float32_matmul_precision()
    try:
        with torch.no_grad(), qk_sniffer.capture(model, layers=[1]) as captured:
            model(input_ids=IDS)
            torch.set_float32_matmul_precision("medium")
            with pytest.raises(
                CaptureError, match=r"the precision of torch\.set_float32_matmul_precision of .* changed"
            ):
                model(input_ids=IDS)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(captured.examples) == 1


def test_hooks_that_stay_and_those_of_libraries_change_nothing() -> None:
    model = LLAMA.model()

    class Observer:
        seen = 0

        def see(self, *_: object) -> None:
            self.seen += 1

    observer = Observer()
    with torch.no_grad(), qk_sniffer.capture(model, layers=[1]) as captured:
        for outputs in (False, True):  # transformers collects these in hooks
            handle = decoder(model).layers[0].register_forward_hook(observer.see)
            model(input_ids=IDS, output_hidden_states=outputs)
            handle.remove()
    assert observer.seen == len(captured.examples) == 2


def test_a_hook_may_answer_to_every_name() -> None:
    class Delegate:
        def __getattr__(self, name: str) -> "Delegate":
            return Delegate()

        def __call__(self, *_: object) -> None:
            pass

    model = LLAMA.model()
    decoder(model).layers[0].register_forward_hook(Delegate())
    with torch.no_grad(), qk_sniffer.capture(model, layers=[1]) as captured:
        model(input_ids=IDS)
        model(input_ids=IDS)
    assert len(captured.examples) == 2


def test_a_change_within_a_pass_drops_its_rows() -> None:
    model = with_adapters()
    hook = decoder(model).layers[0].register_forward_hook(lambda *_: model.set_adapter("b"))
    with torch.no_grad(), qk_sniffer.capture(model, layers=[0]) as captured:
        with pytest.raises(CaptureError, match=r"the adapter of .* changed inside the block"):
            model(input_ids=IDS)
        hook.remove()
        model.set_adapter("a")
        model(input_ids=IDS)
    assert captured.examples["example_id"].to_pylist() == [0]
    assert len(captured.vectors(0, 0, "q").positions) == IDS.shape[1]


def test_weights_may_be_packed_by_the_first_pass_and_not_again() -> None:
    model = LLAMA.model()
    weight = model.model.layers[0].mlp.gate_proj.weight
    weight.quant_state = SimpleNamespace()

    def pack(*_: object) -> None:
        # as bitsandbytes does with weights of 4 bits on the CPU
        if not getattr(weight.quant_state, "packing_format_for_cpu", False):
            weight.data, weight.quant_state.packing_format_for_cpu = weight.data.clone(), True

    model.model.layers[0].mlp.register_forward_pre_hook(pack)
    with torch.no_grad(), qk_sniffer.capture(model, layers=[1]) as captured:
        model(input_ids=IDS)
        model(input_ids=IDS)
        weight.quant_state.packing_format_for_cpu = False
        with pytest.raises(CaptureError, match=r"the weights of .* changed inside the block"):
            model(input_ids=IDS)
    assert len(captured.examples) == 2


@pytest.mark.parametrize("names", [["a", "b"], ["a", "__base__"], ["__base__", "__base__"]])
def test_adapters_by_row_are_refused(names: list[str]) -> None:
    model = with_adapters()
    with torch.no_grad(), qk_sniffer.capture(model, layers=[0]) as captured:
        model(input_ids=IDS.expand(2, -1), adapter_names=["a", "a"])
        with pytest.raises(CaptureError, match="the adapter of"):
            model(input_ids=IDS.expand(2, -1), adapter_names=names)
    assert captured.examples.num_rows == 2


@pytest.mark.parametrize("streamed", [True, False])
def test_a_disabled_adapter_is_not_in_the_dataset(tmp_path: Path, streamed: bool) -> None:
    model, out = with_adapters(), tmp_path / "out"
    capture = lambda: qk_sniffer.capture(model, layers=[1], to=out if streamed else None)  # noqa: E731
    with torch.no_grad(), model.disable_adapter(), capture() as captured:
        model(input_ids=IDS)
    if not streamed:
        captured.save(out)
    base: Any = LLAMA.model()
    with torch.no_grad(), qk_sniffer.capture(base, layers=[1]) as plain:
        base(input_ids=IDS)
    dataset = qk_sniffer.open_dataset(out)
    assert (dataset.vectors(1, 0, "q").vectors == plain.vectors(1, 0, "q").vectors).all()
    assert "adapter" not in dataset.manifest["model"]
    assert "adapter" not in (out / "README.md").read_text()
    assert verify(out).problems == 0


def test_the_adapter_that_is_active_is_the_one_that_is_stated(tmp_path: Path) -> None:
    from peft import LoHaConfig, get_peft_model

    model: Any = get_peft_model(LLAMA.model(), lora(), adapter_name="a", mixed=True)
    model.add_adapter("b", LoHaConfig(target_modules=["k_proj"]))
    for active, kind in (("a", "LORA"), ("b", "LOHA"), (["a", "b"], None)):
        model.set_adapter(active)
        with torch.no_grad(), qk_sniffer.capture(model, layers=[1], to=tmp_path / str(kind)):
            model(input_ids=IDS)
        stated = qk_sniffer.open_dataset(tmp_path / str(kind)).manifest["model"]["adapter"]["kind"]
        assert stated == kind or (kind is None and stated in ("LORA and LOHA", "LOHA and LORA"))


def test_what_is_saved_is_what_was_true_in_the_block(tmp_path: Path) -> None:
    model = with_adapters()
    with torch.no_grad(), qk_sniffer.capture(model, layers=[1]) as captured:
        model(input_ids=IDS)
    captured.save(tmp_path / "before")
    model.set_adapter("b")
    model.set_attn_implementation("eager")
    set_frequencies(model)
    captured.save(tmp_path / "after")
    before, after = (qk_sniffer.open_dataset(tmp_path / name).manifest["model"] for name in ("before", "after"))
    assert before == after
    assert after["attn_implementation"] == "sdpa"


def test_what_is_set_back_before_the_next_pass_is_no_change() -> None:
    model = with_adapters()
    with torch.no_grad(), qk_sniffer.capture(model, layers=[1]) as captured:
        model(input_ids=IDS)
        with model.disable_adapter():
            pass  # no pass of the block runs meanwhile
        model.eval().to(torch.float32).requires_grad_(False)
        rotary = decoder(model).rotary_emb
        rotary.inv_freq = rotary.inv_freq.clone()
        model(input_ids=IDS)
    assert captured.examples.num_rows == 2
