"""The configuration: one frozen dataclass a config group, and what is derived from it.

The field names are the keys of the command line and of `conf/`; `qk_sniffer.conf` registers this schema
with Hydra. Checks of the values are in `validation.py`.
"""

import json
import re
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

ASSETS = Path(__file__).resolve().parent / "assets"

_RUN_ID = secrets.token_hex(3)


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens; `name` null means the model's own tokenizer."""

    name: str | None = None
    revision: str | None = None
    max_length: int = 4096
    add_special_tokens: bool = True


@dataclass(frozen=True)
class LongContextConfig:
    """What a long-context study does to this model. Takes effect only where an experiment interpolates it."""

    max_length: int | None = None
    min_bucket_size: int | None = None
    config_overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """A model on the Hub or in a local folder, and how it is loaded."""

    slug: str | None = None
    name: str | None = None
    revision: str = "main"
    dtype: str = "bfloat16"
    device_map: Any = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    config_overrides: dict[str, Any] = field(default_factory=dict)
    gguf_file: str | None = None
    family: str | None = None
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    long_context: LongContextConfig = field(default_factory=LongContextConfig)


@dataclass(frozen=True)
class DatasetConfig:
    """The texts: a Hub id, a local folder, or a file (parquet, jsonl, csv, txt).

    `filter` maps columns to values: the rows where all are equal are the dataset, the others are left out.
    """

    slug: str | None = None
    path: str | None = None
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    data_files: Any = None
    text_column: str = "text"
    id_column: str | None = None
    filter: dict[str, Any] = field(default_factory=dict)
    max_samples: int | None = None
    streaming: bool = False


@dataclass(frozen=True)
class KeySamplerConfig:
    """The sampler of the keys where it differs from that of the queries; null means the same."""

    type: str | None = None
    base_rate: float | None = None


@dataclass(frozen=True)
class SamplerConfig:
    """Which token positions are kept (see `sampling.py` for the definition)."""

    type: str = "log_uniform"
    base_rate: float = 1.0
    min_bucket_size: int = 128
    max_rows_per_example: int | None = None
    seed: int = 0
    share: str = "layer_kind"
    keys: KeySamplerConfig = field(default_factory=KeySamplerConfig)


@dataclass(frozen=True)
class HeadSamplingConfig:
    """A draw of `count` query heads over all eligible layers; null keeps all of them."""

    count: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class CaptureConfig:
    """Which vectors are captured: kinds, layers, query heads, and the stage (before or after RoPE)."""

    capture_queries: bool = True
    capture_keys: bool = True
    layers: list[int] | None = None
    heads: list[int] | None = None
    head_sampling: HeadSamplingConfig = field(default_factory=HeadSamplingConfig)
    full_attention_only: bool = False
    capture_pre_rope: bool = False
    capture_token_strings: bool = False
    capture_token_ids: bool = False


@dataclass(frozen=True)
class InferenceConfig:
    """How the forward passes are batched and buffered. None of these changes which rows are kept."""

    batch_size: int | None = None
    max_batch_tokens: int = 16384
    lookahead: int = 256
    banded_attention: bool = True
    queue_mb: int = 512
    segment_mb: int = 128
    debug_logging: bool = False


@dataclass(frozen=True)
class ShardConfig:
    """The part of the examples that this job does: those with index % count == `index`."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class VerifyConfig:
    """How many examples are derived again on another path, as proof."""

    examples: int = 1


@dataclass(frozen=True)
class OutputConfig:
    """Where the dataset goes. Null: the branch is `<model slug>-<dataset slug>`, the data root `outputs/<branch>`."""

    data_root: str | None = None
    hf_repo_id: str | None = None
    hf_branch: str | None = None
    private: bool = False
    overwrite: bool = False
    resume_from_hub: bool = False


@dataclass(frozen=True)
class Config:
    """One job."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    dry_run: bool = False
    snapshot: bool | None = None
    """Whether the jobs of a sweep run a copy of the code, made when it is submitted; null: those on SLURM do."""

    @property
    def data_root(self) -> Path:
        """The folder of the dataset; call on a config that `resolved` returned."""
        assert self.output.data_root is not None
        return Path(self.output.data_root)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, as stored in the manifest."""
        return asdict(self)


def from_omegaconf(node: DictConfig) -> Config:
    """The typed config of a composed Hydra config, interpolations resolved."""
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    return config


def from_dict(values: dict[str, Any]) -> Config:
    """The config that `Config.to_dict` gave `values` of, keys that are missing at their defaults."""
    node = OmegaConf.merge(schema(), values)
    assert isinstance(node, DictConfig)
    return from_omegaconf(node)


def resolved(config: Config) -> Config:
    """`config` with every derived value filled in: slugs, tokenizer, branch and data root; `~` is the home folder."""
    config = _at_home(config)
    model_slug = config.model.slug or safe_name(last_part(config.model.name or "model"))
    if config.model.revision != "main":
        revision = _short_revision(config.model.revision)
        if not model_slug.endswith(revision):
            model_slug = f"{model_slug}-{revision}"
    dataset_slug = config.dataset.slug or safe_name(last_part(config.dataset.path or "dataset"))
    branch = config.output.hf_branch or "-".join(
        [model_slug, dataset_slug]
        + (["pre-rope"] if config.capture.capture_pre_rope else [])
        + (["shared"] if config.sampler.share == "example" else [])
    )
    tokenizer = config.model.tokenizer
    if tokenizer.name is None:
        tokenizer = replace(tokenizer, name=config.model.name, revision=tokenizer.revision or config.model.revision)
    return replace(
        config,
        model=replace(config.model, slug=model_slug, tokenizer=tokenizer),
        dataset=replace(config.dataset, slug=dataset_slug),
        output=replace(config.output, hf_branch=branch, data_root=config.output.data_root or f"outputs/{branch}"),
    )


def last_part(name: str) -> str:
    """The last part of a Hub id or path, a file's suffix left out: `org/name`, `/data/name/`, `data/name.jsonl`."""
    last = Path(name).name or "root"
    return re.sub(r"(\.(parquet|jsonl?|csv|txt|gz|bz2|xz|zst))+$", "", last, flags=re.IGNORECASE) or last


