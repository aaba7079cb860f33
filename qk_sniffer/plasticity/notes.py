"""Words the notes on measured heads, and tells them from other texts.

Results may come from someone else, or from a version with other words. A note is taken over only if this version
could have written it.
"""

import re
from string import Formatter

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


def is_note(text: str) -> bool:
    """Whether a text is a note on heads as this version words it."""
    return _NOTE.fullmatch(text) is not None


def _pattern(note: str) -> str:
    parts = Formatter().parse(note)
    return "".join(re.escape(words) + (f"(?:{_FIELDS[field]})" if field else "") for words, field, _, _ in parts)


_NOTE = re.compile("|".join(map(_pattern, _ALL)), re.ASCII)
