"""A mask that shows other keys than a layer declares is an error."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qk_sniffer.backbone.masks import Visible, check_mask, check_slots
from qk_sniffer.backbone.slots import PADDING, Slots
from qk_sniffer.errors import CaptureError

pytestmark = pytest.mark.floor

N = 12
FULL = Visible(None, None, is_sparse=False)


def mask(rules: Visible, n: int = N, *, additive: bool = False) -> torch.Tensor:
    row, column = torch.arange(n)[:, None], torch.arange(n)
    seen = (column <= row) & (column >= torch.tensor([rules.first(i) for i in range(n)])[:, None])
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None] if additive else seen[None, None]


def check(rules: Visible, mask: Any, n: int = N) -> None:
    check_mask(nn.Linear(1, 1), n, rules, {"attention_mask": mask})


WINDOW, CHUNK = Visible(5, None, is_sparse=False), Visible(None, 5, is_sparse=False)
BOTH, WHOLE = Visible(3, 5, is_sparse=False), Visible(N, None, is_sparse=False)


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("rules", [FULL, WINDOW, CHUNK, BOTH, WHOLE])
def test_a_mask_as_declared_is_accepted(rules: Visible, additive: bool) -> None:
    for n in (2, 3, N):
        check(rules, mask(rules, n, additive=additive), n)


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize(
    ("declared", "real", "message"),
    [
        (FULL, WINDOW, "within a window of 5 tokens, but no window is declared: a family can declare it"),
        (Visible(4, None, is_sparse=False), WINDOW, "within a window of 5 tokens, but a window of 4 is declared"),
        (WINDOW, FULL, "without a window, but a window of 5 is declared"),
        (FULL, CHUNK, "hides keys that its facts do not exclude"),
        (CHUNK, FULL, "or shows keys that they do"),
        (CHUNK, WINDOW, "within a window of 5 tokens, but no window is declared"),
    ],
)
def test_a_mask_of_another_rule_is_refused(declared: Visible, real: Visible, message: str, additive: bool) -> None:
    with pytest.raises(CaptureError, match=message):
        check(declared, mask(real, additive=additive))


def test_keys_that_are_hidden_from_some_heads_alone_are_refused() -> None:
    of_heads = mask(FULL).repeat(1, 2, 1, 1)
    check(FULL, of_heads)
    of_heads[0, 1, -1, 3] = False
    with pytest.raises(CaptureError, match="hides keys that its facts do not exclude"):
        check(FULL, of_heads)
    check(Visible(None, None, is_sparse=True), of_heads)


@pytest.mark.parametrize(
    ("kernel", "hint"), [("sdpa", r": set model\.attn_implementation=eager$"), ("eager", "captured$")]
)
def test_a_decoder_whose_kernel_gets_no_causal_mask_is_told_of_the_eager_one(kernel: str, hint: str) -> None:
    module: Any = nn.Linear(1, 1)
    module.config = SimpleNamespace(_attn_implementation=kernel)
    with pytest.raises(CaptureError, match=rf"Linear is not causal.*{hint}"):
        check_mask(module, N, FULL, {"attention_mask": torch.zeros(1, 1, N, N)})


def test_each_rule_of_unmasked_attention_over_the_same_slots_is_checked() -> None:
    """A check that one layer has passed says nothing of a layer that sees other keys, or fewer."""
    slots, module = Slots(np.arange(6)[None]), nn.Identity()
    windowed, whole = Visible(2, None, is_sparse=False), FULL
    unmasked = {"attention_mask": None, "is_causal": True}
    for _ in range(2):
        check_slots(module, 1, 2, windowed, unmasked, slots)
        check_slots(module, 1, 6, whole, unmasked, slots)
        with pytest.raises(CaptureError, match="dropped keys"):
            check_slots(module, 1, 2, whole, unmasked, slots)
    check_slots(module, 2, 6, whole, unmasked, slots)
    with pytest.raises(CaptureError, match="not causal"):
        check_slots(module, 2, 6, whole, unmasked | {"is_causal": False}, slots)


def test_padding_that_no_mask_hides_is_refused_where_the_kernel_takes_masks() -> None:
    slots, rules = Slots(np.array([[PADDING, 0, 1]])), FULL
    check_slots(nn.Identity(), 1, 3, rules, {}, slots)  # a kernel that hides padding itself
    with pytest.raises(CaptureError, match="attends to padding"):
        check_slots(nn.Identity(), 1, 3, rules, {"attention_mask": None}, slots)


def _with(mask: torch.Tensor, query: slice | int, key: slice | int, value: Any) -> torch.Tensor:
    mask = mask.clone()
    mask[..., query, key] = value
    return mask


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (_with(mask(FULL), 4, 2, False), "hides keys that its facts and the padding"),
        (_with(mask(FULL), slice(4, 7), slice(4, 7), True), "not causal"),
        (_with(mask(FULL, additive=True), 4, 6, 0.0), "not causal"),
        (_with(mask(FULL, additive=True), slice(6, 7), 3, -2.0), "adds terms to the logits"),
    ],
)
def test_every_query_of_a_mask_is_compared(given: torch.Tensor, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a block of an image in the middle of a prompt, whose tokens see each other both ways."""
    slots = Slots(np.arange(N)[None])
    monkeypatch.setattr("qk_sniffer.backbone.masks._QUERIES", 5)
    for whole in (mask(FULL), mask(FULL, additive=True)):
        check_slots(nn.Identity(), N, N, FULL, {"attention_mask": whole}, slots)
    with pytest.raises(CaptureError, match=message):
        check_slots(nn.Identity(), N, N, FULL, {"attention_mask": given}, slots)


def test_declared_terms_of_a_mask_are_accepted() -> None:
    biased = {"attention_mask": _with(mask(FULL, additive=True), 6, 3, -2.0)}
    check_slots(nn.Identity(), N, N, FULL, biased, Slots(np.arange(N)[None]), has_bias=True)


def test_padding_queries_of_a_mask_may_see_anything() -> None:
    slots = Slots(np.array([[PADDING, PADDING, *range(N - 2)]]))
    given = _with(mask(FULL), slice(0, N), slice(0, 2), False)
    check_slots(nn.Identity(), N, N, FULL, {"attention_mask": _with(given, 1, slice(0, 2), True)}, slots)
