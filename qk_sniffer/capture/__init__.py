"""Chooses rows, gathers them, and proves them.

`qk_sniffer.capture(model)` is the function `capture` of `qk_sniffer/notebook/captured.py`: this package can be called.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """Calls `capture`: an import replaces any function of this name in `qk_sniffer` by the package."""

    def __call__(self, model: Any, **settings: Any) -> Any:
        # By name: this package is below the one with the function, and does not depend on it.
        return importlib.import_module("qk_sniffer.notebook.captured").capture(model, **settings)


sys.modules[__name__].__class__ = _CallablePackage
