"""Ministral 3 scales queries by their position after the rotary embedding."""

from qk_sniffer import families


class Family(families.Family):
    """Before RoPE is before the scale too; the query that attention receives has both."""

    changed_after_rotary = True
