"""Declares every setting: one frozen dataclass a config group.

The field names are the keys of the command line and of `conf/`. The metadata of a field holds its help text. It says
`"changes_rows": False` where another value cannot change a row or a vector of the dataset. It says
`"names_source": True` where a value is a Hub id or a path, and `"names_files": True` where it names files of a source:
the paths of this machine are not published. It says `"compares": True` where values are compared with those of a
source, which may be texts. It says `"is_place": True` where a value is a folder of this machine that no dataset names.
It says `"is_digested": True` where a value may be long: a fingerprint has its digest.
`resolved.py` derives values from a config; `validation.py` checks one.
"""

import secrets
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from qk_sniffer.text import expand_home

ASSETS = Path(__file__).resolve().parent / "assets"

DTYPES = ("bfloat16", "float16", "float32")
"""The dtypes in which models compute."""

OTHER_NAMES_OF_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
"""What other programs call them."""

SamplerType = Literal["uniform", "log_uniform", "all", "none"]
"""The samplers; `capture/sampling.py` defines them."""

STAGE_NAMES = {"pre": "before RoPE", "post": "after RoPE"}
"""The stages of vectors, in the order of lists, with their names for people."""

STAGES = tuple(STAGE_NAMES)

AUTO = "auto"
"""The `model.dtype` of a checkpoint's own dtype."""

MOST_SHARDS = 100_000
"""The largest `shard.count`."""

MOST_COUNT = 2**53
"""The largest number of tokens, examples or rows: JSON readers read integers up to it exactly."""

MOST_HEAD_DIM = 1 << 12
"""The most numbers of a vector. Released models have up to 576; a covariance of this size has 64 MiB in float32."""

MOST_RATE = 1e15
"""The largest `sampler.base_rate`."""

MOST_TOP_K = 1024
"""The largest `capture.attention.top_k`."""

MOST_SLUG = 500
"""The most characters of a slug."""

