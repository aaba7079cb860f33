"""Loads what a job needs in memory: tokenizer, model, and the heads to capture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.devices import on_one_gpu
from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.backbone.limits import planned_num_embeddings
from qk_sniffer.backbone.loading import check_model, load_backbone
from qk_sniffer.backbone.outline import outline
from qk_sniffer.capture.attention_summary import refusal
from qk_sniffer.capture.forward_cost import ForwardCost
from qk_sniffer.capture.moments import Moments, rotary_pairs
from qk_sniffer.capture.selection import Selection, select
from qk_sniffer.config import KIND_SETTINGS, CaptureConfig, StatisticsConfig
from qk_sniffer.corpus.tokens import Tokenizer
from qk_sniffer.errors import CaptureError, ConfigError
from qk_sniffer.jobs.identity import ROLES, unchanged_files
from qk_sniffer.jobs.loaded_code import DIGEST, class_and_code, code_of
from qk_sniffer.jobs.software import versions_of_loaded
from qk_sniffer.jobs.tokenizers import open_tokenizer
from qk_sniffer.logs import logger
from qk_sniffer.resolved import ResolvedConfig
from qk_sniffer.store.layout import KIND_PLURALS, WIDTHS
from qk_sniffer.store.open_folder import Check, unchecked
from qk_sniffer.timing import Stages

log = logger(__name__)


@dataclass(frozen=True)
class Components:
    """The loaded tokenizer and model. `selection` names heads of `layers`."""

    commits: Mapping[str, str | None]
    """The commits that model, tokenizer and adapter were loaded at."""
    tokenizer: Tokenizer
    backbone: Backbone
    layers: list[LayerFacts]
    selection: Selection
    cost: ForwardCost
    """Of the decoder's forward passes on its device."""
    check: Check
    """Raises a SourceError if a file that the loaded model may read again, or be a view of, has changed."""
    code: Mapping[Path, str]
    """The sha256 of each file of the code of model, family and tokenizer that no version of a library pins."""

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the packages and kernels that the loaded model and tokenizer need, by name."""
        return versions_of_loaded([*self.backbone.stored.quantizers, *self.tokenizer.libraries])

    @property
    def loaded(self) -> dict[str, dict[str, Any]]:
        """The classes of the model and of its family, the attention kernel, and the facts of the tokenizer.

        A class has a digest of its code if no version of a library pins it.
        """
        code = class_and_code(self.tokenizer.kind)
        return {
            "model": _loaded(self.backbone),
            "tokenizer": self.tokenizer.facts() | ({"class": code} if DIGEST in code else {}),
        }

    def moments(self, config: StatisticsConfig) -> Moments | None:
        """Returns empty statistics of the selected heads; None if `config` asks for none."""
        if not config.enabled:
            return None
        heads = {(layer, kind): heads for layer, kind, heads in self.selection}
        pairs = {layer.heads.layer: rotary_pairs(layer, self.backbone.frequencies) for layer in self.layers}
        return Moments(config, heads, pairs)


def load_components(config: ResolvedConfig, commits: Mapping[str, str | None], stages: Stages) -> Components:
    """Loads tokenizer and model at their `commits`, probes the layers, and selects the heads.

    Raises:
        SourceError: the tokenizer or the model cannot be found or loaded.
        ConfigError: the model cannot do what the config asks for.
    """
    with stages("load model"):
        return _load(config, commits)


def _load(config: ResolvedConfig, commits: Mapping[str, str | None]) -> Components:
    model = config.located
    wanted: dict[str, Any] = {
        "commit": commits["model"],
        "adapter_commit": commits.get("adapter"),
        "banded_attention": config.inference.banded_attention,
        # All layers must be seen to tell that none of those asked for has full attention.
        "layers": None if config.capture.full_attention_only else config.capture.layers,
    }
    with unchanged_files(model, commits) as files:
        _, tokenizer = open_fitting(config, commits)
        device_map = on_one_gpu(model.device_map, lambda: _needed_bytes(config, wanted))
        placed = replace(model, device_map=device_map)
        backbone = load_backbone(placed, pre_rope=config.capture.capture_pre_rope, **wanted)
        check_lengths(config, backbone, tokenizer)
        layers = backbone.probe(both_stages=shows_both_stages(config.capture))
        selection = select([layer.heads for layer in layers], config.capture)
        check_captured(selection, layers, backbone.config.model_type)
        if config.capture.attention.enabled and (reasons := unknown_attention(selection, layers)):
            raise ConfigError([f"capture.attention.enabled is true, but {refusal(reasons)}"])
        if selection.note:
            log.warning("%s", selection.note)
        own = backbone.stored.dtype
        log.info(
            "%s: %d of %d query heads, %d files; %s%s on %s",
            config.model.slug,
            selection.drawn,
            sum(layer.heads.num_q_heads for layer in layers),
            selection.num_heads,
            str(backbone.dtype).removeprefix("torch."),
            f" (the checkpoint's is {own})" if own and own != str(backbone.dtype).removeprefix("torch.") else "",
            backbone.device,
        )
    devices = {weight.device.type for weight in backbone.decoder.parameters()} & {"cpu", "meta"}
    check = partial(files["model"].check, replaced="meta" in devices) if devices and "model" in files else unchecked
    loaded = {role: commits[role] for role in ROLES if role in commits}
    parameters = sum(weight.numel() for weight in backbone.decoder.parameters())
    cost = ForwardCost.of(parameters, [layer.to_dict() for layer in layers], backbone.device.type)
    kinds = (type(backbone.decoder), type(backbone.family), tokenizer.kind)
    code = {path: digest for kind in kinds for path, digest in code_of(kind).items()}
    return Components(loaded, tokenizer, backbone, layers, selection, cost, check, code)


def _needed_bytes(config: ResolvedConfig, wanted: Mapping[str, Any]) -> int | None:
    """Returns the bytes of the model's weights, not quantized, and of its largest forward pass; None if not known."""
    found = outline(config.located, **wanted)
    if found is None:
        return None
    longest = config.model.tokenizer.max_length
    activations = found.activation_bytes({(max(1, config.inference.max_batch_tokens // longest), longest)})
    return None if activations is None else found.parameters * found.dtype.itemsize + activations


def open_fitting(config: ResolvedConfig, commits: Mapping[str, str | None]) -> tuple[Any, Tokenizer]:
    """Opens the config of the decoder and the tokenizer at their `commits`, before any weights are loaded.

    Raises:
        SourceError: the model or the tokenizer cannot be found or loaded.
        ConfigError: the tokenizer has ids that the model has no embeddings for.
    """
    decoder_config = check_model(config.located, commit=commits["model"], adapter_commit=commits.get("adapter"))
    tokenizer = open_tokenizer(config, commits)
    tokenizer.check_fits(planned_num_embeddings(decoder_config, tokenizer.largest_id), str(config.model.name))
    return decoder_config, tokenizer


def check_lengths(config: ResolvedConfig, backbone: Backbone, tokenizer: Tokenizer) -> None:
    """Checks that a model has embeddings for the ids of its tokenizer, and positions for the longest text.

    Raises:
        ConfigError: it has not.
    """
    tokenizer.check_fits(backbone.num_embeddings, str(config.model.name))
    limit, max_length = backbone.num_positions, config.model.tokenizer.max_length
    if limit is not None and max_length > limit:
        raise ConfigError(
            [f"model.tokenizer.max_length is {max_length}, but this model has positions for {limit}: set it so"]
        )


def model_facts(backbone: Backbone, layers: Sequence[LayerFacts], selection: Selection) -> dict[str, Any]:
    """Returns the facts of a model and its captured heads, in the form of `model` in a manifest."""
    described = []
    for layer in layers:
        chosen = {kind: list(heads) for number, kind, heads in selection if number == layer.heads.layer}
        described.append(layer.to_dict() | {"captured": chosen})
    kernel = backbone.window_kernel
    of_windows = {} if kernel is None else {"window_kernel": kernel.name}
    return (
        _loaded(backbone)
        | of_windows
        | {
            "model_type": backbone.config.model_type,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "checkpoint_dtype": backbone.stored.dtype,
            "quantization": backbone.stored.describe_quantization(backbone.decoder),
            "rope_stage": "pre" if backbone.pre_rope else "post",
            "num_layers": backbone.num_layers,
            "layers": described,
            "rotary": backbone.rotary_parameters(),
            "max_positions": backbone.max_positions,
        }
    )


def shows_both_stages(capture: CaptureConfig) -> bool:
    """Whether rows and statistics together are of queries and keys before RoPE and after it."""
    stages = capture.statistics.stages if capture.statistics.enabled else []
    return len({"pre" if capture.capture_pre_rope else "post", *stages}) == 2


def unknown_attention(selection: Selection, layers: Sequence[LayerFacts]) -> dict[int, str]:
    """Returns why the attention of selected layers cannot be summarized, by layer; empty if it can."""
    selected = {layer for layer, kind, _ in selection if kind == "q"}
    return {
        layer.heads.layer: layer.unknown_attention
        for layer in layers
        if layer.unknown_attention is not None and layer.heads.layer in selected
    }


def check_captured(selection: Selection, layers: Sequence[LayerFacts], model_type: str) -> None:
    """Checks that the selected layers show the vectors of each kind.

    Raises:
        CaptureError: one does not.
    """
    described = {layer.heads.layer: layer.to_dict() for layer in layers}
    for layer, kind, _ in selection:
        width = described[layer][WIDTHS[kind]]
        if not isinstance(width, int):
            raise CaptureError(
                f"the {KIND_PLURALS[kind]} of {model_type}, layer {layer}, cannot be captured: {width}. Set "
                f"{KIND_SETTINGS[kind]}=false"
            )


def _loaded(backbone: Backbone) -> dict[str, Any]:
    return {
        "decoder": class_and_code(type(backbone.decoder)),
        "family": class_and_code(type(backbone.family)),
        "attn_implementation": backbone.config._attn_implementation,
    }