def safe_name(text: str) -> str:
    """`text` in the characters that are good in a path and in a git branch."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.") or "unnamed"


def schema() -> DictConfig:
    """The defaults as an OmegaConf node that knows the type of every key; writable."""
    node = OmegaConf.structured(Config)
    assert isinstance(node, DictConfig)
    _unlock(node)
    return node


def register() -> None:
    """Makes known what `conf/` relies on: the schema it starts from, and two resolvers.

    `${qk_sniffer.asset:name}` is the path of a folder that ships with the package; `${qk_sniffer.run_id:}` tells
    processes apart that start in the same second, on this machine or another.
    """
    ConfigStore.instance().store(name="qk_sniffer_schema", node=schema())
    OmegaConf.register_new_resolver("qk_sniffer.asset", lambda name: str(ASSETS / name), replace=True)
    # The cached value travels with the config into the jobs of a sweep, which thus agree on its folder.
    OmegaConf.register_new_resolver("qk_sniffer.run_id", lambda: _RUN_ID, use_cache=True, replace=True)


def _short_revision(revision: str) -> str:
    return revision[:12] if re.fullmatch(r"[0-9a-f]{40}", revision) else safe_name(revision)


def _at_home(config: Config) -> Config:
    # A shell expands `~` only at the start of a word, not behind `dataset.path=`.
    def expanded(path: str | None) -> str | None:
        return str(Path.home() / path[2:]) if path is not None and (path + "/").startswith("~/") else path

    tokenizer = replace(config.model.tokenizer, name=expanded(config.model.tokenizer.name))
    return replace(
        config,
        model=replace(config.model, name=expanded(config.model.name), tokenizer=tokenizer),
        dataset=replace(config.dataset, path=expanded(config.dataset.path)),
        output=replace(config.output, data_root=expanded(config.output.data_root)),
    )


def _unlock(node: DictConfig) -> None:
    # OmegaConf makes nodes of frozen dataclasses read-only, but Hydra must merge the groups into them.
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _unlock(child)


def rule(config: SamplerConfig) -> str:
    """The samplers of queries and keys with their rates, for a person."""
    queries = _rule(config.type, config.base_rate)
    keys = _rule(
        config.keys.type or config.type, config.base_rate if config.keys.base_rate is None else config.keys.base_rate
    )
    return queries if keys == queries else f"{queries} (keys: {keys})"


def _rule(sampler_type: str, base_rate: float) -> str:
    return f"`{sampler_type}`" if sampler_type == "all" else f"`{sampler_type}`, base_rate {base_rate:g}"


_FREE = {"model.config_overrides", "dataset.data_files", "dataset.filter"}
"""Keys whose value is a dict of the user's own keys."""


_CANNOT_CHANGE_ROWS_OR_VECTORS = {
    "model.slug",
    "model.device_map",
    "model.trust_remote_code",
    "model.allow_pickle",
    "model.long_context",
    "dataset.slug",
    "dataset.max_samples",  # fewer or more examples, each with the same rows
    "dataset.streaming",
    "inference.queue_mb",
    "inference.segment_mb",
    "inference.debug_logging",
    "shard.index",
    "verify",
    "output",
    "dry_run",
    "snapshot",
}


def fingerprint(config: Config) -> dict[str, Any]:
    """Every key of a resolved `config` that can change a row or a vector, as `section.key: value`."""
    keys = {key: value for key, value in _dotted(config.to_dict()).items() if not _ignored(key)}
    # What was moved is the same: a checkpoint's digest is among the commits, and texts are compared one by one.
    for key in ("model.name", "model.tokenizer.name", "dataset.path"):
        keys[key] = public_name(keys[key])
    plain: dict[str, Any] = json.loads(json.dumps(keys))  # as it comes back from a file
    return plain


def public_name(name: str) -> str:
    """A Hub id as it is; of a local file or folder its name alone, so that no path of this machine is published."""
    return Path(name).resolve().name if Path(name).exists() else name


def _ignored(key: str) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in _CANNOT_CHANGE_ROWS_OR_VECTORS)


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        if isinstance(value, dict) and name not in _FREE:
            flat |= _dotted(value, name + ".")
        else:
            flat[name] = value
    return flat
