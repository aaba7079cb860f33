"""Writes the dataset card: README.md of a dataset, for readers on the Hub and for `load_dataset`.

The front matter names one config for each head, so that `load_dataset(root, "l00h00q")` reads only that head. The
first head is the default. The text depends on the facts alone and has no dates, hosts or local paths. The card on a
branch of the Hub has more sections: loading from the Hub, the proof, the pictures and a citation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qk_sniffer.dataset import card_kinds
from qk_sniffer.dataset.card_attention import attention
from qk_sniffer.dataset.card_facts import CardFacts, Place
from qk_sniffer.dataset.card_names import adapted, adapter_name, dataset_name, model_name, title
from qk_sniffer.dataset.card_rotation import rotary_embedding
from qk_sniffer.dataset.card_run import run
from qk_sniffer.dataset.card_sampling import sampling
from qk_sniffer.dataset.card_segments import segments
from qk_sniffer.dataset.card_snippets import loading
from qk_sniffer.dataset.card_statistics import statistics
from qk_sniffer.dataset.proof_words import (
    compared,
    largest_difference,
    of_rows,
    of_statistics,
    of_summaries,
    whence,
)
from qk_sniffer.markdown import block, code, in_url, link, plain, table, tex, yaml_string
from qk_sniffer.resolved import safe_name
from qk_sniffer.store.layout import ATTENTION, EXAMPLES, KIND_NAMES, KINDS, PICTURE_SUFFIXES, Head, Layout, schema
from qk_sniffer.text import compact_ranges, enumerated

FRONT_MATTER_BYTES = 100_000
"""The largest size of the front matter."""


def write_card(facts: CardFacts) -> str:
    """Returns the text of the card. The dataset has at least one head."""
    queries = [head for head in facts.heads if head.kind == "q"]
    summaries = [replace(head, kind=ATTENTION) for head in queries if facts.config.capture.attention.enabled]
    names = [head.name for head in _in_order([*facts.heads, *summaries])]
    front_matter, lists_all = _front_matter(facts, names)
    parts = [
        front_matter,
        _introduction(facts),
        loading(facts.place, names, lists_all),
        _columns(facts),
        run(facts),
        _head_layout(facts),
        sampling(facts),
        segments(facts),
        attention(facts),
        statistics(facts),
        _logits(facts),
        rotary_embedding(facts),
        _proof(facts),
        _pictures(facts),
        _terms(facts),
        _citation(facts),
    ]
    return "\n".join(part for part in parts if part)


def branch_card(root: Path, manifest: Mapping[str, Any], repo_id: str, branch: str) -> bytes:
    """Returns the card of the dataset at `root` for its branch on the Hub, with its proof and its pictures."""
    pictures = [path.relative_to(root).as_posix() for path in Layout(root).pictures()]
    facts = replace(CardFacts.of(manifest), place=Place(repo_id, branch), proof=manifest["proof"], pictures=pictures)
    return write_card(facts).encode()


def _in_order(heads: Sequence[Head]) -> list[Head]:
    return sorted(heads, key=lambda head: head.key.order)


def _front_matter(facts: CardFacts, names: list[str]) -> tuple[str, bool]:
    """Returns the YAML between dashes, and whether it names every head."""
    # A glob is 11 bytes shorter than the file's name, but costs a listing on the Hub.
    for pattern, listed in (("{}/data.parquet", names), ("{}/*", names), ("{}/data.parquet", names[:1])):
        text = _yaml(facts, [(name, pattern.format(name)) for name in listed])
        if len(text.encode()) <= FRONT_MATTER_BYTES:
            break
    return text, len(listed) == len(names)


def _yaml(facts: CardFacts, configs: list[tuple[str, str]]) -> str:
    # The vectors derive from a model and from texts. No license identifier of the Hub names the terms of both.
    lines = ["---", f"pretty_name: {yaml_string(title(facts))}"]
    lines += ["license: other", "license_name: terms-of-the-model-and-the-texts"]
    if facts.languages:
        lines += ["language:", *(f"- {yaml_string(language)}" for language in facts.languages)]
    lines += ["tags:", *(f"- {tag}" for tag in ("qk-sniffer", "attention", "interpretability"))]
    lines += ["size_categories:", f"- {_size_category(facts.rows)}"]
    if facts.dataset_commit is not None:
        lines += ["source_datasets:", f"- {yaml_string(facts.config.dataset.path or '')}"]
    lines.append("configs:")
    for number, (name, files) in enumerate([*configs, ("examples", EXAMPLES)]):
        lines += [f"- config_name: {name}", f"  data_files: {files}"]
        if number == 0:
            lines.append("  default: true")
    return "\n".join([*lines, "---", ""])


def _introduction(facts: CardFacts) -> str:
    counts = {kind: sum(head.kind == kind for head in facts.heads) for kind in KINDS}
    heads = enumerated([f"{counts[kind]:,} {KIND_NAMES[kind]} heads" for kind in KINDS if counts[kind]])
    stage = "before" if facts.config.capture.capture_pre_rope else "after"
    file = f"l<layer>h<head><{'|'.join(facts.kinds)}>/data.parquet"
    of_texts = "" if facts.from_python else f" of {code(dataset_name(facts))}"
    return f"""\
