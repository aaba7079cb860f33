"""Draws docs/samplers.png: the buckets of each sampler, and the positions that it keeps of some examples.

python scripts/sampler_picture.py
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import SamplerConfig
from qk_sniffer.drawing.style import BLUE, GREY, PAGE_IN, figure, styled

PICTURE = Path(__file__).parents[1] / "docs" / "samplers.png"
NUM_TOKENS, NUM_EXAMPLES = 2047, 12
SAMPLERS = {
    "log_uniform": SamplerConfig(type="log_uniform", base_rate=4),
    "uniform": SamplerConfig(type="uniform", base_rate=4, min_bucket_size=256),
    "all": SamplerConfig(type="all", min_bucket_size=256),
}


def draw() -> Figure:
    """Draws a row a sampler: buckets as bands with their numbers, and a line of kept positions for each example."""
    drawn = figure(PAGE_IN, 3.6)
    for axis, (name, config) in zip(drawn.subplots(len(SAMPLERS), 1, sharex=True), SAMPLERS.items(), strict=True):
        sampler = Sampler(config)
        for number, (bucket, probability) in enumerate(sampler.inclusion("q", NUM_TOKENS).items()):
            first, last = sampler.span("q", bucket)
            end = min(last, NUM_TOKENS - 1) + 1
            axis.axvspan(first, end, color=GREY, alpha=0.30 if number % 2 else 0.12, linewidth=0)
            label = f"{bucket}\np = {probability:.2g}" if end - first > 200 else str(bucket)
            axis.text((first + end) / 2, NUM_EXAMPLES + 0.5, label, ha="center", va="bottom", fontsize=6)
        for example in range(NUM_EXAMPLES):
            kept = sampler.positions(example, 0, "q", NUM_TOKENS)
            axis.plot(kept, np.full(len(kept), example), ".", color=BLUE, markersize=3, markeredgewidth=0)
        axis.set_ylabel(name)
        axis.set_yticks([])
        axis.set_ylim(-1, NUM_EXAMPLES + 0.3)
        axis.set_xlim(0, NUM_TOKENS)
        axis.spines["left"].set_visible(False)
    axis.set_xlabel("position in the example")
    axis.set_xticks(range(0, NUM_TOKENS + 2, 256))
    return drawn


if __name__ == "__main__":
    with styled():
        draw().savefig(PICTURE, metadata={"Software": None})
