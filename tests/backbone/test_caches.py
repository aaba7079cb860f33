"""Keys of a cache that are moved, removed, quantized or unknown are refused by name, and nothing stays patched."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from support.decoding import Passes, at_once, decoded, differences
from support.eager import eager_backbone
from tiny_configs import VOCAB, WINDOW, randomized, tiny_config
from transformers import AutoModelForCausalLM, Cache, DynamicCache, EncoderDecoderCache, QuantizedCache
from transformers.cache_utils import DynamicLayer

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.caches import CacheWatch
from qk_sniffer.backbone.family import Family
from qk_sniffer.backbone.slots import PADDING, Slots
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.errors import CaptureError

IDS = torch.randint(5, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
METHODS = ("update", "reset", "reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices")


@pytest.fixture
def llama() -> Backbone:
    return eager_backbone("llama")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made = randomized(AutoModelForCausalLM.from_config(tiny_config("mistral"))).eval()
    made.generation_config.eos_token_id = None  # texts of a known length
    return made


@contextmanager
def capturing(model: Any, on_call: Callable[[AttentionCall], None] = lambda call: None) -> Iterator[None]:
    """Opens the tap around calls of a model by `generate`, with a mask of padding or without padding."""
    backbone = Backbone(model.get_decoder(), Family())
    running: list[Slots] = []

    def note(_: Any, inputs: Any, arguments: dict[str, Any]) -> None:
        mask, (batch, n) = arguments.get("attention_mask"), arguments["input_ids"].shape
        past = int(arguments["past_key_values"].get_seq_length())
        if mask is None:
            held = np.ones((batch, past + n), bool)
        elif mask.dim() == 2:
            held = mask.numpy() > 0
        else:  # by query and key, of a static cache: a token sees itself
            of_pass = mask[:, 0].diagonal(min(past, mask.shape[-1] - n), 1, 2).numpy()
            held = np.concatenate([running[0].position >= 0, of_pass], axis=1) if past else of_pass
        running[:] = [Slots(np.where(held, held.cumsum(axis=1) - 1, PADDING))]

    hook = backbone.decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with backbone.tapped(on_call, slots=lambda _: running[0]):
            yield
    finally:
        hook.remove()


def of_classes() -> list[Any]:
    return [vars(cls).get(name) for cls in (Cache, EncoderDecoderCache, *Cache.__subclasses__()) for name in METHODS]


PROMPTS = IDS.clone()
PROMPTS[1, :5] = 0
MASK = (PROMPTS > 0).long()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static"},
    ],
)
def test_generation_shows_each_key_once_at_its_position(model: Any, options: dict[str, Any]) -> None:
    """Prompts with padding; the tokens of each row are those of one pass over what was generated."""
    seen: dict[tuple[int, int], list[torch.Tensor]] = {}

    def keep(call: AttentionCall) -> None:
        assert call.slots is not None
        for row, position in enumerate(call.slots.last(call.key.shape[2])):
            seen.setdefault((call.layer, row), []).append(call.key[row][:, torch.from_numpy(position >= 0)].clone())

    arguments: dict[str, Any] = {"max_new_tokens": WINDOW + 3, "pad_token_id": 0, "do_sample": False} | options
    torch.manual_seed(1)
    expected = model.generate(PROMPTS, attention_mask=MASK, **arguments)
    torch.manual_seed(1)
    with capturing(model, keep):
        written = model.generate(PROMPTS, attention_mask=MASK, **arguments)
    assert torch.equal(written, expected)
    backbone = Backbone(model.get_decoder(), Family())
    repeated = len(written) // len(PROMPTS)
    for row, tokens in enumerate(written):
        pads = int((MASK[row // repeated] == 0).sum())
        whole: dict[int, torch.Tensor] = {}
        backbone.forward(tokens[None, pads:-1], lambda call: whole.update({call.layer: call.key[0].clone()}))  # noqa: B023
        for layer, keys in whole.items():
            torch.testing.assert_close(torch.cat(seen[layer, row], dim=1), keys, rtol=1e-4, atol=1e-4)


def test_gemma_4_generates_with_all_tokens_of_its_layers() -> None:
    torch.manual_seed(0)
    gemma: Any = randomized(AutoModelForCausalLM.from_config(tiny_config("gemma4_text"))).eval()
    seen: dict[int, int] = {}

    def count(call: AttentionCall) -> None:
        seen[call.layer] = seen.get(call.layer, 0) + call.query.shape[2]

    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with capturing(gemma, count):
        gemma.generate(PROMPTS[:1], output_hidden_states=True, return_dict_in_generate=True, **options)
    assert set(seen.values()) == {12 + 3}
    with pytest.raises(CaptureError, match="output_hidden_states=True"), capturing(gemma):
        gemma.generate(PROMPTS[:1], **options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_beams": 2}, "it is reordered, as in beam search"),
        ({"num_beams": 2, "do_sample": True}, "it is reordered, as in beam search"),
        ({"prompt_lookup_num_tokens": 3}, "tokens are removed from it, as in assisted decoding"),
    ],
)
def test_other_ways_to_generate_are_refused_by_name(model: Any, options: dict[str, Any], why: str) -> None:
    before = of_classes()
    with pytest.raises(CaptureError, match=why), capturing(model):
        model.generate(PROMPTS[:1], attention_mask=MASK[:1], max_new_tokens=12, pad_token_id=0, **options)
    assert of_classes() == before
    model.generate(PROMPTS[:1], attention_mask=MASK[:1], max_new_tokens=12, pad_token_id=0, **options)


def test_an_assistant_is_refused(model: Any) -> None:
    assistant = AutoModelForCausalLM.from_config(model.config).eval()
    with pytest.raises(CaptureError, match="as in assisted decoding"), capturing(model):
        model.generate(PROMPTS[:1], max_new_tokens=12, pad_token_id=0, assistant_model=assistant)


def drop_a_key(cache: Any) -> None:
    cache.layers[2].keys, cache.layers[2].values = cache.layers[2].keys[:, :, 1:], cache.layers[2].values[:, :, 1:]


def replace_keys(cache: Any) -> None:
    cache.layers[1].keys = cache.layers[1].keys * 2


def change_values(cache: Any) -> None:
    cache.layers[1].values[:, :, 0] += 1


def refill(cache: Any) -> None:
    """Fills it with as many tokens of another text, as a thread could."""
    cache.reset()
    for layer in cache.layers:
        layer.update(torch.randn(2, 2, 4, 16), torch.randn(2, 2, 4, 16))


EDITS: list[tuple[Callable[[Any], Any], str]] = [
    (drop_a_key, "its keys or values were removed between two forward passes"),
    (replace_keys, "its keys or values were moved, replaced or changed between two forward passes"),
    (change_values, "its keys or values were moved, replaced or changed between two forward passes"),
    (refill, "its keys or values were added between two forward passes"),
    (lambda cache: cache.crop(-1), "tokens are removed from it"),
    (lambda cache: cache.batch_repeat_interleave(2), "its rows are repeated"),
    (lambda cache: cache.batch_select_indices(torch.tensor([0])), "some of its rows are selected"),
    (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), "it is reordered"),
]


@pytest.mark.parametrize(("edit", "why"), EDITS)
def test_a_cache_that_is_edited_by_hand_is_refused(llama: Backbone, edit: Callable[[Any], Any], why: str) -> None:
    cache, other = DynamicCache(), DynamicCache()
    running = [Slots(np.arange(4)[None].repeat(2, axis=0))]
    with torch.no_grad():
        llama.decoder(input_ids=IDS[:, :4], past_key_values=other)
    with torch.no_grad(), llama.tapped(lambda call: None, slots=lambda _: running[0]):
        llama.decoder(input_ids=IDS[:, :4], past_key_values=cache)
        edit(other)  # the tap has not seen it
        running[0] = Slots(np.arange(8)[None].repeat(2, axis=0))
        with pytest.raises(CaptureError, match=why):
            edit(cache)
            llama.decoder(input_ids=IDS[:, 4:8], past_key_values=cache)


def test_a_cache_that_starts_again_serves_another_text(llama: Backbone) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        decoded(llama, Passes(llama.decoder, IDS[:, :4], [3, 1], cache=cache))
        cache.reset()
        found, _ = decoded(llama, Passes(llama.decoder, IDS[:, 4:], [3, 1], cache=cache))
    assert differences(found, at_once(llama, IDS[:, 4:8])) == []


def test_a_quantized_cache_is_refused(llama: Backbone) -> None:
    cache = QuantizedCache("fp8", config=llama.config)
    with pytest.raises(CaptureError, match="QuantizedCache cannot be captured: it quantizes keys"):
        decoded(llama, Passes(llama.decoder, IDS, [4], cache=cache))


def test_an_update_by_names_is_noted() -> None:
    states, watch, cache = torch.randn(2, 1, 2, 3, 4), CacheWatch(), DynamicCache()
    cache.update(*states, 0)
    with watch.opened():
        watch.begin()
        key, value = cache.update(key_states=states[0], value_states=states[1], layer_idx=0)
        keys = watch.keys(3, key, value, {})
    assert keys.key is not key and torch.equal(keys.key, states[0]) and torch.equal(keys.value, states[1])
    assert keys.past == 3 and torch.equal(keys.attended, torch.cat([states[0], states[0]], dim=2))


class OwnLayer(DynamicLayer):
    """A layer of another library, which may keep a part of the keys."""


def test_an_unknown_layer_of_a_cache_is_refused(llama: Backbone) -> None:
    cache = Cache(layer_class_to_replicate=OwnLayer)
    with pytest.raises(CaptureError, match="whether OwnLayer holds one key for each token is not known"):
        decoded(llama, Passes(llama.decoder, IDS, [4], cache=cache))


def test_other_threads_are_not_seen(llama: Backbone) -> None:
    """They run the same decoder while the tap is open, and have the results that they have without it."""
    with torch.no_grad():
        expected = Passes(llama.decoder, IDS, [4, 1, 1]).run()
    shown: list[int] = []
    others: list[torch.Tensor] = []

    def run_elsewhere() -> None:
        with torch.no_grad():
            others.extend(Passes(llama.decoder, IDS, [4, 1, 1]).run())

    passes = Passes(llama.decoder, IDS, [4, 1])
    with torch.no_grad(), llama.tapped(lambda call: shown.append(call.layer), slots=lambda _: passes.slots):
        passes.run()
        thread = threading.Thread(target=run_elsewhere)
        thread.start()
        thread.join()
    assert all(map(torch.equal, others, expected))
    assert len(shown) == 2 * len(llama.attention_layers)


def test_layers_that_compute_the_last_tokens_alone_are_refused_with_the_way_out() -> None:
    """Gemma 4 does so in layers that share keys, where logits of the last tokens are wanted, as in `generate`."""
    model: Any = randomized(AutoModelForCausalLM.from_config(tiny_config("gemma4_text"))).eval()
    backbone = Backbone(model.get_decoder(), Family())
    slots = Slots(np.arange(12)[None])
    with torch.no_grad(), backbone.tapped(lambda call: None, slots=lambda _: slots):
        for use_cache in (True, False):
            with pytest.raises(CaptureError, match="computes only the tokens whose logits are wanted"):
                model(IDS[:1, :12], logits_to_keep=1, use_cache=use_cache)
        model(IDS[:1, :12], logits_to_keep=1, output_hidden_states=True)
