"""Takes the results of attention plasticity into the report of their dataset."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.errors import StoreError
from qk_sniffer.logs import logger
from qk_sniffer.plasticity.intervals import of_all
from qk_sniffer.plasticity.results import Results, manifest_sha256
from qk_sniffer.report.heads import Heads, Score, map_of
from qk_sniffer.report.packed import Json
from qk_sniffer.store.layout import HeadKey

log = logger(__name__)

SCORES = (
    Score("ap_overall", "plasticity", "how far the content of a query, and not its position, decides", True),
    Score(
        "q_R2_pos",
        "R² of position",
        "share of the variance of the queries that a line over the position explains",
        True,
    ),
    Score("q_R2_scalar", "R² of log position", "how well the queries tell log2(position + 1)", True),
)

INTERVALS = (
    (
        "ap_overall",
        "corrected",
        Score("ap_corrected", "plasticity, corrected", "plasticity without the bias of a small sample of texts", True),
    ),
    (
        "ap_overall",
        "low",
        Score("ap_low", "plasticity, low", "lower end of the 95 % interval of corrected plasticity", True),
    ),
    (
        "ap_overall",
        "high",
        Score("ap_high", "plasticity, high", "upper end of the 95 % interval of corrected plasticity", True),
    ),
    (
        "ap_null",
        "corrected",
        Score("ap_null", "plasticity without drift", "corrected plasticity if positions said nothing", True),
    ),
    (
        "ap_drift",
        "corrected",
        Score(
            "ap_drift", "lost to drift", "plasticity that the drift of the queries with their position takes away", True
        ),
    ),
)
"""What the page shows of `head_intervals`: quantity and column. Absent from results without replicates."""


@dataclass(frozen=True)
class Measured:
    """The results of plasticity of a dataset."""

    about: list[tuple[str, str]]
    values: Mapping[str, Mapping[HeadKey, float]]
    """The numbers of `SCORES` by query head, and of `INTERVALS` if there are replicates."""

    def maps(self, heads: Heads) -> Iterator[Json]:
        """Yields the maps of the numbers. A query head without one has NaN."""
        queries = [key for key in heads.measures if key.kind == "q"]
        for score in (*SCORES[:1], *(score for _, _, score in INTERVALS), *SCORES[1:]):
            if score.name not in self.values:
                continue
            values = [self.values[score.name].get(key, float("nan")) for key in queries]
            yield map_of("q", score, "plasticity", values)


def read(dataset: Dataset, folder: Path | None) -> Measured | None:
    """Returns the results in a folder, or for None those next to the dataset, if there are any.

    Raises:
        StoreError: the folder has no finished results, or those of another dataset.
    """
    results = Results(dataset.beside("-plasticity") if folder is None else folder)
    if folder is None and not results.record_file.is_file():
        return None
    try:
        return _read(dataset, results)
    except StoreError as error:
        if folder is not None:
            raise
        log.warning("the report leaves out plasticity: %s", error)
        return None


def _read(dataset: Dataset, results: Results) -> Measured:
    record = results.record()
    if record["dataset"]["manifest_sha256"] != manifest_sha256(dataset):
        raise StoreError(
            f"{results.folder} has results of another dataset, or of {dataset} before it changed: measure it again by "
            "python -m qk_sniffer.plasticity data_root=..."
        )
    table = results.table("head_metrics", record)
    keys = [HeadKey(int(layer), int(head), "q") for layer, head in zip(table["layer"], table["q_head"], strict=True)]
    known = {*dataset.heads}
    values = {
        score.name: {key: float(value) for key, value in zip(keys, table[score.name], strict=True) if key in known}
        for score in SCORES
    }
    values |= _of_intervals(results.table("head_intervals", record), known)
    mean = record["mean_ap_overall"]
    about = [
        ("Estimator", record["settings"]["estimator"]["name"].replace("_", " ")),
        ("Heads", f"{record['heads_with_plasticity']:,} of {record['heads']:,} measured"),
        ("Mean plasticity", "none" if mean is None else f"{mean:.4f}"),
        *_of_mean(results.table("mean_intervals", record)),
    ]
    return Measured(about, values)


def _of_intervals(table: Mapping[str, Any], known: Container[HeadKey]) -> dict[str, dict[HeadKey, float]]:
    """Returns the numbers of `INTERVALS` by query head; none of them without replicates."""
    found: dict[str, dict[HeadKey, float]] = {}
    keys = [HeadKey(int(layer), int(head), "q") for layer, head in zip(table["layer"], table["q_head"], strict=True)]
    for quantity, column, score in INTERVALS:
        values = zip(keys, table["quantity"], table[column], strict=True)
        of_heads = {key: float(value) for key, name, value in values if name == quantity and key in known}
        if of_heads:
            found[score.name] = of_heads
    return found


def _of_mean(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields what the page says of the intervals of the mean over heads; nothing without replicates."""
    for quantity, label in (("ap_overall", "Corrected"), ("ap_null", "Without drift"), ("ap_drift", "Lost to drift")):
        one = of_all(table, quantity)
        if isfinite(one.se):
            yield label, f"{one.corrected:.4f} (95 % interval over texts {one.low:.4f} to {one.high:.4f})"
