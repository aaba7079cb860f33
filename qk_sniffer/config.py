"""Declares every setting: one frozen dataclass a config group.

The field names are the keys of the command line and of `conf/`. The metadata of a field holds its help text. It says
`"changes_rows": False` where another value cannot change a row or a vector of the dataset. `resolved.py` derives values
from a config; `validation.py` checks one.
"""

import secrets
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

ASSETS = Path(__file__).resolve().parent / "assets"

_RUN_ID = secrets.token_hex(3)


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens."""

    name: str | None = field(default=None, metadata={"help": "tokenizer, a Hub id or a folder; null: the model's own"})
    revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of the tokenizer; null: the model's, or main"}
    )
    max_length: int = field(default=4096, metadata={"help": "tokens of an example that are used; the rest is cut off"})
    add_special_tokens: bool = field(default=True, metadata={"help": "add the tokenizer's special tokens to each text"})


@dataclass(frozen=True)
class LongContextConfig:
    """What a long-context study changes about this model. Takes effect only where an experiment interpolates it."""

    max_length: int | None = field(
        default=None, metadata={"help": "model.tokenizer.max_length of a long-context experiment"}
    )
    min_bucket_size: int | None = field(
        default=None, metadata={"help": "sampler.min_bucket_size of a long-context experiment"}
    )
    config_overrides: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "model.config_overrides of a long-context experiment"}
    )


@dataclass(frozen=True)
class ModelConfig:
    """A model on the Hub or in a local folder, and how it is loaded."""

    slug: str | None = field(
        default=None, metadata={"help": "name in folders and branches; null: from model.name", "changes_rows": False}
    )
    name: str | None = field(
        default=None, metadata={"help": "org/name on the Hub, or a folder with a checkpoint (with model=hf)"}
    )
    revision: str = field(default="main", metadata={"help": "branch, tag or commit of the model"})
    dtype: str = field(default="bfloat16", metadata={"help": "bfloat16, float16 or float32"})
    device_map: Any = field(
        default="auto", metadata={"help": "a device, or how to spread the weights over devices", "changes_rows": False}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "attention kernel, such as eager or sdpa; null: the choice of transformers"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with a checkpoint", "changes_rows": False}
    )
    allow_pickle: bool = field(default=False, metadata={"help": "load pickled weights", "changes_rows": False})
    config_overrides: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "merged into the model's config: +model.config_overrides.rope_parameters.factor=4"},
    )
    gguf_file: str | None = field(default=None, metadata={"help": "a GGUF file in the folder or repository"})
    family: str | None = field(
        default=None, metadata={"help": "package.module:Class, a family of your own (models/ADDING.md)"}
    )
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    long_context: LongContextConfig = field(default_factory=LongContextConfig, metadata={"changes_rows": False})


@dataclass(frozen=True)
class DatasetConfig:
    """The texts: a Hub id, a local folder, or a file (parquet, jsonl, csv, txt)."""

    slug: str | None = field(
        default=None, metadata={"help": "name in folders and branches; null: from dataset.path", "changes_rows": False}
    )
    path: str | None = field(
        default=None,
        metadata={"help": "org/name on the Hub, a folder, or a parquet, jsonl, csv or txt file (dataset=hf)"},
    )
    name: str | None = field(default=None, metadata={"help": "config of a dataset that has several"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the dataset; null: main"})
    split: str = field(default="train", metadata={"help": "split of the dataset"})
    data_files: Any = field(
        default=None, metadata={"help": "files of the folder or repository to read, such as '*.jsonl'"}
    )
    text_column: str = field(default="text", metadata={"help": "column of the text"})
    id_column: str | None = field(
        default=None, metadata={"help": "column of the example's id; null: the number of the row"}
    )
    filter: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "keep rows with these values: +dataset.filter.length=long"}
    )
    # Fewer or more examples, each with the same rows.
    max_samples: int | None = field(
        default=None, metadata={"help": "use the first so many rows; null: all", "changes_rows": False}
    )
    streaming: bool = field(
        default=False, metadata={"help": "read the dataset without downloading all of it", "changes_rows": False}
    )


@dataclass(frozen=True)
class KeySamplerConfig:
    """The sampler of the keys where it differs from that of the queries; None means the same."""

    type: str | None = field(
        default=None, metadata={"help": "another sampler for the keys, such as all; null: as for the queries"}
    )
    base_rate: float | None = field(
        default=None, metadata={"help": "another rate for the keys; null: as for the queries"}
    )


@dataclass(frozen=True)
class SamplerConfig:
    """Which token positions are kept. `capture/sampling.py` holds the definition."""

    type: str = field(default="log_uniform", metadata={"help": "log_uniform, uniform or all (see capture/sampling.py)"})
    base_rate: float = field(
        default=1.0, metadata={"help": "rows to expect from each bucket of positions of each example, for each head"}
    )
    min_bucket_size: int = field(
        default=128, metadata={"help": "uniform: positions in a bucket; log_uniform: about those in the lowest"}
    )
    max_rows_per_example: int | None = field(
        default=None, metadata={"help": "most rows of an example in a head; null: no limit"}
    )
    seed: int = field(default=0, metadata={"help": "chooses the draw of the positions"})
    share: str = field(
        default="layer_kind",
        metadata={"help": "layer_kind: own positions in each layer and kind; example: the same in all"},
    )
    keys: KeySamplerConfig = field(default_factory=KeySamplerConfig)


@dataclass(frozen=True)
class HeadSamplingConfig:
    """A draw of query heads over all eligible layers."""

    count: int | None = field(
        default=None, metadata={"help": "draw so many query heads from all layers; null: keep all"}
    )
    seed: int = field(default=0, metadata={"help": "chooses the draw of the heads"})


@dataclass(frozen=True)
class CaptureConfig:
    """Which vectors are captured: kinds, layers, query heads, and the stage (before or after RoPE)."""

    capture_queries: bool = field(default=True, metadata={"help": "capture the query vectors"})
    capture_keys: bool = field(default=True, metadata={"help": "capture the key vectors"})
    layers: list[int] | None = field(default=None, metadata={"help": "layers to capture, such as [0,1,2]; null: all"})
    heads: list[int] | None = field(
        default=None, metadata={"help": "query heads to capture in each layer; their key heads follow; null: all"}
    )
    head_sampling: HeadSamplingConfig = field(default_factory=HeadSamplingConfig)
    full_attention_only: bool = field(default=False, metadata={"help": "leave out sliding-window layers"})
    capture_pre_rope: bool = field(
        default=False, metadata={"help": "capture vectors before the rotary embedding instead of after it"}
    )
    capture_token_strings: bool = field(default=False, metadata={"help": "add a column with the token's text"})
    capture_token_ids: bool = field(default=False, metadata={"help": "add a column with the token's id"})


@dataclass(frozen=True)
class InferenceConfig:
    """How the forward passes are batched and buffered. None of these settings changes which rows are kept."""

    batch_size: int | None = field(default=None, metadata={"help": "most examples of a forward pass; null: no limit"})
    max_batch_tokens: int = field(
        default=16384, metadata={"help": "most tokens of a forward pass, padding included; lower it to save memory"}
    )
    lookahead: int = field(default=256, metadata={"help": "examples that are tokenized at a time and sorted by length"})
    banded_attention: bool = field(
        default=True, metadata={"help": "sliding layers without an n x n mask; the same within rounding"}
    )
    queue_mb: int = field(
        default=512, metadata={"help": "size of the buffer between forward pass and disk", "changes_rows": False}
    )
    segment_mb: int = field(
        default=128, metadata={"help": "about the size of a file of the journal", "changes_rows": False}
    )
    debug_logging: bool = field(
        default=False, metadata={"help": "log where the time of each batch goes", "changes_rows": False}
    )


@dataclass(frozen=True)
class ShardConfig:
    """The part of the examples that this job captures: those with index % count == `index`."""

    index: int = field(
        default=0, metadata={"help": "which part of the examples this job captures", "changes_rows": False}
    )
    count: int = field(
        default=1, metadata={"help": "parts that the examples are split into: shard.count=8 'shard.index=range(8)'"}
    )


@dataclass(frozen=True)
class VerifyConfig:
    """The proof."""

    examples: int = field(
        default=1,
        metadata={"help": "examples to derive a second time, as proof; 0: none"},
    )


@dataclass(frozen=True)
class OutputConfig:
    """Where the dataset goes."""

    data_root: str | None = field(default=None, metadata={"help": "folder of the dataset; null: outputs/<branch>"})
    hf_repo_id: str | None = field(default=None, metadata={"help": "dataset repository on the Hub to publish to"})
    hf_branch: str | None = field(default=None, metadata={"help": "its branch; null: <model slug>-<dataset slug>"})
    private: bool = field(default=False, metadata={"help": "create the repository as a private one"})
    overwrite: bool = field(default=False, metadata={"help": "replace a dataset that was made with other settings"})
    resume_from_hub: bool = field(
        default=False, metadata={"help": "continue from the branch; one of other settings is refused"}
    )


@dataclass(frozen=True)
class Config:
    """One job, as a command line or a stored record describes it. `resolved.py` derives the rest."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig, metadata={"changes_rows": False})
    output: OutputConfig = field(default_factory=OutputConfig, metadata={"changes_rows": False})
    dry_run: bool = field(default=False, metadata={"help": "not available yet", "changes_rows": False})
    snapshot: bool | None = field(
        default=None,
        metadata={
            "help": "run the jobs of a sweep from a copy of the code; null: on SLURM alone",
            "changes_rows": False,
        },
    )

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


