"""Checks that examples have the segments that the sampler keeps, before the job is registered."""

from itertools import islice

import numpy as np

from qk_sniffer.corpus.batches import windows
from qk_sniffer.corpus.examples import Corpus
from qk_sniffer.corpus.tokens import Tokenizer
from qk_sniffer.errors import ConfigError
from qk_sniffer.resolved import ResolvedConfig
from qk_sniffer.text import counted, shortened

MOST_EXAMPLES = 10_000
"""The first examples that are searched for the segments. Usually the first few have them all."""

_AT_ONCE = 32


def check_segment_names(config: ResolvedConfig, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Checks that the first examples of the source have a token in each segment of `sampler.segments`.

    Raises:
        ConfigError: they have not. The error lists the segments that they have.
        SourceError: an example cannot be read.
    """
    missing = {*(config.sampler.segments or ())}
    found: set[str] = set()
    number = 0
    for window in windows(islice(corpus.examples(), MOST_EXAMPLES), _AT_ONCE) if missing else ():
        number += len(window)
        for example in tokenizer(window):
            assert example.segments is not None
            found.update(example.segments.names[code] for code in np.unique(example.segments.codes).tolist())
        missing -= found
        if not missing:
            return
    if missing:
        searched = counted(number, "example") if number < MOST_EXAMPLES else f"first {number:,} examples"
        raise ConfigError(
            [
                f"sampler.segments names {shortened(sorted(missing), 6)}, and no token of the {searched} of "
                f"{config.dataset.path} is in such a segment; they have {shortened(sorted(found), 20)}"
            ]
        )
