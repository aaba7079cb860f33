"""Serves PhiMoE, whose masks have the config's window, which its kernel does not receive."""

from typing import Any

from qk_sniffer import families


class Family(families.Family):
    """The config's window holds at every layer."""

    def sliding_window(self, module: Any, arguments: dict[str, Any]) -> int | None:
        window: int | None = module.config.sliding_window
        return window
