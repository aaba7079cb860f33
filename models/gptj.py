"""Serves GPT-J, which calls no kernel of the attention interface.

CodeGen and GPT-NeoX Japanese share this family.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qk_sniffer import families


class Family(families.Family):
    """Query, key and value are the arguments of the attention's method `_attn`, which returns the output first."""

    def register_tap(self, module: Any, on_query_key: Callable[..., None]) -> Sequence[Any]:
        return [
            families.CallSpy(module, "_attn", lambda query, key, value, *rest: on_query_key(query, key, value=value))
        ]

    def register_output_tap(self, module: Any, on_output: Callable[[torch.Tensor], None]) -> Sequence[Any]:
        return [families.CallSpy(module, "_attn", show_result=lambda returned: on_output(returned[0]))]
