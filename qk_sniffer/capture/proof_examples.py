"""Chooses the examples that prove a dataset: short ones that cover every layer and kind, and some of every part.

With a sampler, an example has rows in some layers and kinds only. One forward pass derives the vectors of an example in
all layers at once, and so each further example is chosen for the layers and kinds that it adds, in proportion to its
cost. The choice ends when every (layer, kind) has a row and every kind has `ENOUGH_ROWS`, or when the cost reaches its
limit. If there is enough left, the longest example follows: first its tokens up to `MAX_TOKENS` in all layers, then all
of them, for the rows of later tokens: in the layers up to the last one that half of what is left allows, and in the
first layer of each reach that all of it allows.

An error may be in some batches only, in one shard, or in what was added to a dataset later. If there is still enough
left, examples from all parts of the dataset follow, which a hash draws.

Statistics of all tokens need no rows: their examples are those that a hash draws from all parts, within a limit of the
same size.

The cost is counted in arithmetic of forward passes, and the limit follows from the dataset, the model and the type of
the device alone, so that the same dataset is proven by the same examples on every machine of a kind.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qk_sniffer.capture.forward_cost import ForwardCost, Numbers
from qk_sniffer.capture.sampling import counter_hash, sampling_ids
from qk_sniffer.store.journal import ExampleRecord
from qk_sniffer.store.layout import Head, Layout
from qk_sniffer.store.open_folder import Access
from qk_sniffer.store.parquet_files import read_parquet
from qk_sniffer.store.text_segments import num_tokens_in

MAX_TOKENS = 4096
"""Longer examples are cut to this number of tokens. Later tokens do not change the vectors of earlier ones."""

ENOUGH_ROWS = 200
"""The rows to compare of each kind; the heads of a layer count once."""

SPREAD = 8
"""The examples to draw from all parts of a dataset, and at least one of each part."""

SHARE = 0.02
"""The most arithmetic of a proof, as a share of a forward pass over each example."""

MOST_BYTES = 128 << 20
"""The most bytes of stored vectors that a pass compares, over all heads."""

MOST_OUTPUTS = 16
"""The most rows of outputs that a pass compares in a layer: each costs attention to all its keys, in float64."""

MOST_CANDIDATES = 10_000
"""The examples to choose from: the shortest ones that have rows."""

Int64 = npt.NDArray[np.int64]
LayerKind = tuple[int, str]
Read = Callable[..., pa.Table]
"""Reads the file of a head; `columns` are those to read."""


@dataclass(frozen=True)
class Pass:
    """A forward pass of the proof over the first `tokens` tokens of an example."""

    example: ExampleRecord
    tokens: int
    rows: Mapping[LayerKind, Int64]
    """The rows to compare: their numbers in the files of each (layer, kind). Its heads have the same rows."""
    for_late_rows: bool = False
    """Whether it is for rows from `MAX_TOKENS` on, and may run the first layers alone."""


def choose(
    layout: Layout,
    heads: Sequence[Head],
    parts: Sequence[Sequence[ExampleRecord]],
    *,
    count: int | None,
    cost: ForwardCost,
    boundary: int | None,
    access: Access | None = None,
) -> list[Pass]:
    """Chooses passes over examples that have rows in the files of `heads` in `layout`.

    Args:
        layout: of the dataset, which may be staged.
        heads: all heads of the dataset.
        parts: all examples of the dataset, in parts that were captured apart.
        count: the number of examples, the shortest ones; None for as many as the module's docstring says.
        cost: of forward passes of the model.
        boundary: `Backbone.length_boundary`. Examples whose frequencies the proof cannot have are not chosen.
        access: the way to the files; None looks up their paths.
    """
    first_heads = {(head.layer, head.kind): head for head in reversed(heads)}
    files: dict[LayerKind, Read] = {
        group: partial(read_parquet, layout.root / first_heads[group].file, access=access)
        for group in sorted(first_heads)
    }
    found: set[int] = set()
    for read in files.values():
        found |= set(read(columns=["example_id"])["example_id"].unique().to_pylist())
    usable = [
        [
            example
            for example in part
            if example.example_id in found and is_derivable(example.num_tokens, boundary, cost.min_tokens)
        ]
        for part in parts
    ]
    candidates = sorted(chain(*usable), key=lambda example: (example.num_tokens, example.key))
    candidates = candidates[:MOST_CANDIDATES] + candidates[MOST_CANDIDATES:][-1:]  # and the longest one
    most_rows = max(1, MOST_BYTES // sum(4 * head.head_dim for head in heads))
    cut, start, rows = _found(files, candidates, boundary)
    lengths = [example.num_tokens for example in chain(*parts)]
    budget = max(SHARE * float(cost.flops(lengths).sum()), cost.few)
    costs = cost.flops(np.maximum(cut, cost.min_tokens))
    if count is None:
        chosen = _cover(np.minimum(rows, most_rows), costs, [kind for _, kind in files], budget)
    else:
        chosen = np.flatnonzero(rows.any(axis=1)).tolist()[:count]
    passes = [
        Pass(candidates[number], int(cut[number]), _rows(list(files), start[number], rows[number], most_rows))
        for number in chosen
    ]
    if count is not None or not passes:
        return passes
    budget -= float(costs[chosen].sum())
    late: list[Pass] = []
    if cut[-1] < candidates[-1].num_tokens:
        late = _late(files, heads, candidates[-1], cost, budget, most_rows)
        budget -= sum(float(cost.flops(one.tokens, max(layer for layer, _ in one.rows))) for one in late)
    drawn = _drawn(usable, {each.example.key for each in passes}, cost, boundary, budget)
    cut, start, rows = _found(files, drawn, boundary)
    passes += [
        Pass(example, int(cut[number]), _rows(list(files), start[number], rows[number], most_rows))
        for number, example in enumerate(drawn)
        if rows[number].any()
    ]
    return passes + late


def choose_for_statistics(
    parts: Sequence[Sequence[ExampleRecord]],
    *,
    count: int | None,
    cost: ForwardCost,
    boundary: int | None,
    skip_tokens: int,
    segments: Collection[str] | None = None,
) -> list[Pass]:
    """Chooses passes over examples with tokens that statistics are of, without rows.

    The arguments are those of `choose`. Statistics are of tokens from position `skip_tokens` on in `segments`; None for
    any. Each example is run on two paths.
    """
    usable = [
        [
            example
            for example in part
            if num_tokens_in(example.segments, tokens_to_derive(example.num_tokens, boundary), segments, skip_tokens)
            and is_derivable(example.num_tokens, boundary, cost.min_tokens)
        ]
        for part in parts
    ]
    shortest = sorted(chain(*usable), key=lambda example: (example.num_tokens, example.key))
    chosen = shortest[:count]
    if count is None:
        total = float(cost.flops([example.num_tokens for example in chain(*parts)]).sum())
        budget = max(SHARE * total, cost.few) / 2
        chosen = _drawn(usable, set(), cost, boundary, budget) or shortest[:1]
    return [Pass(example, tokens_to_derive(example.num_tokens, boundary), {}) for example in chosen]


def _found(
    files: Mapping[LayerKind, Read], examples: Sequence[ExampleRecord], boundary: int | None
) -> tuple[Int64, Int64, Int64]:
    """Returns the tokens of each example that a pass runs, (examples,), and in the files of each (layer, kind) its
    first row and the number of its rows among these tokens, (examples, groups) each."""
    cut = np.array([tokens_to_derive(example.num_tokens, boundary) for example in examples], np.int64)
    places = [_places(read, [example.example_id for example in examples], cut) for read in files.values()]
    start, rows = (np.stack(each, axis=1) for each in zip(*places, strict=True))
    return cut, start, rows


def _late(
    files: Mapping[LayerKind, Read],
    heads: Sequence[Head],
    example: ExampleRecord,
    cost: ForwardCost,
    budget: float,
    most: int,
) -> list[Pass]:
    """Returns the pass over all tokens of a long example.

    It is of the layers that half of the budget allows, and of the first layer of each reach that the budget allows.
    """
    first: dict[tuple[int | None, int | None], int] = {}
    for head in sorted(heads, key=lambda head: head.layer):
        first.setdefault((head.sliding_window, head.attention_chunk), head.layer)
    costs = {layer: float(cost.flops(example.num_tokens, layer)) for layer, _ in files}
    first_of_reach = first.values()
    groups = [(layer, kind) for layer, kind in files if costs[layer] <= budget / (1 if layer in first_of_reach else 2)]
    rows = _late_rows(groups, [files[group] for group in groups], example, most)
    return [Pass(example, example.num_tokens, rows, for_late_rows=True)] if rows else []


def _drawn(
    parts: Sequence[Sequence[ExampleRecord]],
    taken: set[int],
    cost: ForwardCost,
    boundary: int | None,
    budget: float,
) -> list[ExampleRecord]:
    """Draws examples for the budget from all parts, one from each section that has none of the `taken` keys."""
    drawn = []
    sections = [section for part in parts for section in _sections(part, max(1, SPREAD // len(parts)))]
    sections = [section for section in sections if not any(example.key in taken for example in section)]
    for left, section in zip(range(len(sections), 0, -1), sections, strict=True):
        tokens = np.array([tokens_to_derive(example.num_tokens, boundary) for example in section])
        costs = cost.flops(np.maximum(tokens, cost.min_tokens))
        index, part = (np.array([getattr(each, name) for each in section]) for name in ("index", "part"))
        order = counter_hash(sampling_ids(index, part))
        affordable = np.flatnonzero(costs <= budget / left)
        if len(affordable):
            best = int(affordable[order[affordable].argmin()])
            drawn.append(section[best])
            budget -= float(costs[best])
    return drawn


def _sections(part: Sequence[ExampleRecord], number: int) -> Iterator[Sequence[ExampleRecord]]:
    """Yields at most `number` sections of a part, of almost equal numbers of examples."""
    edges = np.linspace(0, len(part), number + 1).round().astype(int).tolist()
    for start, stop in pairwise(edges):
        if start < stop:
            yield part[start:stop]


def _late_rows(
    groups: Sequence[LayerKind], files: Sequence[Read], example: ExampleRecord, most: int
) -> dict[LayerKind, Int64]:
    """Returns rows of an example at positions from `MAX_TOKENS` on, which no other pass has."""
    early, whole = (
        [_places(read, [example.example_id], np.array([tokens])) for read in files]
        for tokens in (MAX_TOKENS, example.num_tokens)
    )
    start = [int(first[0] + number[0]) for first, number in early]
    return _rows(groups, start, [int(e[1][0] - s[1][0]) for e, s in zip(whole, early, strict=True)], most)


def _rows(
    groups: Sequence[LayerKind], start: Sequence[int] | Int64, number: Sequence[int] | Int64, most: int
) -> dict[LayerKind, Int64]:
    """Returns at most `most` rows of an example in each (layer, kind), evenly spread, the first and last among them.

    Of outputs, it returns at most `MOST_OUTPUTS`.
    """

    def limit(kind: str) -> int:
        return min(most, MOST_OUTPUTS) if kind == "o" else most

    return {
        group: at + np.unique(np.linspace(0, rows - 1, min(int(rows), limit(group[1]))).round().astype(np.int64))
        for group, at, rows in zip(groups, start, number, strict=True)
        if rows
    }


def tokens_to_derive(num_tokens: int, boundary: int | None) -> int:
    """Returns the number of an example's tokens that the proof runs."""
    return num_tokens if boundary is not None and num_tokens > boundary else min(num_tokens, MAX_TOKENS)


