"""Serves CodeGen with the family of GPT-J: both have the same attention."""

from qk_sniffer.models.gptj import Family

__all__ = ["Family"]
