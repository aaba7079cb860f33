"""Takes the results of attention plasticity into the report of their dataset."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.errors import StoreError
from qk_sniffer.logs import logger
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


@dataclass(frozen=True)
class Measured:
    """The results of plasticity of a dataset."""

    about: list[tuple[str, str]]
    values: Mapping[str, Mapping[HeadKey, float]]
    """The numbers of `SCORES` by query head."""

    def maps(self, heads: Heads) -> Iterator[Json]:
        """Yields the maps of the numbers. A query head without one has NaN."""
        queries = [key for key in heads.measures if key.kind == "q"]
        for score in SCORES:
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
    mean = record["mean_ap_overall"]
    about = [
        ("Estimator", record["settings"]["estimator"]["name"].replace("_", " ")),
        ("Heads", f"{record['heads_with_plasticity']:,} of {record['heads']:,} measured"),
        ("Mean plasticity", "none" if mean is None else f"{mean:.4f}"),
    ]
    return Measured(about, values)
