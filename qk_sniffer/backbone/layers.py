"""Describes one attention layer: its heads and the parameters of its attention."""

from dataclasses import asdict, dataclass
from typing import Any

NOT_SHOWN = "its family does not show them"
"""Why values or outputs cannot be captured, where nothing else is known."""


@dataclass(frozen=True)
class LayerHeads:
    """The heads of one attention layer."""

    layer: int
    num_q_heads: int
    num_k_heads: int
    head_dim: int
    sliding_window: int | None
    """The number of positions that a query sees, its own included; None without a window."""
    hides_keys: bool = False
    """Whether a query does not see all earlier keys for another reason than a window: chunks, a selection by content,
    or a kind of attention that is not known."""

    @property
    def full_attention(self) -> bool:
        """Whether every query sees all earlier keys."""
        return self.sliding_window is None and not self.hides_keys

    def key_head(self, head: int) -> int:
        """Returns the key head of query head `head`. Neighbouring query heads share a key head."""
        return head // (self.num_q_heads // self.num_k_heads)


@dataclass(frozen=True)
class LayerFacts:
    """One self-attention layer, from the arguments of its attention kernel in a forward pass."""

    heads: LayerHeads
    attention_chunk: int | None
    """c: a query at position p sees keys from position p - p % c on; None without chunks."""
    softmax_scale: float
    """The factor of the logits."""
    softcap: float | None
    """c: the logits x become c * tanh(x / c); None without a cap."""
    sinks: list[float] | None
    """One learned logit for each query head; None without sinks."""
    position_bias: bool
    """Whether a bias by position or by key is added to the logits. The bias is not stored."""
    sparse_attention: bool
    """Whether a query sees only some of the keys before it, selected by their content. The selection is not stored."""
    value_dim: int | str = NOT_SHOWN
    """The width of a value; the reason if values cannot be captured."""
    output_dim: int | str = NOT_SHOWN
    """The width of the output of a query head, before the output projection; the reason if it cannot be captured."""
    rotation: dict[str, Any] | str | None = None
    """How queries and keys turn, in the form of `Rotation`; the reason if that is not known; None without RoPE."""
    module: str | None = None
    """The name of its attention module in the checkpoint, such as `model.layers.0.self_attn`; None if it is not known,
    or if the module serves several layers."""
    unknown_attention: str | None = None
    """Why the attention weights do not follow from what the kernel receives; None if they do. Not in the manifest."""

    def to_dict(self) -> dict[str, Any]:
        """Returns all facts in one flat dict, the form of the manifest."""
        values = asdict(self)
        heads: dict[str, Any] = values.pop("heads")
        del heads["hides_keys"], values["unknown_attention"]
        num_q, num_k = self.heads.num_q_heads, self.heads.num_k_heads
        if num_q % num_k == 0:  # heads of any other layer cannot be captured
            heads["key_head"] = [self.heads.key_head(head) for head in range(num_q)]
        return heads | {"full_attention": self.heads.full_attention} | values
