"""Runs a decoder step by step with a key-value cache under the tap, and compares it with one pass over the same tokens.

Shapes: B rows, n tokens of a row, H heads, d head_dim, W numbers of a summary.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from recording import recorded
from summaries import MOST_SLOTS, SINK_TOKENS, Summaries, summarized, table_of, weights_and_logits
from summaries import differences as wrong_columns

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.backbone.slots import PADDING, Slots
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.capture.attention_summary import Summarizer
from qk_sniffer.capture.gather import TokenIndices, send
from qk_sniffer.capture.sampling import Picks
from qk_sniffer.store.attention_table import INTEGERS, NO_KEY

TABLE = table_of(MOST_SLOTS)
TOP_POSITION = TABLE.places["top_position"]

Seen = dict[tuple[int, str], list[torch.Tensor]]
"""By (layer, kind) the states (H, n, d) of each row; kind a has the attention summaries."""


class Passes:
    """Passes with a cache over tokens of `ids` (B, n), `steps` slots each.

    The tokens of a row fill the slots in which `held` (B, slots) is true, in order; the others are padding. None: there
    is no padding, and the decoder receives no attention mask. `cache` None: the one that the decoder makes.
    """

    def __init__(
        self, decoder: Any, ids: torch.Tensor, steps: Sequence[int], *, cache: Any = None, held: Any = None
    ) -> None:
        self._decoder = decoder
        self._steps = steps
        self._cache = cache
        self._is_masked = held is not None
        held = np.ones(ids.shape, bool) if held is None else np.asarray(held, bool)
        self._position = np.where(held, held.cumsum(axis=1) - 1, PADDING)
        self._ids = torch.zeros(held.shape, dtype=torch.int64)
        for row, tokens, at in zip(self._ids, ids, held, strict=True):
            row[torch.from_numpy(at)] = tokens[: at.sum()]
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
            self._cache = getattr(output, "past_key_values", self._cache)
            hidden.append(output[0])
            done += step
        whole = torch.cat(hidden, dim=1)
        return [row[torch.from_numpy(held)] for row, held in zip(whole, self.slots.position >= 0, strict=True)]


def left_padded(padding: Sequence[int], slots: int) -> np.ndarray:
    """Returns `held` of rows that begin with so many slots of padding each."""
    return np.arange(slots) >= np.array(padding)[:, None]


def at_once(backbone: Backbone, ids: torch.Tensor, kinds: str = "qkvoa") -> Seen:
    """Returns the states of one pass without a cache, as a job shows them."""
    recorder = _Recorder(len(ids), kinds)
    backbone.forward(ids, recorder.see, on_output=recorder.see_output)
    return recorder.joined()


def decoded(backbone: Backbone, passes: Passes, kinds: str = "qkvoa") -> tuple[Seen, list[torch.Tensor]]:
    """Returns the states that the tap shows in the passes, and the hidden states that these return."""
    recorder = _Recorder(len(passes.slots.position), kinds)
    opened = backbone.tapped(recorder.see, on_output=recorder.see_output, slots=lambda _: passes.slots)
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


def wrong_calls(backbone: Backbone, facts: Sequence[LayerFacts], make: Callable[[], Passes]) -> list[str]:
    """Returns where the tap shows other calls of attention than a recording of the same passes without the tap.

    Vectors and outputs must be equal, bit for bit, and attention summaries those of the weights of the eager kernel. So
    must the hidden states, which the tap does not change. The passes of `make` are of the same tokens each time.
    """
    passes = make()
    with torch.no_grad():
        calls, expected = recorded(backbone.decoder, torch.empty(0, 0), passes.run)
    shown: list[_Shown] = []
    opened = backbone.tapped(
        lambda call: shown.append(_Shown(call)),
        on_output=lambda call, output: shown[-1].outputs.append(output),
        slots=lambda _: passes.slots,
    )
    passes = make()
    with torch.no_grad(), opened:
        hidden = passes.run()
    wrong = [] if all(map(torch.equal, hidden, expected)) else ["the tap changes the forward pass"]
    if len(calls) != len(shown):
        return [*wrong, f"{len(calls)} calls of attention, {len(shown)} shown"]
    by_layer = {fact.heads.layer: fact for fact in facts}
    rows: dict[tuple[int, int], _Row] = {}
    for call, own in zip(calls, shown, strict=True):
        fact, n = by_layer[own.layer], own.query.shape[2]
        key = call.key[:, :, call.key.shape[2] - n :]
        if not (torch.equal(own.query, call.query) and torch.equal(own.key, key)):
            wrong.append(f"layer {own.layer}: the vectors are not those that attention receives")
        if isinstance(fact.output_dim, int) and isinstance(fact.value_dim, int):
            assert call.value is not None and call.output is not None
            value = call.value[:, :, call.value.shape[2] - n :, : fact.value_dim]
            if not (torch.equal(own.value, value) and torch.equal(own.outputs[0], call.output[..., : fact.output_dim])):
                wrong.append(f"layer {own.layer}: values or outputs are not those of the kernel")
        weights, logits = weights_and_logits(fact, call)
        for row, of_row in enumerate(own.rows):
            rows.setdefault((own.layer, row), _Row()).add(of_row, weights[row], logits[row])
    return wrong + [f"layer {layer} row {row}: {what}" for (layer, row), one in rows.items() for what in one.wrong()]


class _Shown:
    """A copy of a call that the tap shows, and its summaries of each row."""

    def __init__(self, call: AttentionCall) -> None:
        assert call.slots is not None
        self.layer = call.layer
        self.query, self.key = call.query.clone(), call.key.clone()
        self.value = call.query[:0] if call.value is None else call.value.clone()
        self.outputs: list[torch.Tensor] = []
        self.rows = []
        for position in call.slots.last(call.attended[1].shape[2]):
            places = np.flatnonzero(position[-call.query.shape[2] :] >= 0)
            self.rows.append((position, places, summarized(call, len(self.rows), places=places)))


class _Row:
    """The summaries of a row, and the eager weights and logits of its tokens in all passes."""

    def __init__(self) -> None:
        self._parts: list[tuple[Summaries, np.ndarray, np.ndarray | None]] = []

    def add(self, of_row: tuple[np.ndarray, np.ndarray, Summaries], weights: np.ndarray, logits: Any) -> None:
        """Adds a pass with `weights` and `logits` (H, n, m or more)."""
        position, places, summaries = of_row
        held = position >= 0

        def by_position(values: np.ndarray, absent: float) -> np.ndarray:
            placed = np.full((values.shape[0], len(places), MOST_SLOTS), absent)
            placed[:, :, position[held]] = values[:, places][..., : len(position)][..., held]
            return placed

        self._parts.append(
            (summaries, by_position(weights, 0.0), None if logits is None else by_position(logits, -np.inf))
        )

    def wrong(self) -> list[str]:
        """Returns the columns that differ."""
        summaries, weights, logits = zip(*self._parts, strict=True)
        names = summaries[0].columns
        columns = {name: np.concatenate([one.columns[name] for one in summaries], axis=1) for name in names}
        n = columns["num_keys"].shape[1]
        together = np.concatenate(weights, axis=1)[..., :n]
        of_logits = None if logits[0] is None else np.concatenate(logits, axis=1)[..., :n]
        return [*wrong_columns(Summaries(summaries[0].table, columns), together, of_logits)]


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
    picks = Picks(np.full(len(places), row, np.int32), places.astype(np.int32))
    out = torch.empty(len(heads), len(places), TABLE.width)
    sent = send({"q": TokenIndices.of(picks, out.device)}, out.device)["q"]
    Summarizer(TABLE, SINK_TOKENS, {call.layer: heads}).write(call, sent, out)
    for name in INTEGERS:
        place = TABLE.places[name]
        out[..., place] = out[..., place].contiguous().view(torch.int32).float()
    weight, position = out[..., TABLE.places["top_weight"]], out[..., TOP_POSITION]
    distance = -weight.diff(dim=-1, append=weight.new_zeros(*weight.shape[:-1], 1))
    position[(distance < 1e-3) | (distance.roll(1, -1) < 1e-3)] = NO_KEY
    return out
