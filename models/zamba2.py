"""Serves Zamba2 with the family of Zamba: both run one attention module at several layers."""

from .zamba import Family

__all__ = ["Family"]
