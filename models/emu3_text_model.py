"""Serves the text decoder of Emu3, which transformers' AutoModel cannot load alone."""

from qk_sniffer import families


class Family(families.Family):
    """The decoder's own class loads it."""

    auto_class = "Emu3TextModel"
