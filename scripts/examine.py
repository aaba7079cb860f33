"""Captures one model type of transformers, tiny and random, as a job does, and checks the result.

Compares the vectors, their layout and the forward pass itself with a recording of the unmodified model. The recording
uses neither the tap nor families.
"""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from examine_proof import WrongError, proven_kinds
from recording import KernelCall, Rotated, recorded
from safetensors.torch import save_file
from summaries import wrong_summaries
from tiny_configs import LAYERS, SIZES, VOCAB, WINDOW, save_tiny, tiny_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qk_sniffer.backbone import banded_attention as banded_module
from qk_sniffer.backbone.attention_check import AttentionCheck
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import CaptureError, QkSnifferError

TOKENS = 3 * WINDOW

MORE_THAN_HEADS = 257
"""More tokens than any model has heads, so that the shapes of states are unambiguous."""

_COUNTS_FROM_ZERO = {"minimax_m3_vl_text"}
"""Types that do not run on positions that start above 0."""


@dataclass(frozen=True)
class Entry:
    """The result for one model type."""

    model_type: str
    class_name: str
    post: str = "no"
    """yes; no: refused; WRONG: captured with wrong vectors or facts."""
    pre: str = "no"
    """yes; no: refused; no RoPE: no layer is rotated."""
    proof: str = "no"
    """Whether a job proves its dataset by hooks: yes; no; pre: only a dataset of vectors before RoPE."""
    attention: str = "no"
    """Whether a job summarizes the attention of its queries: yes; no: refused."""
    values: str = "no"
    """proven: values and outputs are captured, and a job proves them; values proven; captured; no: refused."""
    note: str = ""
    """The differences from the layout of a plain decoder, the reason of a refusal, or the error."""
    decoder_type: str = ""
    """The model type of the text decoder; empty for a type that is not captured."""
    whole: bool = False
    """Whether a multimodal model is compared with its captured decoder (`examine_whole.py`)."""


