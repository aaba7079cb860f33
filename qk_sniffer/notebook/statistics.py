"""Takes statistics of all tokens of the user's forward passes. A pass that fails leaves nothing in them.

The tokens of a large pass are added to sums of their own, which merge into the others when the pass ends. The tokens of
small passes, such as the steps of decoding, are kept until they are many: adding to the sums of a layer costs as much
for one token as for hundreds.

Shapes: B rows, H heads of the layer, n tokens of the pass, d numbers of a vector.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from qk_sniffer.capture.moments import Moments, Spans
from qk_sniffer.notebook.interrupts import deferred_interrupts
from qk_sniffer.store.statistics import Part, PartKey

FEW_TOKENS = 256
"""The most tokens of a small pass, and the tokens that are kept at most."""


class PassStatistics:
    """Statistics of the tokens of finished passes."""

    def __init__(self, empty: Callable[[], Moments]) -> None:
        """`empty` returns statistics of the captured heads without a token."""
        self._done, self._of_pass = empty(), empty()
        self._new: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
        self._kept: list[dict[tuple[int, str], dict[str, torch.Tensor]]] = []
        self._num_new = self._num_kept = 0
        self._lock = threading.RLock()  # another thread may read while passes end

    @property
    def skip_tokens(self) -> int:
        """The first positions of each example that are left out, this many."""
        return self._done.config.skip_tokens

    def add(self, layer: int, kind: str, states: Mapping[str, torch.Tensor], spans: Sequence[Spans]) -> None:
        """Adds the tokens in `spans` of each row of the pass. `states` (B, H, n, d) are those of the kind by stage."""
        count = sum(stop - start for of_row in spans for start, stop in of_row)
        if count > FEW_TOKENS:
            self._of_pass.add_stages(layer, kind, states, spans)
        elif count:
            pieces = [(row, start, stop) for row, of_row in enumerate(spans) for start, stop in of_row]
            self._num_new = count
            self._new[layer, kind] = {
                stage: torch.cat([of_stage[row, :, start:stop] for row, start, stop in pieces], dim=1)
                for stage, of_stage in states.items()
            }

    def end_pass(self) -> None:
        """Keeps the tokens of the pass."""
        with self._lock:
            self._done.merge(self._of_pass)
            if self._new:
                self._kept.append(self._new)
                self._num_kept += self._num_new
                self._new = {}
            if self._num_kept >= FEW_TOKENS:
                self._add_kept()

    def drop_pass(self) -> None:
        """Forgets the tokens of the pass."""
        self._of_pass.clear()
        self._new = {}

    def part(self, key: PartKey) -> Part | None:
        """Returns the statistics of all finished passes for a key, on the host; None if no pass has ended."""
        with self._whole() as done:
            return done.part(key)

    def parts(self) -> dict[PartKey, Part]:
        """Returns the statistics of all finished passes, on the host."""
        with self._whole() as done:
            return done.parts()

    @contextmanager
    def _whole(self) -> Iterator[Moments]:
        """Returns the statistics of all finished passes. None ends while they are read."""
        with deferred_interrupts(), self._lock:
            self._add_kept()
            yield self._done

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _add_kept(self) -> None:
        for layer, kind in {key for of_pass in self._kept for key in of_pass}:
            of_passes = [of_pass[layer, kind] for of_pass in self._kept if (layer, kind) in of_pass]
            states = {stage: torch.cat([each[stage] for each in of_passes], dim=1)[None] for stage in of_passes[0]}
            count = next(iter(states.values())).shape[2]
            self._done.add_stages(layer, kind, states, [[(0, count)]])
        self._kept.clear()
        self._num_kept = 0
