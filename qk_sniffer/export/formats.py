"""Lists the formats of an export."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from qk_sniffer.errors import ConfigError
from qk_sniffer.export import expected_attention, kv_scales, qfilters, tria, triattention
from qk_sniffer.export.source import Source
from qk_sniffer.text import not_one_of


@dataclass(frozen=True)
class Format:
    """A format of another program."""

    suffix: str
    """The end of the default output, after the name of the dataset's folder."""
    problems: Callable[[Source], Iterable[str]]
    """Returns a line for each reason why a dataset cannot be exported."""
    encode: Callable[[Source], Mapping[str, bytes]]
    """Returns the files of a folder by name; for a format of one file, this file under an empty name."""
    is_folder: bool = False
    has_provenance: bool = False
    """Whether the file itself holds the provenance."""


FORMATS = {
    "triattention": Format("-triattention.pt", triattention.problems, triattention.encode, has_provenance=True),
    "tria": Format("-triattention.tria", tria.problems, tria.encode),
    "expected_attention": Format(
        "-expected-attention", expected_attention.problems, expected_attention.encode, is_folder=True
    ),
    "qfilters": Format("-qfilters", qfilters.problems, qfilters.encode, is_folder=True),
    "kv_scales": Format("-kv-scales", kv_scales.problems, kv_scales.encode, is_folder=True),
}
"""By name."""


def format_named(name: str) -> Format:
    """Returns the format of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in FORMATS:
        raise ConfigError([not_one_of("format", name, list(FORMATS))])
    return FORMATS[name]
