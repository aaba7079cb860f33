"""Declares the form in which the record of a job and the manifest of a dataset describe the model and its layers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from qk_sniffer.config import MOST_HEAD_DIM
from qk_sniffer.store.form_types import (
    MOST_FILES,
    MOST_LAYERS,
    HeadDim,
    HeadNumber,
    Kind,
    Number,
    NumHeads,
    Positive,
)
from qk_sniffer.store.layout import KEY_HEAD_KINDS, WIDTHS
from qk_sniffer.store.stored import Count, Text


class Rotation(TypedDict):
    """The rotation of a layer's queries and keys, by the name of its frequencies in `Model.rotary`."""

    frequencies: Text
    pairs: Literal["halves", "neighbours", "neighbours to halves"]
    first: Annotated[int, Meta(ge=0, lt=MOST_HEAD_DIM)]
    direction: Literal[1, -1]
    changed_after: bool


class Layer(TypedDict):
    """A layer, as `LayerFacts.to_dict` and the job describe it."""

    layer: Annotated[int, Meta(ge=0, lt=MOST_LAYERS)]
    num_q_heads: NumHeads
    num_k_heads: NumHeads
    head_dim: HeadDim
    value_dim: NotRequired[HeadDim | Text]
    output_dim: NotRequired[HeadDim | Text]
    sliding_window: Annotated[int, Meta(ge=1, lt=2**31)] | None
    key_head: NotRequired[list[HeadNumber]]
    full_attention: NotRequired[bool]
    attention_chunk: NotRequired[Annotated[int, Meta(ge=1, lt=2**31)] | None]
    softmax_scale: Number
    softcap: NotRequired[Number | None]
    sinks: NotRequired[list[float] | None]  # weights, which may be infinite
    position_bias: NotRequired[bool]
    sparse_attention: NotRequired[bool]
    rotation: NotRequired[Rotation | Text | None]
    module: NotRequired[Text | None]
    captured: dict[Kind, list[HeadNumber]]


Frequency = Annotated[list[Number], Meta(max_length=MOST_HEAD_DIM)]


class LongFrequencies(TypedDict):
    """The frequencies of a text beyond a boundary: as listed, or by the base and the factor of dynamic ones."""

    attention_scaling: Positive
    inv_freq: NotRequired[Frequency]
    rope_theta: NotRequired[Positive]
    factor: NotRequired[Positive]


class Frequencies(TypedDict):
    """The frequencies of a rotary embedding."""

    inv_freq: Frequency
    attention_scaling: Positive
    boundary: NotRequired[Count]
    long: NotRequired[LongFrequencies | Text]
    layer_type: NotRequired[Text]


class Rotary(TypedDict):
    """The frequencies by name, and further facts in the words of transformers."""

    frequencies: NotRequired[dict[Text, Frequencies]]


class Quantization(TypedDict):
    """The way in which the weights of a checkpoint are quantized; `config` is its `quantization_config`."""

    method: Text
    dequantized: bool
    config: dict[str, Any]


class Adapter(TypedDict):
    """The adapter on the loaded model: its kind in the words of peft, and the model that it was trained on."""

    kind: Text
    base: Text | None


class Model(TypedDict):
    """The loaded model."""

    model_type: Text
    decoder: NotRequired[Text]
    family: NotRequired[Text]
    dtype: Text
    checkpoint_dtype: NotRequired[Text | None]
    quantization: NotRequired[Quantization | None]
    attn_implementation: Text | None
    window_kernel: NotRequired[Text]
    rope_stage: Literal["pre", "post"]
    num_layers: NotRequired[Annotated[int, Meta(ge=1, le=MOST_LAYERS)] | None]
    layers: Annotated[list[Layer], Meta(min_length=1, max_length=MOST_LAYERS)]
    rotary: Rotary
    adapter: NotRequired[Adapter]
    max_positions: NotRequired[Count | None]


def layer_problems(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields what is impossible together in the layers of a model."""
    captured = sum(len(heads) for layer in layers for heads in layer["captured"].values())
    if not 1 <= captured <= MOST_FILES:
        yield f"its layers list {captured:,} captured heads, not 1 to {MOST_FILES:,}"
    seen = set()
    for layer in layers:
        number, num_q, num_k = layer["layer"], layer["num_q_heads"], layer["num_k_heads"]
        if number in seen:
            yield f"layer {number} is listed twice"
        seen.add(number)
        if num_k > num_q:
            yield f"layer {number} has {num_k:,} key heads for {num_q:,} query heads"
        if (of_queries := layer.get("key_head")) is not None:
            if len(of_queries) != num_q:
                yield f"layer {number} lists the key heads of {len(of_queries):,} query heads, and has {num_q:,}"
            elif max(of_queries) >= num_k:
                yield f"layer {number} lists key head {max(of_queries)} in key_head, which it does not have"
        for kind, heads in layer["captured"].items():
            if heads and not isinstance(layer.get(WIDTHS[kind]), int):
                yield f"layer {number} lists heads of kind {kind}, and not {WIDTHS[kind]}"
            if len(set(heads)) != len(heads):
                yield f"layer {number} lists a head of kind {kind} twice"
            if max(heads, default=0) >= (num_k if kind in KEY_HEAD_KINDS else num_q):
                yield f"layer {number} lists head {max(heads)} of kind {kind}, which it does not have"
