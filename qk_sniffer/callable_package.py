"""Lets a package be called like a function of its own name, which an import of the package would replace.

`qk_sniffer.capture(model)` and `qk_sniffer.export(dataset, ...)` are calls of packages.
"""

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """Calls the function that `module_of_function` has under the last part of the package's name."""

    module_of_function: str

    @property
    def _function(self) -> Any:
        # By name, and only for a call: a package may be below the one with its function, and imports little.
        return getattr(importlib.import_module(self.module_of_function), self.__name__.rpartition(".")[2])

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self._function(*arguments, **settings)  # which names itself in the error of a missing argument

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        """The text of the function, after its signature, which `help` shows of no module."""
        return f"{self._function.__name__}{self.__signature__}\n\n{inspect.getdoc(self._function)}"


def make_callable(package: str, module_of_function: str) -> None:
    """Lets an imported package be called."""
    module = sys.modules[package]
    module.__class__ = CallablePackage
    module.__dict__["module_of_function"] = module_of_function