# {plain(title(facts))}

The {card_kinds.named(facts, "{} ({})")} vectors of attention heads of {adapted(facts, code)} at sampled
token positions of {facts.num_examples:,} examples{of_texts}: {heads}, {facts.rows:,} rows.
qk-sniffer captured them in the model's own forward pass, {stage} the rotary embedding (RoPE).\
{card_kinds.unrotated(facts)}

Each head is one Parquet file, `{file}`. {card_kinds.numbering(facts)}
Rows are sorted by the order of the examples in their source, then by position. `examples/data.parquet` describes the
examples. `manifest.json` describes the run and every file.
{_parts(facts)}{_from_python(facts)}"""


def _from_python(facts: CardFacts) -> str:
    if not facts.from_python:
        return ""
    return """
The vectors come from Python: a program ran the model in its own way, within `qk_sniffer.capture`. Its texts and its
tokenizer are not known. A name and a commit of the model are those that the model's config tells; whether the weights
were changed since is not known. Each row of a batch is an example, numbered from 0 in the order in which they began.
`text_hash` in `examples/data.parquet` is a hash of the example's token ids, and empty if they were not seen. The tokens
of an example were seen from `first_position` on.
"""


def _parts(facts: CardFacts) -> str:
    if not facts.is_split:
        return ""
    length = facts.config.model.tokenizer.max_length
    return f"""
