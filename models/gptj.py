"""Serves GPT-J, which calls no kernel of the attention interface.

CodeGen and GPT-NeoX Japanese share this family.
"""

from collections.abc import Callable, Sequence
from typing import Any

from qk_sniffer import families


class Family(families.Family):
    """Query and key are the arguments of the attention's method `_attn`."""

    def register_tap(self, module: Any, on_query_key: Callable[..., None]) -> Sequence[Any]:
        return [families.CallSpy(module, "_attn", lambda query, key, *rest: on_query_key(query, key))]