_RUN_ID = secrets.token_hex(3)


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer, and the part of each text that it keeps."""

    name: str | None = field(
        default=None,
        metadata={"help": "tokenizer, a Hub id or a folder; null: the model's own", "names_source": True},
    )
    revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of the tokenizer; null: the model's, or main"}
    )
    max_length: int = field(default=4096, metadata={"help": "maximum tokens of an example"})
    add_special_tokens: Any = field(
        default="auto",
        metadata={"help": "add the tokenizer's special tokens to each text; auto: unless the text has them already"},
    )
    overlong: str = field(
        default="truncate",
        metadata={"help": "truncate: cut longer texts off; split: make an example of each max_length tokens of a text"},
    )


@dataclass(frozen=True)
class LongContextConfig:
    """Values for a long-context study of the model. They take effect only where an experiment interpolates them."""

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
    """A model on the Hub or in a local folder, and the options for loading it."""

    slug: str | None = field(
        default=None, metadata={"help": "name in folders and branches; null: from model.name", "changes_rows": False}
    )
    name: str | None = field(
        default=None,
        metadata={"help": "org/name on the Hub, or a folder with a checkpoint (with model=hf)", "names_source": True},
    )
    revision: str = field(default="main", metadata={"help": "branch, tag or commit of the model"})
    dtype: str = field(
        default="bfloat16",
        metadata={"help": "bfloat16, float16, float32, or auto: the checkpoint's own"},
    )
    device_map: Any = field(
        default="auto",
        metadata={
            "help": "a device, or a device map of transformers; auto: one GPU if the model fits it",
            "changes_rows": False,
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "attention kernel, such as eager or sdpa; null: transformers' default"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code from the checkpoint"})
    allow_pickle: bool = field(default=False, metadata={"help": "load pickled weights", "changes_rows": False})
    config_overrides: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "values merged into the model's config: +model.config_overrides.rope_parameters.factor=4"},
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "a GGUF file in the folder or repository", "names_files": True}
    )
    family: str | None = field(
        default=None, metadata={"help": "a family of your own, package.module:Class (see models/ADDING.md)"}
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "an adapter of the package peft for the model: a Hub id or a folder", "names_source": True},
    )
    merge_adapter: bool = field(
        default=False,
        metadata={"help": "add the adapter's weights to those of the model, instead of running it next to them"},
    )
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    long_context: LongContextConfig = field(default_factory=LongContextConfig, metadata={"changes_rows": False})


@dataclass(frozen=True)
class ChatConfig:
    """The chat template that makes texts of conversations."""

    add_generation_prompt: bool = field(
        default=False, metadata={"help": "end each conversation with the start of an answer of the assistant"}
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": "a file with a chat template, or the name of one of several of the tokenizer; null: its own",
            "is_digested": True,
        },
    )
    date: str | None = field(
        default=None, metadata={"help": "the day that a template writes as today, such as 2025-01-31"}
    )
    kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "what the template is given besides: +dataset.chat.kwargs.enable_thinking=false"},
    )


@dataclass(frozen=True)
class DatasetConfig:
    """The examples: a Hub id, a local folder, or a file (parquet, jsonl, csv, txt)."""

    slug: str | None = field(
        default=None, metadata={"help": "name in folders and branches; null: from dataset.path", "changes_rows": False}
    )
    path: str | None = field(
        default=None,
        metadata={
            "help": "org/name on the Hub, a folder, or a parquet, jsonl, csv or txt file (dataset=hf)",
            "names_source": True,
        },
    )
    name: str | None = field(default=None, metadata={"help": "config of a dataset with several configs"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the dataset; null: main"})
    split: str = field(default="train", metadata={"help": "split of the dataset"})
    data_files: Any = field(
        default=None,
        metadata={"help": "the files to read from the folder or repository, such as '*.jsonl'", "names_files": True},
    )
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    messages_column: str | None = field(
        default=None,
        metadata={"help": "column that holds the messages of conversations, instead of texts; null: none"},
    )
    tokens_column: str | None = field(
        default=None, metadata={"help": "column that holds token ids, instead of texts; null: none"}
    )
    segments_column: str | None = field(
        default=None, metadata={"help": "column that names the segments of the tokens in tokens_column; null: none"}
    )
    chat: ChatConfig = field(default_factory=ChatConfig)
    id_column: str | None = field(
        default=None, metadata={"help": "column that holds the example's id; null: the number of the example is the id"}
    )
    filter: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "keep only examples with these values: +dataset.filter.length=long", "compares": True},
    )
    # Changes the number of examples, not the rows of an example.
    max_samples: int | None = field(
        default=None,
        metadata={
            "help": "use only the first examples that pass the filter, at most this many; null: all",
            "changes_rows": False,
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "read the dataset without downloading it completely", "changes_rows": False}
    )


@dataclass(frozen=True)
class KeySamplerConfig:
    """Differences between the sampler of the keys and that of the queries; None means the same."""

    type: str | None = field(
        default=None, metadata={"help": "the sampler of the keys, such as all; null: as for the queries"}
    )
    base_rate: float | None = field(default=None, metadata={"help": "the rate of the keys; null: as for the queries"})


@dataclass(frozen=True)
class SamplerConfig:
    """The rule that selects token positions; `capture/sampling.py` defines it."""

    type: str = field(default="log_uniform", metadata={"help": "log_uniform, uniform, all or none"})
    base_rate: float = field(
        default=1.0, metadata={"help": "expected rows for each head, example and bucket of positions"}
    )
    min_bucket_size: int = field(
        default=128,
        metadata={"help": "positions in a bucket; log_uniform: about those in the lowest bucket"},
    )
    max_rows_per_example: int | None = field(
        default=None, metadata={"help": "maximum rows of an example for each head; null: no limit"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the draw of positions"})
    segments: list[str] | None = field(
        default=None, metadata={"help": "keep only tokens of these segments, such as [assistant]; null: of all"}
    )
    share: str = field(
        default="layer_kind",
        metadata={"help": "layer_kind: separate positions for each layer and kind; example: one set for all"},
    )
    keys: KeySamplerConfig = field(default_factory=KeySamplerConfig)


@dataclass(frozen=True)
class HeadSamplingConfig:
    """A draw of query heads over all eligible layers."""

    count: int | None = field(default=None, metadata={"help": "query heads to draw from all layers; null: keep all"})
    seed: int = field(default=0, metadata={"help": "seed of the draw of heads"})


@dataclass(frozen=True)
class StatisticsConfig:
    """Statistics of the captured heads over all tokens, sampled or not; `store/statistics.py` defines them."""

    enabled: bool = field(default=False, metadata={"help": "also make statistics of each head over all tokens"})
    stages: list[str] = field(
        default_factory=lambda: ["post"], metadata={"help": "pre, post or both: before RoPE and after it"}
    )
    skip_tokens: int = field(default=0, metadata={"help": "leave out the first tokens of each text, this many"})
    covariance: bool = field(default=True, metadata={"help": "whole covariances; false: variances alone"})


@dataclass(frozen=True)
class AttentionConfig:
    """Summaries of the attention of the captured queries; `store/attention_table.py` defines the table."""

    enabled: bool = field(
        default=False, metadata={"help": "also summarize the attention of each captured query over all its keys"}
    )
    top_k: int = field(default=8, metadata={"help": "keys with the largest weights that are listed for each query"})
    sink_tokens: int = field(default=4, metadata={"help": "first tokens of a text whose weight first_mass sums"})


@dataclass(frozen=True)
class CaptureConfig:
    """The vectors to capture: kinds, layers, query heads, and the stage (before or after RoPE)."""

    capture_queries: bool = field(default=True, metadata={"help": "capture the query vectors"})
    capture_keys: bool = field(default=True, metadata={"help": "capture the key vectors"})
    capture_values: bool = field(default=False, metadata={"help": "capture the value vectors, at the keys' positions"})
    capture_outputs: bool = field(
        default=False,
        metadata={"help": "capture the outputs of attention, before the output projection, at the queries' positions"},
    )
    layers: list[int] | None = field(default=None, metadata={"help": "layers to capture, such as [0,1,2]; null: all"})
    heads: list[int] | None = field(
        default=None, metadata={"help": "query heads to capture in each layer; their key heads follow; null: all"}
    )
    head_sampling: HeadSamplingConfig = field(default_factory=HeadSamplingConfig)
    full_attention_only: bool = field(
        default=False, metadata={"help": "keep only layers whose queries see all earlier keys"}
    )
    capture_pre_rope: bool = field(
        default=False, metadata={"help": "capture vectors before the rotary embedding instead of after it"}
    )
    capture_token_strings: bool = field(
        default=False, metadata={"help": "add a column with the token as the vocabulary spells it"}
    )
    capture_token_ids: bool = field(default=False, metadata={"help": "add a column with the token's id"})
    capture_segments: bool = field(
        default=False, metadata={"help": "add a column with the token's segment, such as the role of its message"}
    )
    capture_offsets: bool = field(
        default=False, metadata={"help": "add columns with the token's first character and the one after its last"}
    )
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)

    def kinds(self) -> list[str]:
        """Returns the kinds of vectors to capture, queries first."""
        return [kind for kind, key in KIND_SETTINGS.items() if getattr(self, key.rpartition(".")[2])]


KIND_SETTINGS = {
    "q": "capture.capture_queries",
    "k": "capture.capture_keys",
    "v": "capture.capture_values",
    "o": "capture.capture_outputs",
}
"""The setting that captures each kind of vectors."""


@dataclass(frozen=True)
class InferenceConfig:
    """Batching and buffering of the forward passes. These settings do not change which rows are kept."""

    batch_size: int | None = field(
        default=None, metadata={"help": "maximum examples in a forward pass; null: no limit"}
    )
    max_batch_tokens: int = field(
        default=16384,
        metadata={"help": "maximum tokens in a forward pass, with padding; lower saves memory"},
    )
    lookahead: int | None = field(
        default=None,
        metadata={"help": "examples sorted by length together; null: as many as fill 64 batches, 256 to 32,768"},
    )
    banded_attention: bool = field(
        default=True, metadata={"help": "compute sliding-window layers without an n x n mask; equal within rounding"}
    )
    queue_mb: int = field(
        default=512,
        metadata={"help": "size of the buffer between forward pass and disk, in MiB", "changes_rows": False},
    )
    segment_mb: int = field(
        default=128, metadata={"help": "approximate size of a journal file, in MiB", "changes_rows": False}
    )
    debug_logging: bool = field(
        default=False, metadata={"help": "log the time of each stage of each batch", "changes_rows": False}
    )

    def batching(self) -> "dict[str, int | None]":
        """Returns the settings that may change while a job is unfinished, and when its dataset grows.

        Vectors of differently composed batches agree within rounding, so the manifest records every change.
        """
        return {
            "max_batch_tokens": self.max_batch_tokens,
            "batch_size": self.batch_size,
            "lookahead": self.lookahead,
        }


@dataclass(frozen=True)
class ShardConfig:
    """The part of the examples that this job captures: those with index % count == `index`."""

    index: int = field(
        default=0, metadata={"help": "the part of the examples that this job captures, from 0", "changes_rows": False}
    )
    count: int = field(
        default=1,
        metadata={"help": "parts that the examples are split into: shard.count=8 'shard.index=range(8)'"},
    )


@dataclass(frozen=True)
class VerifyConfig:
    """The proof of a finished dataset: its vectors are computed a second time and compared."""

    examples: int | None = field(
        default=None,
        metadata={"help": "examples to compute a second time, as proof; null: few, of all layers and parts; 0: none"},
    )


@dataclass(frozen=True)
class OutputConfig:
    """The destination of the dataset."""

    folder: str = field(
        default="outputs",
        metadata={"help": "parent of the folders of datasets, and of Hydra's own folders", "is_place": True},
    )
    data_root: str | None = field(
        default=None,
        metadata={"help": "folder of the dataset; null: <output.folder>/<branch>", "is_place": True},
    )
    hf_repo_id: str | None = field(default=None, metadata={"help": "dataset repository on the Hub to publish to"})
    hf_branch: str | None = field(
        default=None, metadata={"help": "branch of the repository; null: <model slug>-<dataset slug>, and what differs"}
    )
    private: bool = field(default=False, metadata={"help": "publish to a private repository alone, from now on"})
    overwrite: bool = field(default=False, metadata={"help": "replace a dataset that has other settings"})
    resume_from_hub: bool = field(
        default=False,
        metadata={"help": "resume from the branch; a dataset with other settings is refused"},
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
    dry_run: Any = field(
        default=False,
        metadata={
            "help": "true: show the plan of the job, and write nothing. measure: time some batches, too",
            "changes_rows": False,
        },
    )
    snapshot: bool | None = field(
        default=None,
        metadata={
            "help": "run the jobs of a sweep from a copy of the code; null: only on SLURM",
            "changes_rows": False,
        },
    )

    @property
    def has_segments(self) -> bool:
        """Whether the segments of the examples are needed: for a column, or for the sampler."""
        return self.capture.capture_segments or self.sampler.segments is not None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain nested dicts, as stored in the manifest."""
        return asdict(self)


