"""Banded attention equals masked attention within rounding, builds no n x n mask, and leaves other masks alone."""

from typing import Any

import pytest
import torch
from support.simulated_cuda import simulated_cuda
from support.zoo import CASES, Case, ids
from torch import nn
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


@pytest.mark.few(8)
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


@pytest.mark.few(3)
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


def attended_in_blocks(
    window: int, length: int, heads: tuple[int, int], device: str, *, biased: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output of a band of random vectors on a device, and that of a mask on the CPU, (B, n, H, d)."""
    draw = torch.Generator().manual_seed(length)
    query, *others = (torch.randn(2, count, length, 8, generator=draw) for count in (heads[0], heads[1], heads[1]))
    module = nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]  # type: ignore[assignment]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    mask, arguments = (distance >= 0) & (distance < window), {}
    if biased:
        arguments["position_bias"] = torch.randn(1, heads[0], length, length, generator=draw)
        mask = torch.where(mask, arguments["position_bias"], -torch.inf)
    repeated = [states.repeat_interleave(heads[0] // heads[1], dim=1) for states in others]
    expected = nn.functional.scaled_dot_product_attention(query, *repeated, mask).transpose(1, 2)
    on_device: list[Any] = [states.to(device) for states in (query, *others)]
    with banded():
        kernel: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        moved = {name: value.to(device) for name, value in arguments.items()}
        found, _ = kernel(module, *on_device, Band(window), **moved)
    return found.cpu(), expected


SHAPES = [
    *((window, length) for window in (2, 12, 300) for length in (window + 2, 289, 513, 700)),
    (300, 256 + 256 + 1),  # the last block has one query, and 300 + 1 keys
    (1300, 1302),
    (1300, 325 * 5 + 33),
]
"""Windows and lengths: one block and several, and last blocks of one query and of all."""


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
def test_blocks_of_all_shapes_attend_within_the_window(heads: tuple[int, int]) -> None:
    for window, length in SHAPES:
        found, expected = attended_in_blocks(window, length, heads, "cpu")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
def test_blocks_on_cuda_have_aligned_keys_of_their_own_and_no_plans(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = nn.functional.scaled_dot_product_attention
    shapes: list[tuple[int, int]] = []

    def seeing(query: Any, key: Any, value: Any, attn_mask: Any, **arguments: Any) -> Any:
        if not query.is_cuda:  # of the mask
            return plain(query, key, value, attn_mask=attn_mask)
        shapes.append((query.shape[2], key.shape[2]))
        assert key.shape[2] % 64 == attn_mask.shape[-1] % 64 == 0 and not torch.backends.cuda.cudnn_sdp_enabled()
        assert 0 not in key.stride() and 0 not in value.stride()
        return plain(query, key, value, attn_mask=attn_mask, **arguments)

    with simulated_cuda("at once"):
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", seeing)
        found = [attended_in_blocks(*shape, heads, "cuda:0") for shape in SHAPES]
    for one, expected in found:
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert {(1, 320), (2, 320)} & {*shapes} and max(keys for _, keys in shapes) < 1300 + 325 + 64


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_arguments_by_query_and_key_are_cut_like_the_mask(device: str) -> None:
    with simulated_cuda("at once"):
        found, expected = attended_in_blocks(14, 700, (4, 4), device, biased=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_mask_of_a_large_window_is_of_a_block() -> None:
    query = torch.empty(1, 1, 131_072, 8, device="meta")
    with banded(), Largest() as largest:
        kernel: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        kernel(nn.Module(), query, query, query, Band(32_768))
    assert largest.elements == 2048 * (32_768 + 2048 - 1)
