"""Captures query, key, value and output vectors of transformer attention heads into Parquet datasets."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qk_sniffer.dataset.head_vectors import HeadVectors
    from qk_sniffer.dataset.reader import Dataset, open_dataset
    from qk_sniffer.export.write import export
    from qk_sniffer.notebook.captured import Captured, capture

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "conf").is_dir():
    # A checkout keeps `conf/` and `models/` next to this package, a wheel inside it. Both import them as
    # `qk_sniffer.conf` and `qk_sniffer.models`, so that neither a folder of the same name in the current directory
    # nor another distribution's `models` can replace them.
    __path__.append(str(_here.parent))

__all__ = ["Captured", "Dataset", "HeadVectors", "__version__", "capture", "export", "open_dataset"]

_MODULES = {
    "Captured": "qk_sniffer.notebook.captured",
    "Dataset": "qk_sniffer.dataset.reader",
    "HeadVectors": "qk_sniffer.dataset.head_vectors",
    "open_dataset": "qk_sniffer.dataset.reader",
}


def __getattr__(name: str) -> Any:
    # A late import: a mistyped command line is answered before pyarrow is imported.
    if name in ("capture", "export"):
        return importlib.import_module(f"qk_sniffer.{name}")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
