"""Decoding every captured model type shows what attention receives, or is refused by name."""

import re
from typing import Any

import examine
import pytest
import supported
import torch
import transformers
from support.decoding import Passes, at_once, decoded, differences, left_padded, wrong_calls
from tiny_configs import VOCAB, WINDOW
from transformers import DynamicCache, EncoderDecoderCache

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import Family
from qk_sniffer.errors import CaptureError

TABLE = supported.TABLE.read_text()
CAPTURED = re.findall(r"^\| (\S+) \| \w+ \| yes \|", TABLE, flags=re.MULTILINE)

IDS = torch.randint(5, VOCAB, (2, 3 * WINDOW - 2), generator=torch.Generator().manual_seed(1))
STEPS = [WINDOW + 4, 1, 1, 3, *[1] * 5]
PADDED = left_padded([0, 5], sum(STEPS))
TOLERANCE = 1e-3

WITHOUT_CACHE = {"openai-gpt"}
"""Types that take none of transformers' caches."""

REFUSED: dict[tuple[str, bool], str] = {
    ("minimax_m3_vl_text", True): "its mask hides keys that its facts and the padding do not exclude",
    ("moshi", False): "its cache has dropped keys that its facts say its queries see",
    ("moshi", True): "its cache has dropped keys that its facts say its queries see",
}
"""By type, and whether there is padding. MiniMax M3 selects blocks of padding. Moshi has a window with a cache only."""

_ALWAYS = "bamba jamba recurrent_gemma"
_PADDED = "bart bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text falcon_h1 granitemoehybrid "
_PADDED += "lfm2_moe lfm3 llama4 llama4_text marian mbart nemotron_h pegasus plbart roberta roberta-prelayernorm "
_PADDED += "xlm-roberta xlm-roberta-xl xmod zamba zamba2 zaya"
CHANGE = {(name, False) for name in _ALWAYS.split()} | {(name, True) for name in (_ALWAYS + " " + _PADDED).split()}
"""Types of which decoding has other vectors than one pass, with or without the tap, and whether there is padding.

Recurrent and convolving layers see padding, and do not go on with several tokens; learned positions, and the scale of
Llama 4's queries, count padding.
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        f"transformers {transformers.__version__}" not in TABLE, reason="the table is of another version"
    ),
]


@pytest.mark.parametrize("is_padded", [False, True], ids=["dense", "padded"])
@pytest.mark.parametrize("model_type", CAPTURED)
def test_decoding_of_every_type(model_type: str, is_padded: bool) -> None:
    """Bit for bit what a recording shows; where the model's decoding agrees with one pass, so do the vectors."""
    backbone, facts, _ = examine._loaded(model_type)
    decoder: Any = backbone.decoder

    def passes() -> Passes:
        is_nested = hasattr(backbone.config, "decoder_layers")
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if is_nested else None
        if model_type == "recurrent_gemma":  # it does not return the cache that it makes
            cache = DynamicCache(config=backbone.config)
        return Passes(decoder, IDS, STEPS, cache=cache, held=PADDED if is_padded else None)

    if model_type in WITHOUT_CACHE:
        with pytest.raises((CaptureError, RuntimeError), match=r"after 0 slots of a cache|Expected size"):
            decoded(backbone, passes())
        return
    if (model_type, is_padded) in REFUSED:
        with pytest.raises(CaptureError, match=REFUSED[model_type, is_padded]):
            decoded(backbone, passes())
        return
    if type(backbone.family).register_tap is Family.register_tap:
        decoder.set_attn_implementation("eager")
        assert wrong_calls(backbone, facts, passes) == []
    kinds = "qk" + "vo" * all(isinstance(fact.output_dim, int) for fact in facts)
    found, _ = decoded(backbone, passes(), kinds)
    wrong = differences(found, at_once(backbone, IDS, kinds), TOLERANCE)
    if not any(fact.sparse_attention for fact in facts):  # a selection by almost equal scores depends on rounding
        assert bool(wrong) is ((model_type, is_padded) in CHANGE)
    before = Backbone(decoder, backbone.family, pre_rope=True)
    try:
        expected = at_once(before, IDS, "qk")
    except CaptureError:
        with pytest.raises(CaptureError):
            decoded(before, passes(), "qk")
    else:
        found, _ = decoded(before, passes(), "qk")
        assert wrong or differences(found, expected, TOLERANCE) == []
