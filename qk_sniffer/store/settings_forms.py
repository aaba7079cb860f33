"""Declares the form of the settings in the record of a job and in the manifest of a dataset."""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from qk_sniffer.config import MOST_COUNT, MOST_RATE, MOST_SHARDS, MOST_TOP_K, STAGES, SamplerType
from qk_sniffer.store.form_types import Slug, Stage
from qk_sniffer.store.stored import Count, Text


class _Tokenizer(TypedDict):
    name: Text | None
    max_length: NotRequired[Annotated[int, Meta(ge=1, lt=2**31)]]
    overlong: NotRequired[Literal["truncate", "split"]]


class _Model(TypedDict):
    slug: Slug
    name: Text | None
    revision: Text
    adapter: NotRequired[Text | None]
    tokenizer: _Tokenizer


class _Dataset(TypedDict):
    slug: Slug
    path: Text | None
    max_samples: Count | None
    streaming: bool


class _Keys(TypedDict):
    type: SamplerType | None
    base_rate: Annotated[float, Meta(gt=0, le=MOST_RATE)] | None


class SamplerSettings(TypedDict):
    """The settings of a sampler."""

    type: SamplerType
    base_rate: Annotated[float, Meta(gt=0, le=MOST_RATE)]
    min_bucket_size: Annotated[int, Meta(ge=1, le=2**31)]
    max_rows_per_example: Annotated[int, Meta(ge=1, le=MOST_COUNT)] | None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    share: Literal["layer_kind", "example"]
    segments: NotRequired[list[Text] | None]
    keys: NotRequired[_Keys]


class _Statistics(TypedDict):
    enabled: bool
    stages: Annotated[list[Stage], Meta(min_length=1, max_length=len(STAGES))]
    skip_tokens: Count
    covariance: bool


class _Attention(TypedDict):
    enabled: bool
    top_k: Annotated[int, Meta(ge=1, le=MOST_TOP_K)]
    sink_tokens: Annotated[int, Meta(ge=1, lt=2**31)]


class _Capture(TypedDict):
    statistics: NotRequired[_Statistics]
    attention: NotRequired[_Attention]


class _Shard(TypedDict):
    index: Annotated[int, Meta(ge=0, lt=MOST_SHARDS)]
    count: Annotated[int, Meta(ge=1, le=MOST_SHARDS)]


class Settings(TypedDict):
    """The settings of a dataset that later steps compute with. `Config` has the types of all."""

    model: _Model
    dataset: _Dataset
    sampler: SamplerSettings
    capture: NotRequired[_Capture]


class JobSettings(Settings):
    """The settings of a job, with those of the place where it runs."""

    shard: _Shard
    output: dict[str, Any]
    snapshot: bool | None
