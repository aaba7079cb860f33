"""Hydra's config groups. Importing this package makes their schema known to Hydra."""

from qk_sniffer.config import register

register()
