"""Serves Zamba2 with the family of Zamba: both run one attention module at several layers."""

from qk_sniffer.models.zamba import Family

__all__ = ["Family"]
