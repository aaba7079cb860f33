"""Accumulates statistics of heads over all tokens of the forward passes, on the device of the states.

The vectors of a batch are taken in pieces of bounded size. Each piece gives a count, a mean that is summed in float64,
as it may be near 0 next to the vectors, and centered moments in float32, which do not cancel because they are centered.
It merges into float64 sums (`store/statistics.py` has the formula). A piece with a head whose squares float32 might not
hold, because they are too large or too small, is computed in float64. Padding never counts.

Shapes: B batch, H heads that are kept, n tokens, d numbers of a vector, f rotary frequencies, p tokens of a piece.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.backbone.rotation import Frequencies
from qk_sniffer.config import STAGES, StatisticsConfig
from qk_sniffer.store.layout import UNROTATED_KINDS
from qk_sniffer.store.statistics import Pairs, Part, PartKey, paired, stages_of

Spans = Sequence[tuple[int, int]]
"""Tokens of a text: the first one and the one after the last, of each span."""

PIECE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""The bytes of a piece in float32, by the type of the device. A GPU waits for the largest number of each head and
piece, and for the starts of some thirty kernels."""

LARGE, SMALL = 1e15, 1e-15
"""A piece is computed in float64 if the largest number of a head is above LARGE, or below SMALL and not 0. The squares
of 2**23 numbers, as many as a piece has, of the size LARGE have a sum in float32, and those of the size SMALL have all
their digits. Heads that training has left unused have smaller ones."""


def rotary_pairs(layer: LayerFacts, frequencies: Mapping[str, Frequencies]) -> Pairs | None:
    """Returns the two components of a head that turn with each frequency of a layer; None if they are not known."""
    if not isinstance(layer.rotation, dict):
        return None
    return paired(layer.rotation, len(frequencies[layer.rotation["frequencies"]].inv_freq))


