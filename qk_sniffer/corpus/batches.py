"""Cuts the examples of a job into look-ahead windows, and each window into batches of about equal length.

A window is cut into batches by length, so that batches need almost no padding. The composition of a batch follows from
the lengths alone. A job that restarts cuts the same batches: it takes the lengths of finished examples from their
records. A text is tokenized again only if one of its parts is not finished.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import TypeVar

from qk_sniffer.config import InferenceConfig
from qk_sniffer.corpus.contents import Conversation, TokenIds
from qk_sniffer.corpus.examples import Corpus, Example
from qk_sniffer.corpus.tokens import HashOf, Tokenizer, Tokens, chosen, plain_hash
from qk_sniffer.errors import SourceError
from qk_sniffer.machine import trim_memory
from qk_sniffer.store.journal import ExampleRecord
from qk_sniffer.store.text_segments import encode
from qk_sniffer.timing import Stages

T = TypeVar("T")

FULL_BATCHES = 64
"""The batches that the texts of a window fill. Texts of one length seldom fill their last batch, and the limit on
padding makes some twenty lengths of texts of 5 to 50 tokens."""

FEWEST_TEXTS, MOST_TEXTS = 1 << 8, 1 << 15
"""The texts of a window, or parts of texts: at least and at most. A short text takes about a kilobyte."""

MOST_TOKENS = 1 << 24
"""The tokens from which on a window with the fewest texts takes no others, whatever a batch may have."""


@dataclass(frozen=True)
class Window:
    """A look-ahead window with at least one unfinished example."""

    lengths: Sequence[int]
    """Tokens of each example, finished or not."""
    batches: Sequence[Sequence[Tokens]]
    """The batches of unfinished examples."""
    num_texts: int
    """The texts that begin in the window; at least 1."""


def open_windows(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    done: Iterable[ExampleRecord],
    inference: InferenceConfig,
    *,
    boundary: int | None,
    stages: Stages,
) -> Iterator[Window]:
    """Yields the windows of `examples` that are not finished completely.

    All examples of a window, finished or not, determine which of them share a batch. A job that was killed therefore
    runs the same batches as one that was not.

    Args:
        done: the records of the finished examples.
        boundary: an example of more tokens runs alone; None for no boundary.

    Raises:
        SourceError: the content of a finished example has changed, or that of another one is refused.
    """
    read_together = inference.lookahead or FEWEST_TEXTS
    for window in lookahead_windows(_parts(examples, tokenizer, done, read_together, stages), inference):
        tokens = {part.key: part for part in window if isinstance(part, Tokens)}
        if not tokens:
            continue
        trim_memory()  # the encodings of long texts take ten times the memory of their ids
        lengths = {part.key: part.num_tokens for part in window if part is not None}
        num_texts = sum(part is not None and part.part == 0 for part in window)
        yield Window(list(lengths.values()), [*_batches(lengths, tokens, inference, boundary)], max(1, num_texts))


def _parts(
    examples: Iterable[Example], tokenizer: Tokenizer, done: Iterable[ExampleRecord], most: int, stages: Stages
) -> Iterator[Tokens | ExampleRecord | None]:
    """Yields the parts of each text: the record of a finished one, the tokens of another. None is a text without parts.

    Reads at most `most` texts ahead.
    """
    of_text: dict[int, list[ExampleRecord]] = {}
    for record in done:
        of_text.setdefault(record.index, []).append(record)
    for some in windows(examples, most):
        finished = {example.index: _by_part(of_text.pop(example.index, ())) for example in some}
        for example in some:
            check_unchanged(example, next(iter(finished[example.index].values()), None), tokenizer.content_hash)
        tokenized = _timed(tokenizer.parts([each for each in some if not _is_whole(finished[each.index])]), stages)
        for example in some:
            records = finished[example.index]
            if _is_whole(records):
                yield from records.values()
                continue
            is_empty = True
            for part in _timed(next(tokenized), stages):
                yield records.get(part.part, part)
                is_empty = False
            if is_empty:
                yield None


def _by_part(records: Iterable[ExampleRecord]) -> dict[int, ExampleRecord]:
    return {record.part: record for record in sorted(records, key=lambda record: record.part)}


def _is_whole(records: Mapping[int, ExampleRecord]) -> bool:
    """Whether the finished parts of a text are all of its parts."""
    last = records.get(len(records) - 1)
    return last is not None and last.is_last


def _timed(items: Iterator[T], stages: Stages) -> Iterator[T]:
    while True:
        start = perf_counter()
        item = next(items, None)
        stages.add("tokenize", perf_counter() - start)
        if item is None:
            return
        yield item


def lookahead_windows(
    parts: Iterable[Tokens | ExampleRecord | None], inference: InferenceConfig
) -> Iterator[list[Tokens | ExampleRecord | None]]:
    """Yields the parts of texts, in their order, in look-ahead windows. None is a text without parts.

    A window has `inference.lookahead` parts. If that is None, it has at least `FEWEST_TEXTS`, and so many more that
    they fill `FULL_BATCHES`, but no more after `MOST_TEXTS` or `MOST_TOKENS`. A batch is full when it has
    `max_batch_tokens` tokens or `batch_size` examples.
    """
    if inference.lookahead is not None:
        yield from windows(parts, inference.lookahead)
        return
    full = inference.max_batch_tokens
    share = 0 if inference.batch_size is None else -(-full // inference.batch_size)
    enough = min(FULL_BATCHES * full, MOST_TOKENS)
    window: list[Tokens | ExampleRecord | None] = []
    filled = 0
    for part in parts:
        window.append(part)
        filled += 0 if part is None else max(share, part.num_tokens)
        if len(window) >= MOST_TEXTS or (len(window) >= FEWEST_TEXTS and filled >= enough):
            yield window
            window, filled = [], 0
    if window:
        yield window


def _batches(
    lengths: Mapping[int, int], tokens: Mapping[int, Tokens], inference: InferenceConfig, boundary: int | None
) -> Iterator[list[Tokens]]:
    order = list(lengths)  # keys
    for batch in batches(
        list(lengths.values()), max_batch_tokens=inference.max_batch_tokens, batch_size=inference.batch_size
    ):
        members = [tokens[order[place]] for place in batch if order[place] in tokens]
        together = [example for example in members if boundary is None or example.num_tokens <= boundary]
        if together:
            yield together
        yield from ([example] for example in members if boundary is not None and example.num_tokens > boundary)


def check_unchanged(
    example: Example,
    record: ExampleRecord | None,
    hash_of: HashOf = plain_hash,
    origin: str = "that was captured before the job stopped",
) -> None:
    """Checks that the source still has the text and the id of a finished example. `origin` says where that is from.

    Raises:
        SourceError: `example` has another text or id than `record`.
    """
    if record is None:
        return
    # In a dataset, a later part of a text has a number of its own.
    example_id = record.example_id if record.part else example.example_id
    now = example.source_id, example_id, hash_of(example)
    if now == (record.source_id, record.example_id, record.text_hash):
        if _has_other_segments(example, record):
            raise _changed(
                f"example {example.index} of the dataset (id {example.source_id}) has other segments than the example "
                f"{origin}"
            )
        return
    if now[2] == record.text_hash and now[0] != record.source_id:
        raise _changed(
            f"example {example.index} of the dataset has the id {example.source_id} now, and had {record.source_id} "
            f"with the text {origin} (earlier versions read some ids as numbers or dates)"
        )
    raise _changed(f"example {example.index} of the dataset (id {example.source_id}) is not the text {origin}")


def examples_of(corpus: Corpus, captured: Iterable[ExampleRecord], hash_of: HashOf = plain_hash) -> list[Example]:
    """Returns the examples of the source that `captured` are, or are parts of, in its order.

    Raises:
        SourceError: a text or an id has changed, or a row cannot be read.
    """
    left = _by_index(captured)
    found = []
    for example in corpus.examples():
        if (record := left.pop(example.index, None)) is not None:
            check_unchanged(example, record, hash_of)
            found.append(example)
        if not left:
            break
    return found


def check_same_texts(
    corpus: Corpus,
    captured: Iterable[ExampleRecord],
    tokenizer: Callable[[], Tokenizer],
    *,
    rows: int = 0,
    origin: str = "that was captured before the job stopped",
) -> None:
    """Checks that the source still has the texts of the `captured` examples, and no others in its first `rows` rows.

    Args:
        tokenizer: called for conversations, and for texts that are not among the examples.
        rows: see above; 0 where `captured` are some of the examples.
        origin: says in errors where these texts are from.

    Raises:
        SourceError: it has others, conversations have other segments, or a row cannot be read.
    """
    captured = list(captured)
    left, segmented = _by_index(captured), _with_segments(captured)
    end = max(rows, 1 + max(left, default=-1))

    def hash_of(example: Example) -> str:
        return tokenizer().content_hash(example) if isinstance(example.content, Conversation) else plain_hash(example)

    for example in corpus.examples():
        if example.index >= end:
            break
        record = left.pop(example.index, None)
        check_unchanged(example, record, hash_of, origin)
        if isinstance(example.content, Conversation) and (of_text := segmented.get(example.index)):
            # Roles that the template writes in the same way are in no hash.
            now = chosen(tokenizer(), [example], {part.key for part in of_text})
            for part in of_text:
                if part.key in now and now[part.key].num_tokens == part.num_tokens:  # else of other software
                    check_same_segments(now[part.key], part)
        if record is None and example.index < rows and tokenizer()([example]):  # else a text without tokens
            raise _changed(
                f"example {example.index} of the dataset (id {example.source_id}) has a text now, and had none when "
                "the dataset was captured"
            )
    if left:
        raise _changed(f"example {min(left)} of the dataset has lost the text {origin}")


def _has_other_segments(example: Example, record: ExampleRecord) -> bool:
    """Whether token ids have other segments than those of `record`, whose hash has none. Conversations: False."""
    content = example.content
    if record.segments is None or not isinstance(content, TokenIds) or content.segments is None:
        return False
    now = content.segments.between(record.first_token, record.first_token + record.num_tokens)
    return encode(now.names, now.codes) != record.segments


def check_same_segments(tokens: Tokens, record: ExampleRecord) -> None:
    """Checks that the tokens of a captured example are in the same segments as before. Its `text_hash` has none.

    Raises:
        SourceError: they are in others.
    """
    if tokens.record().segments != record.segments:
        raise _changed(
            f"example {tokens.index} of the dataset (id {tokens.source_id}) has other segments than when it was "
            "captured"
        )


def _with_segments(captured: Iterable[ExampleRecord]) -> dict[int, list[ExampleRecord]]:
    """Returns the examples with segments of each text, by index."""
    found: dict[int, list[ExampleRecord]] = {}
    for record in captured:
        if record.segments is not None:
            found.setdefault(record.index, []).append(record)
    return found


def _by_index(captured: Iterable[ExampleRecord]) -> dict[int, ExampleRecord]:
    """Returns an example of each text, by index: the first part if it is there, which has the number of the text."""
    found: dict[int, ExampleRecord] = {}
    for record in captured:
        if record.part == 0 or record.index not in found:
            found[record.index] = record
    return found


def _changed(what: str) -> SourceError:
    return SourceError(
        f"{what}: the source has changed. Restore it, give this job another folder (output.data_root=...), or replace "
        "the dataset with output.overwrite=true"
    )


def windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields `items`, in their order, in lists of `size`. The last list may be shorter."""
    iterator = iter(items)
    while window := list(islice(iterator, size)):
        yield window


def batches(
    lengths: Sequence[int], *, max_batch_tokens: int, batch_size: int | None = None, max_padding: float = 0.05
) -> list[list[int]]:
    """Cuts examples of these `lengths` into batches, longest first. Every index into `lengths` is in exactly one batch.

    A batch is ordered by length, longest first, then by index. It has at most `batch_size` examples and at most
    `max_batch_tokens` tokens, padding included; a longer example is a batch of its own. At most the fraction
    `max_padding` of its tokens is padding.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    cut: list[list[int]] = []
    longest = total = 0
    for place in order:
        length = lengths[place]
        if cut:
            count = len(cut[-1]) + 1
            area = longest * count
            if (
                (batch_size is None or count <= batch_size)
                and area <= max_batch_tokens
                and area - (total + length) <= max_padding * area
            ):
                cut[-1].append(place)
                total += length
                continue
        cut.append([place])
        longest = total = length
    return cut
