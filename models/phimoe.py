"""PhiMoE masks with its config's window, and does not tell its kernel of it."""

from typing import Any

from qk_sniffer import families


class Family(families.Family):
    """Its window is that of its config, at every layer."""

    def sliding_window(self, module: Any, arguments: dict[str, Any]) -> int | None:
        window: int | None = module.config.sliding_window
        return window
