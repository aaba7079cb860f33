"""Names the model, its adapter and the texts of a dataset on its card."""

from collections.abc import Callable
from pathlib import Path

from qk_sniffer.dataset import card_kinds
from qk_sniffer.dataset.card_facts import CardFacts
from qk_sniffer.markdown import code


def title(facts: CardFacts) -> str:
    """Returns the title of the dataset."""
    where = "from Python" if facts.from_python else f"on {dataset_name(facts)}"
    return f"{card_kinds.named(facts, '{1}')} vectors of {adapted(facts, str)} {where}"


def adapted(facts: CardFacts, shown: Callable[[str], str]) -> str:
    """Returns the name of the model, with that of its adapter; `shown` formats each name."""
    model = shown(model_name(facts))
    return model if facts.config.model.adapter is None else f"{model} with the adapter {shown(adapter_name(facts))}"


def adapter(facts: CardFacts) -> str:
    """Returns the adapter, and how it is computed; empty without one."""
    model = facts.config.model
    if model.adapter is None:
        return "" if facts.adapter_kind is None else f"of the kind {code(facts.adapter_kind)}, on the model in memory"
    how = "merged into the model's weights" if model.merge_adapter else "computed next to the model's weights"
    return f"{source(model.adapter, None, facts.adapter_commit)} ({how})"


def model_name(facts: CardFacts) -> str:
    """Returns the name of the model."""
    if facts.from_python and facts.config.model.name is None:
        return f"an unnamed {facts.config.model.slug} model"
    return _public_name(facts.config.model.name, facts.model_commit)


def adapter_name(facts: CardFacts) -> str:
    """Returns the name of the adapter. There is one."""
    return _public_name(facts.config.model.adapter, facts.adapter_commit)


def dataset_name(facts: CardFacts) -> str:
    """Returns the name of the texts."""
    if facts.from_python:
        return "forward passes in Python"
    return _public_name(facts.config.dataset.path, facts.dataset_commit)


def source(name: str | None, revision: str | None, commit: str | None) -> str:
    """Returns the name of a source, with its commit and revision if it is on the Hub."""
    text = code(_public_name(name, commit))
    if commit is None:
        return text
    text += f", commit {code(commit)}"
    return text if revision in (None, "main", commit) else f"{text} (revision {code(revision)})"


def _public_name(name: str | None, commit: str | None) -> str:
    # A source without a commit is a local folder or file. Its path means nothing to a reader and may be private.
    return (name if commit is not None else Path(name or "").name) or "unnamed"