def states_by_stage(
    stage: str, kind: str, states: torch.Tensor, others: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Returns the states of a kind by stage: `states` of `stage`, and `others` of the other one, if they are shown.

    Kinds that are not rotated have the same states in both stages.
    """
    if kind in UNROTATED_KINDS:
        return dict.fromkeys(STAGES, states)
    found = {stage: states}
    return found if others is None else found | {other: others for other in STAGES if other != stage}


@dataclass
class _Sums:
    """The part of the heads of one key so far, on their device, in float64."""

    count: torch.Tensor  # (H,)
    nonfinite: torch.Tensor  # (H,)
    mean: torch.Tensor  # (H, d)
    moment: torch.Tensor  # (H, d, d) or (H, d)
    minimum: torch.Tensor  # (H, d)
    maximum: torch.Tensor  # (H, d)
    norm: torch.Tensor  # (H, 2)
    modulus: torch.Tensor  # (H, f)

    @classmethod
    def empty(cls, heads: int, d: int, f: int, *, covariance: bool, device: torch.device) -> "_Sums":
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(heads, *shape, dtype=torch.float64, device=device)

        return cls(
            zeros(),
            zeros(),
            zeros(d),
            zeros(d, d) if covariance else zeros(d),
            zeros(d) + torch.inf,
            zeros(d) - torch.inf,
            zeros(2),
            zeros(f),
        )

    def add(self, vectors: torch.Tensor, pairs: torch.Tensor | None, buffer: torch.Tensor) -> None:
        """Adds vectors (H, p, d) in float32. `pairs` (2, f) are their components by frequency.

        Overwrites `buffer`, of at least H p d numbers in float32: the pages of new memory cost more than arithmetic.
        """
        low, high = vectors.amin(dim=1), vectors.amax(dim=1)
        sizes = torch.maximum(-low, high).amax(dim=1).tolist()  # of the heads; NaN or Inf if there is any
        finite, kept, count = None, vectors, torch.full_like(self.count, vectors.shape[1])
        nonfinite = torch.zeros_like(count)
        if not all(map(math.isfinite, sizes)):
            finite = torch.isfinite(vectors).all(dim=-1)
            count = finite.sum(dim=1).double()
            nonfinite = finite.shape[1] - count
            low = torch.where(finite[..., None], vectors, torch.inf).amin(dim=1)
            high = torch.where(finite[..., None], vectors, -torch.inf).amax(dim=1)
            kept = torch.where(finite[..., None], vectors, 0.0)
            sizes = kept.abs().amax(dim=(1, 2)).tolist()
        if any(size > LARGE or 0 < size < SMALL for size in sizes):
            kept = kept.double()
        divisor = count.clamp(min=1)[:, None]
        mean = _sums(kept) / divisor
        center = mean.to(kept.dtype)
        out = buffer[: kept.numel()].view(kept.shape) if kept.dtype == buffer.dtype else None
        centered = torch.sub(kept, center[:, None], out=out)
        if finite is not None:
            centered = torch.where(finite[..., None], centered, 0.0)
        rest = mean - center.double()  # the distances are those from a rounded mean
        if self.moment.dim() == 3:
            moment = torch.bmm(centered.transpose(1, 2), centered).double()
            moment -= rest[:, :, None] * rest[:, None, :] * divisor[..., None]
        else:
            moment = centered.square_().sum(dim=1).double() - rest**2 * divisor
        norms = torch.linalg.vector_norm(kept, dim=-1)
        norm = norms.sum(dim=1).double() / divisor[:, 0]
        apart = norms.double() - norm[:, None]
        if finite is not None:
            apart = torch.where(finite, apart, 0.0)
        modulus = torch.zeros_like(self.modulus)
        if pairs is not None:
            modulus = torch.hypot(kept[..., pairs[0]], kept[..., pairs[1]]).sum(dim=1).double() / divisor
        spread = torch.stack([norm, apart.square().sum(dim=1)], dim=1)
        self.merge(_Sums(count, nonfinite, mean, moment, low.double(), high.double(), spread, modulus))

    def merge(self, other: "_Sums") -> None:
        """Adds the vectors of `other`, of the same heads."""
        total = self.count + other.count
        share = (other.count / total.clamp(min=1))[:, None]
        weight = self.count[:, None] * share
        change, step = other.mean - self.mean, other.norm[:, 0] - self.norm[:, 0]
        if self.moment.dim() == 3:
            self.moment += other.moment + change[:, :, None] * change[:, None, :] * weight[..., None]
        else:
            self.moment += other.moment + change**2 * weight
        self.mean += change * share
        self.norm[:, 1] += other.norm[:, 1] + step**2 * weight[:, 0]
        self.norm[:, 0] += step * share[:, 0]
        self.minimum = torch.minimum(self.minimum, other.minimum)
        self.maximum = torch.maximum(self.maximum, other.maximum)
        self.modulus += (other.modulus - self.modulus) * share
        self.nonfinite = self.nonfinite + other.nonfinite
        self.count = total

    def part(self) -> Part:
        arrays = {name: values.cpu().numpy() for name, values in vars(self).items()}
        whole = {name: arrays.pop(name).astype(np.int64) for name in ("count", "nonfinite")}
        return Part(**whole, **arrays)


@dataclass
class Moments:
    """Statistics of the selected heads since the last `take`."""

    config: StatisticsConfig
    heads: Mapping[tuple[int, str], Sequence[int]]
    """The heads of each (layer, kind), ascending."""
    pairs: Mapping[int, Pairs | None]
    """The components by rotary frequency, by layer."""
    _sums: dict[PartKey, _Sums] = field(default_factory=dict)
    _pairs: dict[tuple[int, torch.device], torch.Tensor] = field(default_factory=dict)
    _index: dict[tuple[int, str, torch.device], torch.Tensor] = field(default_factory=dict)
    """The heads on a device, sent once, where not all heads of a layer are kept."""
    _buffers: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def spans(self, lengths: Sequence[int], in_segments: Sequence[npt.NDArray[np.bool_]] | None) -> list[Spans]:
        """Returns the tokens of each text that statistics are of.

        `lengths` are those of the texts. `in_segments` (num_tokens,) each are their tokens in `sampler.segments`; None
        without that setting.
        """
        skip = self.config.skip_tokens
        if in_segments is None:
            return [[(skip, length)] if skip < length else [] for length in lengths]
        edges = [np.flatnonzero(np.diff(mask[skip:], prepend=False, append=False)) + skip for mask in in_segments]
        return [list(zip(each[::2].tolist(), each[1::2].tolist(), strict=True)) for each in edges]

    def add_stages(self, layer: int, kind: str, states: Mapping[str, torch.Tensor], spans: Sequence[Spans]) -> None:
        """Adds the tokens in `spans` of each text to the statistics of a kind. `states` has its states by stage."""
        for stage in stages_of(kind, self.config.stages):
            self.add(PartKey(layer, kind, stage), states[stage], spans)

    def add(self, key: PartKey, states: torch.Tensor, spans: Sequence[Spans]) -> None:
        """Adds the tokens in `spans` of each text of a batch. `states` is (B, heads of the layer, n, d)."""
        heads = self.heads[key.layer, key.kind]
        index = None if len(heads) == states.shape[1] else self._index_of(key, states.device)
        pairs = self._pairs_of(key, states.device)
        if key not in self._sums:
            self._sums[key] = _Sums.empty(
                len(heads),
                states.shape[-1],
                0 if pairs is None else pairs.shape[1],
                covariance=self.config.covariance,
                device=states.device,
            )
        row = len(heads) * states.shape[-1]
        step = max(1, PIECE_BYTES.get(states.device.type, PIECE_BYTES["cpu"]) // (4 * row))
        total = sum(stop - start for of_text in spans for start, stop in of_text)
        buffer = self._buffer(row * min(step, total), states.device)
        pieces, size = [], 0
        for place, start, last in ((place, *span) for place, of_text in enumerate(spans) for span in of_text):
            while start < last:
                stop = min(last, start + step - size)
                piece = states[place, :, start:stop] if index is None else states[place, index, start:stop]
                pieces.append(piece)
                size += stop - start
                start = stop
                if size == step:
                    self._sums[key].add(_joined(pieces), pairs, buffer)
                    pieces, size = [], 0
        if pieces:
            self._sums[key].add(_joined(pieces), pairs, buffer)

    def merge(self, other: "Moments") -> None:
        """Moves all tokens of `other`, of the same heads, to these statistics. Afterwards, `other` is empty."""
        for key, sums in other._sums.items():
            if key in self._sums:
                self._sums[key].merge(sums)
            else:
                self._sums[key] = sums
        other.clear()

    def clear(self) -> None:
        """Forgets all tokens."""
        self._sums.clear()

    def part(self, key: PartKey) -> Part | None:
        """Returns the part of a key since the last `take`, on the host; None without a token."""
        return self._sums[key].part() if key in self._sums else None

    def parts(self) -> dict[PartKey, Part]:
        """Returns the parts since the last `take`, on the host."""
        return {key: sums.part() for key, sums in self._sums.items()}

    def take(self) -> dict[PartKey, Part]:
        """Returns the parts since the last call, on the host, and forgets their tokens."""
        parts = self.parts()
        self.clear()
        return parts

    def _index_of(self, key: PartKey, device: torch.device) -> torch.Tensor:
        place = key.layer, key.kind, device
        if place not in self._index:
            self._index[place] = torch.tensor(self.heads[key.layer, key.kind], device=device)
        return self._index[place]

    def _buffer(self, size: int, device: torch.device) -> torch.Tensor:
        """Returns memory for at least `size` numbers, which is used again."""
        if device not in self._buffers or len(self._buffers[device]) < size:
            self._buffers.pop(device, None)
            self._buffers[device] = torch.empty(size, device=device)
        return self._buffers[device]

    def _pairs_of(self, key: PartKey, device: torch.device) -> torch.Tensor | None:
        pairs = self.pairs[key.layer] if key.stage == "pre" else None
        if pairs is None:
            return None
        if (key.layer, device) not in self._pairs:
            self._pairs[key.layer, device] = torch.tensor(pairs, device=device).reshape(-1, 2).T
        return self._pairs[key.layer, device]


def _sums(vectors: torch.Tensor) -> torch.Tensor:
    """Returns the sum over the tokens of vectors (H, p, d) in float64, as (H, d)."""
    if vectors.device.type != "cpu" or vectors.dtype == torch.float64:
        return vectors.sum(dim=1, dtype=torch.float64)
    # On a CPU, torch takes up to six times as long for all heads at once.
    return torch.stack([head.sum(dim=0, dtype=torch.float64) for head in vectors])


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0].float() if len(pieces) == 1 else torch.cat([*pieces], dim=1).float()
