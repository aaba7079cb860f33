"""The text decoder of Emu3, which transformers' AutoModel does not know by itself."""

from types import MappingProxyType

from qk_sniffer import families


class Family(families.Family):
    """Loads by the decoder's own class, whose weights have no prefix of their own."""

    auto_class = "Emu3TextModel"
    key_mapping = MappingProxyType({r"^text_model\.model\.": "", r"^model\.text_model\.": ""})
