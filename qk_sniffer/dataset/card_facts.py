"""Collects the facts that a dataset card states, from the manifest of its dataset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qk_sniffer.config import Config, from_dict
from qk_sniffer.dataset.heads import captured_heads
from qk_sniffer.hub.revisions import hub_commit_of
from qk_sniffer.store.layout import KINDS, Head

_SOURCES = ("model", "adapter", "dataset")


@dataclass(frozen=True)
class Place:
    """The branch of the Hub that a card is published to."""

    repo_id: str
    branch: str


@dataclass(frozen=True)
class CardFacts:
    """The facts that a card states. A commit is None for a source that is not on the Hub."""

    config: Config
    """The config in the manifest, which names local files and folders without their paths."""
    dtype: str
    """The dtype that the model computed in."""
    model_commit: str | None
    tokenizer_commit: str | None
    dataset_commit: str | None
    software: Mapping[str, str]
    """Versions by package."""
    num_examples: int
    num_tokens: int
    num_truncated: int
    num_skipped: int
    longest: int
    """Tokens of the longest example."""
    heads: Sequence[Head]
    rows_by_bucket: Mapping[str, Mapping[int, int]]
    """{kind: {bucket: rows of all heads of the kind}}"""
    rotations: Mapping[int, Mapping[str, Any] | str | None] = field(default_factory=dict)
    """How each layer rotates, as in the manifest; empty if it does not say."""
    licenses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The licenses that the sources state: {"model": ..., "adapter": ..., "dataset": ...}."""
    checkpoint_dtype: str | None = None
    """The dtype that the checkpoint names as its own; None if it is not known."""
    quantization: Mapping[str, Any] | None = None
    """The manifest's `quantization` of the model."""
    languages: Sequence[str] = ()
    """The languages of the examples that their source states."""
    adapter_commit: str | None = None
    adapter_kind: str | None = None
    """The kind of the adapter in the words of peft; None without an adapter."""
    from_python: bool = False
    """Whether the dataset is a capture from Python."""
    place: Place | None = None
    """None for the card in a folder, which has neither proof nor pictures."""
    truncated_tokens: int | None = None
    """The tokens that the truncated examples lack in all; None if the number is not known."""
    special_tokens: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The special tokens `before` and `after` each text that does not have them already; empty if they are added to
    every text or to none."""
    segments: Mapping[str, int] = field(default_factory=dict)
    """The tokens in the segments of each name; empty without segments."""
    own_special_tokens: Mapping[str, int] = field(default_factory=dict)
    """The examples whose text has these tokens already, by the same keys."""
    chat_template: str | None = None
    """The sha256 of the template that renders conversations; None for other contents."""
    max_positions: int | None = None
    """The tokens of a text that the model's config provides for; None if that is not known."""
    num_beyond: int = 0
    """The examples of more tokens."""
    num_texts: int = 0
    """The texts that the examples are parts of; 0 if texts are not split."""
    proof: Mapping[str, Any] | None = None
    """The manifest's `proof`."""
    statistics: Mapping[str, Any] | None = None
    """The manifest's `statistics`; None without statistics."""
    pictures: Sequence[str] = ()
    """The names of the files, relative to the card."""

    @property
    def is_split(self) -> bool:
        """Whether the examples are parts of texts."""
        return self.config.model.tokenizer.overlong == "split"

    @property
    def kinds(self) -> list[str]:
        """The kinds of the heads, in the order of `KINDS`."""
        return [kind for kind in KINDS if any(head.kind == kind for head in self.heads)]

    @property
    def rows(self) -> int:
        """The rows of all heads."""
        return sum(sum(rows.values()) for rows in self.rows_by_bucket.values())

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "CardFacts":
        """Returns the facts in the manifest of a dataset."""
        commits, stated = manifest["commits"], manifest["stated"]
        return cls(
            config=from_dict(manifest["config"]),
            dtype=manifest["model"]["dtype"],
            checkpoint_dtype=manifest["model"].get("checkpoint_dtype"),
            quantization=manifest["model"].get("quantization"),
            model_commit=hub_commit_of(commits["model"]),
            adapter_commit=hub_commit_of(commits.get("adapter")),
            adapter_kind=manifest["model"].get("adapter", {}).get("kind"),
            from_python="source" in manifest,
            tokenizer_commit=hub_commit_of(commits["tokenizer"]),
            dataset_commit=commits["dataset"],
            software=manifest["versions"],
            num_examples=manifest["examples"],
            num_tokens=manifest["tokens"],
            num_truncated=manifest["truncated_examples"],
            num_skipped=manifest["skipped_rows"],
            longest=manifest["longest_example"],
            heads=captured_heads(manifest),
            rows_by_bucket={
                kind: {int(bucket): rows for bucket, rows in counted.items()}
                for kind, counted in manifest["rows_by_bucket"].items()
            },
            rotations={
                layer["layer"]: layer["rotation"] for layer in manifest["model"]["layers"] if "rotation" in layer
            },
            licenses={source: stated[source]["license"] for source in _SOURCES if source in stated},
            languages=stated["dataset"]["language"],
            truncated_tokens=manifest.get("truncated_tokens"),
            special_tokens=manifest["tokenizer"].get("special_tokens", {}),
            chat_template=manifest["tokenizer"].get("chat_template"),
            max_positions=manifest["model"].get("max_positions"),
            num_beyond=manifest.get("examples_beyond_max_positions", 0),
            segments=manifest.get("segments", {}),
            num_texts=manifest.get("texts", 0),
            statistics=manifest.get("statistics"),
            own_special_tokens=manifest.get("own_special_tokens", {}),
        )
