"""GPT-NeoX Japanese has an attention of its own."""

from collections.abc import Callable, Sequence
from typing import Any

from qk_sniffer import families


class Family(families.Family):
    """Query and key are what its method `_attn` receives."""

    def watch(self, module: Any, see: Callable[..., None]) -> Sequence[Any]:
        return [families.Shown(module, "_attn", lambda query, key, *rest: see(query, key))]