An example is a part of a text: each text is split into parts of at most {length:,} tokens, and each part was
captured alone, with positions from 0 and the special tokens of a text. In `examples/data.parquet`, the parts of a text
share its `source_id`, `index` and `text_hash`; `part` counts them from 0, and `first_token` is the number of the
text's own tokens before the part. The first part has the `example_id` of the text; the others have -1, -2, and so on,
in the order of the source.
"""


def _columns(facts: CardFacts) -> str:
    capture, dtype = facts.config.capture, facts.dtype
    stage = "before RoPE" if capture.capture_pre_rope else "as attention received it, after RoPE"
    of_example = "" if facts.from_python else "its id in the source, "
    meanings = {
        "bucket": "the range of positions that the row is drawn from, see Sampling",
        "example_id": f"the example: `examples/data.parquet` has {of_example}its length and its hash",
        "position": "the token's position in the example, from 0",
        "vector": f"{card_kinds.vector(facts, stage)}; {plain(dtype)}, widened to float32",
        "sliding_window": "tokens that the layer attends back to, including the token itself; null without a window",
        "segment": "the segment of the token, see Segments",
        "token_id": "the token at this position",
        "token_str": "the token as text",
        "char_start": "the token's first character in its text, from 0; null for a special token without characters",
        "char_end": "the character after the token's last one",
    }
    types = {"vector": f"list of {compact_ranges(head.head_dim for head in facts.heads)} float32"}
    types["segment"] = "string (dictionary)"
    fields = schema(1, capture)
    lines = [(f"`{field.name}`", types.get(field.name, str(field.type)), meanings[field.name]) for field in fields]
    return "## Columns\n\n" + table(("column", "type", "meaning"), lines)


def _head_layout(facts: CardFacts) -> str:
    by_layer: dict[int, list[Head]] = {}
    for head in _in_order(facts.heads):
        by_layer.setdefault(head.layer, []).append(head)
    layers_alike: dict[tuple[str, ...], list[int]] = {}
    kinds = [kind for kind in KINDS if kind in ("q", "k") or kind in facts.kinds]
    for layer, heads in by_layer.items():
        alike = (
            _attention(heads[0]),
            card_kinds.sizes(heads),
            *(compact_ranges(head.head for head in heads if head.kind == kind) or "none" for kind in kinds),
        )
        layers_alike.setdefault(alike, []).append(layer)
    header = ("layers", "attention", "head_dim", *(f"{KIND_NAMES[kind]} heads" for kind in kinds))
    lines = [(compact_ranges(layers), *alike) for alike, layers in layers_alike.items()]
    text = "## Heads\n\n" + table(header, lines)
    draw = facts.config.capture.head_sampling
    if draw.count is not None:
        text += (
            f"\nThe query heads were drawn: {draw.count:,} of the eligible ones (seed {draw.seed}). The key heads are\n"
            "the ones that serve them.\n"
        )
    return text


def _attention(head: Head) -> str:
    """Returns the attention of the head's layer in words."""
    limits = []
    if head.sliding_window is not None:
        limits.append(f"sliding, {head.sliding_window:,} tokens")
    if head.attention_chunk is not None:
        limits.append(f"chunks of {head.attention_chunk:,} tokens")
    if head.sparse_attention:
        limits.append("sparse")
    return "; ".join(limits) or ("not full" if head.full_attention is False else "full")


def _logits(facts: CardFacts) -> str:
    rotated = (
        "These vectors are from before RoPE: first apply the layer's rotary embedding, as below, then the norm or\n"
        "the scale by position that some models apply after it.\nThen the logit"
        if facts.config.capture.capture_pre_rope
        else "The logit"
    )
    return f"""\
## Rebuilding attention logits

{rotated} of a query and a key is their dot product times the layer's softmax scale, then soft-capped if the layer has a
softcap. Both are of the same example, and the key's position is at most the query's. `manifest.json` has the scale,
softcap, sinks and rotary parameters of each layer, and its `key_head`, the key head of each query head. The metadata of
each Parquet file has the scale, window and key head of its head.
With a sliding window of w tokens, a query attends to a key only if their positions differ by less than w. With an
`attention_chunk` of c, a query attends to a key only if both positions divided by c have the same whole part. Where
`position_bias` is true, the model adds a bias to the logits, which is not stored. Where `sparse_attention` is true, a
query attends to only some of these keys, and the choice is not stored.
"""


