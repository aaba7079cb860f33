"""The tap on unusual models: compiled, with layers that show nothing, rotated in place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    FalconConfig,
    FalconModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
)
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama import modeling_llama

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.banded_attention import banded
from qk_sniffer.backbone.family import Family, find_family
from qk_sniffer.errors import CaptureError

pytestmark = pytest.mark.floor

Seen = dict[int, tuple[torch.Tensor, torch.Tensor]]

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def decoder() -> Any:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return LlamaModel(LlamaConfig(**TINY)).eval()


def ids(length: int = 20) -> torch.Tensor:
    return torch.randint(1, 96, (2, length), generator=torch.Generator().manual_seed(1))


def captured(decoder: nn.Module, *, pre_rope: bool = False, length: int = 20) -> Seen:
    seen: Seen = {}
    backbone = Backbone(decoder, Family(), pre_rope=pre_rope)
    backbone.forward(ids(length), lambda call: seen.update({call.layer: (call.query.clone(), call.key.clone())}))
    return seen


class Counting:
    """A compiler that does not change the code and counts the runs of compiled code."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


def compile_whole(decoder: Any, backend: Any) -> Any:
    return torch.compile(decoder, backend=backend)


def compile_in_place(decoder: Any, backend: Any) -> Any:
    decoder.compile(backend=backend)
    return decoder


def compile_some_layers(decoder: Any, backend: Any) -> Any:
    for layer in decoder.layers[1:]:
        layer.compile(backend=backend)
    return decoder


def compile_attention(decoder: Any, backend: Any) -> Any:
    attention = decoder.layers[1].self_attn
    attention.forward = torch.compile(attention.forward, backend=backend)
    return decoder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "pre_rope"),
    [
        (compile_whole, False),
        (compile_in_place, True),
        (compile_some_layers, False),
        (compile_attention, False),
        (compile_whole, True),
        (compile_in_place, False),
        (compile_some_layers, True),
        (compile_attention, True),
    ],
)
def test_a_compiled_model_shows_the_vectors_of_the_model_that_it_was_compiled_from(
    decoder: Any, how: Callable[..., Any], pre_rope: bool
) -> None:
    expected = {length: captured(decoder, pre_rope=pre_rope, length=length) for length in (20, 30)}
    backend = Counting()
    compiled = how(decoder, backend)
    with torch.inference_mode():
        compiled(input_ids=ids(), use_cache=False)
        compiled(input_ids=ids(), use_cache=False)
    before = backend.runs
    assert before > 0
    for length in (20, 30, 20):
        seen = captured(compiled, pre_rope=pre_rope, length=length)
        assert seen.keys() == {0, 1, 2}
        for layer, vectors in seen.items():
            assert all(map(torch.equal, vectors, expected[length][layer]))
    assert backend.runs == before, "compiled code would show the tap nothing new"
    with torch.inference_mode():
        compiled(input_ids=ids(), use_cache=False)
    assert backend.runs > before, "after the tap is closed the model runs compiled again"


def test_a_compiled_kernel_stays_compiled(decoder: Any) -> None:
    backend = Counting()
    kernel = torch.compile(modeling_llama.eager_attention_forward, backend=backend)
    AttentionInterface.register("compiled_eager", kernel)
    decoder.set_attn_implementation("eager")
    expected = captured(decoder)
    decoder.config._attn_implementation = "compiled_eager"
    seen = captured(decoder)
    assert backend.runs > 0
    assert all(torch.equal(seen[0][kind], expected[0][kind]) for kind in (0, 1))
    del AttentionInterface._global_mapping["compiled_eager"]


def test_a_layer_without_a_kernel_of_the_interface_is_refused_next_to_others_with_one(decoder: Any) -> None:
    class OwnAttention(nn.Module):
        layer_idx = 1

        def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
            return hidden_states, None

    decoder.layers[1].self_attn = OwnAttention()
    with pytest.raises(CaptureError, match=r"attention \(OwnAttention\) calls no kernel of .* interface"):
        captured(decoder)


