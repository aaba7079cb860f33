"""Tests the capture of forward passes that the user runs: what is captured, and that nothing of the model changes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from recording import recorded
from support.decoding import at_once
from support.live import BY_NAME, LLAMA, padded, random_ids, states
from support.zoo import CASES, Case
from transformers.modeling_utils import AttentionInterface

import qk_sniffer
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import KeySamplerConfig, SamplerConfig, StatisticsConfig
from qk_sniffer.errors import CaptureError
from qk_sniffer.notebook.model import UserBackbone

pytestmark = pytest.mark.floor


@pytest.mark.few(5)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_vectors_are_those_that_attention_receives_and_the_pass_is_the_same(case: Case) -> None:
    model = case.model()
    ids = random_ids(2, 20)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with qk_sniffer.capture(model, kinds="qkvo") as captured:
            logits = model(input_ids=ids).logits
    assert torch.equal(logits, expected)
    calls, _ = recorded(UserBackbone(model).decoder, ids)
    layers = sorted({head.layer for head in captured.heads})
    assert layers == [*case.layers]
    for layer, call in zip(layers, calls, strict=True):
        for example in range(2):
            assert torch.equal(states(captured, layer, "q", example), call.query[example])
            assert torch.equal(states(captured, layer, "k", example), call.key[example])
            assert call.output is not None
            assert torch.equal(states(captured, layer, "o", example), call.output[example])


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Fails if the block changes the state of the model or of torch, or leaves anything patched."""

    def state() -> list[Any]:
        hooks = [
            tuple(len(getattr(module, name)) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"))
            for module in model.modules()
        ]
        modes = [module.training for module in model.modules()]
        attributes = [sorted(vars(module)) for module in model.modules()]
        return [hooks, modes, attributes, AttentionInterface.get_interface, torch.get_rng_state().tolist()]

    before, weights = state(), {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: (id(buffer), buffer.clone()) for name, buffer in model.named_buffers()}
    yield
    assert state() == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == {n: at for n, (at, _) in buffers.items()}


def test_a_model_in_training_mode_with_hooks_stays_as_it_is() -> None:
    model: Any = LLAMA.model()
    model.train()
    model.model.layers[1].eval()
    seen: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    with unchanged(model):
        captured = qk_sniffer.capture(model)
        assert not seen
        with torch.no_grad(), captured:
            pass
        with pytest.raises(ZeroDivisionError), qk_sniffer.capture(model):
            model(input_ids=random_ids(1, 5))
            raise ZeroDivisionError
    assert seen == [1]


def test_gradients_pass_through_a_captured_pass() -> None:
    model: Any = LLAMA.model()
    ids = random_ids(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    with qk_sniffer.capture(model, statistics=True) as captured:
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.equal(weight.grad, expected[name]) for name, weight in model.named_parameters())
    assert not captured.tensor(0, "q").requires_grad


def test_gradient_checkpointing_runs_layers_again_and_captures_them_once() -> None:
    model: Any = LLAMA.model()
    model.gradient_checkpointing_enable()
    model.train()
    ids = random_ids(2, 9)
    with qk_sniffer.capture(model) as captured:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert len(captured.vectors(0, 0, "q").positions) == 18


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_captured_tensors_can_be_used_for_training(mode: Any) -> None:
    model = LLAMA.model()
    with mode(), qk_sniffer.capture(model, statistics=True, attention=True) as captured:
        model(input_ids=random_ids(1, 9))
        model(input_ids=random_ids(1, 400))
    keys = captured.tensor(1, "k")
    weight = torch.ones(keys.shape[-1], requires_grad=True)
    (keys * weight).sum().backward()
    assert captured.statistics(1, "k").count.tolist() == [409, 409]
    assert len(captured.attention_summary(0, 0).entropy) == 409


@pytest.mark.few(3)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_sliding", "deepseek_v3", "gpt_neox", "gpt_oss"])
def test_padding_is_not_captured_and_positions_count_the_tokens(name: str, side: str) -> None:
    model = BY_NAME[name].model()
    lengths = [17, 6, 20]
    ids, mask = padded(lengths, side)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), qk_sniffer.capture(model, kinds="qkvo", attention=True, statistics=True) as captured:
        model(input_ids=ids, attention_mask=mask, position_ids=position_ids)
    assert captured.examples["num_tokens"].to_pylist() == lengths
    backbone = UserBackbone(model)
    sums: dict[tuple[int, str], list[torch.Tensor]] = {}
    for example, length in enumerate(lengths):
        alone = at_once(backbone, ids[example][mask[example] == 1][None], "qkvo")
        for (layer, kind), (expected,) in alone.items():
            found = states(captured, layer, kind, example)
            assert found.shape == (expected.shape[0], length, expected.shape[2])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            sums.setdefault((layer, kind), []).append(expected)
    for (layer, kind), parts in sums.items():
        mean = torch.cat(parts, dim=1).mean(dim=1)
        np.testing.assert_allclose(captured.statistics(layer, kind).mean, mean, rtol=1e-3, atol=1e-4)
    for layer in sorted({layer for layer, _ in sums}):
        weights = captured.attention(layer, 0, 1).weights
        summary = captured.attention_summary(layer, 0, example_id=1)
        entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(axis=1)
        np.testing.assert_allclose(summary.entropy, entropy, atol=1e-4)