def _proof(facts: CardFacts) -> str:
    proof = facts.proof
    if proof is None:
        return ""
    if not proof["proven"]:
        return f"## Proof\n\nNot proven: {plain(proof['reason'])}.\n"
    heads, layers, largest = len(facts.heads), len({head.layer for head in facts.heads}), largest_difference(proof)
    statistics = of_statistics(proof, heads=heads, layers=layers, examples=facts.num_examples)
    what, tolerance = statistics, (proof if of_rows(proof) else proof["statistics"])["tolerance"]
    if of_rows(proof):
        what = f"{compared(proof, heads=heads, layers=layers)},\nfrom {whence(proof, facts.num_examples)}"
        what += f";\n{statistics}" if statistics else ""
    text = f"""\
## Proof

The job derived these vectors a second time: {what}.
The second path is a plain forward pass with hooks on the projections of the unmodified
model, without the tap that captured them. Relative to the spread of a head's vectors, they differ by {largest:.1g} at
most, in any layer; up to {tolerance:g} counts as rounding in {plain(facts.dtype)}. A wrong head,
position or rotation gives about 1. `manifest.json` has the figure of each layer.
"""
    if statistics and "reason" not in proof["statistics"]:
        text += """\
Of statistics, count, mean and covariance of single examples were compared, as the capture makes them and as float64
makes them of the vectors of the second path.
"""
    if summaries := of_summaries(proof, heads=sum(head.kind == "q" for head in facts.heads), layers=layers):
        text += f"\n{summaries[0].upper()}{summaries[1:]}"
        made = proof["summaries"]
        if "reason" not in made:
            most = max(made["largest_difference_by_layer"].values())
            text += f""" were compared with
those of the queries and keys of the second path, in float64. They differ by {most:.1g} at most (relative); up to
{made["tolerance"]:g} counts as rounding"""
        text += ".\n"
    checks = [check for check in proof.get("attention", ()) if check["passed"]]
    if not checks:
        return text
    kinds = ", ".join(f"layer {check['layer']} ({plain(check['kind'])})" for check in checks)
    return f"""{text}
The attention kernel itself was checked in the longest text, of {max(check["tokens"] for check in checks):,} tokens, in
one layer of each kind of attention: {kinds}. At positions to {max(max(check["positions"]) for check in checks):,}, its
output agrees with softmax(q K) V, computed in float64.
"""


def _pictures(facts: CardFacts) -> str:
    if not facts.pictures:
        return ""
    shown, drawn = PICTURE_SUFFIXES
    found = [f"!{_picture(name)}\n" for name in facts.pictures if name.endswith(shown)]
    found += [f"{_picture(name, ' as SVG')}\n" for name in facts.pictures if name.endswith(drawn)]
    return "## Pictures\n\n" + "\n".join(found)


def _picture(name: str, ending: str = "") -> str:
    return link(plain(Path(name).stem.replace("_", " ") + ending), in_url(name, safe="/"))


def _terms(facts: CardFacts) -> str:
    def source(name: str, role: str) -> str:
        licenses = ", ".join(code(license) for license in facts.licenses.get(role, ()))
        return code(name) + (f" (licence: {licenses})" if licenses else "")

    texts = "the texts of the program" if facts.from_python else source(dataset_name(facts), "dataset")
    sources = [source(model_name(facts), "model"), texts]
    if facts.config.model.adapter is not None:
        sources.insert(1, source(adapter_name(facts), "adapter"))
    return f"""\
## Terms

The vectors derive from {" and from ".join(sources)}.
This card states no licence of its own: the terms of {"both" if len(sources) == 2 else "all"} apply.
"""


def _citation(facts: CardFacts) -> str:
    if facts.place is None:
        return ""
    key = safe_name(facts.place.branch).replace(".", "-")
    entry = f"""\
@misc{{{key},
  title        = {{{tex(title(facts))}}},
  howpublished = {{Dataset repository {tex(facts.place.repo_id)} on the Hugging Face Hub, branch
                  {tex(facts.place.branch)}}},
  note         = {{Captured with qk-sniffer}}
}}
"""
    return f"""\
## How to cite

Cite the model, the texts, and this dataset with the commit that you used:

{block("bibtex", entry)}"""


def _size_category(rows: int) -> str:
    bounds = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    for power, bound in enumerate(bounds):
        if rows < 10 ** (power + 3):
            return f"n<{bound}" if power == 0 else f"{bounds[power - 1]}<n<{bound}"
    return f"n>{bounds[-1]}"