def is_derivable(num_tokens: int, boundary: int | None, min_tokens: int) -> bool:
    """Whether a pass of the proof has the rotary frequencies of the example's own pass, in spite of its padding."""
    return boundary is None or num_tokens >= min_tokens or boundary >= min_tokens


def _places(read: Read, example_ids: Sequence[int], cut: Int64) -> tuple[Int64, Int64]:
    """Returns the first row in the file of each example, and the number of its rows at positions below `cut`."""
    table = read(columns=["example_id", "position"])
    ids, position = (table[name].to_numpy() for name in ("example_id", "position"))
    if not len(ids):
        return np.zeros(len(cut), np.int64), np.zeros(len(cut), np.int64)
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))  # each example's rows are together
    stops = np.append(starts[1:], len(ids))
    order = np.argsort(ids[starts], kind="stable")
    run = order[np.minimum(np.searchsorted(ids[starts[order]], example_ids), len(order) - 1)]
    first, number = starts[run], np.where(ids[starts[run]] == example_ids, stops[run] - starts[run], 0)
    for at in np.flatnonzero((number > 0) & (position[stops[run] - 1] >= cut)).tolist():
        number[at] = np.searchsorted(position[first[at] : stops[run[at]]], cut[at])
    return first, number


def _cover(rows: Int64, cost: Numbers, kinds: Sequence[str], budget: float) -> list[int]:
    """Returns the numbers of the chosen candidates. `rows` is (candidates, groups), `kinds` the kind of each group."""
    chosen: list[int] = []
    of_kind = {kind: np.array([each == kind for each in kinds]) for kind in kinds}
    uncovered = np.ones(len(kinds), np.bool_)
    missing = dict.fromkeys(of_kind, ENOUGH_ROWS)
    left = np.ones(len(rows), np.bool_)
    while left.any():
        gain = (rows[:, uncovered] > 0).sum(axis=1) / len(kinds)
        for kind, columns in of_kind.items():
            gain += np.minimum(rows[:, columns].sum(axis=1), missing[kind]) / ENOUGH_ROWS
        worth = np.where(left & (cost <= budget), gain / cost, 0.0)
        if not chosen and not worth.any():
            worth = (gain > 0) / cost  # no example is within the limit: the shortest one proves the dataset
        best = int(worth.argmax())
        if not worth[best]:
            break
        chosen.append(best)
        left[best] = False
        budget -= cost[best]
        uncovered &= rows[best] == 0
        missing = {kind: max(0, missing[kind] - int(rows[best, of_kind[kind]].sum())) for kind in of_kind}
    longest = int(cost.argmax()) if len(cost) else -1
    if chosen and left[longest] and rows[longest].any() and cost[chosen].max() < cost[longest] <= budget:
        chosen.append(longest)
    return chosen