def from_omegaconf(node: DictConfig) -> Config:
    """Returns the typed config of a composed Hydra config, with its interpolations resolved."""
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    return config


def from_dict(values: dict[str, Any]) -> Config:
    """Returns the config of which `Config.to_dict` returned `values`. Missing keys have their defaults.

    The values are plain data. A text such as `${oc.env:HF_TOKEN}` stays as it is: stored settings may come from someone
    else, and are never interpolated.

    Raises:
        ValueError: a key is not a setting, or a value has another type than its setting.
    """
    config = msgspec.convert(values, Config)
    if unknown := sorted(_unknown(values, Config, "")):
        raise ValueError(f"unknown settings {', '.join(unknown)}")
    return config


def _unknown(values: dict[str, Any], section: type, prefix: str) -> Iterator[str]:
    known = {each.name: each for each in fields(section)}
    for name, value in values.items():
        if name not in known:
            yield prefix + name
        elif (nested := known[name].default_factory) is not MISSING and is_dataclass(nested):
            yield from _unknown(value, nested, f"{prefix}{name}.")


def schema() -> DictConfig:
    """Returns the defaults of a job as a writable OmegaConf node that knows the type of every key."""
    return structured(Config)


def structured(kind: type) -> DictConfig:
    """Returns the defaults of a dataclass as a writable OmegaConf node that knows the type of every key."""
    node = OmegaConf.structured(kind)
    assert isinstance(node, DictConfig)
    _unlock(node)
    return node


