"""The code of a card rotates vectors as the model does, for every type of RoPE, on both sides of a boundary."""

import re
from pathlib import Path
from typing import Any

import examine as examine_module
import numpy as np
import pytest
import supported
import transformers
from support.rope import BOUNDARY, DYNAMIC, LONGROPE
from support.rotated_vectors import manifest_of, run_card, vectors_of
from support.zoo import CASES, Case
from tiny_configs import randomized, tiny_config
from transformers import AutoModel

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import Family, find_family

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 10000.0, "factor": 2.0, "partial_rotary_factor": 0.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": BOUNDARY,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": BOUNDARY}
PARTIAL = LONGROPE | {"partial_rotary_factor": 0.5, "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
MSCALES = LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3}


def case(name: str, config_class: str, rope: dict[str, Any], length: int = 96, **options: Any) -> Case:
    return Case(name, config_class, options | {"rope_parameters": rope, "max_position_embeddings": length}, 8)


BY_KIND = {
    "head_dim": 8,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
ROPES = [
    case("default", "LlamaConfig", DEFAULT),
    case("linear", "LlamaConfig", LINEAR),
    case("dynamic", "LlamaConfig", DYNAMIC, BOUNDARY),
    case("yarn", "LlamaConfig", YARN),
    case("longrope", "LlamaConfig", LONGROPE),
    case("llama3", "LlamaConfig", LLAMA3),
    case("proportional", "LlamaConfig", PROPORTIONAL),
    case("partial", "Phi3Config", PARTIAL),
    case("factor of its own", "PhimoeConfig", MSCALES, num_local_experts=2),
    case(
        "by kind of layer",
        "Gemma3TextConfig",
        {"full_attention": DYNAMIC, "sliding_attention": LONGROPE},
        BOUNDARY,
        **BY_KIND,
    ),
]
OF_ZOO = [one for one in CASES if one.name in ("glm", "deepseek_v3_yarn", "smollm3")]


def decoder_and_family(name: Case | str) -> tuple[Any, Family]:
    if isinstance(name, Case):
        decoder: Any = name.decoder()
    else:
        decoder = randomized(AutoModel.from_config(tiny_config(name))).eval().get_decoder()
    return decoder, find_family(decoder.config.model_type)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "name", [*ROPES, *OF_ZOO, "gptj", "codegen"], ids=lambda one: one if isinstance(one, str) else one.name
)
def test_the_code_rotates_and_turns_back_texts_of_any_length(
    name: Case | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    decoder, family = decoder_and_family(name)
    manifest = manifest_of(Backbone(decoder, family))
    texts = dict(enumerate((BOUNDARY - 5, BOUNDARY, BOUNDARY + 1, 3 * BOUNDARY)))
    before, after = (
        {example: vectors_of(decoder, family, length, pre_rope=pre_rope) for example, length in texts.items()}
        for pre_rope in (True, False)
    )
    layers = {one["layer"]: one["rotation"] for one in manifest["model"]["layers"]}
    rotated = 0
    for layer, kind in [*after[0]][:: 3 if len(after[0]) > 4 else 1]:
        if layers[layer] is None:
            continue
        rotated += 1
        old, new = ({example: one[layer, kind][0] for example, one in some.items()} for some in (before, after))
        for given, expected, pre_rope in ((old, new, True), (new, old, False)):
            made = run_card(tmp_path, manifest, layer, kind, given, pre_rope=pre_rope)
            for example, vectors in made.items():
                np.testing.assert_allclose(vectors, expected[example], rtol=1e-4, atol=1e-4)
    assert rotated


TABLE = supported.TABLE.read_text()
ROTATED = re.findall(r"^\| (\S+) \| \w+ \| yes \| yes ", TABLE, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(f"transformers {transformers.__version__}" not in TABLE, reason="the table is of another version")
@pytest.mark.parametrize("model_type", ROTATED)
def test_the_rotation_of_every_type_is_recorded(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone, _, _ = examine_module._loaded(model_type)
    decoder, family = backbone.decoder, backbone.family
    manifest = manifest_of(backbone)
    layers = {one["layer"]: one["rotation"] for one in manifest["model"]["layers"]}
    rotations = {str(rotation): layer for layer, rotation in layers.items() if isinstance(rotation, dict)}
    assert rotations and not any(isinstance(rotation, str) for rotation in layers.values())
    if family.changed_after_rotary:
        return
    before, after = (vectors_of(decoder, family, 20, pre_rope=pre_rope) for pre_rope in (True, False))
    for layer in rotations.values():
        for kind in "qk":
            old, new = before[layer, kind][0], after[layer, kind][0]
            made = run_card(tmp_path, manifest, layer, kind, {7: old}, pre_rope=True)
            np.testing.assert_allclose(made[7], new, rtol=1e-3, atol=1e-4)
