"""BLOOM has an attention of its own, whose logits carry a bias by distance (ALiBi)."""

from collections.abc import Callable, Sequence
from typing import Any

from qk_sniffer import families


class Family(families.Family):
    """Query and key are cut from its one projection."""

    def watch(self, module: Any, see: Callable[..., None]) -> Sequence[Any]:
        return [module.query_key_value.register_forward_hook(lambda _, inputs, fused: see(*module._reshape(fused)[:2]))]
