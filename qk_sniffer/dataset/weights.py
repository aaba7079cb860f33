"""Words the dtype and the quantization of a model for the card and the summary of a dataset."""

from collections.abc import Mapping
from typing import Any


def computed_in(dtype: str, own: str | None) -> str:
    """Returns the dtype that a model computed in, with `own`, that of its checkpoint, if it is another one."""
    return dtype if own in (None, dtype) else f"{dtype}, from a checkpoint in {own}"


def quantized(quantization: Mapping[str, Any]) -> str:
    """Returns the method of a manifest's `quantization`, and the form of the weights that computed."""
    how = "dequantized when they were loaded" if quantization["dequantized"] else "computed with as they are stored"
    return f"{quantization['method']}, {how}"
