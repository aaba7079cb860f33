"""Finds the rows that `dataset.split` names in the files of a source: whole splits, parts of them, and sums."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qk_sniffer.config import DatasetConfig
from qk_sniffer.corpus.data_files import DataFile, first_lines
from qk_sniffer.corpus.rows import FORMATS, FileRows, Part, Rows
from qk_sniffer.errors import SourceError


def rows_of_files(
    where: str,
    data_files: Mapping[str, Sequence[DataFile]],
    format: str,
    options: Mapping[str, Any],
    config: DatasetConfig,
) -> Rows:
    """Opens the rows of `config.split`. For a part of a split, this counts the rows of the split.

    Args:
        where: the name of the source in errors.
        data_files: the files of each split, at least of those that `config.split` names.
        format: a key of `rows.FORMATS`.
        options: of its reader.

    Raises:
        SourceError: there is no such split, its rows cannot be counted, or the options do not fit.
    """
    names = named_splits(where, config, list(data_files))
    try:
        reader = FORMATS[format](options)
    except (TypeError, ValueError) as error:
        raise SourceError(
            f"{where}: the options of its README.md or .huggingface.yaml ({', '.join(sorted(options))}) do not fit "
            f"{format} files: {first_lines(str(error))}"
        ) from error
    rows = FileRows(where, [Part(data_files[names[0]])], reader, may_scan=not config.streaming)
    if config.split in data_files:
        return rows
    counts = {name: replace(rows, parts=[Part(data_files[name])]).count() for name in dict.fromkeys(names)}
    return replace(
        rows, parts=_parts(where, config.split if config.split != "all" else "+".join(names), counts, data_files)
    )


def named_splits(where: str, config: DatasetConfig, known: list[str]) -> list[str]:
    """Returns the splits that `config.split` names, in their order.

    Raises:
        SourceError: there is no such split, or a stream is asked for a part of one.
    """
    if config.split in known:
        return [config.split]
    if config.split == "all" and not config.streaming:
        return known
    names = [config.split] if config.streaming else re.split(r"\s*\+\s*", re.sub(r"\[.*?\]", "", config.split))
    if not {name.strip() for name in names} <= set(known):
        raise no_split(where, config.split, known, streaming=config.streaming)
    return [name.strip() for name in names]


def no_split(where: str, split: str, known: list[str], streaming: bool = False) -> SourceError:
    """Returns the error for a split that a source does not have."""
    hint = ". Streaming reads a whole split: use dataset.max_samples for a part" if streaming and "[" in split else ""
    return SourceError(f"{where} has no split {split!r}. Choose one with dataset.split: {', '.join(known)}{hint}")


def _parts(
    where: str, spec: str, counts: Mapping[str, int], data_files: Mapping[str, Sequence[DataFile]]
) -> list[Part]:
    """Returns the parts that a `spec` of `datasets` names, such as `train[:10%]+test`."""
    from datasets import ReadInstruction

    try:
        absolute = ReadInstruction.from_spec(spec).to_absolute(counts)
    except (ValueError, AssertionError) as error:
        raise SourceError(f"{where}: dataset.split={spec}: {first_lines(str(error))}") from error
    parts = []
    for each in absolute:
        start, stop = each.from_ or 0, counts[each.splitname] if each.to is None else each.to
        parts.append(Part(data_files[each.splitname], start, max(start, stop)))
    return parts
