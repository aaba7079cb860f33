"""Writes what a dataset card says about the kinds of its vectors."""

from collections.abc import Sequence

from qk_sniffer.dataset.card_facts import CardFacts
from qk_sniffer.store.layout import KEY_HEAD_KINDS, KIND_NAMES, KIND_PLURALS, UNROTATED_KINDS, Head
from qk_sniffer.text import enumerated


def named(facts: CardFacts, form: str) -> str:
    """Returns the kinds of the vectors, each in a form of its name and its letter: `query (Q) and key (K)`."""
    return enumerated([form.format(KIND_NAMES[kind], kind.upper()) for kind in facts.kinds])


def unrotated(facts: CardFacts) -> str:
    """Returns a sentence on the kinds that no rotary embedding changes; empty without them."""
    meanings = {
        "v": "Values are those of the keys",
        "o": "an output is the sum of the values by a query's attention weights, before the output projection",
    }
    present = [meanings[kind] for kind in facts.kinds if kind in UNROTATED_KINDS]
    if not present:
        return ""
    text = "; ".join(present)
    return f"\n{text[0].upper()}{text[1:]}. RoPE does not change {'them' if len(present) == 1 else 'either'}."


def numbering(facts: CardFacts) -> str:
    """Returns how the heads of the kinds of key heads are numbered."""
    of_keys = [f"`{kind}`" for kind in KEY_HEAD_KINDS if kind in facts.kinds or kind == "k"]
    return f"A {' or '.join(of_keys)} head is numbered among the key heads."


def vector(facts: CardFacts, stage: str) -> str:
    """Returns the meaning of the column of vectors."""
    rotated = [KIND_NAMES[kind] for kind in facts.kinds if kind not in UNROTATED_KINDS]
    parts = [f"the {' or '.join(rotated)} vector, {stage}"] if rotated else []
    parts += ["the value that attention received"] if "v" in facts.kinds else []
    parts += ["the output of attention"] if "o" in facts.kinds else []
    return "; or ".join(parts)


def sizes(heads: Sequence[Head]) -> str:
    """Returns the sizes of a layer's vectors: `24 (values and outputs 16)`."""
    of_kind = {head.kind: head.head_dim for head in heads}
    first = next(iter(of_kind.values()))
    others = {
        size: [KIND_PLURALS[kind] for kind, of in of_kind.items() if of == size]
        for size in of_kind.values()
        if size != first
    }
    named = [f"{enumerated(kinds)} {size}" for size, kinds in others.items()]
    return f"{first} ({'; '.join(named)})" if named else str(first)
