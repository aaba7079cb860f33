"""Lists the versions of the packages that a job uses, and of the kernels of the Hub that it has loaded.

Another version of one of these may compute other tokens or other vectors.
"""

import importlib.metadata
import re
import sys
from collections.abc import Iterable
from contextlib import suppress

from qk_sniffer.resolved import ResolvedConfig

ALWAYS = ("torch", "transformers", "tokenizers")

KERNEL = "kernel "
"""The start of the name of a kernel of the Hub among the versions."""

_KERNEL = re.compile(r"/(?:models|kernels)--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/build/")
"""The path of a module that the package kernels has loaded from the cache of the Hub."""


def installed(names: Iterable[str]) -> dict[str, str]:
    """Returns the versions of packages by name. One that is not installed is left out: loading the model says so."""
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def versions_of(config: ResolvedConfig) -> dict[str, str]:
    """Returns the versions of the packages that the settings of a job tell."""
    further = {
        "jinja2": config.dataset.messages_column is not None,
        "peft": config.model.adapter is not None,
        "gguf": config.model.gguf_file is not None,
    }
    return installed([*ALWAYS, *(name for name, is_used in further.items() if is_used)])


def versions_of_loaded(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of `packages` that are known once model and tokenizer are loaded, and of kernels of the Hub.

    The version of a kernel, such as `kernel org/name`, is the commit of its repository.
    """
    kernels = {}
    for module in [*sys.modules.values()]:
        if match := _KERNEL.search(str(getattr(module, "__file__", ""))):
            kernels[f"{KERNEL}{match['repo'].replace('--', '/')}"] = match["commit"]
    return installed([*packages, *(["kernels"] if kernels else [])]) | kernels
