"""What a dataset card tells, from the manifest of its dataset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qk_sniffer.config import Config, from_dict
from qk_sniffer.hub.revisions import hub_commit_of
from qk_sniffer.store.layout import KINDS, head_file


@dataclass(frozen=True)
class CardHead:
    """One captured head; `head` counts key heads where `kind` is "k"."""

    layer: int
    kind: str
    head: int
    head_dim: int
    sliding_window: int | None
    rows: int


@dataclass(frozen=True)
class Place:
    """Where on the Hub a card is read."""

    repo_id: str
    branch: str


@dataclass(frozen=True)
class CardFacts:
    """What the card tells. A commit is null for what did not come from the Hub."""

    config: Config
    """As the manifest has it: names of local files and folders without their paths."""
    model_commit: str | None
    tokenizer_commit: str | None
    dataset_commit: str | None
    software: Mapping[str, str]
    """Versions by name."""
    num_examples: int
    num_tokens: int
    num_truncated: int
    num_skipped: int
    longest: int
    """Tokens of the longest example."""
    heads: Sequence[CardHead]
    rows_by_bucket: Mapping[str, Mapping[int, int]]
    """{kind: {bucket: rows of all its heads}}"""
    licenses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Those that the sources state: {"model": ..., "dataset": ...}."""
    languages: Sequence[str] = ()
    """Of the texts, as their source states them."""
    place: Place | None = None
    """Where the card is to be read, if not in a folder; what follows is told there alone."""
    proof: Mapping[str, Any] | None = None
    """The manifest's."""
    pictures: Sequence[str] = ()
    """Names of files, relative to the card."""

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "CardFacts":
        """What the manifest of a dataset says."""
        model, commits, stated = manifest["model"], manifest["commits"], manifest["stated"]
        heads = [
            CardHead(
                layer["layer"],
                kind,
                head,
                layer["head_dim"],
                layer["sliding_window"],
                manifest["files"][head_file(layer["layer"], head, kind)]["rows"],
            )
            for layer in model["layers"]
            for kind in KINDS
            for head in layer["captured"].get(kind, ())
        ]
        return cls(
            config=from_dict(manifest["config"]),
            model_commit=hub_commit_of(commits["model"]),
            tokenizer_commit=hub_commit_of(commits["tokenizer"]),
            dataset_commit=commits["dataset"],
            software=manifest["versions"],
            num_examples=manifest["examples"],
            num_tokens=manifest["tokens"],
            num_truncated=manifest["truncated_examples"],
            num_skipped=manifest["skipped_rows"],
            longest=manifest["longest_example"],
            heads=heads,
            rows_by_bucket={
                kind: {int(bucket): rows for bucket, rows in counted.items()}
                for kind, counted in manifest["rows_by_bucket"].items()
            },
            licenses={source: terms["license"] for source, terms in stated.items()},
            languages=stated["dataset"]["language"],
        )