def schema() -> DictConfig:
    """The defaults as an OmegaConf node that knows the type of every key; writable."""
    node = OmegaConf.structured(Config)
    assert isinstance(node, DictConfig)
    _unlock(node)
    return node


@dataclass(frozen=True)
class Setting:
    """One setting, as help texts list it."""

    key: str
    default: Any
    help: str
    changes_rows: bool
    """Whether another value can change a row or a vector of the dataset."""


def settings() -> tuple[Setting, ...]:
    """Every setting, in the order of the schema."""
    return tuple(_settings_of(Config, "", True))


def _settings_of(section: type, prefix: str, changes_rows: bool) -> Iterator[Setting]:
    for each in fields(section):
        key, matters = prefix + each.name, changes_rows and each.metadata.get("changes_rows", True)
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if is_dataclass(default):
            yield from _settings_of(type(default), key + ".", matters)
        else:
            yield Setting(key, default, each.metadata["help"], matters)


def settings_help() -> str:
    """The settings for `--help`, one a line."""
    width = max(len(setting.key) for setting in settings())
    return "\n".join(f"  {setting.key:<{width}}  {setting.help}" for setting in settings())


def register() -> None:
    """Registers with Hydra the schema that `conf/` starts from, and the resolvers that it uses.

    `${qk_sniffer.asset:name}` is the path of a folder that ships with the package. `${qk_sniffer.run_id:}` differs
    between processes that start in the same second, on any machine. `${qk_sniffer.settings:}` lists the settings.
    """
    ConfigStore.instance().store(name="qk_sniffer_schema", node=schema())
    OmegaConf.register_new_resolver("qk_sniffer.settings", settings_help, replace=True)
    OmegaConf.register_new_resolver("qk_sniffer.asset", lambda name: str(ASSETS / name), replace=True)
    # The cached value travels with the config into the jobs of a sweep, which thus agree on its folder.
    OmegaConf.register_new_resolver("qk_sniffer.run_id", lambda: _RUN_ID, use_cache=True, replace=True)


def _unlock(node: DictConfig) -> None:
    # OmegaConf makes nodes of frozen dataclasses read-only, but Hydra must merge the groups into them.
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _unlock(child)
