"""Which batches a job runs: those of its look-ahead windows whose examples are not done yet."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from qk_sniffer.config import InferenceConfig
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.tokenizer import TextTokenizer, Tokens, text_hash
from qk_sniffer.errors import SourceError
from qk_sniffer.machine import trim_memory
from qk_sniffer.store.journal import ExampleRecord
from qk_sniffer.timing import Stages


@dataclass(frozen=True)
class Window:
    """A look-ahead window in which there is something to do."""

    lengths: Sequence[int]
    """Tokens of every example, done or not."""
    batches: Sequence[Sequence[Tokens]]
    """Those to run."""


def open_windows(
    examples: Iterable[Example],
    tokenizer: TextTokenizer,
    done: Mapping[int, ExampleRecord],
    inference: InferenceConfig,
    *,
    boundary: int | None,
    stages: Stages,
) -> Iterator[Window]:
    """The windows of `examples` that are not all `done` (by index); examples of more than `boundary` tokens run alone.

    Which examples share a batch follows from the whole window, done or not, so that a job that was killed runs the
    same batches as one that was not.

    Raises:
        SourceError: an example that is done has another text now.
    """
    done = dict(done)
    for window in windows(examples, inference.lookahead):
        for example in window:
            check_unchanged(example, done.get(example.index))
        fresh = [example for example in window if example.index not in done]
        if not fresh:
            continue
        with stages("tokenize"):
            tokens = {made.index: made for made in tokenizer(fresh)}
            trim_memory()  # the encodings of a window of long texts take ten times as much as their ids
        both = ((example.index, done.get(example.index) or tokens.get(example.index)) for example in window)
        lengths = {index: found.num_tokens for index, found in both if found is not None}
        yield Window(list(lengths.values()), list(_batches(lengths, tokens, inference, boundary)))


def _batches(
    lengths: Mapping[int, int], tokens: Mapping[int, Tokens], inference: InferenceConfig, boundary: int | None
) -> Iterator[list[Tokens]]:
    order = list(lengths)
    for batch in batches(
        list(lengths.values()), max_batch_tokens=inference.max_batch_tokens, batch_size=inference.batch_size
    ):
        members = [tokens[order[place]] for place in batch if order[place] in tokens]
        together = [example for example in members if boundary is None or example.num_tokens <= boundary]
        if together:
            yield together
        yield from ([example] for example in members if boundary is not None and example.num_tokens > boundary)


def check_unchanged(example: Example, record: ExampleRecord | None) -> None:
    """
    Raises:
        SourceError: `record` is of another text.
    """
    if record is not None and text_hash(example.text) != record.text_hash:
        raise SourceError(
            f"row {example.index} of the dataset (id {example.source_id}) is not the text that was captured before "
            "the job stopped: the source has changed. Restore it, or start anew with output.overwrite=true"
        )


def windows(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """`examples` in lists of `size`, the last one shorter, in their order."""
    iterator = iter(examples)
    while window := list(islice(iterator, size)):
        yield window


def batches(
    lengths: Sequence[int], *, max_batch_tokens: int, batch_size: int | None = None, max_padding: float = 0.05
) -> list[list[int]]:
    """Cuts examples of these `lengths` into batches, longest first; every place in `lengths` is in exactly one.

    In a batch (longest first, then by place): at most `batch_size` examples; no more than `max_batch_tokens` tokens,
    padding included, but for an example that is longer than that by itself; at most `max_padding` of the tokens
    are padding.
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
