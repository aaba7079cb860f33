"""Follows the examples through the user's forward passes: which tokens a pass adds to which, at which positions.

Each row of a batch is an example. A row of a pass that continues a cache is the example of that cache's row. Positions
are those of the pass's `position_ids`; without these they count the tokens of the attention mask, and without a mask
they go on from the length of the cache. Padding has no position.

Shapes: B rows, n tokens of the pass with padding, c slots of its cache, which are the tokens of earlier passes with
padding.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import Cache

from qk_sniffer.backbone.masks import is_visible
from qk_sniffer.backbone.slots import PADDING, Slots
from qk_sniffer.corpus.contents import ids_hash
from qk_sniffer.errors import CaptureError
from qk_sniffer.logs import logger
from qk_sniffer.store.journal import ExampleRecord

log = logger(__name__)

Bools = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(eq=False)
class Example:
    """One example so far."""

    number: int
    first: int
    """The position of its first token that a pass showed: above 0 if the capture began later than the example."""
    stop: int
    """The position after its last token."""
    ids: list[Int32] | None = field(default_factory=list)
    """The ids of its tokens from `first` on, by pass; None if a pass received embeddings instead."""
    has_stopped: bool = False
    """Whether generation has stopped its row. It feeds the row with padding while others go on."""

    def copy(self) -> "Example":
        """Returns the example as it is now."""
        return replace(self, ids=None if self.ids is None else [*self.ids])

    def record(self) -> ExampleRecord:
        """Returns its record. The hash is that of its token ids; it is empty if they are not all known."""
        is_known = self.ids is not None and self.first == 0
        return ExampleRecord(
            index=self.number,
            example_id=self.number,
            source_id=str(self.number),
            num_tokens=self.stop,
            truncated=False,
            first_position=self.first,
            text_hash=ids_hash(np.concatenate(self.ids or [np.zeros(0, np.int32)])) if is_known else "",
        )


@dataclass(frozen=True, eq=False)
class PassTokens:
    """The tokens of a forward pass."""

    examples: Sequence[Example]
    """(B,)"""
    slots: Slots
    """The positions of the tokens in the cache and in the pass."""
    ids: Int32 | None
    """(B, n); None if the pass receives embeddings."""
    n: int

    @cached_property
    def position(self) -> Int64:
        """(B, n): the position of each token of the pass; negative for padding."""
        return self.slots.last(self.n)

    @cached_property
    def is_token(self) -> Bools:
        """(B, n): which tokens of the pass are no padding."""
        return self.position >= 0

    @cached_property
    def lengths(self) -> Int64:
        """(B,): the number of tokens that the pass adds to each example."""
        counts: Int64 = np.sum(self.is_token, axis=1, dtype=np.int64)
        return counts

    @cached_property
    def starts(self) -> Int64:
        """(B,): the position of the first of them."""
        return np.array([example.stop for example in self.examples], np.int64)

    def is_before(self, ids: torch.Tensor) -> bool:
        """Whether `ids` (B, m) may be the tokens of generation after this pass: they end with its own and a new one."""
        own = ids[:, -1 - self.n : -1]
        return self.ids is None or (own.shape == self.ids.shape and np.array_equal(_array(own), self.ids))

    def place(self, row: Int32, position: Int32) -> Int32:
        """Returns the places, among the n of the pass, of tokens that are given by row and position."""
        tokens = np.flatnonzero(self.is_token)
        before = np.cumsum(self.lengths) - self.lengths
        found: Int32 = (tokens[before[row] + position - self.starts[row]] % self.n).astype(np.int32)
        return found

    def spans(self, skip: int) -> list[list[tuple[int, int]]]:
        """Returns the places of tokens at positions from `skip` on, for each row: the first and the one after the last
        of each span."""
        edges = [
            np.flatnonzero(np.diff(row, prepend=False, append=False)) for row in self.is_token & (self.position >= skip)
        ]
        return [list(zip(each[::2].tolist(), each[1::2].tolist(), strict=True)) for each in edges]


@dataclass(frozen=True, eq=False)
class _Cached:
    """What a cache holds after a pass."""

    cache: "weakref.ref[Cache]"
    examples: Sequence[Example]
    position: Int64
    """(B, c): the position of the token in each slot; negative for padding."""


class Examples:
    """The examples of all passes. `begin` a pass, then `end` it or `drop` it."""

    def __init__(self) -> None:
        self.all: list[Example] = []
        self._has_warned = False
        self._is_generating = False
        self._of_step: list[PassTokens] = []  # those of the step of generation that runs
        self._generates: Sequence[Example] = ()  # those whose next pass is that of the generation which noted stops
        self._cached: list[_Cached] = []
        self._broken: weakref.WeakSet[Cache] = weakref.WeakSet()

    def begin(self, arguments: Mapping[str, Any]) -> PassTokens:
        """Returns the tokens of a pass of the decoder with these `arguments`, by name.

        Raises:
            CaptureError: the positions do not follow from the arguments, or do not go on where an example ended.
        """
        ids, embeds, cache = (arguments.get(name) for name in ("input_ids", "inputs_embeds", "past_key_values"))
        given = ids if ids is not None else embeds
        if not isinstance(given, torch.Tensor) or given.dim() < 2:
            raise CaptureError("a forward pass without input_ids (B, n) or inputs_embeds cannot be captured")
        rows, n = given.shape[:2]
        past = _length(cache)
        known = self._continued(cache, rows) if past else None
        mask = _mask(arguments.get("attention_mask"), rows, n, None if known is None else known.position >= 0, past)
        held = np.ones((rows, past + n), np.bool_) if mask is None else mask.copy()
        found = _array(ids) if ids is not None and ids.dim() == 2 else None
        if known is not None and n == 1 and self._generates is known.examples:
            held[_stopped(known.examples), -1] = False
        of_pass = _positions(arguments.get("position_ids"), held, mask, n)
        if arguments.get("position_ids") is None and not held[:, 0].all() and not self._has_warned:
            self._has_warned = True
            log.warning(
                "a forward pass is padded on the left and has no position_ids: positions count the tokens of a row, "
                "while most models rotate by its places, padding included, so that vectors after RoPE are those of "
                "later positions. Pass position_ids, as generate does"
            )
        examples = [Example(len(self.all) + row, 0, 0) for row in range(rows)] if known is None else known.examples
        for row, example in enumerate(examples):
            tokens = np.flatnonzero(held[row, past:])
            first = int(of_pass[row, tokens[0]]) if len(tokens) else example.stop
            if known is None:
                example.first = example.stop = max(0, first)
            elif first != example.stop:
                raise CaptureError(
                    f"row {row} of the batch goes on at position {first}, and its example, number {example.number}, "
                    f"has ended before position {example.stop}: pass position_ids, or the whole attention_mask, from "
                    "the first token in the cache on"
                )
        before = _before(held[:, :past], examples) if known is None else known.position
        position = np.concatenate([before, np.where(held[:, past:], of_pass, PADDING)], axis=1)
        return PassTokens(examples, Slots(position), found, n)

    def end(self, tokens: PassTokens, caches: Sequence[Any]) -> list[Example]:
        """Ends a pass whose cache is one of `caches`. Returns the examples that no later pass can continue."""
        if not tokens.examples or tokens.examples[-1].number >= len(self.all):
            self.all += tokens.examples
        for row, example in enumerate(tokens.examples):
            example.stop += int(tokens.lengths[row])
            if tokens.ids is None:
                example.ids = None
            elif example.ids is not None:
                example.ids.append(tokens.ids[row, tokens.is_token[row]])
        if self._is_generating:
            self._of_step.append(tokens)
        self._generates = ()
        cache = next((each for each in caches if isinstance(each, Cache)), None)
        if cache is None:
            return [*tokens.examples, *self._take_dead()]
        before = self._of_cache(cache)
        self._cached = [each for each in self._cached if each is not before]
        self._cached.append(_Cached(weakref.ref(cache), tokens.examples, tokens.slots.position))
        was_emptied = before is not None and before.examples is not tokens.examples
        return [*(before.examples if before is not None and was_emptied else ()), *self._take_dead()]

    def drop(self, caches: Sequence[Any]) -> None:
        """Drops a pass that failed. It has left an unknown part of its tokens in one of `caches`."""
        for cache in caches:
            if isinstance(cache, Cache):
                self._broken.add(cache)

    def generates(self, is_generating: bool) -> None:
        """Notes that generation with the captured decoder begins, or that it ends, of itself or by an error."""
        self._is_generating, self._generates = is_generating, ()
        self._of_step.clear()
        for example in self.all:
            example.has_stopped = False

    def note_stops(self, ids: torch.Tensor, stops: Sequence[bool]) -> None:
        """Notes which rows (B,) generation stops in a step that has ended.

        `ids` (B, m) are the tokens so far, those of the step's pass and then a new one. Further passes may follow that
        pass in a step, as with guidance.
        """
        ran = (each for each in self._of_step if len(stops) == len(each.examples) and each.is_before(ids))
        if (of_step := next(ran, None)) is None:
            return
        self._of_step.clear()
        self._generates = of_step.examples
        for example, stop in zip(of_step.examples, stops, strict=True):
            example.has_stopped |= stop

    def take_open(self) -> list[Example]:
        """Returns the examples that a later pass could continue, and forgets their caches."""
        found = [example for each in self._cached for example in each.examples]
        self._cached.clear()
        return found

    def _take_dead(self) -> list[Example]:
        dead = [each for each in self._cached if each.cache() is None]
        self._cached = [each for each in self._cached if each.cache() is not None]
        return [example for each in dead for example in each.examples]

    def _of_cache(self, cache: Cache) -> _Cached | None:
        return next((each for each in self._cached if each.cache() is cache), None)

    def _continued(self, cache: Any, rows: int) -> _Cached | None:
        """Returns what a cache holds; None if it was filled before the capture."""
        if cache in self._broken:
            raise CaptureError(
                "this pass continues a cache that a failed pass has left in an unknown state: start with a new cache"
            )
        known = self._of_cache(cache)
        if known is not None and len(known.examples) != rows:
            raise CaptureError(
                f"this pass continues a cache of {len(known.examples)} rows with {rows}: a cache whose rows are copied "
                "or selected, as in beam search, cannot be captured; generate with num_beams=1"
            )
        return known


def _stopped(examples: Sequence[Example]) -> Bools:
    """Returns the rows (B,) that generation has stopped."""
    return np.array([example.has_stopped for example in examples], np.bool_)


def _length(cache: Any) -> int:
    """Returns c; 0 without a cache."""
    if cache is None:
        return 0
    if not isinstance(cache, Cache):
        raise CaptureError(
            f"past_key_values is a {type(cache).__name__}: only caches of transformers can be captured; pass a "
            "transformers.DynamicCache"
        )
    return int(cache.get_seq_length())


def _mask(mask: Any, rows: int, n: int, before: Bools | None, past: int) -> Bools | None:
    """Returns which slots of the cache and of the pass hold tokens, (B, c + n); None without a mask.

    `before` (B, c) says it of the cache, if earlier passes have filled it.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    total = past + n
    if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[-2] == n <= mask.shape[-1]:
        # By query and key. A token sees itself, and padding sees nothing. A window hides early keys from the last query
        # and has no columns for those that a cache has dropped.
        own = mask[:, 0].diagonal(min(past, mask.shape[-1] - n), 1, 2)[:, :n]
        new = is_visible(own).expand(rows, n).cpu().numpy()
        if before is None and mask.shape[-1] >= total:
            before = is_visible(mask[:, 0, -1, :past]).expand(rows, past).cpu().numpy()
        if before is not None and new[:, -1].all():
            return np.concatenate([before, new], axis=1)
    elif isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape == (rows, total):
        return mask.detach().ne(0).cpu().numpy()  # as the model reads it: a weight of 0.5 is no padding
    shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
    raise CaptureError(
        f"the attention_mask that the decoder receives ({shape}) does not tell which tokens are padding: pass one of "
        f"the shape {(rows, total)}, for all tokens in the cache and in this pass"
    )


