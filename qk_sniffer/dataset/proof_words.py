"""Says in words what the proof of a dataset covers, and why it failed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qk_sniffer.store.layout import KIND_PLURALS, KINDS
from qk_sniffer.text import compact_ranges, counted


def compared(proof: Mapping[str, Any], *, heads: int, layers: int) -> str:
    """Returns the rows that a proof compared: `1,240 rows of 60 heads in all 6 layers, positions to 4,095`.

    Kinds of vectors without a compared row follow the layers: `(no keys in layers 0-2)`.
    `heads` and `layers` are the numbers of those that the dataset has. A proof of an earlier version of this package
    tells its examples alone.
    """
    if "rows" not in proof:
        return f"rows of {counted(len(proof['examples']), 'example')}"
    proven = len(proof["largest_difference_by_layer"])
    rows = f"{counted(proof['rows'], 'row')} of {_parts(proof, heads, layers)}"
    far, last = proof.get("beyond"), proof["longest_position"]
    beyond = ""
    if far is not None and len(far["layers"]) == proven:
        last = max(last, far["longest_position"])
    elif far is not None:
        beyond = f" ({_layers(far['layers'])}: to {far['longest_position']:,})"
    return f"{rows}, positions to {last:,}{beyond}"


def of_statistics(proof: Mapping[str, Any], *, heads: int, layers: int, examples: int) -> str:
    """Returns the statistics that a proof compared: `statistics of 60 heads in all 6 layers, from 4 of 90 examples`.

    Empty for a proof without any. `heads` and `layers` are as in `compared`, `examples` is the dataset's number.
    """
    made = proof.get("statistics")
    if made is None:
        return ""
    if "reason" in made:
        return f"statistics not proven: {made['reason']}"
    return f"statistics of {_parts(made, heads, layers)}, from {whence(made, examples)}"


def of_summaries(proof: Mapping[str, Any], *, heads: int, layers: int) -> str:
    """Returns the attention summaries that a proof compared: `attention summaries of 48 heads in all 6 layers`.

    Empty for a proof without any. `heads` is the number of the dataset's query heads, `layers` that of its layers.
    """
    made = proof.get("summaries")
    if made is None:
        return ""
    if "reason" in made:
        return f"attention summaries not proven: {made['reason']}"
    return f"attention summaries of {_parts(made, heads, layers)}"


def of_rows(proof: Mapping[str, Any]) -> bool:
    """Whether a proof that was made compared rows. One of a dataset without rows compared statistics alone."""
    return "largest_difference_by_layer" in proof


def whence(proof: Mapping[str, Any], examples: int) -> str:
    """Returns of how many of the dataset's examples a proof compared rows: `8 of 90 examples`."""
    number = len(proof["examples"])
    if examples == 1:
        return "the only example"
    return f"{'all' if number == examples else f'{number:,} of'} {counted(examples, 'example')}"


def attention(proof: Mapping[str, Any]) -> str:
    """Returns where a job checked attention itself, and which kinds it could not check."""
    checks: Sequence[Mapping[str, Any]] = proof.get("attention", ())
    made = [check for check in checks if check["passed"] is not None]
    skipped = [f"{check['kind']}: {check['reason']}" for check in checks if check["passed"] is None]
    if not made:
        return "attention itself not checked" + (f" ({'; '.join(skipped)})" if skipped else "")
    positions = {position for check in made for position in check["positions"]}
    where = f"attention itself at {counted(len(positions), 'position')} to {max(positions):,}"
    return where + (f" (not checked: {'; '.join(skipped)})" if skipped else "")


def largest_difference(proof: Mapping[str, Any]) -> float:
    """Returns the largest difference of a layer, of rows and of statistics; NaN without layers."""
    parts = (proof, proof.get("statistics", {}))
    differences = [each for part in parts for each in part.get("largest_difference_by_layer", {}).values()]
    return max(differences, key=lambda value: math.inf if math.isnan(value) else value, default=math.nan)


def why(proof: Mapping[str, Any]) -> str:
    """Returns why a proof failed, and the way out."""
    report = "Please report this with the model's name; verify.examples=0 makes a dataset without proof"
    reasons = [_wrong(check) for check in proof.get("attention", ()) if check["passed"] is False]
    if reasons:
        reasons.append(
            "That is an error of the attention kernel, which changes the vectors of all later layers. Set "
            "model.attn_implementation to another kernel, or lower model.tokenizer.max_length, and add "
            "output.overwrite=true"
        )
    statistics, summaries = proof.get("statistics", {}), proof.get("summaries", {})
    wrong = [
        f"{what} derived a second time, from the model's projections, differ by more than {tolerance} (relative): "
        f"{differences} by layer"
        for what, tolerance, differences in (
            ("Vectors", proof.get("tolerance"), proof.get("largest_difference_by_layer", {})),
            ("Single rows of vectors", proof.get("row_tolerance"), proof.get("largest_row_difference_by_layer", {})),
            (
                "Attention summaries",
                summaries.get("tolerance"),
                summaries.get("largest_difference_by_layer", {}),
            ),
            ("Statistics", statistics.get("tolerance"), statistics.get("largest_difference_by_layer", {})),
        )
        if not all(difference <= tolerance for difference in differences.values())  # NaN is not
    ]
    if wrong or not reasons:
        reasons = [*wrong, *reasons, report]
    return ". ".join(reasons)


def _wrong(check: Mapping[str, Any]) -> str:
    largest = check.get("largest_difference")
    exact = "softmax(q K) V of the queries, keys and values that it received"
    if largest is None:
        finding = f"is not finite, and {exact} is"
    else:
        finding = f"differs by up to {largest:.2g} (relative) from {exact}; up to {check['tolerance']:g} is rounding"
    return (
        f"Layer {check['layer']} ({check['kind']}), positions {compact_ranges(check['wrong_positions'])} of a text of "
        f"{check['tokens']:,} tokens: the output of the attention kernel {finding}"
    )


def _parts(proof: Mapping[str, Any], heads: int, layers: int) -> str:
    """Returns the heads and layers of a proof: `58 of 60 heads in all 6 layers (no keys in layer 2)`."""
    proven = len(proof["largest_difference_by_layer"])
    of_heads = counted(heads, "head") if proof["heads"] == heads else f"{proof['heads']:,} of {counted(heads, 'head')}"
    of_layers = _all(layers) if proven == layers else f"{proven:,} of {counted(layers, 'layer')}"
    return f"{of_heads} in {of_layers}{_uncovered(proof)}"


def _uncovered(proof: Mapping[str, Any]) -> str:
    layers: dict[tuple[str, str], list[int]] = {}
    for each in proof["uncovered"]:
        layers.setdefault((each["kind"], each.get("reason", "")), []).append(each["layer"])
    groups = sorted(layers.items(), key=lambda item: (KINDS.index(item[0][0]), item[1]))
    kinds = [
        f"no {KIND_PLURALS[kind]} in {_layers(of)}{f': {reason}' if reason else ''}" for (kind, reason), of in groups
    ]
    return f" ({', '.join(kinds)})" if kinds else ""


def _layers(layers: Sequence[int]) -> str:
    return f"layer{'' if len(layers) == 1 else 's'} {compact_ranges(layers)}"


def _all(layers: int) -> str:
    return "the only layer" if layers == 1 else f"all {layers:,} layers"
