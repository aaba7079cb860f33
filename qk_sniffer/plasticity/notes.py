"""Words the notes on measured heads, and tells them from other texts.

Results may come from someone else, or from a version with other words. A note is taken over only if this version
could have written it.
"""

import re
from collections.abc import Iterator, Mapping
from math import isclose, isfinite, isnan
from string import Formatter

from qk_sniffer.text import counted

DROPPED = "{count} {kind} left out, with NaN or infinite numbers"
REPEATED = "{count} {kind} repeat an example and position (qk_sniffer.verify)"
NO_QUERIES = "no queries: nothing can be fitted, measures are NaN"
ONE_POSITION = "{rows} of queries, all at one position: nothing can be fitted, measures are NaN"
NO_DRIFT = "no positional drift (beta is 0): the first component serves as its direction"
CONSTANT = "{components}: without a shape"
TOO_FEW = "{count} queries: too few for {shape}"
EMPTY_BUCKETS = "no queries in bucket {buckets}: its plasticity is NaN"
NO_PAIRS = "no two keys of an example in bucket {buckets}: NaN for it"
FEW_TEXTS = "{texts}, fewer than {enough}: {bias}"
FEW_QUERIES = "a bucket has fewer than {enough} queries: {bias}"
NO_PLASTICITY = "no query bucket sees keys of an earlier one: there is no plasticity"

KURTOSIS, SKEWNESS = "a kurtosis", "skewness and kurtosis"

MAKES_LOW = "this sample makes plasticity too low"
MAY_BIAS = "this sample may bias plasticity"
SEEMS_LOW = "this sample seems to make plasticity too low"
SEEMS_HIGH = "this sample seems to make plasticity too high"

CORRECTED = "see `corrected` and its interval in the tables of intervals"
UNCORRECTED = "replicates=200 adds a corrected number and its interval"

_ALL = (
    *(DROPPED, REPEATED, NO_QUERIES, ONE_POSITION, NO_DRIFT, CONSTANT, TOO_FEW),
    *(EMPTY_BUCKETS, NO_PAIRS, FEW_TEXTS, FEW_QUERIES, NO_PLASTICITY),
)

_NUMBER = "[0-9,]{1,20}"

_FIELDS = {
    "count": _NUMBER,
    "enough": _NUMBER,
    "kind": "queries|keys",
    "rows": f"{_NUMBER} rows?",
    "components": f"{_NUMBER} constant components?",
    "shape": f"{KURTOSIS}|{SKEWNESS}",
    "buckets": "[0-9][0-9, -]*",
    "texts": f"{_NUMBER} texts?",
    "bias": f"{MAKES_LOW}(, {UNCORRECTED})?|{MAY_BIAS}(, ({CORRECTED}|{UNCORRECTED}))?|"
    f"({SEEMS_LOW}|{SEEMS_HIGH}), {CORRECTED}",
}
"""What the fields of the notes hold."""


def of_queries(metrics: Mapping[str, float], pairs: int) -> Iterator[str]:
    """Yields the notes that follow from the metrics of a head and its number of pairs of buckets."""
    count = int(metrics["n_q_tokens"])
    if not count:
        yield NO_QUERIES
    elif isnan(metrics["q_R2_pos"]):
        yield ONE_POSITION.format(rows=counted(count, "row"))
    else:
        if metrics["q_beta_norm"] == 0:
            yield NO_DRIFT
        if count < 4:
            yield TOO_FEW.format(count=count, shape=KURTOSIS if count == 3 else SKEWNESS)
        if not pairs:
            yield NO_PLASTICITY


def bias(value: float, corrected: float, *, is_line: bool, has_replicates: bool) -> str:
    """Words which way a small sample is off: by the head's own correction, or else by what is known of the estimator.

    Args:
        value: the plasticity of the head.
        corrected: without its bias; NaN if that is not known.
        is_line: whether the estimator fits a line.
        has_replicates: whether the measurement has replicates.
    """
    if not isfinite(corrected):
        # The error of the line's mean query lowers plasticity. The covariance of few queries may also raise it.
        known = MAKES_LOW if is_line else MAY_BIAS
        return known if has_replicates else f"{known}, {UNCORRECTED}"
    if isclose(corrected, value, rel_tol=1e-5, abs_tol=1e-8):  # a stored number has fewer digits
        return f"{MAY_BIAS}, {CORRECTED}"
    return f"{SEEMS_LOW if corrected > value else SEEMS_HIGH}, {CORRECTED}"


def is_note(text: str) -> bool:
    """Whether a text is a note on heads as this version words it."""
    return _NOTE.fullmatch(text) is not None


def _pattern(note: str) -> str:
    parts = Formatter().parse(note)
    return "".join(re.escape(words) + (f"(?:{_FIELDS[field]})" if field else "") for words, field, _, _ in parts)


_NOTE = re.compile("|".join(map(_pattern, _ALL)), re.ASCII)
