"""One model type of transformers, built tiny and random and captured as a job does: is what is captured right?

The vectors, their layout and the forward itself are held against a recording of the untouched model, which knows
nothing of the tap or of families.
"""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from recording import KernelCall, Rotated, recorded
from safetensors.torch import save_file
from tiny_configs import LAYERS, SIZES, VOCAB, WINDOW, save_tiny, tiny_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qk_sniffer.backbone import banded_attention as banded_module
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.capture import proof as proof_module
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import CaptureError, QkSnifferError
from qk_sniffer.store.compact import HeadSpec

TOKENS = 3 * WINDOW

_COUNTS_FROM_ZERO = {"minimax_m3_vl_text"}
"""Types that do not run on positions that begin later."""


@dataclass(frozen=True)
class Entry:
    """What is found of a type. `note`: what sets its layout apart, why it is refused, or what is wrong."""

    model_type: str
    class_name: str
    post: str = "no"
    """yes; no: refused; WRONG: captured, but not what it should be."""
    pre: str = "no"
    """yes; no: refused; no RoPE: there is nothing to be before."""
    proof: str = "no"
    """Can a job prove its dataset by hooks? yes; no; pre: only one of vectors before RoPE."""
    note: str = ""


class WrongError(Exception):
    """What is captured differs from the recording, and was not refused."""


