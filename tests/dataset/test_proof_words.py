"""Tests the words for what a proof covers."""

from typing import Any

from qk_sniffer.dataset.proof_words import attention, compared, largest_difference, of_summaries, whence, why

CHECK: dict[str, Any] = {
    "layer": 3,
    "kind": "full attention",
    "tokens": 131_072,
    "positions": [0, 65_536, 131_071],
    "tolerance": 0.05,
    "passed": True,
    "largest_difference": 0.001,
    "wrong_positions": [],
}
PROOF: dict[str, Any] = {
    "proven": True,
    "examples": [7, 9],
    "rows": 1_240,
    "heads": 60,
    "longest_position": 4095,
    "uncovered": [],
    "tolerance": 0.1,
    "largest_difference_by_layer": dict.fromkeys("012345", 0.01),
    "attention": [CHECK, CHECK | {"layer": 4, "kind": "chunks of 8", "positions": [0, 7, 8, 9]}],
}


def words(proof: dict[str, Any]) -> str:
    return compared(proof, heads=60, layers=6)


def test_it_says_what_was_compared() -> None:
    line = "1,240 rows of 60 heads in all 6 layers, positions to 4,095"
    assert words(PROOF) == line
    assert whence(PROOF, 90) == "2 of 90 examples" and whence(PROOF, 2) == "all 2 examples"
    assert whence(PROOF | {"examples": [7]}, 1) == "the only example"
    far = PROOF | {"beyond": {"layers": [0], "longest_position": 131_071}}
    assert words(far) == f"{line} (layer 0: to 131,071)"
    everywhere = PROOF | {"beyond": {"layers": [*range(6)], "longest_position": 131_071}}
    assert words(everywhere) == "1,240 rows of 60 heads in all 6 layers, positions to 131,071"
    some = PROOF | {"heads": 58, "largest_difference_by_layer": {"0": 0.1, "1": float("nan")}}
    assert words(some).startswith("1,240 rows of 58 of 60 heads in 2 of 6 layers, positions to 4,095")
    lacking = [{"layer": layer, "kind": kind} for layer, kind in ((0, "k"), (1, "k"), (3, "k"), (5, "q"))]
    assert words(PROOF | {"heads": 50, "uncovered": lacking}) == (
        "1,240 rows of 50 of 60 heads in all 6 layers (no queries in layer 5, no keys in layers 0-1, 3), "
        "positions to 4,095"
    )
    assert largest_difference(PROOF) == 0.01 and str(largest_difference(some)) == "nan"
    earlier = {"proven": True, "examples": [7], "tolerance": 0.1, "largest_difference_by_layer": {"0": 0.01}}
    assert words(earlier) == "rows of 1 example"


def test_it_says_which_attention_summaries_were_compared() -> None:
    made = {"rows": 90, "heads": 8, "uncovered": [], "tolerance": 0.005, "largest_difference_by_layer": {"0": 1e-7}}
    assert of_summaries(PROOF, heads=8, layers=1) == ""
    assert of_summaries(PROOF | {"summaries": made}, heads=8, layers=1) == (
        "attention summaries of 8 heads in the only layer"
    )
    assert of_summaries(PROOF | {"summaries": {"reason": "a bias"}}, heads=8, layers=1) == (
        "attention summaries not proven: a bias"
    )
    wrong = why(PROOF | {"summaries": made | {"largest_difference_by_layer": {"0": 0.3}}})
    assert wrong.startswith("Attention summaries derived a second time") and "0.005 (relative): {'0': 0.3}" in wrong


def test_it_says_where_attention_was_checked_and_where_not() -> None:
    assert attention(PROOF) == "attention itself at 6 positions to 131,071"
    skipped = CHECK | {"passed": None, "reason": "no kernel"}
    assert attention({"attention": [skipped]}) == "attention itself not checked (full attention: no kernel)"
    assert attention({"attention": [PROOF["attention"][1], skipped]}) == (
        "attention itself at 4 positions to 9 (not checked: full attention: no kernel)"
    )
    assert attention({}) == "attention itself not checked"


def test_it_says_why_a_proof_failed() -> None:
    wrong = CHECK | {"passed": False, "largest_difference": 0.71, "wrong_positions": [65_536, 131_071]}
    kernel = why(PROOF | {"attention": [wrong]})
    assert kernel.startswith(
        "Layer 3 (full attention), positions 65536, 131071 of a text of 131,072 tokens: the output of the attention "
        "kernel differs by up to 0.71 (relative) from softmax(q K) V"
    )
    assert "Set model.attn_implementation to another kernel" in kernel and "from the model's projections" not in kernel
    assert "the attention kernel is not finite, and softmax(q K) V of" in why(
        PROOF | {"attention": [wrong | {"largest_difference": None}]}
    )
    rows = why(PROOF | {"largest_difference_by_layer": {"0": 0.2}})
    assert "differ by more than 0.1 (relative): {'0': 0.2} by layer" in rows and "attention kernel" not in rows
    assert "report this" in rows
    single = why(PROOF | {"row_tolerance": 0.5, "largest_row_difference_by_layer": {"0": 0.9, "1": 0.1}})
    assert single.startswith("Single rows of vectors derived a second time, from the model's projections, differ by")
    assert "more than 0.5 (relative): {'0': 0.9, '1': 0.1} by layer" in single and "report this" in single
