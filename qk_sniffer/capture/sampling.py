"""Samples token positions: a pure function of (seed, example_id, layer, kind, position) decides which are kept.

The rows of a dataset therefore do not depend on batch size, padding, order, device, shard or restart. They do not
depend on `max_length` either, for the positions below it, except with `max_rows_per_example`, which compares the tokens
of a whole example. This is the complete definition:

Hash. All arithmetic is modulo 2**64; negative integers are taken as their two's complement.

    mix(z):     z ^= z >> 30;  z *= 0xBF58476D1CE4E5B9;  z ^= z >> 27;  z *= 0x94D049BB133111EB;  z ^= z >> 31
    hash(w...): state = 0;  for each w:  state = mix(state ^ mix(w + 0x9E3779B97F4A7C15))

`mix` is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014), with the constants of David Stafford's variant 13, as in Sebastiano Vigna's public-domain splitmix64.c. The
constant that is added to a word is that generator's increment.

Uniform number. u = (hash(seed, example_id, layer, kind, position) >> 11) / 2**53, with 0 for the kinds "q" and "o", and
1 for "k" and "v": values have the positions of the keys, and outputs those of the queries. With
`share: example` it is hash(seed, example_id, position), the same for all layers and kinds. Here, the example_id of a
part of a text is that of the text for the first part, and hash(example_id of the text, part) for the others.

Bucket, and the number of positions that it spans (the end of the example may cut the last one):

    uniform, all:  b = position // min_bucket_size                      min_bucket_size positions
    log_uniform:   b = max(low, floor(log2(position + 1)))              2**b positions, except
                   with low = ceil(log2(min_bucket_size))               2**(low + 1) - 1 in bucket `low`

A position is kept when u < p, with p = min(1, base_rate / positions spanned), in float64, and p = 1 for `all`. Every
whole bucket therefore expects base_rate rows an example, or all of its positions if they are fewer. Of the positions
kept, `max_rows_per_example` leaves those with the smallest hashes for each (example, layer, kind). Of the positions
left, `segments` leaves those whose tokens are in segments of these names: the rows of a dataset with `segments` are
those of the dataset without it that are in these segments. The type `none` keeps no position; its buckets are those of
`all`.

The keys and values may have their own type and base_rate; they share the other settings with queries and outputs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import get_args

import numpy as np
import numpy.typing as npt

from qk_sniffer.config import MOST_COUNT, MOST_RATE, SamplerConfig, SamplerType
from qk_sniffer.errors import ConfigError
from qk_sniffer.text import not_one_of

TYPES = get_args(SamplerType)
SHARES = ("layer_kind", "example")

POSITIONS_OF = {"q": "q", "k": "k", "v": "k", "o": "q"}
"""The kind whose positions each kind has: a value is at the position of its key, and an output at that of its query."""

# The word of the hash for each kind that has positions of its own.
_KIND_WORDS = {"q": 0, "k": 1}

LONGEST_TABLE = 2**21
"""Positions below are looked up in tables (16 MB each at most); a batch that reaches further has its own computed."""

Bools = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Picks:
    """The kept tokens of one (layer, kind) of a batch, ordered by row, then position.

    `row` (num_picks,) is the example's place in the batch. `position` (num_picks,) is the token's position in the
    example.
    """

    row: Int32
    position: Int32


class Sampler:
    """The sampler of a `SamplerConfig`. Safe to use from several threads."""

    def __init__(self, config: SamplerConfig) -> None:
        if lines := problems(config):
            raise ConfigError(lines)
        query_rule = _Rule(config.type, config.base_rate, config.min_bucket_size)
        key_rule = _Rule(
            query_rule.type if config.keys.type is None else config.keys.type,
            query_rule.base_rate if config.keys.base_rate is None else config.keys.base_rate,
            config.min_bucket_size,
        )
        self.config = config
        rules = {"q": query_rule, "k": key_rule}
        self._rules = {kind: rules[positions] for kind, positions in POSITIONS_OF.items()}

    def same_rule(self) -> bool:
        """Whether queries and keys have the same buckets and probabilities."""
        return self._rules["q"] == self._rules["k"]

    def keeps_none(self, kind: str) -> bool:
        """Whether no position is ever kept."""
        return self._rules[kind].type == "none"

    def bucket(self, kind: str, positions: npt.ArrayLike) -> Int32:
        """Returns the bucket of every position. Exact for positions 0 to 2**31 - 1."""
        return self._rules[kind].bucket(np.asarray(positions, dtype=np.int64)).astype(np.int32)

    def span(self, kind: str, bucket: int) -> tuple[int, int]:
        """Returns the first and the last position of a bucket, both included."""
        first, last = self._rules[kind].span(np.array([bucket]))
        return int(first[0]), int(last[0])

    def probability(self, kind: str, buckets: npt.ArrayLike) -> Float64:
        """Returns the probability that a position of each bucket is kept, before `max_rows_per_example` and `segments`.

        Raises:
            ValueError: no position has one of the buckets.
        """
        return self._rules[kind].probability(np.asarray(buckets, dtype=np.int64))

    def inclusion(self, kind: str, num_tokens: int) -> dict[int, float]:
        """Returns {bucket: probability} of all buckets of positions 0 to num_tokens - 1."""
        if num_tokens == 0:
            return {}
        first, last = self.bucket(kind, [0, num_tokens - 1])
        buckets = np.arange(first, last + 1)
        return dict(zip(buckets.tolist(), self.probability(kind, buckets).tolist(), strict=True))

    def expected_rows(self, kind: str, num_tokens: int) -> float:
        """Returns the expected number of rows of an example of `num_tokens` tokens, for each head of a kind.

        All tokens count, whatever their segments.
        """
        lowest, highest = self.bucket(kind, [0, num_tokens - 1])
        buckets = np.arange(lowest, highest + 1)
        first, last = self._rules[kind].span(buckets)
        sizes = np.minimum(last, num_tokens - 1) - first + 1
        expected = float((self.probability(kind, buckets) * sizes).sum())
        limit = self.config.max_rows_per_example
        return expected if limit is None else min(expected, limit)

    def positions(
        self, example_id: int, layer: int, kind: str, num_tokens: int, in_segments: Bools | None = None
    ) -> Int32:
        """Returns the positions of one example that are kept in one (layer, kind), ascending; see `plan`."""
        return self.plan([example_id], [num_tokens], [(layer, kind)], in_segments)[layer, kind].position

    def plan(
        self,
        example_ids: npt.ArrayLike,
        lengths: Sequence[int],
        layer_kinds: Sequence[tuple[int, str]],
        in_segments: Bools | None = None,
        *,
        starts: Sequence[int] | None = None,
    ) -> dict[tuple[int, str], Picks]:
        """Returns the kept tokens of a batch for each (layer, kind).

        `lengths` are numbers of tokens, without padding. `starts` are the positions of the first tokens of the
        examples, if not all are 0: only the tokens from there on are of the batch, and `max_rows_per_example` compares
        these alone. `in_segments` (sum of `lengths`,) says which tokens are in the
        segments of `sampler.segments`, one example after the other; None without that setting.

        Each (layer, kind) that must keep the same tokens as another
        (with `share: example`, or where all tokens are kept, or as the values of keys do) gets the same `Picks` object.
        """
        assert (in_segments is None) == (self.config.segments is None), "which tokens are in sampler.segments?"
        tokens = _Tokens.of(lengths, starts)
        states = counter_hash(self.config.seed, np.asarray(example_ids, dtype=np.int64))
        limits = {rule: tokens.limits(rule) for rule in set(self._rules.values())}
        hashes, scratch = np.empty(tokens.count, np.uint64), np.empty(tokens.count, np.uint64)
        plan: dict[tuple[int, str], Picks] = {}
        made: dict[_Rule | tuple[int, str], Picks] = {}
        for layer, kind in layer_kinds:
            rule, positions = self._rules[kind], POSITIONS_OF[kind]
            is_shared = self.config.share == "example" or self._keeps_all(rule)
            of = rule if is_shared else (layer, positions)
            if of in made:
                plan[layer, kind] = made[of]
                continue
            if rule.type == "none":
                plan[layer, kind] = made[of] = Picks(tokens.row[:0], tokens.position[:0])
                continue
            keys = states if is_shared else _absorb(_absorb(states, layer), _KIND_WORDS[positions])
            np.bitwise_xor(np.repeat(keys, tokens.lengths), tokens.mixed, out=hashes)
            _mix(hashes, scratch)
            kept = self._capped(np.flatnonzero(hashes <= limits[rule]), hashes, tokens)
            kept = kept if in_segments is None else kept[in_segments[kept]]
            plan[layer, kind] = made[of] = Picks(tokens.row[kept], tokens.position[kept])
        return plan

    def _keeps_all(self, rule: "_Rule") -> bool:
        return rule.type == "none" or (rule.type == "all" and self.config.max_rows_per_example is None)

    def _capped(self, kept: Int64, hashes: UInt64, tokens: "_Tokens") -> Int64:
        # `kept` are ascending indices into the batch's tokens. No two hashes of one (example, layer, kind) are equal,
        # because `_mix` is a bijection, so "the smallest" needs no rule for ties.
        limit = self.config.max_rows_per_example
        if limit is None or len(kept) <= limit:
            return kept
        bounds = np.searchsorted(tokens.row[kept], np.arange(len(tokens.lengths) + 1))
        parts = []
        for start, stop in pairwise(bounds.tolist()):
            part = kept[start:stop]
            if len(part) > limit:
                part = np.sort(part[np.argpartition(hashes[part], limit - 1)[:limit]])
            parts.append(part)
        return np.concatenate(parts)


def counter_hash(*words: int | Int64) -> UInt64:
    """Returns the hash that the module docstring defines, of words that broadcast: (n,), (1,) for plain integers."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = _absorb(state, word)
    return state


