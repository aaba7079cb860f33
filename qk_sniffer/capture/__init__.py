"""Chooses rows, gathers them, and proves them.

`qk_sniffer.capture(model)` is the function `capture` of `qk_sniffer/notebook/captured.py`: this package can be called.
"""

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """Calls `capture`: an import replaces any function of this name in `qk_sniffer` by the package."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return _function()(*arguments, **settings)  # which names itself in the error of a missing argument

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_function())

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        """The text of the function, after its signature, which `help` shows of no module."""
        return f"capture{self.__signature__}\n\n{inspect.getdoc(_function())}"


def _function() -> Any:
    # By name: this package is below the one with the function, and does not depend on it.
    return importlib.import_module("qk_sniffer.notebook.captured").capture


sys.modules[__name__].__class__ = _CallablePackage
