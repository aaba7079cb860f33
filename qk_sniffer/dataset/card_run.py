"""Writes the section of a card on the run: the model, the texts and the software."""

import json

from qk_sniffer.dataset.card_contents import contents, special_tokens
from qk_sniffer.dataset.card_facts import CardFacts
from qk_sniffer.dataset.card_names import adapter, source
from qk_sniffer.dataset.weights import computed_in, quantized
from qk_sniffer.markdown import code, plain, table


def run(facts: CardFacts) -> str:
    """Returns the section."""
    settings = [
        *_of_model(facts),
        *(_of_calls(facts) if facts.from_python else _of_texts(facts)),
        ("tokens", f"{facts.num_tokens:,} (the longest example has {facts.longest:,})"),
        ("stage", "before RoPE" if facts.config.capture.capture_pre_rope else "after RoPE"),
        ("software", plain(", ".join(f"{name} {version}" for name, version in sorted(facts.software.items())))),
    ]
    lines = [(key, value) for key, value in settings if value]
    return "## Run\n\n" + table(("setting", "value"), lines)


def _of_model(facts: CardFacts) -> list[tuple[str, str]]:
    model = facts.config.model
    overrides = json.dumps(model.config_overrides, sort_keys=True)
    return [
        ("model", source(model.name, model.revision, facts.model_commit)),
        ("adapter", adapter(facts)),
        ("dtype", plain(computed_in(facts.dtype, facts.checkpoint_dtype))),
        ("quantization", "" if facts.quantization is None else plain(quantized(facts.quantization))),
        ("attention implementation", _plain(model.attn_implementation)),
        ("config overrides", code(overrides) if model.config_overrides else ""),
    ]


def _of_calls(facts: CardFacts) -> list[tuple[str, str]]:
    return [
        ("source", "forward passes of a program in Python"),
        ("max_position_embeddings", _beyond(facts)),
        ("examples", f"{facts.num_examples:,}"),
    ]


def _of_texts(facts: CardFacts) -> list[tuple[str, str]]:
    dataset, tokenizer = facts.config.dataset, facts.config.model.tokenizer
    cut, empty = f"{facts.num_truncated:,} cut at max_length", f"{facts.num_skipped:,} left out as empty"
    if facts.is_split:
        cut, empty = f"parts of {facts.num_texts:,} texts", f"{facts.num_skipped:,} texts left out as empty"
    if facts.num_truncated and facts.truncated_tokens is not None:
        cut += f", without {facts.truncated_tokens:,} tokens in all"
    return [
        ("tokenizer", _tokenizer(facts)),
        ("special tokens", special_tokens(facts)),
        ("max_length", f"{tokenizer.max_length:,} tokens"),
        ("max_position_embeddings", _beyond(facts)),
        ("dataset", source(dataset.path, dataset.revision, facts.dataset_commit)),
        ("dataset config", _plain(dataset.name)),
        ("split", plain(dataset.split)),
        *contents(facts),
        ("id column", _plain(dataset.id_column) or "none: example_id is the example's number"),
        ("examples", f"{facts.num_examples:,} ({cut}; {empty})"),
    ]


def _tokenizer(facts: CardFacts) -> str:
    if facts.config.dataset.tokens_column is not None and not facts.config.capture.capture_token_strings:
        return "none: the dataset has token ids"
    tokenizer = facts.config.model.tokenizer
    return source(tokenizer.name, tokenizer.revision, facts.tokenizer_commit)


def _beyond(facts: CardFacts) -> str:
    if not facts.num_beyond or facts.max_positions is None:
        return ""
    examples = f"{facts.num_beyond:,} examples are" if facts.num_beyond > 1 else "one example is"
    return f"{facts.max_positions:,} tokens: {examples} longer, captured as the model computes them"


def _plain(text: str | None) -> str:
    return "" if text is None else plain(text)
