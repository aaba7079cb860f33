"""Serves the text decoder of Llama 3.2 Vision, which transformers' AutoModel cannot load alone."""

from qk_sniffer import families


class Family(families.Family):
    """The decoder's own class loads it.

    Its cross-attention layers attend to an image. They are not captured, and text alone does not run them.
    """

    auto_class = "MllamaTextModel"
