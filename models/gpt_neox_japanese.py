"""GPT-NeoX Japanese has an attention of its own."""

from collections.abc import Callable, Sequence
from typing import Any

from qk_sniffer import families


class Family(families.Family):
    """Query and key are what its method `_attn` receives."""

    def register_tap(self, module: Any, on_query_key: Callable[..., None]) -> Sequence[Any]:
        return [families.CallSpy(module, "_attn", lambda query, key, *rest: on_query_key(query, key))]
