"""Writes the section of a dataset card on statistics: their tokens, their arrays, and code that reads them.

Tests run this code.
"""

from collections.abc import Collection

from qk_sniffer.config import STAGE_NAMES
from qk_sniffer.dataset.card_facts import CardFacts, Place
from qk_sniffer.markdown import block, table
from qk_sniffer.store.layout import STATISTICS, UNROTATED_KINDS, statistics_file
from qk_sniffer.store.statistics import stages_of
from qk_sniffer.text import counted, python_literal, shortened

ARRAYS = {
    "heads": ("(H,) int64", "the captured heads, ascending: query heads for `q` and `o`, key heads for `k` and `v`"),
    "count": ("(H,) int64", "n, the tokens that every other array is of"),
    "nonfinite": ("(H,) int64", "further tokens: their vectors have NaN or Inf and count in nothing else"),
    "mean": ("(H, d) float32", "mean of each number of the vector"),
    "variance": ("(H, d) float32", "variance of each number, divisor n - 1, in squared units of the vectors"),
    "covariance": ("(H, d, d) float32", "covariance of the numbers, divisor n - 1, in squared units of the vectors"),
    "minimum": ("(H, d) float32", "smallest value of each number"),
    "maximum": ("(H, d) float32", "largest value of each number"),
    "norm_mean": ("(H,) float32", "mean of the Euclidean norms of the vectors"),
    "norm_variance": ("(H,) float32", "variance of these norms, divisor n - 1"),
    "frequency_pairs": ("(f, 2) int64", "the numbers a and b of a vector that turn with each rotary frequency, from 0"),
    "frequency_modulus": ("(H, f) float32", "mean of the modulus sqrt(a² + b²) of each pair"),
}
"""The shape and the meaning of each array of `store.statistics.Statistics`."""

_WITH_QK_SNIFFER = """\
import qk_sniffer

dataset = qk_sniffer.open_dataset({where})
found = dataset.statistics({layer}, "{kind}", "{stage}")
heads, mean, {second} = found.heads, found.mean, found.{second}
"""

_WITH_SAFETENSORS = """\
from safetensors.numpy import load_file

arrays = load_file("{file}")
mean = arrays["{kind}.{stage}.mean"]
"""


def statistics(facts: CardFacts) -> str:
    """Returns the section; empty for a dataset without statistics."""
    config = facts.config.capture.statistics
    if not config.enabled or facts.statistics is None:
        return ""
    tokens = facts.statistics["tokens"]
    left_out = ["frequency_pairs", "frequency_modulus"] if "pre" not in config.stages else []
    if not config.covariance:
        left_out.append("covariance")
    lines = [(f"`{name}`", *ARRAYS[name]) for name in ARRAYS if name not in left_out]
    head = min(facts.heads, key=lambda head: head.key.order)
    stage = stages_of(head.kind, config.stages)[0]
    names = {"layer": head.layer, "kind": head.kind, "stage": stage, "file": statistics_file(head.layer)}
    second = "covariance" if config.covariance else "variance"
    reading = _WITH_QK_SNIFFER.format(where=where(facts.place), second=second, **names)
    stages = " and ".join(words for stage, words in STAGE_NAMES.items() if stage in config.stages)
    skipped = f", without the first {counted(config.skip_tokens, 'token')} of each text" if config.skip_tokens else ""
    kept = " in the segments that are kept" if facts.config.sampler.segments is not None else ""
    has_unrotated = any(head.kind in UNROTATED_KINDS for head in facts.heads)
    unrotated = " Values and outputs are not rotated, and have the stage `post` alone." if has_unrotated else ""
    text = f"""\
## Statistics

`{STATISTICS}/layer-<layer>.safetensors` has statistics of each captured head over all tokens{kept}, \
sampled or not{skipped}:
{counted(tokens, "token")} a head, {stages}. Padding does not count.
An array is named by kind, stage and the name below, such as `{head.kind}.{stage}.mean`. The stage is `pre`
or `post`: before or after RoPE.{unrotated}
H is the number of captured heads of the layer and kind, d is the size of a vector, f the number of rotary frequencies.
Where no unit is given, the numbers have the units of the vectors.

{table(("array", "shape", "meaning"), lines)}
Numbers of a head without a token are NaN, and variances of a head with one token too.
{_exceptions(facts)}"""
    if "pre" in config.stages:
        text += "Arrays by frequency are of the stage `pre`, and of layers whose rotation `manifest.json` records.\n"
    return f"""\
{text}
With qk-sniffer, which also has `absmax` and, by frequency, the complex mean of a + ib:

{block("python", reading)}
In {"that folder" if facts.place is not None else "the folder of this card"}, with safetensors alone:

{block("python", _WITH_SAFETENSORS.format(**names))}"""


def _exceptions(facts: CardFacts) -> str:
    """Returns sentences on vectors with NaN or Inf, and on numbers that float32 cannot hold; empty without any."""
    found = facts.statistics or {}
    lines = []
    if nonfinite := found.get("nonfinite"):
        vectors = counted(sum(nonfinite.values()), "vector")
        lines.append(f"{vectors} with NaN or Inf, of {_some(nonfinite)}, count in `nonfinite` alone.\n")
    if overflow := found.get("overflow"):
        lines.append(f"NaN is also in the place of numbers that float32 cannot hold, of {_some(overflow)}.\n")
    return "".join(lines)


def _some(names: Collection[str]) -> str:
    """Names heads and stages, as the manifest lists them all."""
    return shortened([f"`{name}`" for name in names], 6)


def where(place: Place | None) -> str:
    """Returns the arguments of `open_dataset`, as code."""
    if place is None:
        return '"."'
    return f"{python_literal(place.repo_id)}, revision={python_literal(place.branch)}"
