"""Declares the form of the proof in the manifest of a dataset, and of the checks of attention in it."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from qk_sniffer.store.form_types import MOST_LAYERS, Bucket, ExampleId, Kind, Number, Positive, Stage
from qk_sniffer.store.stored import Count, Text


class Attention(TypedDict):
    """The check of an attention kernel in one layer, at some positions of one text."""

    layer: Annotated[int, Meta(ge=0, lt=MOST_LAYERS)]
    kind: Text
    tokens: Annotated[int, Meta(ge=1, lt=2**31)]
    positions: Annotated[list[Count], Meta(min_length=1, max_length=1000)]
    tolerance: Positive
    passed: bool | None
    reason: NotRequired[Text]
    """Why it was not made, where `passed` is None."""
    largest_difference: NotRequired[Number | None]
    """None if the kernel returned numbers that are not finite."""
    wrong_positions: NotRequired[Annotated[list[Count], Meta(max_length=1000)]]


_COVERAGE = {"rows", "heads", "longest_position", "uncovered"}


class LayerKind(TypedDict):
    """The heads of one kind in one layer, without a compared row."""

    layer: Annotated[int, Meta(ge=0, lt=MOST_LAYERS)]
    kind: Kind
    reason: NotRequired[Text]
    """Why their vectors cannot be derived."""


class Beyond(TypedDict):
    """The layers that a proof ran over a longer text than the others."""

    layers: Annotated[list[Annotated[int, Meta(ge=0, lt=MOST_LAYERS)]], Meta(min_length=1, max_length=MOST_LAYERS)]
    longest_position: Count


class StatisticsProof(TypedDict):
    """The proof of statistics. Only one that was made has numbers; the others have a reason."""

    stages: list[Stage]
    reason: NotRequired[Text]
    examples: NotRequired[list[ExampleId]]
    tokens: NotRequired[Count]
    heads: NotRequired[Count]
    uncovered: NotRequired[list[LayerKind]]
    tolerance: NotRequired[Positive]
    largest_difference_by_layer: NotRequired[dict[Bucket, float]]


class SummariesProof(TypedDict):
    """The proof of attention summaries. Only one that was made has numbers; the others have a reason."""

    reason: NotRequired[Text]
    rows: NotRequired[Count]
    heads: NotRequired[Count]
    uncovered: NotRequired[list[LayerKind]]
    tolerance: NotRequired[Positive]
    largest_difference_by_layer: NotRequired[dict[Bucket, float]]


class Proof(TypedDict):
    """The proof of a dataset. Only one that was made has numbers; the others have a reason."""

    proven: bool | None
    reason: NotRequired[Text]
    examples: NotRequired[list[ExampleId]]
    model_commit: NotRequired[Text | None]
    tolerance: NotRequired[Positive]
    largest_difference_by_layer: NotRequired[dict[Bucket, float]]
    """NaN or infinite where vectors are."""
    row_tolerance: NotRequired[Positive]
    largest_row_difference_by_layer: NotRequired[dict[Bucket, float]]
    """Of single rows. Earlier versions have neither."""
    max_tokens: NotRequired[Count]
    """Longer examples were cut to this number of tokens, except in the layers of `beyond`."""
    rows: NotRequired[Count]
    heads: NotRequired[Count]
    longest_position: NotRequired[Count]
    beyond: NotRequired[Beyond]
    uncovered: NotRequired[list[LayerKind]]
    summaries: NotRequired[SummariesProof]
    """Of attention summaries. Earlier versions have none."""
    statistics: NotRequired[StatisticsProof]
    attention: NotRequired[Annotated[list[Attention], Meta(max_length=MOST_LAYERS)]]


_MADE = {"examples", "tokens", "heads", "uncovered", "tolerance", "largest_difference_by_layer"}
"""The keys that every proof of statistics has if it was made."""

_SUMMARIES_MADE = {"rows", "heads", "uncovered", "tolerance", "largest_difference_by_layer"}


def proof_problems(proof: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is impossible together in a proof."""
    checks, statistics = proof.get("attention", ()), proof.get("statistics", {})
    summaries = proof.get("summaries", {})
    failed = any(check["passed"] is False for check in checks)
    of_rows = "largest_difference_by_layer" in proof
    needed = {"examples"}
    if proof["proven"] is None or (failed and "reason" in proof):
        needed = {"reason"}
    elif of_rows or "largest_difference_by_layer" not in statistics:
        needed |= {"tolerance", "largest_difference_by_layer"}
        if proof.keys() & _COVERAGE:  # earlier versions have none of these
            needed |= _COVERAGE
    if missing := needed - proof.keys():
        yield f"proof lacks {', '.join(sorted(missing))}"
    elif missing := (set() if not statistics or "reason" in statistics else _MADE - statistics.keys()):
        yield f"the proof of statistics lacks {', '.join(sorted(missing))}"
    elif missing := (set() if not summaries or "reason" in summaries else _SUMMARIES_MADE - summaries.keys()):
        yield f"the proof of attention summaries lacks {', '.join(sorted(missing))}"
    elif ("row_tolerance" in proof) != ("largest_row_difference_by_layer" in proof):
        yield "proof has only one of row_tolerance and largest_row_difference_by_layer"
    elif proof["proven"] and not (proof if of_rows else statistics)["largest_difference_by_layer"]:
        yield "proof is of no layer"
    elif proof["proven"] is not False and failed:
        yield "proof is not false, and a check of attention failed"
    for check in checks:
        if check["passed"] is not True and ("reason" if check["passed"] is None else "wrong_positions") not in check:
            yield f"the check of attention in layer {check['layer']} does not say what is wrong"