@dataclass(frozen=True)
class Setting:
    """One setting: its key, default and help text."""

    key: str
    default: Any
    help: str
    changes_rows: bool
    """Whether another value can change a row or a vector of the dataset."""
    names_source: bool
    """Whether a value is a Hub id, or a path of this machine."""
    names_files: bool
    """Whether a value names files of a source, which may be paths or addresses."""
    is_digested: bool
    """Whether a fingerprint has a digest of a long value."""


def settings() -> tuple[Setting, ...]:
    """Returns every setting, in the order of the schema."""
    return tuple(_settings_of(Config, "", True))


def _settings_of(section: type, prefix: str, changes_rows: bool) -> Iterator[Setting]:
    for each in fields(section):
        key, changes = prefix + each.name, changes_rows and each.metadata.get("changes_rows", True)
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if is_dataclass(default):
            yield from _settings_of(type(default), key + ".", changes)
        else:
            names = [each.metadata.get(flag, False) for flag in ("names_source", "names_files", "is_digested")]
            yield Setting(key, default, each.metadata["help"], changes, *names)


def settings_help() -> str:
    """Returns the settings for `--help`, one a line."""
    width = max(len(setting.key) for setting in settings())
    return "\n".join(f"  {setting.key:<{width}}  {setting.help}" for setting in settings())


def register() -> None:
    """Registers the schema and the resolvers of `conf/` with Hydra.

    `${qk_sniffer.asset:name}` is the path of a folder of the package. `${qk_sniffer.home:path}` is `path` with its `~`
    expanded. `${qk_sniffer.run_id:}` differs between processes that start in the same second, on any machine.
    `${qk_sniffer.settings:}` lists the settings.
    """
    ConfigStore.instance().store(name="qk_sniffer_schema", node=schema())
    OmegaConf.register_new_resolver("qk_sniffer.settings", settings_help, replace=True)
    OmegaConf.register_new_resolver("qk_sniffer.asset", lambda name: str(ASSETS / name), replace=True)
    OmegaConf.register_new_resolver("qk_sniffer.home", expand_home, replace=True)
    # The cached value is part of the config of every job of a sweep, so the jobs agree on the folder of the sweep.
    OmegaConf.register_new_resolver("qk_sniffer.run_id", lambda: _RUN_ID, use_cache=True, replace=True)


def _unlock(node: DictConfig) -> None:
    # OmegaConf makes nodes of frozen dataclasses read-only, but Hydra merges the config groups into them.
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _unlock(child)