def sampling_ids(example_ids: npt.ArrayLike, parts: npt.ArrayLike) -> Int64:
    """Returns the number that stands for each example in the hashes, (n,).

    `example_ids` (n,) are those of the texts, and `parts` (n,) the parts of them that the examples are.
    """
    ids, part = np.asarray(example_ids, np.int64), np.asarray(parts, np.int64)
    return np.where(part == 0, ids, counter_hash(ids, part).view(np.int64))


def problems(config: SamplerConfig) -> list[str]:
    """Returns the problems with the values of `config`, one line each, with their keys."""
    lines = [
        not_one_of(key, value, [name or "null" for name in valid])
        for key, value, valid in (
            ("sampler.type", config.type, TYPES),
            ("sampler.keys.type", config.keys.type, (*TYPES, None)),
            ("sampler.share", config.share, SHARES),
        )
        if value not in valid
    ]
    for key, rate in (("sampler.base_rate", config.base_rate), ("sampler.keys.base_rate", config.keys.base_rate)):
        if rate is not None and not 0 < rate <= MOST_RATE:
            lines.append(f"{key} is {rate}; it must be a finite number above 0, at most {MOST_RATE:g}")
    if not 1 <= config.min_bucket_size <= 2**31:
        lines.append(f"sampler.min_bucket_size is {config.min_bucket_size}; it must be 1 to {2**31}")
    if config.segments is not None and (not config.segments or len({*config.segments}) < len(config.segments)):
        lines.append(f"sampler.segments is {config.segments}; it must name at least one segment, and each once")
    if config.max_rows_per_example is not None and not 1 <= config.max_rows_per_example <= MOST_COUNT:
        lines.append(f"sampler.max_rows_per_example is {config.max_rows_per_example}; it must be 1 to {MOST_COUNT}")
    return lines