def test_a_text_longer_than_the_table_of_positions_is_an_error_before_and_in_the_forward() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=24)
    backbone = Backbone(GPT2Model(config).eval(), Family())
    assert backbone.num_positions == 24
    backbone.forward(ids(24), lambda call: None)
    with pytest.raises(
        CaptureError, match=r"gpt2: its forward pass over 2 x 25 tokens failed: .*model\.tokenizer\.max_length"
    ):
        backbone.forward(ids(25), lambda call: None)


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_in_which_no_query_sees_a_key_is_refused_with_the_setting(window: int) -> None:
    config = Gemma3TextConfig(**TINY, head_dim=8, layer_types=["sliding_attention"] * 3, sliding_window=window)
    backbone = Backbone(Gemma3TextModel(config).eval(), Family())
    with pytest.raises(CaptureError, match=rf"a sliding window of {window} tokens.*config_overrides\.sliding_window"):
        backbone.probe()


def test_a_family_that_sees_nothing_with_this_kernel_says_so() -> None:
    config = FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config._attn_implementation = "eager"
    with pytest.raises(CaptureError, match=r"did not show its vectors to its family, .*falcon.*attn_implementation"):
        Backbone(FalconModel(config).eval(), find_family("falcon")).probe()


def test_values_that_are_filled_up_to_the_width_of_keys_are_cut_to_their_own(decoder: Any) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    cut: list[tuple[torch.Tensor, torch.Tensor]] = []

    def into(vectors: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., None]:
        return lambda call, output: vectors.append((call.value.clone(), output.clone()))

    backbone = Backbone(decoder, Family())
    backbone.forward(ids(), lambda call: None, on_output=into(seen))
    for layer in decoder.layers:
        layer.self_attn.v_head_dim = 5
    backbone.forward(ids(), lambda call: None, on_output=into(cut))
    assert len(cut) == len(seen) == 3
    for whole, part in zip(seen, cut, strict=True):
        for one, other in zip(whole, part, strict=True):
            assert one.shape[-1] == 8 and torch.equal(one[..., :5], other)
    assert {(fact.value_dim, fact.output_dim) for fact in backbone.probe()} == {(5, 5)}
    attention = decoder.layers[0].self_attn
    assert Family().value_dim(attention, 16, 8) == 8, "not filled up: keys have another width"


def test_vectors_before_rope_are_refused_where_the_rotary_function_writes_over_them(
    decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_place(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return q.mul_(cos.mean()), k.mul_(sin.mean())

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", in_place)
    with pytest.raises(CaptureError, match="capture_pre_rope=false"):
        captured(decoder, pre_rope=True)


def test_vectors_before_rope_are_refused_where_the_rotary_function_takes_them_last(decoder: Any) -> None:
    query, key, cos = torch.ones(1, 4, 8, 16), torch.ones(1, 2, 8, 16), torch.ones(1, 8, 16)
    calls = [(cos, query), (cos.clone(), key)]
    with pytest.raises(CaptureError, match="capture_pre_rope=false"):
        Family().before_rotary(decoder.layers[0].self_attn, calls, query, key)


class ValueReads(TorchDispatchMode):
    """Counts the reads of a tensor's value by Python, each of which would wait for a GPU."""

    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.reads += function in (torch.ops.aten.is_nonzero.default, torch.ops.aten.item.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kernel", "num_masks"), [("eager", 2), ("sdpa", 0)])
def test_the_tap_asks_each_mask_once_a_forward(kernel: str, num_masks: int) -> None:
    config = Gemma3TextConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 3,
        attn_implementation=kernel,
    )
    backbone = Backbone(Gemma3TextModel(config).eval(), find_family("gemma3_text"))
    for _ in range(2):
        seen: list[int] = []
        with banded(), ValueReads() as plain:
            backbone.run(ids())
        with ValueReads() as tapped:
            backbone.forward(ids(), lambda call, seen=seen: seen.append(call.layer))
        assert seen == list(range(6))
        assert tapped.reads - plain.reads == num_masks
