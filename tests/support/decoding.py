"""Runs a decoder step by step with a key-value cache under the tap, and compares it with one pass over the same tokens.

Shapes: B rows, n tokens of a row, H heads, d head_dim, W numbers of a summary.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.slots import PADDING, Slots
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.capture.attention_summary import Summarizer
from qk_sniffer.capture.gather import TokenIndices, send
from qk_sniffer.capture.sampling import Picks
from qk_sniffer.config import from_dict
from qk_sniffer.store.attention_table import INTEGERS, AttentionTable

Seen = dict[tuple[int, str], list[torch.Tensor]]
"""By (layer, kind) the states (H, n, d) of each row; kind a has the attention summaries."""


class Passes:
    """Passes with a cache over the first tokens of `ids` (B, n), `steps` tokens each.

    Row b has `padding[b]` slots of padding on the left, and as many tokens fewer. None: no row has, and the decoder
    receives no attention mask. `cache` None: the one that the decoder makes.
    """

    def __init__(
        self,
        decoder: Any,
        ids: torch.Tensor,
        steps: Sequence[int],
        *,
        cache: Any = None,
        padding: Sequence[int] | None = None,
    ) -> None:
        self._decoder = decoder
        self._steps = steps
        self._cache = cache
        self._is_masked = padding is not None
        pads = [0] * len(ids) if padding is None else padding
        position = np.arange(ids.shape[1])[None] - np.array(pads)[:, None]
        self._position = np.where(position < 0, PADDING, position)
        self._ids = torch.stack([row.roll(pad) for row, pad in zip(ids, pads, strict=True)])
        self._ids[torch.from_numpy(self._position == PADDING)] = 0
        self.slots = Slots(self._position[:, : steps[0]])
        """Of the running pass."""

    def run(self) -> list[torch.Tensor]:
        """Runs the passes; returns the last hidden states (n, width) of the tokens of each row."""
        accepted = inspect.signature(self._decoder.forward).parameters
        hidden: list[torch.Tensor] = []
        done = 0
        for step in self._steps:
            self.slots = Slots(self._position[:, : done + step])
            arguments: dict[str, Any] = {}
            if self._is_masked:
                arguments["attention_mask"] = torch.from_numpy((self.slots.position >= 0).astype(np.int64))
            if self._is_masked and "position_ids" in accepted:
                arguments["position_ids"] = torch.from_numpy(self.slots.last(step).clip(min=0))
            ids = self._ids[:, done : done + step]
            output = self._decoder(input_ids=ids, past_key_values=self._cache, use_cache=True, **arguments)
            self._cache = output.past_key_values
            hidden.append(output[0])
            done += step
        whole = torch.cat(hidden, dim=1)
        return [row[torch.from_numpy(held)] for row, held in zip(whole, self.slots.position >= 0, strict=True)]


def at_once(backbone: Backbone, ids: torch.Tensor, kinds: str = "qkvoa") -> Seen:
    """Returns the states of one pass without a cache, as a job shows them."""
    recorder = _Recorder(len(ids), kinds)
    backbone.forward(ids, recorder.see, on_output=recorder.see_output)
    return recorder.joined()


def decoded(backbone: Backbone, passes: Passes, kinds: str = "qkvoa") -> tuple[Seen, list[torch.Tensor]]:
    """Returns the states that the tap shows in the passes, and the hidden states that these return."""
    recorder = _Recorder(len(passes.slots.position), kinds)
    opened = backbone.tapped(recorder.see, on_output=recorder.see_output, slots=lambda: passes.slots)
    with torch.no_grad(), opened:
        hidden = passes.run()
    return recorder.joined(), hidden


def differences(found: Seen, expected: Seen, tolerance: float = 1e-4) -> list[str]:
    """Returns where `found` differs from `expected`, of which it may have the first tokens of each row only."""
    if found.keys() != expected.keys():
        return [f"shown {sorted(found)}, expected {sorted(expected)}"]
    wrong = []
    for (layer, kind), rows in found.items():
        for row, (states, wanted) in enumerate(zip(rows, expected[layer, kind], strict=True)):
            wanted = wanted[:, : states.shape[1]]
            if states.shape != wanted.shape:
                wrong.append(f"layer {layer} {kind} row {row}: shape {states.shape}, expected {wanted.shape}")
            elif not torch.allclose(states, wanted, rtol=tolerance, atol=tolerance):
                largest = float((states - wanted).abs().max())
                wrong.append(f"layer {layer} {kind} row {row}: differs by up to {largest:.2g}")
    return wrong


class _Recorder:
    """Copies the states of each call, without those of padding."""

    def __init__(self, rows: int, kinds: str) -> None:
        self._rows = rows
        self._kinds = kinds
        self._parts: dict[tuple[int, str], list[list[torch.Tensor]]] = {}

    def see(self, call: AttentionCall) -> None:
        for kind, states in (("q", call.query), ("k", call.key), ("v", call.value)):
            if states is not None:
                self._add(call, kind, states)
        if "a" in self._kinds:
            self._parts.setdefault((call.layer, "a"), [[] for _ in range(self._rows)])
            for row, parts in enumerate(self._parts[call.layer, "a"]):
                parts.append(summaries(call, row, self._places(call, row)))

    def see_output(self, call: AttentionCall, output: torch.Tensor | None) -> None:
        if output is not None:
            self._add(call, "o", output)

    def joined(self) -> Seen:
        return {key: [torch.cat(parts, dim=1) for parts in rows] for key, rows in self._parts.items()}

    def _add(self, call: AttentionCall, kind: str, states: torch.Tensor) -> None:
        if kind not in self._kinds:
            return
        self._parts.setdefault((call.layer, kind), [[] for _ in range(self._rows)])
        for row, parts in enumerate(self._parts[call.layer, kind]):
            parts.append(states[row][:, torch.from_numpy(self._places(call, row))].clone())

    @staticmethod
    def _places(call: AttentionCall, row: int) -> np.ndarray:
        """Returns the places of the tokens of a row among its n ones."""
        n = call.query.shape[2]
        return np.arange(n) if call.slots is None else np.flatnonzero(call.slots.last(n)[row] >= 0)


def summaries(call: AttentionCall, row: int, places: np.ndarray) -> torch.Tensor:
    """Returns the summaries (H, queries, W) of the queries at `places` of a row, integers as numbers.

    A key whose weight is that of the next one, but for rounding, has no position.
    """
    heads = range(call.query.shape[1])
    table = AttentionTable.of(
        from_dict(
            {
                "capture": {"attention": {"enabled": True, "top_k": 4, "sink_tokens": 3}},
                "model": {"tokenizer": {"max_length": 64}},
            }
        )
    )
    assert table is not None
    picks = Picks(np.full(len(places), row, np.int32), places.astype(np.int32))
    out = torch.empty(len(heads), len(places), table.width)
    sent = send({"q": TokenIndices.of(picks, out.device)}, out.device)["q"]
    Summarizer(table, 3, {call.layer: heads}).write(call, sent, out)
    for name in INTEGERS:
        place = table.places[name]
        out[..., place] = out[..., place].contiguous().view(torch.int32).float()
    weight, position = out[..., table.places["top_weight"]], out[..., table.places["top_position"]]
    distance = -weight.diff(dim=-1, append=weight.new_zeros(*weight.shape[:-1], 1))
    is_unsure = (distance < 1e-3) | (distance.roll(1, -1) < 1e-3)
    position[is_unsure] = 0
    return out
