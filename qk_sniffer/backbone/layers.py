"""What is known of one attention layer: its heads, and how its attention kernel is called."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerHeads:
    """The heads of one attention layer; `sliding_window` is null on full attention."""

    layer: int
    num_q_heads: int
    num_k_heads: int
    head_dim: int
    sliding_window: int | None

    def key_head(self, head: int) -> int:
        """The key head that query head `head` attends with."""
        return head // (self.num_q_heads // self.num_k_heads)


@dataclass(frozen=True)
class LayerFacts:
    """One self-attention layer, as its attention kernel was seen to be called."""

    heads: LayerHeads
    attention_chunk: int | None
    """c where a query at position p sees keys from position p - p % c on; None: no chunks."""
    softmax_scale: float
    softcap: float | None
    sinks: list[float] | None
    """One learned logit for each query head, where the model has them."""
    position_bias: bool
    """Is a bias by position, or by key, added to the logits? It is not stored."""
    sparse_attention: bool
    """Does a query see only some of the keys before it, chosen by what they hold? Which ones is not stored."""

    def to_dict(self) -> dict[str, Any]:
        """Flat, as the manifest holds it."""
        values = asdict(self)
        heads: dict[str, Any] = values.pop("heads")
        return heads | values
