"""Serves the text decoder of Emu3, which transformers' AutoModel cannot load alone."""

from types import MappingProxyType

from qk_sniffer import families


class Family(families.Family):
    """The decoder's own class loads it. Its weights have no prefix."""

    auto_class = "Emu3TextModel"
    key_mapping = MappingProxyType({r"^text_model\.model\.": "", r"^model\.text_model\.": ""})