def _positions(given: Any, held: Bools, mask: Bools | None, n: int) -> Int64:
    """Returns the positions (B, n) of the tokens of the pass; those of padding have no meaning."""
    rows, total = held.shape
    if given is None:
        counted = np.cumsum(held, axis=1) - 1 if mask is not None else np.broadcast_to(np.arange(total), held.shape)
        return counted[:, total - n :].astype(np.int64)
    if not isinstance(given, torch.Tensor):
        raise CaptureError(f"position_ids is a {type(given).__name__}: pass a tensor")
    values = given.detach().cpu()
    found = values.long()
    is_position = ((found == values) & (found >= 0) & (found < _LONGEST)).numpy()
    positions = found.numpy()
    if positions.ndim == 3 and (positions == positions[0]).all():
        # One and the same for time, height and width: that of text.
        positions, is_position = positions[0], np.logical_and.reduce(is_position)
    if positions.ndim == 1:
        positions, is_position = positions[None], is_position[None]
    if positions.ndim != 2 or positions.shape[1] != n or positions.shape[0] not in (1, rows):
        raise CaptureError(
            f"position_ids has the shape {tuple(given.shape)}, and not one position for each of {(rows, n)} tokens: "
            "tokens of images and videos, which have several, cannot be captured"
        )
    # Checked before any cast: 2**32 would be recorded as 0, and 0.5 too, while the model computes with the number.
    if (wrong := held[:, total - n :] & ~is_position).any():
        row, token = np.argwhere(wrong)[0]
        value = values.reshape(-1, *positions.shape)[0, row if len(positions) > 1 else 0, token].item()
        raise CaptureError(
            f"position_ids of row {row} has {value}, which is no position of a token: give whole numbers from 0 to "
            f"{_LONGEST - 1:,}, or leave the token out of the attention_mask"
        )
    return np.broadcast_to(positions, (rows, n))


_LONGEST = 2**31 - 1
"""The tokens of the longest example: the datasets have their number, and with it positions, as int32."""


def _before(held: Bools, examples: Sequence[Example]) -> Int64:
    """Returns the positions (B, c) of the tokens in a cache that was filled before the capture."""
    firsts = np.array([example.first for example in examples], np.int64)[:, None]
    left = np.cumsum(held[:, ::-1], axis=1)[:, ::-1]  # from each slot on
    return np.where(held, firsts - left, PADDING)


def _array(values: torch.Tensor) -> Int32:
    found: Int32 = values.detach().to("cpu", torch.int32).numpy()
    return found
