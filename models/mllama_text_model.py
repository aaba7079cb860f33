"""The text decoder of Llama 3.2 Vision, which transformers' AutoModel does not know by itself."""

from types import MappingProxyType

from qk_sniffer import families


class Family(families.Family):
    """Loads by the decoder's own class, whose weights have no prefix of their own.

    Its cross-attention layers, which see the image, are no self-attention, and text alone does not run them.
    """

    auto_class = "MllamaTextModel"
    key_mapping = MappingProxyType({r"^language_model\.model\.": "", r"^model\.language_model\.": ""})
