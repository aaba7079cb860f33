"""Banded attention equals masked attention within rounding, builds no n x n mask, and leaves other masks alone."""

import pytest
import torch
from support.zoo import CASES, Case, ids
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Llama4TextConfig
from transformers.masking_utils import create_chunked_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qk_sniffer.backbone.banded_attention import Band, banded

pytestmark = pytest.mark.floor

sliding_cases = pytest.mark.parametrize(
    "case",
    [case for case in CASES if any(case.sliding_windows) and "sdpa" in case.kernels],
    ids=lambda case: case.name,
)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns, in elements."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@sliding_cases
@pytest.mark.parametrize("length", [13, 14, 40, 255, 256, 257, 700])
def test_hidden_states_agree_with_the_masked_path(case: Case, length: int) -> None:
    decoder = case.decoder()
    tokens = ids(length=length)
    with torch.no_grad():
        masked = decoder(input_ids=tokens, use_cache=False).last_hidden_state
        with banded():
            band = decoder(input_ids=tokens, use_cache=False).last_hidden_state
        after = decoder(input_ids=tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(band, masked, rtol=1e-4, atol=1e-4)
    assert torch.equal(after, masked)


@sliding_cases
def test_no_mask_of_n_by_n_is_built(case: Case) -> None:
    decoder = case.decoder()
    tokens = ids(batch=1, length=2048)
    with torch.no_grad():
        with Largest() as masked:
            decoder(input_ids=tokens, use_cache=False)
        with banded(), Largest() as band:
            decoder(input_ids=tokens, use_cache=False)
    assert masked.elements >= 2048**2
    assert band.elements < 2048**2 / 4


def test_only_a_plain_sliding_window_becomes_a_band() -> None:
    case = next(case for case in CASES if case.name == "mistral")
    config = case.model().config
    embeds = torch.zeros(1, 40, 32)
    with banded():
        assert create_sliding_window_causal_mask(config, embeds, None, None) == Band(12)
        padded = create_sliding_window_causal_mask(config, embeds, torch.tensor([[1] * 30 + [0] * 10]), None)
        overlaid = create_sliding_window_causal_mask(
            config, embeds, None, None, or_mask_function=lambda batch, head, query, key: key == 0
        )
        chunked_config = Llama4TextConfig(attention_chunk_size=12, attn_implementation="sdpa")
        chunked = create_chunked_causal_mask(chunked_config, embeds, None, None)
    for mask in (padded, overlaid, chunked):
        assert isinstance(mask, torch.Tensor) and mask.shape[-2:] == (40, 40)


def test_the_kernels_are_put_back_also_after_an_exception() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(ZeroDivisionError), banded():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
        raise ZeroDivisionError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_arguments_by_query_and_key_are_cut_like_the_mask() -> None:
    torch.manual_seed(0)
    length, window = 700, 14
    query, key, value = torch.randn(2, 4, length, 8), torch.randn(2, 4, length, 8), torch.randn(2, 4, length, 8)
    bias = torch.randn(2, 4, length, length)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    mask = torch.where((distance >= 0) & (distance < window), bias, -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
    with banded():
        kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
        found, _ = kernel(torch.nn.Module(), query, key, value, Band(window), position_bias=bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
