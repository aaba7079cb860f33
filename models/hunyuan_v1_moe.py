"""Serves Hunyuan's mixtures of experts with the family of its dense decoders: both have the same attention."""

from qk_sniffer.models.hunyuan_v1_dense import Family

__all__ = ["Family"]
