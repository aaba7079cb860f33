"""Writes a plan for people: all of it for `dry_run`, or in three lines for the start of a job."""

import textwrap
from collections.abc import Iterator, Sequence

from qk_sniffer.jobs.plan import STATISTICS, KindSize, Plan
from qk_sniffer.store.layout import FILE_NAMES, KIND_PLURALS
from qk_sniffer.text import aligned, compact_ranges, counted, printable

WIDTH = 80
_LABEL = 11
_NAMES = {**KIND_PLURALS, "a": FILE_NAMES["a"], STATISTICS: STATISTICS, "others": "card, lists"}


def plan_text(plan: Plan) -> str:
    """Returns the whole plan, in lines of at most 80 characters."""
    lines = [
        *labelled("model", _model(plan)),
        *labelled("captured", _captured(plan)),
        *labelled("texts", _texts(plan)),
        *labelled("batches", _batches(plan)),
        *labelled("memory", _memory(plan)),
        *labelled("disk", _disk(plan)),
        "",
        *_table(plan).split("\n"),
    ]
    return "\n".join(lines)


def three_lines(plan: Plan) -> list[str]:
    """Returns the plan of a job that starts, whose numbers are those of its first texts in proportion."""
    about = "" if plan.share == 1 and plan.texts is not None else "about "
    known = plan.texts is not None
    texts = counted(plan.texts, "text") if plan.texts is not None else "texts of unknown number"
    tokens = _scaled(plan, plan.counts.tokens)
    size = f", {about}{tokens:,} tokens, {about}{counted(plan.rows, 'row')}" if known else ""
    left = f" to go ({plan.counts.done_texts:,} are done)" if plan.counts.done_texts else ""
    files = sum(kind.files for kind in plan.kinds if kind.name in KIND_PLURALS)
    disk = (
        f"{about}{size_of(plan.needed)} needed (journal {size_of(plan.journal)}, dataset {size_of(plan.dataset)}), "
        if known
        else ""
    )
    return [
        f"plan: {texts}{left}{size}, of {counted(files, 'head')}",
        f"disk: {disk}{size_of(plan.free)} free",
        f"memory: {_of_model(plan)}",
    ]


def size_of(size: int) -> str:
    """Returns a number of bytes with three digits: `512 B`, `1.21 MB`."""
    number, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if number < 999.5:
            break
        number, unit = number / 1000, larger
    return f"{number:.3g} {unit}"


def labelled(label: str, text: str) -> list[str]:
    """Returns a text after its label, wrapped."""
    return textwrap.wrap(
        printable(text),
        WIDTH,
        initial_indent=label.ljust(_LABEL),
        subsequent_indent=" " * _LABEL,
        break_on_hyphens=False,
    )


def _scaled(plan: Plan, number: int) -> int:
    return round(number / plan.share)


def _model(plan: Plan) -> str:
    config = plan.config
    where = "cpu" if plan.model.device == "cpu" else plan.model.device
    return f"{config.model.slug} ({config.model.name}), {plan.model.dtype} on {where}"


def _captured(plan: Plan) -> str:
    """Returns the captured heads by layer; layers with the same ones together."""
    by_heads: dict[str, list[int]] = {}
    for chosen in plan.model.selection.layers:
        heads = ", ".join(f"{kind} {compact_ranges(numbers)}" for kind, numbers in chosen.by_kind.items())
        by_heads.setdefault(heads, []).append(chosen.layer.layer)
    parts = [
        f"layer{'s' if len(layers) > 1 else ''} {compact_ranges(layers)}: {heads}" for heads, layers in by_heads.items()
    ]
    return f"{counted(plan.model.selection.num_heads, 'head')}. {'; '.join(parts)}"


def _texts(plan: Plan) -> str:
    counts = plan.counts
    text = counted(counts.texts, "text")
    if counts.done_texts:
        text += f" to go ({counts.done_texts:,} are captured)"
    if plan.base_texts:
        text += f", added to {plan.base_texts:,} of the finished dataset"
    text += f"; {counted(counts.tokens, 'token')}"
    if counts.examples != counts.texts:
        text += f" in {counted(counts.examples, 'example')}"
    if counts.cut:
        more = "" if counts.knows_left_out else "at least "
        text += (
            f"; {counts.cut:,} cut to {plan.config.model.tokenizer.max_length:,} tokens, "
            f"which leaves out {more}{counts.left_out:,}"
        )
    if (shard := plan.config.shard).count > 1:
        text += f"; shard {shard.index} of {shard.count}"
    return text


def _batches(plan: Plan) -> str:
    counts = plan.counts
    if not counts.batches:
        return "none: all texts are captured"
    padding = 100 * (counts.computed - counts.tokens) / counts.computed
    return f"{counts.batches:,}, the largest of {_shape(counts.largest)} tokens; {padding:.1f} % padding"


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]:,} x {shape[1]:,}"


def _memory(plan: Plan) -> str:
    return f"{_of_model(plan)}, threads for Parquet {size_of(plan.writers)}"


def _of_model(plan: Plan) -> str:
    model = plan.model
    weights = "unknown" if model.weight_bytes is None else size_of(model.weight_bytes)
    activations = "unknown" if plan.activations is None else f"about {size_of(plan.activations)}"
    return f"weights {weights}, activations {activations} ({model.device}); buffers {size_of(plan.buffers)}"


def _disk(plan: Plan) -> str:
    there = f", of which {size_of(plan.there)} are there" if plan.there else ""
    journal = f" (and {size_of(plan.in_journal)} that are there)" if plan.in_journal else ""
    short = ": NOT ENOUGH" if plan.is_short else ""
    return (
        f"{size_of(plan.needed)} needed: journal {size_of(plan.journal)}{journal}, dataset "
        f"{size_of(plan.dataset)}{there}; {size_of(plan.free)} free{short}"
    )


def _table(plan: Plan) -> str:
    rows = [("kind", "files", "rows", "journal", "dataset"), *map(_cells, plan.kinds)]
    total = KindSize("together", sum(kind.files for kind in plan.kinds), plan.rows, plan.journal, plan.dataset)
    return aligned([*right([*rows, _cells(total)])])


def _cells(kind: KindSize) -> tuple[str, ...]:
    name = _NAMES.get(kind.name, kind.name)
    rows = f"{kind.rows:,}" if kind.rows else "-"
    return name, f"{kind.files:,}", rows, size_of(kind.journal), size_of(kind.dataset)


def right(rows: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Yields rows whose cells after the first are aligned at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield [row[0], *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
