"""Captures query, key, value and output vectors of transformer attention heads into Parquet datasets."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qk_sniffer.dataset.reader import Dataset, HeadVectors, open_dataset
    from qk_sniffer.export.write import export

_here = Path(__file__).resolve().parent
if not (_here / "conf").is_dir():
    # A checkout keeps `conf/` and `models/` next to this package, a wheel inside it. Both import them as
    # `qk_sniffer.conf` and `qk_sniffer.models`, so that neither a folder of the same name in the current directory
    # nor another distribution's `models` can replace them.
    __path__.append(str(_here.parent))

__all__ = ["Dataset", "HeadVectors", "export", "open_dataset"]


def __getattr__(name: str) -> Any:
    # A late import: a mistyped command line is answered before pyarrow is imported.
    if name == "export":
        return importlib.import_module("qk_sniffer.export")
    if name in __all__:
        return getattr(importlib.import_module("qk_sniffer.dataset.reader"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
