"""Tests that whole models of every captured type run, generate and are captured in Python."""

import re
from typing import Any

import pytest
import supported
import torch
import transformers
from support.decoding import at_once
from support.live import states
from tiny_configs import VOCAB, randomized, tiny_config, whole_model

import qk_sniffer
from qk_sniffer.errors import CaptureError
from qk_sniffer.notebook.model import UserBackbone

TABLE = supported.TABLE.read_text()
CAPTURED = re.findall(r"^\| (\S+) \| \w+ \| yes \|", TABLE, flags=re.MULTILINE)

IDS = torch.randint(5, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
GENERATION: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

NEED_LIBRARIES = {"gemma3n": "timm"}
NEED_AN_ENCODER = {"bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus", "plbart"}
"""Types whose tiny models do not run without the encoder that their config names."""
WITHOUT_CACHE = {"mpt", "openai-gpt"}
"""Types that run the whole text in each step of generation."""
REFUSED = {
    "gemma4": "whose logits are wanted: then leave it out",
    "gemma4_text": "whose logits are wanted: then leave it out",
    "moshi": "its cache has dropped keys",
}
"""Types of which generation is refused."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        f"transformers {transformers.__version__}" not in TABLE, reason="the table is of another version"
    ),
]


@pytest.mark.parametrize("model_type", sorted({*CAPTURED} - NEED_LIBRARIES.keys() - NEED_AN_ENCODER))
@torch.no_grad()
def test_a_model_of_every_type(model_type: str) -> None:
    torch.manual_seed(0)
    model: Any = randomized(whole_model(tiny_config(model_type))).eval()
    expected = model(input_ids=IDS)
    with qk_sniffer.capture(model) as captured:
        found = model(input_ids=IDS)
    assert torch.equal(found[0], expected[0])
    for (layer, kind), rows in at_once(UserBackbone(model), IDS, "qk").items():
        for example, row in enumerate(rows):
            torch.testing.assert_close(states(captured, layer, kind, example), row, rtol=1e-4, atol=1e-4)
    if model_type == "whisper" or not model.can_generate():
        return
    output = model.generate(input_ids=IDS, **GENERATION)
    if model_type in REFUSED:
        with pytest.raises(CaptureError, match=REFUSED[model_type]), qk_sniffer.capture(model):
            model.generate(input_ids=IDS, **GENERATION)
        return
    with qk_sniffer.capture(model) as captured:
        assert torch.equal(model.generate(input_ids=IDS, **GENERATION), output)
    steps = [20, 20, 21, 21, 22, 22, 23, 23] if model_type in WITHOUT_CACHE else [23, 23]
    assert captured.examples["num_tokens"].to_pylist() == steps


@pytest.mark.parametrize("model_type", sorted(NEED_AN_ENCODER))
def test_these_types_do_not_run_without_an_encoder(model_type: str) -> None:
    with pytest.raises(IndexError):
        whole_model(tiny_config(model_type)).eval()(input_ids=IDS)