def examine(model_type: str) -> Entry:
    """Builds, saves, loads and captures a model of that type."""
    entry = Entry(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    try:
        backbone, facts, cut = _loaded(model_type)
    except QkSnifferError as error:
        return replace(entry, note=reason_of(error))
    try:
        calls, seen = _check_post(backbone, facts)
        values, refused = _check_outputs(backbone, facts, calls)
        check_cut(cut, seen, _ids())
        notes = _notes(backbone, calls, seen, facts)
        _check_attention(backbone, facts)
        pre, reason = _pre_verdict(backbone, calls)
        before = Backbone(backbone.decoder, backbone.family, pre_rope=True, banded_attention=False)
        unknown = sorted({fact.unknown_attention for fact in facts if fact.unknown_attention is not None})
        if not unknown and (wrong := wrong_summaries(backbone, facts, _ids())):
            raise WrongError(f"wrong attention summaries: {wrong[0]}")
        long = _ids(MORE_THAN_HEADS)[:1]
        proven = proven_kinds(backbone, facts, long)
        proof = "yes" if "q" in proven else "pre" if pre == "yes" and proven_kinds(before, facts, long) else "no"
    except (WrongError, CaptureError) as error:
        return replace(entry, post="WRONG", note=str(error))
    decoder_type = backbone.config.model_type
    if values == "captured" and "v" in proven:
        values = "proven" if "o" in proven else "values proven"
    return replace(
        entry,
        post="yes",
        pre=pre,
        proof=proof,
        attention="no" if unknown else "yes",
        values=values,
        note="; ".join(notes + reason + unknown + refused),
        decoder_type=decoder_type,
    )


def _loaded(model_type: str) -> tuple[Backbone, list[LayerFacts], Backbone]:
    """Returns the whole decoder, its layers, and the decoder that a capture of the first layer alone loads."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_tiny(model_type, Path(folder))
        except ValueError:
            # The model cannot be built. The error of the loader gives the reason.
            tiny_config(model_type).save_pretrained(folder)
            save_file({"nothing": torch.zeros(1)}, Path(folder) / "model.safetensors")
        config = ModelConfig(name=folder, dtype="float32", device_map="cpu")
        try:
            backbone = load_backbone(config, banded_attention=False)
        except QkSnifferError as error:
            raise without_name(error, folder) from error
        facts = backbone.probe()
        return backbone, facts, load_backbone(config, banded_attention=False, layers=[facts[0].heads.layer])


def _check_post(backbone: Backbone, facts: list[LayerFacts]) -> tuple[list[KernelCall], list[AttentionCall]]:
    """Returns every attention call twice: from the recording and from the capture.

    Raises:
        WrongError: vectors, layers or heads differ, or the capture changes the forward pass.
    """
    decoder, ids = backbone.decoder, _ids()
    with torch.inference_mode():
        calls, hidden = recorded(decoder, ids)
        seen = captured(backbone, ids, hidden)
    missed = {type(call.module).__name__ for call in calls if call.module not in backbone.attention_layers}
    if missed:
        raise WrongError(f"attention of {', '.join(sorted(missed))} is not captured")
    layers = [call.layer for call in seen]
    if len(seen) != len(calls) or layers != [fact.heads.layer for fact in facts] or layers[0] < 0:
        raise WrongError(f"{len(calls)} calls of attention, {len(facts)} layers probed, captured {layers}")
    for call, own in zip(calls, seen, strict=True):
        if not (_equal(own.query, call.query) and _equal(own.key, call.key)):
            raise WrongError(f"layer {own.layer}: the vectors are not those that attention receives")
        heads = own.query.shape[1], own.key.shape[1]
        if heads[0] != SIZES["num_attention_heads"] or heads[0] % heads[1]:
            raise WrongError(f"layer {own.layer}: {heads[0]} query heads and {heads[1]} key heads")
    # Padding is at the end and has no mask, so earlier tokens must not see later ones.
    half = TOKENS // 2
    ids[:, half:] = ids[:, half:].flip(0)
    if _differ(seen, captured(backbone, ids), slice(0, half)):
        raise WrongError("tokens see later ones")
    with patch.object(banded_module, "MIN_BLOCK", WINDOW):  # several blocks in a short text
        if _differ(seen, captured(Backbone(decoder, backbone.family), _ids()), slice(None)):
            raise WrongError("with banded attention the vectors differ")
    return calls, seen


def _check_outputs(backbone: Backbone, facts: list[LayerFacts], calls: list[KernelCall]) -> tuple[str, list[str]]:
    """Compares the values and outputs of a forward pass with the recording.

    Returns whether they are captured, and the reason if they are not.

    Raises:
        WrongError: they differ.
    """
    if reasons := {width for fact in facts for width in (fact.value_dim, fact.output_dim) if isinstance(width, str)}:
        return "no", [f"no values and outputs: {reason}" for reason in sorted(reasons)]
    seen: list[tuple[AttentionCall, torch.Tensor]] = []

    def keep(call: AttentionCall, output: torch.Tensor | None) -> None:
        assert call.value is not None and output is not None
        seen.append((replace(call, value=call.value.clone()), output.clone()))

    backbone.forward(_ids(), lambda call: None, on_output=keep)
    for call, fact, (own, output) in zip(calls, facts, seen, strict=True):
        assert call.value is not None and call.output is not None and own.value is not None
        if not (_equal(own.value, call.value) and _equal(output, call.output)):
            raise WrongError(f"layer {own.layer}: the values or outputs are not those of attention")
        if (own.value.shape[-1], output.shape[-1], own.value.shape[1]) != (
            fact.value_dim,
            fact.output_dim,
            own.key.shape[1],
        ):
            raise WrongError(f"layer {own.layer}: its values have another shape than its facts say")
    return "captured", []


def _check_attention(backbone: Backbone, facts: list[LayerFacts]) -> None:
    """Runs the check of attention kernels that every job makes, which must not find a right kernel wrong.

    Raises:
        WrongError: it does.
    """
    check = AttentionCheck(facts, backbone.family, backbone.dtype).of(TOKENS)
    assert check is not None
    backbone.forward(_ids(), lambda call: None, check.see)
    for result in check.finish():
        if result["passed"] is False:
            raise WrongError(f"layer {result['layer']}: the check of attention finds its kernel wrong")


def check_cut(cut: Backbone, seen: list[AttentionCall], ids: torch.Tensor) -> None:
    """Checks the decoder that ends with its first layer.

    Raises:
        WrongError: the layer has another number or other vectors than in the whole decoder.
    """
    (own, *_), (whole, *_) = captured(cut, ids), seen
    cut.run(ids)  # the proof runs a forward pass to its end
    if own.layer != whole.layer or not (_equal(own.query, whole.query) and _equal(own.key, whole.key)):
        raise WrongError("without the later layers, the first layer has other vectors")


def _pre_verdict(backbone: Backbone, calls: list[KernelCall]) -> tuple[str, list[str]]:
    """Returns `Entry.pre` and notes: the reason of a refusal, or that some layers are not rotated.

    Raises:
        WrongError: vectors before RoPE are not the inputs of rotary functions, or depend on the position.
    """
    before = Backbone(backbone.decoder, backbone.family, pre_rope=True, banded_attention=False)
    rotated = [bool(call.rotated) for call in calls]
    try:
        seen = captured(before, _ids())
    except CaptureError as error:
        return ("no", [reason_of(error)]) if any(rotated) else ("no RoPE", [])
    for call, own in zip(calls, seen, strict=True):
        for after, vectors in ((call.query, own.query), (call.key, own.key)):
            known = any(_is_before(vectors, after, pair) for pair in call.rotated)
            if not (known if call.rotated else _equal(vectors, after)):
                raise WrongError(f"layer {own.layer}: the vectors are not those that the rotary function receives")
    if not any(rotated):
        return "no RoPE", []
    if before.config.model_type not in _COUNTS_FROM_ZERO:
        _check_unmoved(before)
    return "yes", [] if all(rotated) else ["some layers are not rotated"]


def _check_unmoved(before: Backbone) -> None:
    """Runs the same text from two start positions and compares the vectors before RoPE.

    RoPE is relative: if the outputs are equal, so are the vectors before RoPE. This check needs no name of a rotary
    function.

    Raises:
        WrongError: the vectors differ.
    """
    seen: tuple[list[AttentionCall], list[AttentionCall]] = [], []
    outputs: list[torch.Tensor] = []
    for start, calls in zip((0, 7), seen, strict=True):
        positions = torch.arange(start, start + TOKENS)[None].expand(2, -1)
        with torch.inference_mode(), before.tapped(_keeping(calls)):
            outputs.append(before.decoder(input_ids=_ids(), position_ids=positions, use_cache=False)[0])
    if not torch.allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-4):
        # Another part depends on the position, such as hunyuan's norms: only the first layer can be compared.
        del seen[0][1:], seen[1][1:]
    if seen[0][0].layer == 0 and _differ(*seen, slice(None), atol=1e-2):  # norms magnify rounding
        raise WrongError("vectors before RoPE depend on the position")


def _is_before(before: torch.Tensor, after: torch.Tensor, rotated: Rotated) -> bool:
    """Whether `before` is the input of that rotary call, next to the part of `after` that is not rotated."""
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


def _notes(
    backbone: Backbone, calls: list[KernelCall], seen: list[AttentionCall], facts: list[LayerFacts]
) -> list[str]:
    """Returns the differences from the layout of a plain decoder.

    Raises:
        WrongError: a mask or the logits contradict the layer's facts.
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
    """Whether the logits have a bias next to the scaled and capped products of queries and keys.

    Raises:
        WrongError: the layer's facts contradict the logits.
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
            raise WrongError(f"layer {fact.heads.layer}: its facts do not explain its attention weights")
        if explained and fact.position_bias:
            raise WrongError(f"layer {fact.heads.layer}: its facts name a bias, but its logits have none")
    return any(fact.position_bias for fact in facts)


def _explains(fact: LayerFacts, call: KernelCall) -> bool:
    """Whether the layer's facts lead from query and key to the attention weights that the kernel returned."""
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
    """Returns the ways in which queries see fewer than all earlier tokens.

    Raises:
        WrongError: the mask contradicts the call.
    """
    n = call.query.shape[2]
    row, column = torch.arange(n)[:, None], torch.arange(n)
    causal = column <= row
    if call.mask is not None:
        visible = call.mask[0, 0] if call.mask.dtype == torch.bool else call.mask[0, 0] > -1
    else:
        visible = causal if call.weights is None else call.weights[0].amax(0) > 0
    declared, notes, finding = causal, [], "its mask hides keys that its facts do not exclude"
    if own.sliding_window is not None:
        declared = declared & (column > row - own.sliding_window)
        notes.append("sliding windows")
        finding = f"its facts give a window of {own.sliding_window}, its mask has another"
    if own.attention_chunk is not None:
        declared = declared & (column >= row - row % own.attention_chunk)
        notes.append("chunks")
        finding = f"its facts give chunks of {own.attention_chunk}, its mask has others"
    if own.sparse_attention:
        notes.append("sparse attention")
        finding = "its facts say that it is sparse, its mask is dense"
        right = not torch.equal(visible, declared) and not (visible & ~declared).any()
    else:
        right = torch.equal(visible, declared)
    if not right:
        raise WrongError(f"layer {own.layer}: {finding}")
    return notes


def captured(backbone: Backbone, ids: torch.Tensor, hidden: torch.Tensor | None = None) -> list[AttentionCall]:
    """Returns the calls of a forward pass as jobs run it; with `hidden`, of a plain pass that must return `hidden`.

    Raises:
        WrongError: the plain forward pass returns other hidden states.
    """
    seen: list[AttentionCall] = []
    if hidden is None:
        backbone.forward(ids, _keeping(seen))
        return seen
    with backbone.tapped(_keeping(seen)):
        if not torch.equal(backbone.decoder(input_ids=ids, use_cache=False)[0], hidden):
            raise WrongError("capturing changes the forward pass")
    return seen


def _keeping(calls: list[AttentionCall]) -> Callable[[AttentionCall], None]:
    """Returns a callback that appends a copy of each call to `calls`."""
    return lambda call: calls.append(replace(call, query=call.query.clone(), key=call.key.clone()))


def _differ(seen: list[AttentionCall], others: list[AttentionCall], tokens: slice, atol: float = 1e-4) -> bool:
    """Whether some vector at `tokens` differs by more than rounding."""
    return any(
        not torch.allclose(one[:, :, tokens], other[:, :, tokens], rtol=1e-3, atol=atol)
        for a, b in zip(seen, others, strict=True)
        for one, other in ((a.query, b.query), (a.key, b.key))
    )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, after one is widened or its heads are repeated for their queries."""
    heads = max(a.shape[1], b.shape[1])
    a, b = (states.repeat_interleave(heads // states.shape[1], dim=1).float() for states in (a, b))
    return torch.equal(a, b)


def _ids(length: int = TOKENS) -> torch.Tensor:
    return torch.randint(5, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


def reason_of(error: QkSnifferError) -> str:
    """Returns the first clause of the error's message: the reason without the way out."""
    return re.split(r"; |: it is |\. |\n|, so |, as ", re.sub(r"^\S+: this model", "this model", str(error)))[0]


def without_name(error: QkSnifferError, folder: str) -> QkSnifferError:
    """Returns the error without the folder of the checkpoint."""
    return type(error)(re.sub(rf"^model {folder}:? ", "", str(error)))
