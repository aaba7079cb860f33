"""Hunyuan's mixtures of experts norm queries and keys after their rotary embedding."""

from qk_sniffer import families


class Family(families.Family):
    """Before RoPE, and before the norm that follows it."""

    changed_after_rotary = True
