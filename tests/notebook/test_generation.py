"""Tests captures of generation: each new token once, as in one forward pass over all tokens (teacher forcing)."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support.decoding import at_once
from support.live import BY_NAME, LLAMA, padded, random_ids, states
from support.zoo import CASES, Case
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList

import qk_sniffer
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import SamplerConfig
from qk_sniffer.corpus.contents import ids_hash
from qk_sniffer.errors import CaptureError
from qk_sniffer.notebook.captured import Captured
from qk_sniffer.notebook.model import UserBackbone


def check(captured: Captured, model: Any, texts: list[torch.Tensor], *, first: int = 0) -> None:
    """Compares the captured examples with passes over their `texts`, each (n,), whose last tokens may lack.

    `first` is the number of the first example.
    """
    backbone = UserBackbone(model, pre_rope=captured._facts.backbone.pre_rope)
    kinds = "".join(sorted({head.kind for head in captured.heads}))
    lengths = captured.examples["num_tokens"].to_pylist()
    for example, ids in enumerate(texts, start=first):
        assert lengths[example] <= len(ids) <= lengths[example] + 1
        for (layer, kind), (expected,) in at_once(backbone, ids[None], kinds).items():
            if kind in kinds:
                found = states(captured, layer, kind, example)
                assert found.shape[1] == lengths[example]
                torch.testing.assert_close(found, expected[:, : found.shape[1]], rtol=1e-4, atol=1e-4)


def check_attention(captured: Captured, example: int) -> None:
    """Compares the summaries of an example with the weights of its captured queries and keys."""
    for layer in sorted({head.layer for head in captured.heads}):
        found = captured.attention(layer, 1, example)
        summary = captured.attention_summary(layer, 1, example_id=example)
        np.testing.assert_array_equal(summary.num_keys, (found.weights > 0).sum(axis=1))
        np.testing.assert_allclose(summary.top_weight[:, 0], found.weights.max(axis=1), rtol=1e-4)
        np.testing.assert_array_equal(summary.top_position[:, 0], found.key_positions[found.weights.argmax(axis=1)])


pytestmark = pytest.mark.floor

GENERATION: dict[str, Any] = {"max_new_tokens": 18, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


QUICK = ("llama", "gemma3", "deepseek_v3", "gpt_neox", "gpt_oss", "ministral3")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case.name in QUICK else pytest.mark.slow, id=case.name) for case in CASES],
)
def test_greedy_generation_from_prompts_with_padding(case: Case) -> None:
    model: Any = case.model()
    # llama4 scales the queries of layers without RoPE by their place in the row, padding included.
    lengths = [14, 14, 14] if case.name == "llama4" else [11, 5, 14]
    ids, mask = padded(lengths, "left")
    expected = model.generate(input_ids=ids, attention_mask=mask, **GENERATION)
    with qk_sniffer.capture(model, kinds="qkvo", attention=True, statistics=True) as captured:
        output = model.generate(input_ids=ids, attention_mask=mask, **GENERATION)
    assert torch.equal(output, expected)
    texts = [row[len(row) - 18 - length :] for row, length in zip(output, lengths, strict=True)]
    assert captured.examples["num_tokens"].to_pylist() == [length + 17 for length in lengths]
    check(captured, model, texts)
    check_attention(captured, 1)
    layer, head, kind = captured.heads[0]
    found = captured.statistics(layer, kind)
    assert found.count.tolist() == [sum(lengths) + 3 * 17] * len(found.heads)
    np.testing.assert_allclose(found.mean[0], captured.vectors(layer, head, kind).vectors.mean(0), rtol=1e-3, atol=1e-4)


def test_sampled_generation_of_several_sequences() -> None:
    model: Any = BY_NAME["gemma3"].model()
    torch.manual_seed(3)
    with qk_sniffer.capture(model, pre_rope=True) as captured:
        settings = GENERATION | {"do_sample": True, "num_return_sequences": 3}
        output = model.generate(input_ids=random_ids(1, 6), **settings)
    assert len({*map(str, output.tolist())}) == 3
    check(captured, model, [*output])


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3", "gpt_neox"])
def test_a_loop_by_hand_with_a_prompt_in_chunks(name: str) -> None:
    model: Any = BY_NAME[name].model()
    ids = random_ids(2, 40)
    cache = None
    with torch.no_grad(), qk_sniffer.capture(model, kinds="qkvo", attention=True) as captured:
        for start, stop in [(0, 9), (9, 25), (25, 26), (26, 27), (27, 40)]:
            cache = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True).past_key_values
    assert captured.examples.num_rows == 2
    check(captured, model, [*ids])
    check_attention(captured, 1)


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("llama", [9, 12]), ("gemma3", [9, 12]), ("ministral", [9, 12]), ("mistral", [13, 16])],  # longer than its window
)
def test_static_caches(name: str, lengths: list[int]) -> None:
    model: Any = BY_NAME[name].model()
    ids, mask = padded(lengths, "left")
    settings = GENERATION | {"cache_implementation": "static", "disable_compile": True}
    with qk_sniffer.capture(model, attention=True) as captured:
        output = model.generate(input_ids=ids, attention_mask=mask, **settings)
    check(captured, model, [output[0, 3:], output[1]])
    check_attention(captured, 0)


def test_a_static_cache_that_is_reset_begins_new_examples() -> None:
    model: Any = LLAMA.model()
    cache = StaticCache(config=model.config, max_cache_len=30)
    texts = [random_ids(1, 12, seed=1), random_ids(1, 10, seed=2)]
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        for ids in texts:
            cache.reset()
            model(input_ids=ids[:, :7], past_key_values=cache, position_ids=torch.arange(7)[None])
            rest = torch.arange(7, ids.shape[1])[None]
            model(input_ids=ids[:, 7:], past_key_values=cache, position_ids=rest)
    check(captured, model, [ids[0] for ids in texts])


def test_a_cache_of_the_caller() -> None:
    model: Any = LLAMA.model()
    ids = random_ids(2, 6)
    with qk_sniffer.capture(model) as captured:
        output = model.generate(input_ids=ids, past_key_values=DynamicCache(config=model.config), **GENERATION)
    check(captured, model, [*output])


def test_rows_that_have_ended_are_not_captured_while_others_go_on() -> None:
    model: Any = LLAMA.model()
    ids = random_ids(3, 6)
    free = model.generate(input_ids=ids, **GENERATION)
    ends = next(int(token) for token in free[0, 8:] if int(token) not in free[0, 6:8].tolist())
    settings = GENERATION | {"eos_token_id": ends, "pad_token_id": ends}
    output = model.generate(input_ids=ids, **settings)
    places = [row[6:].tolist().index(ends) if ends in row[6:] else None for row in output]
    assert places[0] is not None
    with qk_sniffer.capture(model) as captured:
        assert torch.equal(model.generate(input_ids=ids, **settings), output)
    # The last token of a row is not run, as in generation of this row alone.
    lengths = [6 + (17 if place is None else place) for place in places]
    assert min(lengths) < max(lengths)
    assert captured.examples["num_tokens"].to_pylist() == lengths
    check(captured, model, [row[:length] for row, length in zip(output, lengths, strict=True)])


class StopsAndFails(StoppingCriteria):
    """Stops row 0 after its second token, and fails after its fourth."""

    steps = 0

    def __call__(self, *_: Any, **__: Any) -> torch.BoolTensor:
        self.steps += 1
        if self.steps == 4:
            raise KeyboardInterrupt
        return torch.tensor([self.steps >= 2, False])  # type: ignore[return-value]


def generate_and_fail(model: Any, ids: torch.Tensor, cache: DynamicCache) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopping = StoppingCriteriaList([StopsAndFails()])
        model.generate(input_ids=ids, past_key_values=cache, stopping_criteria=stopping, **GENERATION)


def test_rows_that_an_interrupted_generation_had_stopped_are_seen_by_passes_by_hand() -> None:
    model: Any = LLAMA.model()
    ids, cache = random_ids(2, 6), DynamicCache(config=model.config)
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        generate_and_fail(model, ids, cache)
        with pytest.raises(CaptureError, match="row 0 of the batch goes on at position 9"):  # the padding is in between
            model(input_ids=ids[:, :1], past_key_values=cache)
        mask = torch.tensor([[1] * 7 + [0, 0, 1], [1] * 10])
        model(input_ids=ids[:, :1], past_key_values=cache, attention_mask=mask, position_ids=torch.tensor([[7], [9]]))
    assert captured.examples["num_tokens"].to_pylist() == [8, 10]


def test_an_interrupted_generation_stops_no_row_of_the_next_one_with_its_cache() -> None:
    model: Any = LLAMA.model()
    ids, cache = random_ids(2, 6), DynamicCache(config=model.config)
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        generate_and_fail(model, ids, cache)
        before = captured.examples["num_tokens"].to_pylist()
        held = cache.get_seq_length()
        mask = torch.ones(2, held + 2, dtype=torch.long)
        mask[0, before[0] : held] = 0  # the padding of the stopped row
        more = random_ids(2, held + 2, seed=1)
        model.generate(input_ids=more, attention_mask=mask, past_key_values=cache, **GENERATION)
    added = [now - then for now, then in zip(captured.examples["num_tokens"].to_pylist(), before, strict=True)]
    assert added[0] == added[1] == 2 + GENERATION["max_new_tokens"] - 1


@pytest.mark.parametrize("by", ["a loop of one's own", "another model"])
def test_stops_outside_of_generation_with_the_model_leave_out_no_token(by: str) -> None:
    """A loop may go on with a row that a criterion stops, and the other model has rows of its own."""
    model: Any = LLAMA.model()
    ids, cache = random_ids(2, 6), DynamicCache(config=model.config)

    class StopsRow0(StoppingCriteria):
        def __call__(self, *_: Any, **__: Any) -> torch.BoolTensor:
            return torch.tensor([True, False])  # type: ignore[return-value]

    criteria = StoppingCriteriaList([StopsRow0()])
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        step = ids
        for _ in range(4):
            step = model(input_ids=step, past_key_values=cache).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, step], dim=1)
            if by == "another model":
                LLAMA.model().generate(input_ids=ids[:, :-1], stopping_criteria=criteria, **GENERATION)
            else:
                criteria(ids, torch.zeros(2, 1))  # type: ignore[arg-type]
    assert captured.examples["num_tokens"].to_pylist() == [9, 9]
    check(captured, model, [row[:9] for row in ids])


@pytest.mark.parametrize("length", [6, 2])
def test_the_passes_of_guidance_do_not_hide_which_rows_have_stopped(length: int) -> None:
    model: Any = LLAMA.model()

    class StopsEarly(StoppingCriteria):
        steps = 0

        def __call__(self, *_: Any, **__: Any) -> torch.BoolTensor:
            self.steps += 1
            return torch.tensor([self.steps >= 3, False])  # type: ignore[return-value]

    settings: Any = GENERATION | {"guidance_scale": 1.5}
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        stopping = StoppingCriteriaList([StopsEarly()])
        model.generate(input_ids=random_ids(2, length), stopping_criteria=stopping, **settings)
    tokens = captured.examples["num_tokens"].to_pylist()
    assert tokens[:2] == [length + 2, length + GENERATION["max_new_tokens"] - 1]


def test_passes_of_one_cache_are_one_example_and_those_of_another_are_another() -> None:
    model: Any = LLAMA.model()
    first, second = random_ids(1, 20, seed=1), random_ids(1, 14, seed=2)
    caches: list[Any] = [None, None]
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        for start in (0, 5, 10):
            for place, ids in enumerate((first, second)):
                part = ids[:, start : start + 5]
                if part.shape[1]:
                    caches[place] = model(input_ids=part, past_key_values=caches[place]).past_key_values
    assert captured.examples["num_tokens"].to_pylist() == [15, 14]
    check(captured, model, [first[0, :15], second[0]])


def test_a_copied_cache_begins_an_example_where_the_copy_ends() -> None:
    """A prompt that is computed once, for several continuations."""
    model: Any = LLAMA.model()
    ids = random_ids(1, 12)
    with torch.no_grad(), qk_sniffer.capture(model, attention=True) as captured:
        prompt = model(input_ids=ids[:, :8]).past_key_values
        for _ in range(2):
            model(input_ids=ids[:, 8:], past_key_values=copy.deepcopy(prompt))
    assert captured.examples["first_position"].to_pylist() == [0, 8, 8]
    whole = at_once(UserBackbone(model), ids, "q")[0, "q"][0]
    found = captured.vectors(0, 2, "q", example_id=2)
    assert found.positions.tolist() == [8, 9, 10, 11]
    np.testing.assert_allclose(found.vectors, whole[2, 8:], rtol=1e-4, atol=1e-4)
    assert captured.attention_summary(0, 2, example_id=2).num_keys.tolist() == [9, 10, 11, 12]
    with pytest.raises(CaptureError, match="the capture began at its position 8"):
        captured.logits(0, 0, 1)


def test_a_cache_with_padding_that_was_filled_before_the_capture() -> None:
    model: Any = LLAMA.model()
    ids, mask = padded([9, 13], "left")
    with torch.no_grad():
        cache = model(input_ids=ids[:, :10], attention_mask=mask[:, :10]).past_key_values
        with qk_sniffer.capture(model, attention=True) as captured:
            model(input_ids=ids[:, 10:], attention_mask=mask, past_key_values=cache)
    assert captured.vectors(1, 0, "k").positions.tolist() == [6, 7, 8, 10, 11, 12]
    assert captured.attention_summary(1, 0).num_keys.tolist() == [7, 8, 9, 11, 12, 13]


def test_the_mask_may_lack_once_the_cache_knows_the_padding() -> None:
    model: Any = LLAMA.model()
    ids, mask = padded([9, 13], "right")
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        cache = model(input_ids=ids, attention_mask=mask).past_key_values
        with pytest.raises(CaptureError, match=r"row 0 .*goes on at position 13.*has ended before position 9"):
            model(input_ids=random_ids(2, 1), past_key_values=cache)
    assert captured.examples["num_tokens"].to_pylist() == [9, 13]


def test_sampled_positions_while_decoding_are_those_of_the_whole_example() -> None:
    model: Any = LLAMA.model()
    sampler = SamplerConfig("uniform", base_rate=2, min_bucket_size=5, seed=4)
    with qk_sniffer.capture(model, sampler=sampler, attention=True) as captured:
        model.generate(input_ids=random_ids(2, 10), **GENERATION)
    for layer, head, kind in captured.heads:
        for example in range(2):
            expected = Sampler(sampler).positions(example, layer, kind, 27)
            assert captured.vectors(layer, head, kind, example_id=example).positions.tolist() == expected.tolist()
    summary = captured.attention_summary(2, 3)
    assert summary.num_keys.tolist() == (summary.positions + 1).tolist()
    limited = SamplerConfig("uniform", base_rate=2, min_bucket_size=5, max_rows_per_example=3)
    with pytest.raises(CaptureError, match="max_rows_per_example"), qk_sniffer.capture(model, sampler=limited):
        model.generate(input_ids=random_ids(1, 10), **GENERATION)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
    ],
    ids=["beams", "prompt-lookup"],
)
def test_generation_that_moves_keys_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    model: Any = LLAMA.model()
    with pytest.raises(CaptureError, match=message), qk_sniffer.capture(model):
        model.generate(input_ids=random_ids(1, 6).repeat(1, 3), **GENERATION | settings)


def test_assisted_decoding_is_refused_by_name() -> None:
    model: Any = LLAMA.model()
    assistant: Any = BY_NAME["llama"].model()
    with torch.no_grad():
        assistant.model.layers[0].self_attn.o_proj.weight.mul_(-3)
    with pytest.raises(CaptureError, match="assisted decoding"), qk_sniffer.capture(model):
        model.generate(input_ids=random_ids(1, 6), assistant_model=assistant, **GENERATION)


def test_a_cache_that_a_failed_pass_has_filled_is_not_continued() -> None:
    model: Any = LLAMA.model()
    ids = random_ids(1, 9)
    fails = False

    def fail(*_: Any) -> None:
        if fails:
            raise ZeroDivisionError

    model.model.layers[1].register_forward_hook(fail)
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        cache = model(input_ids=ids).past_key_values
        fails = True
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids[:, :1], past_key_values=cache)
        fails = False
        with pytest.raises(CaptureError, match="a failed pass has left in an unknown state"):
            model(input_ids=ids[:, :1], past_key_values=cache)
        model.generate(input_ids=ids, **GENERATION)
    assert captured.examples["num_tokens"].to_pylist() == [9, 26]


def test_generation_of_another_model_stops_no_row_of_passes_by_hand() -> None:
    model: Any = LLAMA.model()
    other: Any = LLAMA.model()
    ids, cache = random_ids(2, 9), DynamicCache(config=model.config)
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        for at in range(9):
            model(input_ids=ids[:, at : at + 1], past_key_values=cache)
            other.generate(input_ids=random_ids(2, 3, seed=at), stopping_criteria=[FirstRowStops()], **GENERATION)
    check(captured, model, [*ids])


class FirstRowStops(StoppingCriteria):
    """Stops row 0 at once, and row 1 after its third step."""

    steps = 0

    def __call__(self, *_: Any, **__: Any) -> torch.BoolTensor:
        self.steps += 1
        return torch.tensor([True, self.steps >= 3])  # type: ignore[return-value]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_hook_that_changes_the_tokens_unseen_is_refused(in_place: bool) -> None:
    model: Any = LLAMA.model()
    ids, others = random_ids(1, 6), random_ids(1, 6, seed=1)

    def change(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if in_place:
            kwargs["input_ids"].copy_(others)
        return args, kwargs if in_place else kwargs | {"input_ids": others}

    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        model.model.register_forward_pre_hook(lambda module, args: None)
        handle = model.model.register_forward_pre_hook(change, with_kwargs=True)
        with pytest.raises(
            CaptureError, match=r"input_ids of LlamaModel changed after .* register it before the block"
        ):
            model(input_ids=ids.clone())
        handle.remove()
        model(input_ids=ids)
    check(captured, model, [ids[0]])
    model.model.register_forward_pre_hook(change, with_kwargs=True)
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        model(input_ids=ids.clone())
    assert captured.examples["text_hash"].to_pylist() == [ids_hash(others[0].numpy().astype(np.int32))]