def examine(model_type: str) -> Entry:
    """Builds, saves, loads and captures that type."""
    entry = Entry(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    try:
        backbone, facts, cut = _loaded(model_type)
    except QkSnifferError as error:
        return replace(entry, note=_reason(error))
    try:
        calls, seen = _check_post(backbone, facts)
        _check_cut(cut, seen)
        notes = _notes(backbone, calls, seen, facts)
        pre, reason = _pre_verdict(backbone, calls)
        before = Backbone(backbone.decoder, backbone.family, pre_rope=True, banded_attention=False)
        proof = "yes" if _is_proven(backbone) else "pre" if pre == "yes" and _is_proven(before) else "no"
    except (WrongError, CaptureError) as error:
        return replace(entry, post="WRONG", note=str(error))
    return replace(entry, post="yes", pre=pre, proof=proof, note="; ".join(notes + reason))


def _loaded(model_type: str) -> tuple[Backbone, list[LayerFacts], Backbone]:
    """The whole decoder, its layers, and the decoder as it is loaded where its first layer alone is captured."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_tiny(model_type, Path(folder))
        except ValueError:
            # It cannot be built; loading it says why.
            tiny_config(model_type).save_pretrained(folder)
            save_file({"nothing": torch.zeros(1)}, Path(folder) / "model.safetensors")
        config = ModelConfig(name=folder, dtype="float32", device_map="cpu")
        try:
            backbone = load_backbone(config, banded_attention=False)
        except QkSnifferError as error:
            raise type(error)(str(error).replace(f"model {folder} ", "")) from error
        facts = backbone.probe()
        return backbone, facts, load_backbone(config, banded_attention=False, layers=[facts[0].heads.layer])


def _check_post(backbone: Backbone, facts: list[LayerFacts]) -> tuple[list[KernelCall], list[AttentionCall]]:
    """Every attention call as it is recorded, and as it is captured.

    Raises:
        WrongError: vectors, layers or heads differ, or the capture changes the forward.
    """
    decoder, ids = backbone.decoder, _ids()
    with torch.inference_mode():
        calls, hidden = recorded(decoder, ids)
        seen = _captured(backbone, ids, hidden)
    missed = {type(call.module).__name__ for call in calls if call.module not in backbone.attention_layers}
    if missed:
        raise WrongError(f"attention of {', '.join(sorted(missed))} is not captured")
    layers = [call.layer for call in seen]
    if len(seen) != len(calls) or layers != [fact.heads.layer for fact in facts] or layers[0] < 0:
        raise WrongError(f"{len(calls)} calls of attention, {len(facts)} layers probed, captured {layers}")
    for call, own in zip(calls, seen, strict=True):
        if not (_equal(own.query, call.query) and _equal(own.key, call.key)):
            raise WrongError(f"layer {own.layer}: not the vectors that attention receives")
        heads = own.query.shape[1], own.key.shape[1]
        if heads[0] != SIZES["num_attention_heads"] or heads[0] % heads[1]:
            raise WrongError(f"layer {own.layer}: {heads[0]} query heads and {heads[1]} key heads")
    # Padding is at the end, and there is no mask: tokens there must not be seen from the beginning.
    half = TOKENS // 2
    ids[:, half:] = ids[:, half:].flip(0)
    if _differ(seen, _captured(backbone, ids), slice(0, half)):
        raise WrongError("tokens see later ones")
    with patch.object(banded_module, "MIN_BLOCK", WINDOW):  # so that so few tokens are several blocks
        if _differ(seen, _captured(Backbone(decoder, backbone.family), _ids()), slice(None)):
            raise WrongError("with banded attention the vectors differ")
    return calls, seen


def _check_cut(cut: Backbone, seen: list[AttentionCall]) -> None:
    """
    Raises:
        WrongError: without the layers behind it, the first layer is another one.
    """
    (own, *_), (whole, *_) = _captured(cut, _ids()), seen
    cut.run(_ids())  # as the proof does, to the end of the forward
    if own.layer != whole.layer or not (_equal(own.query, whole.query) and _equal(own.key, whole.key)):
        raise WrongError("without the layers behind it, the first layer has other vectors")


def _pre_verdict(backbone: Backbone, calls: list[KernelCall]) -> tuple[str, list[str]]:
    """`Entry.pre` and, where it is no, the reason.

    Raises:
        WrongError: vectors before RoPE are not what rotary functions are given, or depend on the position.
    """
    before = Backbone(backbone.decoder, backbone.family, pre_rope=True, banded_attention=False)
    rotated = [bool(call.rotated) for call in calls]
    try:
        seen = _captured(before, _ids())
    except CaptureError as error:
        return ("no", [_reason(error)]) if any(rotated) else ("no RoPE", [])
    for call, own in zip(calls, seen, strict=True):
        for after, vectors in ((call.query, own.query), (call.key, own.key)):
            known = any(_is_before(vectors, after, pair) for pair in call.rotated)
            if not (known if call.rotated else _equal(vectors, after)):
                raise WrongError(f"layer {own.layer}: not the vectors that the rotary function is given")
    if not any(rotated):
        return "no RoPE", []
    if before.config.model_type not in _COUNTS_FROM_ZERO:
        _check_unmoved(before)
    return "yes", [] if all(rotated) else ["some layers are not rotated"]


def _check_unmoved(before: Backbone) -> None:
    """RoPE is relative: where a text that begins later gives the same output, its vectors before RoPE are the same.

    Raises:
        WrongError: they are not. So this needs no name of a rotary function.
    """
    seen: tuple[list[AttentionCall], list[AttentionCall]] = [], []
    outputs: list[torch.Tensor] = []
    for start, calls in zip((0, 7), seen, strict=True):
        positions = torch.arange(start, start + TOKENS)[None].expand(2, -1)
        with torch.inference_mode(), before.tapped(_keeping(calls)):
            outputs.append(before.decoder(input_ids=_ids(), position_ids=positions, use_cache=False)[0])
    if not torch.allclose(
        outputs[0], outputs[1], rtol=1e-3, atol=1e-4
    ):  # something else depends on the position, as hunyuan's norms
        del seen[0][1:], seen[1][1:]
    if seen[0][0].layer == 0 and _differ(*seen, slice(None)):
        raise WrongError("vectors before RoPE depend on the position")


def _is_before(before: torch.Tensor, after: torch.Tensor, rotated: Rotated) -> bool:
    """Is `before` what went into that rotary call, beside the part of `after` that is not rotated?"""
    given = rotated[0]
    if given.dim() != 4:
        return False
    for part in (given, given.transpose(1, 2)):
        if part.shape[2] != before.shape[2] or before.shape[1] % part.shape[1]:
            continue
        copies = before.shape[1] // part.shape[1]
        for start in {0, before.shape[-1] - part.shape[-1]}:
            for repeated in (part.repeat(1, copies, 1, 1), part.repeat_interleave(copies, dim=1)):
                expected = after.clone()
                expected[..., start : start + part.shape[-1]] = repeated
                if _equal(before, expected):
                    return True
    return False


def _is_proven(backbone: Backbone) -> bool:
    """Do the hooks of a job's proof derive the same vectors? False where the family has no hooks.

    Raises:
        WrongError: they derive others, so that a right dataset would be refused.
    """
    ids = _ids(proof_module.MIN_TOKENS)[:1]
    vectors: dict[HeadSpec, np.ndarray] = {}
    for call in _captured(backbone, ids):
        for kind, states in (("q", call.query), ("k", call.key)):
            for head in range(states.shape[1]):
                spec = HeadSpec(
                    call.layer, head, kind, key_head=0, head_dim=states.shape[-1], sliding_window=None, row=0
                )
                vectors[spec] = states[0, head].float().numpy()
    positions = np.arange(ids.shape[1])
    derived = proof_module._derived(backbone, ids[0].numpy().astype(np.int32), dict.fromkeys(vectors, positions))
    if derived is None:
        return False
    largest = max(proof_module._difference(vectors[spec], derived[spec]) for spec in vectors)
    if not largest <= proof_module.TOLERANCES["float32"]:
        raise WrongError(f"hooks derive other vectors: relative difference {largest:.2g}")
    return True


def _notes(
    backbone: Backbone, calls: list[KernelCall], seen: list[AttentionCall], facts: list[LayerFacts]
) -> list[str]:
    """What sets the layout apart from that of a plain decoder.

    Raises:
        WrongError: a mask shows other keys than the layer's facts, or the logits have a bias that they do not say.
    """
    notes = []
    if len(facts) < LAYERS:
        notes.append("attention at some layers only")
    if len({call.module for call in calls}) < len(calls):
        notes.append("layers share one attention")
    for name, values in (
        ("query heads", {fact.heads.num_q_heads for fact in facts}),
        ("key heads", {fact.heads.num_k_heads for fact in facts}),
        ("head widths", {fact.heads.head_dim for fact in facts}),
    ):
        if len(values) > 1:
            notes.append(f"{name} differ by layer")
    if "kv_lora_rank" in vars(backbone.config):
        notes.append("latent attention, captured expanded: a key head for each query head")
    elif {fact.heads.num_k_heads for fact in facts} == {1}:
        notes.append("one key head")
    if any(_equal(a.key, b.key) for i, a in enumerate(calls) for b in calls[:i] if a.key.shape == b.key.shape):
        notes.append("some layers use the keys of another")
    notes += sorted({reach for call, own in zip(calls, seen, strict=True) for reach in _reach(call, own)})
    notes += ["softcap"] if any(fact.softcap for fact in facts) else []
    notes += ["sinks"] if any(fact.sinks for fact in facts) else []
    if _is_biased(backbone, facts):
        notes.append("a bias is part of the logits")
    return notes


def _is_biased(backbone: Backbone, facts: list[LayerFacts]) -> bool:
    """Is more in the logits than scale, softcap and sinks make of the products of queries and keys?

    Raises:
        WrongError: a layer's facts say otherwise.
    """
    decoder: Any = backbone.decoder
    kernel = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    with torch.inference_mode():
        calls, _ = recorded(decoder, _ids())
    decoder.set_attn_implementation(kernel)
    for call, fact in zip(calls, facts, strict=True):
        if call.weights is None:
            continue
        explained = _explains(fact, call)
        if not explained and not fact.position_bias:
            raise WrongError(f"layer {fact.heads.layer}: a softmax of other logits than its layout says")
        if explained and fact.position_bias:
            raise WrongError(f"layer {fact.heads.layer}: a bias is said to be in its logits, and there is none")
    return any(fact.position_bias for fact in facts)


def _explains(fact: LayerFacts, call: KernelCall) -> bool:
    """Do the layer's facts lead from query and key to the weights that the kernel returned?"""
    assert call.weights is not None
    heads, n = call.query.shape[1:3]
    weights = call.weights.view(-1, heads, n, call.weights.shape[-1])[..., :n]
    key = call.key.repeat_interleave(heads // call.key.shape[1], dim=1)
    logits = (call.query @ key.transpose(-1, -2)).float() * fact.softmax_scale
    if fact.softcap is not None:
        logits = fact.softcap * torch.tanh(logits / fact.softcap)
    logits = logits.masked_fill(weights == 0, -torch.inf)
    sinks = torch.tensor(fact.sinks or [-torch.inf] * heads)[:, None, None].expand(len(logits), -1, n, 1)
    expected = torch.cat([logits, sinks], -1).softmax(-1)[..., :n]
    # Some kernels scale by the sinks only after the product with the values.
    return any(torch.allclose(weights.float(), w, atol=1e-3) for w in (expected, logits.softmax(-1)))


def _reach(call: KernelCall, own: AttentionCall) -> list[str]:
    """Which earlier tokens queries see, where it is not all of them.

    Raises:
        WrongError: the mask shows others than the call says.
    """
    n = call.query.shape[2]
    row, column = torch.arange(n)[:, None], torch.arange(n)
    causal = column <= row
    if call.mask is not None:
        visible = call.mask[0, 0] if call.mask.dtype == torch.bool else call.mask[0, 0] > -1
    else:
        visible = causal if call.weights is None else call.weights[0].amax(0) > 0
    said, notes, finding = causal, [], "its mask hides keys, of which nothing is said"
    if own.sliding_window is not None:
        said = said & (column > row - own.sliding_window)
        notes.append("sliding windows")
        finding = f"its window is said to be {own.sliding_window}, its mask shows another"
    if own.attention_chunk is not None:
        said = said & (column >= row - row % own.attention_chunk)
        notes.append("chunks")
        finding = f"its chunks are said to be {own.attention_chunk}, its mask shows others"
    if own.sparse_attention:
        notes.append("sparse attention")
        finding = "its attention is said to be sparse, its mask shows a dense one"
        right = not torch.equal(visible, said) and not (visible & ~said).any()
    else:
        right = torch.equal(visible, said)
    if not right:
        raise WrongError(f"layer {own.layer}: {finding}")
    return notes


def _captured(backbone: Backbone, ids: torch.Tensor, hidden: torch.Tensor | None = None) -> list[AttentionCall]:
    """The calls of a forward as jobs run it, or of a plain one, which must end with `hidden`.

    Raises:
        WrongError: it does not.
    """
    seen: list[AttentionCall] = []
    if hidden is None:
        backbone.forward(ids, _keeping(seen))
        return seen
    with backbone.tapped(_keeping(seen)):
        if not torch.equal(backbone.decoder(input_ids=ids, use_cache=False)[0], hidden):
            raise WrongError("capturing changes the forward")
    return seen


def _keeping(calls: list[AttentionCall]) -> Callable[[AttentionCall], None]:
    """A callback that appends each call to `calls`, with vectors of its own."""
    return lambda call: calls.append(replace(call, query=call.query.clone(), key=call.key.clone()))


def _differ(seen: list[AttentionCall], others: list[AttentionCall], tokens: slice) -> bool:
    """By more than rounding, at some of those tokens."""
    return any(
        not torch.allclose(one[:, :, tokens], other[:, :, tokens], rtol=1e-3, atol=1e-4)
        for a, b in zip(seen, others, strict=True)
        for one, other in ((a.query, b.query), (a.key, b.key))
    )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, where one may be widened, or repeat its heads for the queries that they serve."""
    heads = max(a.shape[1], b.shape[1])
    a, b = (states.repeat_interleave(heads // states.shape[1], dim=1).float() for states in (a, b))
    return torch.equal(a, b)


def _ids(length: int = TOKENS) -> torch.Tensor:
    return torch.randint(5, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


def _reason(error: QkSnifferError) -> str:
    """The first clause of the error's message, which is what it is about."""
    return re.split(r"; |: it is |\. |\n|, so that |, as ", re.sub(r"^\S+: this model", "this model", str(error)))[0]
