"""Captures the same tokens in all layers, and in several models that share a tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import heads_of, keys, run
from support.zoo import CASES

SAMPLED = {"type": "uniform", "base_rate": 4.0, "min_bucket_size": 16}
LLAMA = next(case for case in CASES if case.name == "llama")


@pytest.fixture
def both(
    request: pytest.FixtureRequest, undisturbed: Callable[..., Path], folder_of: Any, texts: Path, tmp_path: Path
) -> list[dict[str, list[tuple[int, int]]]]:
    """The tokens of each head, in datasets of two models."""
    sampler = SAMPLED | request.param
    other = run(folder_of(LLAMA), texts, tmp_path / "llama", sampler=sampler)
    return [
        {name: keys(head) for name, head in heads_of(root).items()} for root in (undisturbed(sampler=sampler), other)
    ]


@pytest.mark.parametrize("both", [{"share": "example"}], indirect=True)
def test_all_heads_of_all_models_have_the_same_tokens(both: list[dict[str, list[tuple[int, int]]]]) -> None:
    one, other = both
    found = [*one.values(), *other.values()]
    assert len(found) > 20 and len(found[0]) > 50
    assert all(tokens == found[0] for tokens in found)


@pytest.mark.parametrize("both", [{}], indirect=True)
def test_without_sharing_the_heads_of_one_layer_and_kind_have_the_same_tokens_in_all_models(
    both: list[dict[str, list[tuple[int, int]]]],
) -> None:
    one, other = both
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one)
    assert one["l00h00q"] != one["l01h00q"] and one["l00h00q"] != one["l00h00k"]
