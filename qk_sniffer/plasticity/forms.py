"""Declares the forms of the files in a folder of results, which a later start and `compare` read back."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args

from msgspec import Meta, convert

from qk_sniffer.config import MOST_HEAD_DIM
from qk_sniffer.errors import StoreError
from qk_sniffer.plasticity.config import ESTIMATORS
from qk_sniffer.plasticity.notes import is_note
from qk_sniffer.plasticity.tables import QUERY_METRICS, TABLES, HeadResult
from qk_sniffer.plasticity.uncertainty import Uncertainty
from qk_sniffer.store import stored
from qk_sniffer.store.form_types import HeadNumber, Sha256
from qk_sniffer.store.own_files import contains
from qk_sniffer.store.settings_forms import SamplerSettings
from qk_sniffer.store.stored import LARGE, Count, Text, UnreadableError

FORMAT = "qk-sniffer-plasticity/3"
"""The format of `plasticity.json`. Every change to the measures raises its number: results are then recomputed."""

TABLE_FILES = frozenset(f"{name}.{ending}" for name in TABLES for ending in ("csv", "parquet"))

WAY_OUT = "delete it and rerun the measurement"

_Estimator = Literal["regression", "full_covariance"]
assert get_args(_Estimator) == ESTIMATORS


class _EstimatorSettings(TypedDict):
    name: _Estimator


class _Settings(TypedDict):
    estimator: _EstimatorSettings


class _Model(TypedDict):
    slug: Text
    name: Text | None
    revision: Text


class _Dataset(TypedDict):
    manifest_sha256: Sha256
    model: _Model
    texts: Text
    sampler: SamplerSettings
    limited_layers: list[HeadNumber]


class Record(TypedDict):
    """The content of `plasticity.json`."""

    fingerprint: Sha256
    tables: dict[str, Sha256]
    settings: _Settings
    dataset: _Dataset
    heads: Count
    heads_with_plasticity: Count
    mean_ap_overall: float | None
    notes: dict[str, list[str]]
    without_keys: list[str]
    damaged: dict[str, str]


class _Head(TypedDict):
    layer: HeadNumber
    q_head: HeadNumber
    k_head: HeadNumber
    metrics: dict[str, float | int]
    buckets: list[tuple[Annotated[int, Meta(ge=0, lt=2**31)], Annotated[int, Meta(ge=0, lt=2**31)], float]]
    r2: Annotated[list[float], Meta(min_length=1, max_length=MOST_HEAD_DIM)]
    notes: list[str]
    uncertainty: Uncertainty | None


METRICS = {"n_q_tokens", "n_k_tokens", "d_model", *QUERY_METRICS, "ap_overall"}


def read_record(path: Path) -> dict[str, Any]:
    """Returns the content of `plasticity.json`.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        UnreadableError: it is not of this package, or of another version.
    """
    values = stored.read(path, _AnyFormat, way_out=WAY_OUT, most_bytes=LARGE)
    if values["format"] != FORMAT:
        which = "an earlier" if _number(values["format"]) < _number(FORMAT) else "a later"
        raise UnreadableError(path, f"is of {which} version of qk-sniffer ({values['format']})", WAY_OUT)
    record: Any = stored.check(values, Record, path, WAY_OUT)
    if record["tables"].keys() != TABLE_FILES:
        raise UnreadableError(path, "contradicts itself (it does not list the tables)", WAY_OUT)
    return dict(record)


def _number(form: str) -> int:
    return int(form.rpartition("/")[2])


IS_RECORD = contains(rb'"format": "qk-sniffer-plasticity/[0-9]{1,9}"')
"""Whether a file is a record of results, of whatever version, also if it is damaged elsewhere."""


def is_of_another_version(path: Path) -> bool:
    """Whether a file is a record of results of another version than this one."""
    try:
        record: Any = stored.read(path, _AnyFormat, way_out=WAY_OUT, most_bytes=LARGE)
    except (OSError, StoreError):
        return False
    return bool(record["format"] != FORMAT)


class _AnyFormat(TypedDict):
    format: Annotated[str, Meta(pattern=r"\Aqk-sniffer-plasticity/[0-9]{1,9}\Z")]


def encode_head(result: HeadResult, fingerprint: str) -> bytes:
    """Returns the bytes of a head's file: its result, NaN and all digits included, and a digest of it."""
    values = result.to_dict()
    return stored.encode({"fingerprint": fingerprint, "result": values, "sha256": stored.digest(values)})


def read_head(path: Path, layer: int, q_head: int, fingerprint: str) -> HeadResult | None:
    """Returns the result of a head; None if the file is missing, damaged, or of another head, fingerprint or version.

    It is then measured again.
    """
    try:
        file: Any = stored.read(path, _HeadFile, way_out=WAY_OUT, most_bytes=LARGE)
    except (OSError, StoreError):
        return None
    values = file["result"]
    if file["sha256"] != stored.digest(values) or values["metrics"].keys() != METRICS:
        return None
    if not all(map(is_note, values["notes"])):
        return None
    if (values["layer"], values["q_head"], file["fingerprint"]) != (layer, q_head, fingerprint):
        return None
    buckets = [tuple(row) for row in values["buckets"]]
    uncertainty = convert(values["uncertainty"], Uncertainty | None)
    names = HeadResult.__dataclass_fields__
    return HeadResult(**{name: values[name] for name in names} | {"buckets": buckets, "uncertainty": uncertainty})


class _HeadFile(TypedDict):
    result: _Head
    sha256: Sha256
    fingerprint: str
