"""Serves CodeGen with the family of GPT-J: both have the same attention."""

from .gptj import Family

__all__ = ["Family"]
