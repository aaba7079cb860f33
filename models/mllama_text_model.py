"""Serves the text decoder of Llama 3.2 Vision, which transformers' AutoModel cannot load alone."""

from types import MappingProxyType

from qk_sniffer import families


class Family(families.Family):
    """The decoder's own class loads it. Its weights have no prefix.

    Its cross-attention layers attend to an image. They are not captured, and text alone does not run them.
    """

    auto_class = "MllamaTextModel"
    key_mapping = MappingProxyType({r"^language_model\.model\.": "", r"^model\.language_model\.": ""})