def test_padding_on_the_left_without_positions_is_captured_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The model rotates by places then, and the keys of a text are those of other positions."""
    model = LLAMA.model()
    for side, given, warns in (("left", False, True), ("left", True, False), ("right", False, False)):
        ids, mask = padded([9, 4], side)
        positions = (mask.cumsum(1) - 1).clamp(min=0) if given else None
        caplog.clear()
        with torch.no_grad(), qk_sniffer.capture(model) as captured:
            for _ in range(2):
                model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        said = [record.getMessage() for record in caplog.records if "padded on the left" in record.getMessage()]
        assert len(said) == warns
        assert captured.vectors(0, 0, "k", example_id=1).positions.tolist() == [0, 1, 2, 3]


def test_positions_are_those_that_the_pass_names() -> None:
    model = LLAMA.model()
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        model(input_ids=random_ids(2, 5), position_ids=torch.arange(100, 105)[None])
    assert captured.vectors(0, 0, "q", example_id=1).positions.tolist() == [*range(100, 105)]
    assert captured.examples["first_position"].to_pylist() == [100, 100]
    assert captured.examples["num_tokens"].to_pylist() == [105, 105]


def test_embeddings_are_captured_and_have_no_hash() -> None:
    model: Any = LLAMA.model()
    ids = random_ids(1, 5)
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        model(input_ids=ids)
        model(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(states(captured, 2, "k", 0), states(captured, 2, "k", 1))
    first, second = captured.examples["text_hash"].to_pylist()
    assert len(first) == 32
    assert second == ""


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerConfig("uniform", base_rate=3, min_bucket_size=8, seed=5),
        SamplerConfig("log_uniform", base_rate=2, min_bucket_size=4, share="example"),
        SamplerConfig("uniform", base_rate=4, min_bucket_size=8, keys=KeySamplerConfig("all")),
        SamplerConfig("uniform", base_rate=4, min_bucket_size=8, max_rows_per_example=9),
    ],
)
def test_the_rows_are_those_that_a_job_keeps_of_examples_of_these_numbers(sampler: SamplerConfig) -> None:
    model = LLAMA.model()
    lengths = [40, 23, 31]
    ids, mask = padded(lengths, "left")
    with torch.no_grad(), qk_sniffer.capture(model, sampler=sampler) as captured:
        model(input_ids=ids[:1], use_cache=False)
        model(input_ids=ids[1:], attention_mask=mask[1:], use_cache=False)
    rows = 0
    for layer, head, kind in captured.heads:
        for example, length in enumerate([40, 23, 31]):
            expected = Sampler(sampler).positions(example, layer, kind, length)
            found = captured.vectors(layer, head, kind, example_id=example).positions
            assert found.tolist() == expected.tolist()
            rows += len(found)
    assert 0 < rows < len(captured.heads) * sum(lengths)
    assert f"{rows:,} rows of 3 examples" in repr(captured)


def test_vectors_before_rope_and_statistics_of_both_stages() -> None:
    model = LLAMA.model()
    ids = random_ids(1, 30)
    both = StatisticsConfig(stages=["pre", "post"], skip_tokens=4)
    with torch.no_grad(), qk_sniffer.capture(model, pre_rope=True, statistics=both) as captured:
        model(input_ids=ids)
    backbone = UserBackbone(model, pre_rope=True)
    before = at_once(backbone, ids, "qk")
    after = at_once(UserBackbone(model), ids, "qk")
    for (layer, kind), (expected,) in before.items():
        if kind not in "qk":
            continue
        assert torch.equal(states(captured, layer, kind, 0), expected)
        for stage, all_tokens in (("pre", expected), ("post", after[layer, kind][0])):
            found = captured.statistics(layer, kind, stage)
            assert found.count.tolist() == [26] * len(expected)
            np.testing.assert_allclose(found.mean, all_tokens[:, 4:].mean(1), rtol=1e-4, atol=1e-5)
            cov = torch.stack([head[4:].T.cov() for head in all_tokens])
            np.testing.assert_allclose(found.covariance, cov, rtol=1e-3, atol=1e-4)


def test_statistics_alone() -> None:
    model = LLAMA.model()
    with torch.no_grad(), qk_sniffer.capture(model, sampler="none", statistics=True, kinds="qkvo") as captured:
        model(input_ids=random_ids(1, 300))
        model(input_ids=random_ids(1, 30, seed=1))
        early = captured.statistics(1, "v").count.tolist()
        model(input_ids=random_ids(1, 5, seed=2))
    assert early == [330, 330]
    assert "0 rows of 3 examples, 0.0 MB, statistics (post)>" in repr(captured)
    backbone = UserBackbone(model)
    texts = [random_ids(1, 300), random_ids(1, 30, seed=1), random_ids(1, 5, seed=2)]
    for kind in "qkvo":
        found = captured.statistics(1, kind)
        expected = torch.cat([at_once(backbone, ids, kind)[1, kind][0] for ids in texts], dim=1)
        assert found.count.tolist() == [335] * len(expected)
        np.testing.assert_allclose(found.mean, expected.mean(1), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found.minimum, expected.amin(1))
        cov = torch.stack([head.T.cov() for head in expected])
        np.testing.assert_allclose(found.covariance, cov, rtol=1e-3, atol=1e-4)


def test_a_block_without_a_pass_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = LLAMA.model()
    with qk_sniffer.capture(model):
        thread = threading.Thread(target=lambda: model(input_ids=random_ids(1, 7)))
        thread.start()
        thread.join()
    assert "no forward pass was captured" in caplog.text


def test_other_threads_are_not_seen() -> None:
    model = LLAMA.model()
    expected = model(input_ids=random_ids(1, 7)).logits
    results: list[torch.Tensor] = []

    def work() -> None:
        results.append(model(input_ids=random_ids(1, 7)).logits)

    with qk_sniffer.capture(model) as captured:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        model(input_ids=random_ids(1, 3))
    assert torch.equal(results[0], expected)
    assert captured.examples["num_tokens"].to_pylist() == [3]


def test_captures_of_several_threads_are_refused_by_name() -> None:
    model = LLAMA.model()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with qk_sniffer.capture(model):
                pass
        except CaptureError as error:
            errors.append(error)

    with qk_sniffer.capture(model):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert "open in another thread" in str(errors[0])
    work()
    assert len(errors) == 1


def test_captures_can_be_nested() -> None:
    model, other = LLAMA.model(), BY_NAME["qwen3"].model()
    with torch.no_grad(), qk_sniffer.capture(model) as outer:
        model(input_ids=random_ids(1, 5))
        with qk_sniffer.capture(model, pre_rope=True) as inner, qk_sniffer.capture(other) as of_other:
            model(input_ids=random_ids(1, 6))
            other(input_ids=random_ids(1, 9))
        model(input_ids=random_ids(1, 7))
    assert outer.examples["num_tokens"].to_pylist() == [5, 6, 7]
    assert inner.examples["num_tokens"].to_pylist() == [6]
    assert of_other.examples["num_tokens"].to_pylist() == [9]
    after = at_once(UserBackbone(model), random_ids(1, 6), "qk")[0, "q"][0]
    assert torch.equal(states(outer, 0, "q", 1), after)
    before = at_once(UserBackbone(model, pre_rope=True), random_ids(1, 6), "qk")[0, "q"][0]
    assert torch.equal(states(inner, 0, "q", 0), before)


def test_captures_are_left_in_the_reverse_order() -> None:
    model = LLAMA.model()
    outer, inner = qk_sniffer.capture(model), qk_sniffer.capture(model)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(CaptureError, match="leave that one first"):
        outer.__exit__(None, None, None)
    with torch.no_grad():
        model(input_ids=random_ids(1, 4))
    inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)
    assert outer.examples.equals(inner.examples)
    assert AttentionInterface.get_interface.__qualname__ == "AttentionInterface.get_interface"


def test_a_pass_that_fails_leaves_no_rows_and_no_example() -> None:
    model: Any = LLAMA.model()

    def fail(_: Any, __: Any, output: torch.Tensor) -> None:
        if output.shape[1] in (6, 300):
            raise ZeroDivisionError

    model.model.layers[1].register_forward_hook(fail)
    with torch.no_grad(), qk_sniffer.capture(model, statistics=True, attention=True) as captured:
        model(input_ids=random_ids(1, 5))
        for n in (6, 300):
            with pytest.raises(ZeroDivisionError):
                model(input_ids=random_ids(1, n))
        model(input_ids=random_ids(1, 7))
    assert captured.examples["num_tokens"].to_pylist() == [5, 7]
    for head in captured.heads:
        assert captured.vectors(*head).positions.tolist() == [*range(5), *range(7)]
    assert captured.statistics(0, "q").count.tolist() == [12] * 4
    assert len(captured.attention_summary(0, 0).positions) == 12


def test_a_forward_that_the_user_put_in_place_may_name_no_arguments() -> None:
    model: Any = LLAMA.model()
    original, ids = model.model.forward, random_ids(1, 6)
    model.model.forward = lambda *inputs, **options: original(*inputs, **options)
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        model(input_ids=ids)
        model.model(ids)
    after = at_once(UserBackbone(LLAMA.model()), ids, "qk")[0, "q"][0]
    assert torch.equal(states(captured, 0, "q", 0), after)
    assert torch.equal(states(captured, 0, "q", 1), after)
