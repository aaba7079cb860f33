"""Writes the statistics of a dataset in the file formats that KV-cache methods read.

`qk_sniffer.export(dataset, "triattention", path)` is the function `export` of `write.py`: this package can be called.
`python -m qk_sniffer.export` is the program. `docs/kv_cache.md` describes the methods.
"""

import inspect
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """Calls `export`: an import replaces any function of this name in `qk_sniffer` by the package."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return _function()(*arguments, **settings)  # which names itself in the error of a missing argument

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_function())


def _function() -> Any:
    from qk_sniffer.export.write import export

    return export


sys.modules[__name__].__class__ = _CallablePackage