@dataclass(frozen=True)
class _Rule:
    """The buckets and probabilities of one kind."""

    type: str
    base_rate: float
    min_bucket_size: int

    @property
    def lowest(self) -> int:
        return (self.min_bucket_size - 1).bit_length() if self.type == "log_uniform" else 0

    def bucket(self, positions: Int64) -> Int64:
        if self.type != "log_uniform":
            return positions // self.min_bucket_size
        # frexp reads the exponent of the float64 itself: exact, where log2 may round up just below a power.
        exponent = np.frexp((positions + 1).astype(np.float64))[1].astype(np.int64)
        return np.maximum(exponent - 1, self.lowest)

    def span(self, buckets: Int64) -> tuple[Int64, Int64]:
        if np.any(buckets < self.lowest):
            raise ValueError(f"bucket {int(buckets.min())} does not exist: the lowest is {self.lowest}")
        if self.type != "log_uniform":
            return buckets * self.min_bucket_size, (buckets + 1) * self.min_bucket_size - 1
        one = np.int64(1)
        return np.where(buckets == self.lowest, 0, (one << buckets) - 1), (one << (buckets + 1)) - 2

    def probability(self, buckets: Int64) -> Float64:
        first, last = self.span(buckets)
        if self.type in ("all", "none"):
            return np.full(buckets.shape, float(self.type == "all"))
        return np.minimum(1.0, self.base_rate / (last - first + 1).astype(np.float64))

    def limits(self, positions: Int64) -> UInt64:
        """Returns the largest hash that each position is kept with."""
        distinct, places = np.unique(self.bucket(positions), return_inverse=True)
        # u < p  <=>  hash >> 11 < ceil(p * 2**53)  <=>  hash <= (ceil(p * 2**53) << 11) - 1, all exact.
        # A p that is 0 by underflow counts as the smallest one.
        limits = [(max(1, math.ceil(p * 2.0**53)) << 11) - 1 for p in self.probability(distinct).tolist()]
        return np.array(limits, dtype=np.uint64)[places]


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The tokens of a batch, one example after the other."""

    lengths: Int64  # (num_examples,)
    row: Int32  # (count,)
    position: Int32  # (count,)
    mixed: UInt64  # (count,) the mixed words of the positions
    longest: int
    count: int

    @classmethod
    def of(cls, lengths: Sequence[int], starts: Sequence[int] | None) -> "_Tokens":
        counts = np.asarray(lengths, dtype=np.int64)
        first = np.zeros_like(counts) if starts is None else np.asarray(starts, dtype=np.int64)
        longest, total = int((first + counts).max(initial=0)), int(counts.sum())
        row = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        position = (np.arange(total) - np.repeat(np.cumsum(counts) - counts - first, counts)).astype(np.int32)
        if longest > LONGEST_TABLE:
            return cls(counts, row, position, _mixed(position.astype(np.int64)), longest, total)
        return cls(counts, row, position, _mixed_positions(_table_length(longest))[position], longest, total)

    def limits(self, rule: _Rule) -> UInt64:
        """Returns the largest hash (count,) that each token is kept with."""
        if self.longest > LONGEST_TABLE:
            return rule.limits(self.position.astype(np.int64))
        return _limits(rule, _table_length(self.longest))[self.position]


# Tables by position have lengths of powers of two and are cached: the examples of a run need only a few of them.
def _table_length(num_tokens: int) -> int:
    return 1 << max(12, (num_tokens - 1).bit_length())


@cache
def _mixed_positions(length: int) -> UInt64:
    return _read_only(_mixed(np.arange(length)))


@cache
def _limits(rule: _Rule, length: int) -> UInt64:
    return _read_only(rule.limits(np.arange(length)))


def _read_only(table: UInt64) -> UInt64:
    table.flags.writeable = False
    return table


def _absorb(state: UInt64, word: int | Int64) -> UInt64:
    mixed = state ^ _mixed(word)
    _mix(mixed, np.empty_like(mixed))
    return mixed


def _mixed(word: int | Int64) -> UInt64:
    words = word if isinstance(word, np.ndarray) else np.array([int(word) % 2**64], np.uint64)
    mixed = words.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    _mix(mixed, np.empty_like(mixed))
    return mixed


def _mix(z: UInt64, scratch: UInt64) -> None:
    """Mixes `z` in place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(z, np.uint64(shift), out=scratch)
        np.bitwise_xor(z, scratch, out=z)
        np.multiply(z, np.uint64(factor), out=z)
    np.right_shift(z, np.uint64(31), out=scratch)
    np.bitwise_xor(z, scratch, out=z)
