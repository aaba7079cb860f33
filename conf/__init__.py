"""Holds Hydra's config groups. Importing this package registers their schema with Hydra."""

from qk_sniffer.config import register

register()
