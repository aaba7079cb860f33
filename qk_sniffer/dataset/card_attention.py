"""Writes the section of a dataset card on attention summaries: their columns, and code that reads them.

Tests run this code.
"""

from qk_sniffer.dataset.card_facts import CardFacts
from qk_sniffer.dataset.card_statistics import where
from qk_sniffer.markdown import block, table
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.layout import ATTENTION, KEY_COLUMNS, head_name
from qk_sniffer.text import counted

MEANINGS = {
    "num_keys": "keys that the query sees, its own included",
    "logsumexp": "natural logarithm of the sum of exp(logit) over these keys, with that of a learned sink",
    "max_logit": "largest logit of a key",
    "entropy": "sum of -w ln w over the keys, in nats",
    "effective_keys": "1 divided by the sum of w²",
    "sink_weight": "weight of the learned sink of the head; 0 where the model has none",
    "first_mass": "weight of the keys at the first {sink_tokens} of the example",
    "distance_mass": "weight of the keys by distance d = position of the query - position of the key: entry b has the "
    "distances of which floor(log2(d + 1)) is b, that is 0, 1 to 2, 3 to 6, 7 to 14, ...",
    "top_position": "positions of the {top_k} with the largest weights, largest first; -1 where there are fewer keys",
    "top_weight": "weights of these keys; 0 where there are fewer keys",
}
"""The meaning of each column of `store.attention_table`."""

_WITH_QK_SNIFFER = """\
import qk_sniffer

dataset = qk_sniffer.open_dataset({where})
attention = dataset.attention_summary({layer}, {head})
sink, positions = attention.first_mass, attention.positions
"""

_WITH_PANDAS = """\
import pandas as pd

attention = pd.read_parquet("{attention}/data.parquet")
queries = pd.read_parquet("{queries}/data.parquet")  # the same rows
"""


def attention(facts: CardFacts) -> str:
    """Returns the section; empty for a dataset without attention summaries."""
    columns = AttentionTable.of(facts.config)
    if columns is None:
        return ""
    settings = facts.config.capture.attention
    numbers = {"sink_tokens": counted(settings.sink_tokens, "token"), "top_k": counted(settings.top_k, "key")}
    types = {field.name: field.type for field in columns.schema if field.name not in KEY_COLUMNS}
    lines = []
    for name, meaning in MEANINGS.items():
        kind = f"list of {columns.widths[name]} {types[name].value_type}" if columns.is_list(name) else str(types[name])
        lines.append((f"`{name}`", kind, meaning.format(**numbers)))
    head = min((head for head in facts.heads if head.kind == "q"), key=lambda head: head.key.order)
    reading = _WITH_QK_SNIFFER.format(where=where(facts.place), layer=head.layer, head=head.head)
    files = {"attention": head_name(head.layer, head.head, ATTENTION), "queries": head.name}
    return f"""\
## Attention

`l<layer>h<head>{ATTENTION}/data.parquet` summarizes the attention of each captured query over all keys that it sees,
captured or not. Its rows are those of `l<layer>h<head>q`, in the same order, with the same `bucket`, `example_id` and
`position`, and these columns:

{table(("column", "type", "meaning"), lines)}
The weights w are those of the model's softmax, computed a second time in float32 from the queries and keys of its
attention, after RoPE{" although the vectors are from before RoPE" if facts.config.capture.capture_pre_rope else ""}, \
with its scale, softcap, window, chunks, selection of keys, bias and learned sinks. Where a learned sink takes a share,
the weights of the keys sum to less than 1, and all columns are of these weights as they are. A key with logit x has the
weight exp(x - `logsumexp`), captured or not.

With qk-sniffer, as arrays:

{block("python", reading)}
With pandas:

{block("python", _WITH_PANDAS.format(**files))}"""
