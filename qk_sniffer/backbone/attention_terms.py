"""Collects the terms that turn queries and keys of an attention call into weights: scale, cap, sinks, mask and bias.

Shapes: B batch, H query heads, n queries, m keys that they attend to (`AttentionCall.attended`).
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qk_sniffer.backbone.masks import Visible

if TYPE_CHECKING:
    from qk_sniffer.backbone.tap import AttentionCall

_KNOWN = {"scaling", "sliding_window", "softcap", "s_aux", "is_causal", "position_ids"}
"""Arguments of kernels that are accounted for, or that have no effect on the weights of a row with one text."""

_OF_MODELS = {
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("return_dict", "logits_to_keep", "num_items_in_batch"),
}
"""Arguments of whole models that their decoders pass on, and that have no effect on attention."""

_OF_SPARSE_ATTENTION = {"indices", "block_indices"}
"""Arguments that select keys. The mask has the selection too."""

_TENSORS = {"value", "attention_mask", "position_bias", "sinks"}
"""Further arguments that `AttentionTerms` accounts for."""


class UnknownTermsError(Exception):
    """The weights of a call do not follow from what its kernel receives; the text gives the reason."""


@dataclass(frozen=True)
class AttentionTerms:
    """The terms of one call. A query's weights are the softmax of its logits over the keys that it sees and its sink.

    A logit is `scale` times the product of query and key, then capped, then with the bias added.
    """

    scale: float
    softcap: float | None
    """c: the logits x become c * tanh(x / c); None without a cap."""
    sinks: torch.Tensor | None
    """(1 or B, H, 1 or n): learned logits that join the softmax of each query; None without sinks."""
    visible: Visible
    """The rule by which queries see earlier keys, before any selection by content."""
    selection: torch.Tensor | None
    """(1 or B, 1 or H, n, m): the mask that hides more keys, in a layer with sparse attention. None elsewhere."""
    bias: torch.Tensor | None
    """(1 or B, 1 or H, 1 or n, m): the term that is added to the logits; None without a bias."""

    @classmethod
    def of(cls, call: "AttentionCall") -> "AttentionTerms":
        """Returns the terms of `call`.

        Raises:
            UnknownTermsError: they do not follow from the call.
        """
        if call.hides_keys and call.attention_chunk is None and not call.sparse_attention:
            raise UnknownTermsError("which earlier keys its queries see is not known")
        if (name := unknown_argument(call.arguments, _TENSORS, is_sparse=call.sparse_attention)) is not None:
            raise UnknownTermsError(f"its kernel has an argument {name}, whose effect is not known")
        mask = call.arguments.get("attention_mask")
        if call.sparse_attention and not isinstance(mask, torch.Tensor):
            raise UnknownTermsError("the selection of its keys is not in its kernel's mask")
        query, _ = call.attended
        return cls(
            scale=query.shape[-1] ** -0.5 if call.softmax_scale is None else float(call.softmax_scale),
            softcap=call.softcap,
            sinks=_sinks(call),
            visible=Visible(call.sliding_window, call.attention_chunk, call.sparse_attention),
            selection=mask if call.sparse_attention else None,
            bias=_bias(call, mask) if call.position_bias else None,
        )


def why_unknown(call: "AttentionCall") -> str | None:
    """Returns why the attention weights of calls like this one cannot be computed; None if they can."""
    try:
        AttentionTerms.of(call)
    except UnknownTermsError as error:
        return str(error)
    return None


def unknown_argument(arguments: Mapping[str, Any], further: Set[str] = frozenset(), *, is_sparse: bool) -> str | None:
    """Returns the name of a kernel's argument whose effect on the weights is not known; None if there is none.

    `further` are arguments that the caller accounts for.
    """
    known = _KNOWN | _OF_MODELS | further | (_OF_SPARSE_ATTENTION if is_sparse else set())
    for name, value in arguments.items():
        if name not in known and not (value is None or (isinstance(value, int | float) and not value)):
            return name
    return None


def _sinks(call: "AttentionCall") -> torch.Tensor | None:
    """Returns the logits of the sinks: one a head, or one for each query and head, as an argument of its own."""
    by_query = call.arguments.get("sinks")
    if by_query is not None:
        if not isinstance(by_query, torch.Tensor) or by_query.shape[1:] != (*call.query.shape[1:3], 1):
            raise UnknownTermsError("its sinks are not one logit for each query")
        return by_query[..., 0]
    return None if call.sinks is None else call.sinks.reshape(1, -1, 1)


def _bias(call: "AttentionCall", mask: Any) -> torch.Tensor:
    """Returns the bias: an argument of its own, or else the mask, if that is added to the logits."""
    found = call.arguments.get("position_bias")
    if found is None and isinstance(mask, torch.Tensor) and mask.is_floating_point():
        found = mask
    n, m = call.query.shape[2], call.attended[1].shape[2]
    if not isinstance(found, torch.Tensor) or found.dim() != 4 or found.shape[-1] != m or found.shape[-2] not in (1, n):
        raise UnknownTermsError("a bias is added to its logits, which its kernel does not receive by query and key")
    return found
