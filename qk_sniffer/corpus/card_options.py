"""Admits only options of reading in the configs of a dataset card, and each with a value of its type.

The library `datasets` passes everything else to its builder too. It joins the version and the name of a config into the
path of its copies, which could then be any folder of this machine. Of the admitted options, the readers of this package
know some; the library reads files with others.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from qk_sniffer.corpus.rows import FORMATS
from qk_sniffer.errors import SourceError
from qk_sniffer.logs import logger

log = logger(__name__)

_TEXTS = (
    *("sep", "delimiter", "prefix", "thousands", "decimal", "lineterminator", "quotechar", "escapechar", "comment"),
    *("encoding", "encoding_errors", "dialect", "engine", "float_precision", "on_bad_lines", "date_format"),
    *("field", "on_mixed_types", "sample_by", "comment_prefix", "on_bad_files", "description"),
)
_NUMBERS = ("nrows", "skipfooter", "quoting", "chunksize", "batch_size", "block_size")
_SWITCHES = (
    *("mangle_dupe_cols", "skipinitialspace", "keep_default_na", "na_filter", "verbose", "skip_blank_lines"),
    *("error_bad_lines", "warn_bad_lines", "doublequote", "newlines_in_values", "use_threads", "parse_agent_traces"),
    *("keep_linebreaks", "skip_docstart", "drop_labels", "drop_metadata", "default"),
)
_LISTS = (
    *("header", "names", "column_names", "index_col", "usecols", "skiprows", "na_values", "true_values"),
    *("false_values", "columns", "filters"),
)

_CHECKED_ELSEWHERE = frozenset({"features", "data_files", "data_dir"})
"""Types, which the library makes of the YAML, and the places of files (`home.py`)."""

_VERSION = re.compile(r"\d+\.\d+\.\d+")

_NAME = re.compile(r"(?!\.+\Z)[^/\\\0]+")

_KNOWN_VALUES: dict[str, tuple[Any, ...]] = {"header": (0, "infer", None), "sample_by": ("document",)}
"""The values of options of `datasets` that the readers know, where they do not know all."""


@contextmanager
def plain_options(where: str) -> Iterator[None]:
    """Checks the configs of each card that `datasets` reads in the block, before it makes anything of them.

    Args:
        where: the name of the source in errors.

    Raises:
        SourceError: a config has a name or version that is not one, a parameter of the library that is no option of
            reading, or an option with a value of another type.
    """
    from datasets import load

    make = load.create_builder_configs_from_metadata_configs

    def checked(module: str, configs: Mapping[Any, Mapping[str, Any]], *arguments: Any, **options: Any) -> Any:
        of_library = load.import_main_class(module).BUILDER_CONFIG_CLASS
        for name, given in configs.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise SourceError(f"{where}: {name!r} in its card is no name of a config: rename it there")
            for key, value in given.items():  # the library leaves out what its builder does not have
                if not _is_admitted(key, value) and (hasattr(of_library, key) or key in _KINDS):
                    raise SourceError(
                        f"{where}: the config {name} of its card has {key}: {str(value)[:80]!r}, which is no option of "
                        "reading or has another type: it is not read. Remove it from README.md or .huggingface.yaml, "
                        "or choose files with dataset.path=FILE"
                    )
        return make(module, configs, *arguments, **options)

    load.create_builder_configs_from_metadata_configs = checked
    try:
        yield
    finally:
        load.create_builder_configs_from_metadata_configs = make


def format_of(where: str, builder: Any) -> tuple[str | None, dict[str, Any]]:
    """Returns the format and the options of the files that a builder reads; None for what only the library reads."""
    name = type(builder.config).__name__.removesuffix("Config").lower()
    if name not in FORMATS:
        return None, {}
    usual = type(builder.config)()
    neutral = {"name", "version", "data_dir", "data_files", "description", "chunksize", "batch_size", "delimiter"}
    neutral |= {"column_names", "parse_agent_traces", "on_mixed_types", "use_threads", "block_size", "keep_linebreaks"}
    if name != "text":  # a card may give types, and for a text file the name of its column
        neutral |= {"features"}
    options = {
        each.name: value
        for each in fields(builder.config)
        if each.name not in neutral and (value := getattr(builder.config, each.name)) != getattr(usual, each.name)
    }
    is_known = all(options[key] in known for key, known in _KNOWN_VALUES.items() if key in options)
    is_known &= set(options) <= FORMATS[name].options and len(str(options.get("sep", ","))) == 1
    if is_known:
        return name, options
    log.warning(
        "%s: the library datasets reads these %s files with the options %s. It guesses types, and may take texts such "
        "as NA for null",
        where,
        name,
        ", ".join(sorted(options)),
    )
    return None, {}


def _is_admitted(key: str, value: Any) -> bool:
    if key == "version":
        return isinstance(value, str) and _VERSION.fullmatch(value) is not None
    if key in _CHECKED_ELSEWHERE:
        return True
    return key in _KINDS and (value is None or _KINDS[key](value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, str | int | float)


_KINDS = {
    **dict.fromkeys(_TEXTS, lambda value: isinstance(value, str)),
    **dict.fromkeys(_NUMBERS, _is_number),
    **dict.fromkeys(_SWITCHES, lambda value: isinstance(value, bool)),
    **dict.fromkeys(_LISTS, _is_plain),
}
"""Whether a value is of the type of each option."""
