"""A checkpoint is loaded without its head, in the given dtype, and completely or not at all."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.tiny import saved
from support.zoo import CASES, Case
from transformers import CONFIG_MAPPING

from qk_sniffer.backbone import checkpoint_weights, damaged_files
from qk_sniffer.backbone import loading as loading_module
from qk_sniffer.backbone.loading import check_model, load_backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import SourceError
from qk_sniffer.hub.checkpoint_files import folder_digest

pytestmark = pytest.mark.floor

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
multimodal_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.vision is not None], ids=lambda case: case.name
)


@pytest.mark.few(15)
@all_cases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_loads_without_its_head_in_the_dtype_asked_for(case: Case, dtype: str, tmp_path: Path) -> None:
    config = replace(saved(case, tmp_path), dtype=dtype)
    backbone = load_backbone(config)
    decoder = backbone.decoder
    # transformers keeps a few weights of some families (routers of experts) in float32, but none of attention.
    attention = [weight.dtype for module in backbone.attention_layers for weight in module.parameters()]
    assert set(attention) == {backbone.dtype} == {getattr(torch, dtype)}
    assert not decoder.training
    assert not any("lm_head" in name for name, _ in decoder.named_modules())
    original = case.decoder().state_dict()
    for name, weight in decoder.state_dict().items():
        assert torch.equal(weight, original[name].to(weight.dtype)), name


def test_a_missing_weight_is_an_error_that_names_it(tmp_path: Path) -> None:
    config = saved(CASES[0], tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"layers\.1\.self_attn\.k_proj\.weight"):
        load_backbone(config)


def test_weights_of_another_shape_are_an_error(tmp_path: Path) -> None:
    config = replace(saved(CASES[0], tmp_path), config_overrides={"num_key_value_heads": 1})
    with pytest.raises(SourceError, match="k_proj"):
        load_backbone(config)


def test_weights_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    config = saved(CASES[0], tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SourceError, match=str(tmp_path)):
        load_backbone(config)


def test_a_pickle_checkpoint_is_refused_unless_asked_for(tmp_path: Path) -> None:
    config = saved(CASES[0], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"model\.allow_pickle=true"):
        load_backbone(config)
    decoder = load_backbone(replace(config, allow_pickle=True)).decoder
    assert torch.equal(decoder.state_dict()["embed_tokens.weight"], weights["model.embed_tokens.weight"])


def test_a_pickle_that_an_index_of_safetensors_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = saved(CASES[0], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "w.txt")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "w.txt")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"names 1 file of other formats than safetensors \(w\.txt\)"):
        load_backbone(config)
    for module in (checkpoint_weights, damaged_files):  # as an index that is only fetched while the model is loaded
        monkeypatch.setattr(module, "shards_of", lambda *_: ["w.txt"])
    with pytest.raises(SourceError, match=r"names a pickle among its weights \(w\.txt\), .*model\.allow_pickle=true"):
        load_backbone(config)
    load_backbone(replace(config, allow_pickle=True))


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "\ud800", "/".join(["a"] * 3000)])
def test_names_of_files_as_no_disk_can_have_are_refused(name: str, tmp_path: Path) -> None:
    config = saved(CASES[0], tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SourceError, match="names a file as no disk can"):
        folder_digest(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "w.safetensors")
    with pytest.raises(SourceError, match="names 1 file as no disk can"):
        load_backbone(config)


def test_code_that_comes_with_a_checkpoint_does_not_run_unless_asked_for(tmp_path: Path) -> None:
    saved(CASES[0], tmp_path)
    config_file = tmp_path / "config.json"
    text = config_file.read_text().replace('"model_type": "llama"', '"model_type": "unheard_of"')
    config_file.write_text(text.replace("{", '{"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"},', 1))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    with pytest.raises(SourceError, match=r"trust_remote_code"):
        load_backbone(ModelConfig(name=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere"])
def test_a_folder_that_is_not_there_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(SourceError, match=name):
        load_backbone(ModelConfig(name=name))


def test_a_folder_without_a_config_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=str(tmp_path)):
        load_backbone(ModelConfig(name=str(tmp_path)))


def test_the_digest_of_a_local_checkpoint_follows_its_contents(tmp_path: Path) -> None:
    saved(CASES[0], tmp_path)
    before = folder_digest(tmp_path)
    (tmp_path / "README.md").write_text("a file that is not loaded")
    assert folder_digest(tmp_path) == before
    file = tmp_path / "model.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    assert folder_digest(tmp_path) != before


def test_the_digest_of_a_local_checkpoint_has_every_file_that_a_tokenizer_may_read(tmp_path: Path) -> None:
    source = Path(transformers.__file__).parent / "models"
    named = {
        name
        for path in source.glob("*/tokenization_*.py")
        for block in re.findall(r"^VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(encoding="utf-8"), re.M | re.S)
        for name in re.findall(r':\s*"([^"]+)"', block)
    }
    assert {"vocab.txt", "bpe.codes", "source.spm", "prophetnet.tokenizer"} <= named
    digests = {folder_digest(tmp_path)}
    for name in sorted(named):
        (tmp_path / name).write_text("a vocabulary")
        digests.add(folder_digest(tmp_path))
    assert len(digests) == len(named) + 1


def test_the_digest_of_a_local_checkpoint_has_the_files_that_its_index_or_config_names(tmp_path: Path) -> None:
    CASES[0].model().save_pretrained(tmp_path, max_shard_size="20KB")
    plain = folder_digest(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    moved = sorted(tmp_path.glob("*.safetensors"))[0].name
    (tmp_path / "deeper").mkdir()
    (tmp_path / moved).rename(tmp_path / "deeper" / moved)
    deeper = {name: f"deeper/{file}" if file == moved else file for name, file in values["weight_map"].items()}
    index.write_text(json.dumps(values | {"weight_map": deeper}))
    config = ModelConfig(name=str(tmp_path), dtype="float32")
    before, weights = folder_digest(tmp_path), load_backbone(config).decoder.state_dict()
    assert before != plain
    change_weights(tmp_path / "deeper", lambda stored: {name: w + 1 for name, w in stored.items()}, moved)
    assert folder_digest(tmp_path) != before
    after = load_backbone(config).decoder.state_dict()
    assert any(not torch.equal(weights[name], after[name]) for name in weights), "the file is loaded"
    path = tmp_path / "config.json"
    named = {"transformers_weights": "deeper/index.safetensors.index.json"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    index.rename(tmp_path / "deeper" / "index.safetensors.index.json")
    assert load_backbone(config).decoder.state_dict().keys() == weights.keys()
    before = folder_digest(tmp_path)
    change_weights(tmp_path / "deeper", lambda stored: {name: w + 1 for name, w in stored.items()}, moved)
    assert folder_digest(tmp_path) != before


def change_weights(folder: Path, change: Any, name: str = "model.safetensors") -> list[str]:
    """Applies `change` to the weights in one file of a checkpoint; returns the new names."""
    file = folder / name
    weights = change(load_file(file))
    save_file(weights, file, metadata={"format": "pt"})
    return list(weights)


@multimodal_cases
def test_a_missing_weight_of_a_multimodal_checkpoint_is_an_error_that_names_it(case: Case, tmp_path: Path) -> None:
    config = saved(case, tmp_path)
    lost = "layers.0.self_attn.k_proj.weight"

    def without(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: weight for name, weight in weights.items() if "vision" in name or not name.endswith(lost)}

    change_weights(tmp_path, without)
    with pytest.raises(SourceError, match=rf"lacks.* 1 weights of the decoder: {re.escape(lost)}\."):
        load_backbone(config)


@multimodal_cases
def test_weights_of_another_shape_in_a_multimodal_checkpoint_are_an_error(case: Case, tmp_path: Path) -> None:
    config = replace(saved(case, tmp_path), config_overrides={"num_key_value_heads": 1})
    with pytest.raises(
        SourceError, match=r"k_proj\.weight \(\[\d+, 32\] in the checkpoint, \[\d+, 32\] by the config\)"
    ):
        load_backbone(config)


def test_weights_of_attention_that_the_config_does_not_ask_for_are_an_error(tmp_path: Path) -> None:
    case = replace(CASES[0], options={"attention_bias": True, "mlp_bias": True})
    config = saved(case, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('_bias": true', '_bias": false'))
    with pytest.raises(
        SourceError,
        match=r"layers\.0\.mlp\.down_proj\.bias, .*config_overrides\.attention_bias=true or .*mlp_bias=true$",
    ):
        load_backbone(config)
    # One override alone leaves the other biases.
    with pytest.raises(
        SourceError, match=r"self_attn\.k_proj\.bias.*set model\.config_overrides\.attention_bias=true$"
    ):
        load_backbone(replace(config, config_overrides={"mlp_bias": True}))
    biases = {"attention_bias": True, "mlp_bias": True}
    weights = load_backbone(replace(config, config_overrides=biases)).decoder.state_dict()
    for name, weight in case.decoder().state_dict().items():
        assert torch.equal(weights[name], weight), name


@multimodal_cases
def test_further_weights_of_attention_in_a_multimodal_checkpoint_are_an_error(case: Case, tmp_path: Path) -> None:
    config = saved(case, tmp_path)

    def further(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scales = {f"{name}_scale": torch.ones(1) for name in weights if name.endswith("self_attn.k_proj.weight")}
        return weights | {name: scale for name, scale in scales.items() if "vision" not in name}

    change_weights(tmp_path, further)
    with pytest.raises(SourceError, match=r"does not ask for \d weights .*k_proj\.weight_scale.*quantization_config"):
        load_backbone(config)


@pytest.mark.parametrize("name", ["llama", "gemma3_multimodal", "deepseek_v3", "gpt_neox"])
def test_masks_tables_and_further_layers_of_a_checkpoint_are_left_out(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    config = saved(case, tmp_path)

    def further(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = next(
            key for key in weights if re.search(r"layers\.0\.(self_attn|attention)\.", key) and "vis" not in key
        )
        attention = re.sub(r"(self_attn|attention)\..*", r"\1", found)
        tower = "vision_tower.encoder.layers.0.self_attn.q_proj.weight_scale"
        inside = ("bias", "masked_bias", "rotary_emb.inv_freq", "rotary_emb.cos_cached")
        added = [tower, "lm_head.bias", attention.replace("layers.0", "layers.3") + ".q_proj.bias"]
        return weights | {key: torch.ones(1) for key in [*added, *(f"{attention}.{part}" for part in inside)]}

    change_weights(tmp_path, further)
    load_backbone(config)


def test_layers_that_are_cut_off_are_not_asked_for(tmp_path: Path) -> None:
    config = saved(replace(CASES[0], options={"attention_bias": True}), tmp_path)
    assert len(load_backbone(replace(config, config_overrides={"num_hidden_layers": 1})).attention_layers) == 1


SEQ2SEQ: dict[str, Any] = {
    "t5": transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "bart": transformers.BartConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    ),
}


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_an_encoder_decoder_is_refused_unless_its_decoder_alone_is_asked_for(name: str, tmp_path: Path) -> None:
    whole = transformers.AutoModelForSeq2SeqLM.from_config(SEQ2SEQ[name])
    whole.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), dtype="float32")
    with pytest.raises(SourceError, match=r"attends to an encoder.*model\.config_overrides\.is_encoder_decoder=false"):
        check_model(config)
    backbone = load_backbone(replace(config, config_overrides={"is_encoder_decoder": False}))
    assert len(backbone.probe()) == 2
    expected = whole.get_decoder().state_dict()
    for key, weight in backbone.decoder.state_dict().items():
        assert torch.equal(weight, expected[key]), key


def test_a_decoder_saved_from_an_encoder_decoder_type_is_captured(tmp_path: Path) -> None:
    transformers.BartForCausalLM(SEQ2SEQ["bart"]).save_pretrained(tmp_path)
    assert len(load_backbone(ModelConfig(name=str(tmp_path), dtype="float32")).probe()) == 2


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_checkpoint_may_offer_the_model_with_its_head_alone(tmp_path: Path) -> None:
    config = replace(saved(CASES[0], tmp_path), trust_remote_code=True)
    file = tmp_path / "config.json"
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "own_llama", "auto_map": classes}))
    (tmp_path / "own.py").write_text(OWN_CODE)
    decoder = load_backbone(config).decoder
    for name, weight in CASES[0].decoder().state_dict().items():
        assert torch.equal(decoder.state_dict()[name], weight), name
    change_weights(tmp_path, lambda weights: {key: weights[key] for key in weights if "1.self_attn.k" not in key})
    with pytest.raises(SourceError, match=r"lacks.* 1 weights of the decoder: model\.layers\.1\.self_attn\.k_proj"):
        load_backbone(config)


def test_a_checkpoint_in_shards_is_whole_or_an_error(tmp_path: Path) -> None:
    model = CASES[0].model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    config = ModelConfig(name=str(tmp_path), dtype="float32")
    weights = load_backbone(config).decoder.state_dict()
    for name, weight in model.get_decoder().state_dict().items():
        assert torch.equal(weights[name], weight), name
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    lost = "model.layers.2.self_attn.q_proj.weight"
    shard = tmp_path / index["weight_map"][lost]
    assert len(set(index["weight_map"].values())) > 2
    save_file({name: weight for name, weight in load_file(shard).items() if name != lost}, shard)
    with pytest.raises(SourceError, match=re.escape(lost.removeprefix("model."))):
        load_backbone(config)
    shard.unlink()
    with pytest.raises(SourceError, match=str(tmp_path)):
        load_backbone(config)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_the_embedding_or_is_left_out_is_not_missed(tied: bool, tmp_path: Path) -> None:
    case = replace(CASES[0], options=CASES[0].options | {"tie_word_embeddings": tied})
    config = saved(case, tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    change_weights(
        tmp_path, lambda weights: {name: weight for name, weight in weights.items() if "lm_head" not in name}
    )
    load_backbone(config)


def test_weights_of_other_names_are_an_error_that_shows_them(tmp_path: Path) -> None:
    config = saved(CASES[0], tmp_path)
    change_weights(tmp_path, lambda weights: {f"tower.{name}": weight for name, weight in weights.items()})
    with pytest.raises(SourceError, match=r"of other names, such as tower\..*Family\.key_mapping"):
        load_backbone(config)


def test_a_type_that_no_class_of_transformers_loads_is_refused_in_two_lines(tmp_path: Path) -> None:
    CONFIG_MAPPING["kosmos_2_text_model"](layers=1).save_pretrained(tmp_path)
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        SourceError, match=r"no class that loads .* type kosmos_2_text_model\..*Family\.auto_class"
    ) as e:
        load_backbone(ModelConfig(name=str(tmp_path)))
    assert len(str(e.value).replace(str(tmp_path), "")) < 240


def test_the_list_of_all_types_is_no_part_of_an_error() -> None:
    with pytest.raises(SourceError) as e, loading_module._loading(ModelConfig(name="me/it"), None, None):
        raise ValueError("Unrecognized model. Should contain one of albert, aria, and all the others")
    assert str(e.value).endswith("ValueError: Unrecognized model")
