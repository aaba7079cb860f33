"""Describes one attention layer: its heads and the parameters of its attention."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerHeads:
    """The heads of one attention layer; `sliding_window` is None on full attention."""

    layer: int
    num_q_heads: int
    num_k_heads: int
    head_dim: int
    sliding_window: int | None

    def key_head(self, head: int) -> int:
        """Returns the key head of query head `head`."""
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

    def to_dict(self) -> dict[str, Any]:
        """Returns all facts in one flat dict, the form of the manifest."""
        values = asdict(self)
        heads: dict[str, Any] = values.pop("heads")
        return heads | values
