"""Measures the query heads of a key head: reads, draws and cleans their rows, and computes the rows of three tables.

A value that cannot be computed is NaN, and a note gives the reason.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.dataset.dataset_files import WAY_OUT
from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.errors import StoreError
from qk_sniffer.plasticity import notes
from qk_sniffer.plasticity.config import PlasticityConfig
from qk_sniffer.plasticity.drift import (
    CONSTANT,
    Drift,
    Float32,
    Float64,
    Int64,
    components,
    fit_drift,
    normality,
    orientation,
    predictability,
    rotate_residuals,
)
from qk_sniffer.plasticity.estimators import Estimator, FullCovariance, Regression, plasticity
from qk_sniffer.plasticity.intervals import ENOUGH_ROWS, ENOUGH_TEXTS
from qk_sniffer.plasticity.jackknife import FullCovarianceReplicates, left_out
from qk_sniffer.plasticity.key_pairs import COMPONENTS, KEY_ROWS, PAIRS, QUERY_ROWS, KeyGroups, generator
from qk_sniffer.plasticity.resampled_queries import along_drift, of_lines
from qk_sniffer.plasticity.resampling import Clusters, first_signs, replicate_drift, text_weights
from qk_sniffer.plasticity.tables import QUERY_METRICS, HeadResult
from qk_sniffer.plasticity.uncertainty import PlasticityReplicates, Uncertainty, of_components, of_queries
from qk_sniffer.store.layout import head_file
from qk_sniffer.text import compact_ranges, counted

MAX_BUCKETS = 2048
"""The most buckets of positions. Memory and time grow with their square."""


@dataclass(frozen=True)
class KeyHead:
    """A key head, its captured query heads, and the limits of their layer's attention."""

    layer: int
    head: int
    query_heads: tuple[int, ...]
    sliding_window: int | None
    attention_chunk: int | None

    @property
    def is_limited(self) -> bool:
        """Whether a query sees only near keys."""
        return self.sliding_window is not None or self.attention_chunk is not None

    def sees(self, first_query: int, last_key: int) -> bool:
        """Whether a query at or after `first_query` sees a key at or before `last_key`, an earlier position.

        If any two do, the nearest two do.
        """
        if self.sliding_window is not None and first_query - last_key >= self.sliding_window:
            return False
        chunk = self.attention_chunk
        return chunk is None or first_query // chunk == last_key // chunk


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a head to measure.

    `dropped` counts rows with NaN or infinite numbers.
    """

    vectors: Float32
    positions: Int64
    example_ids: Int64
    buckets: Int64
    dropped: int

    @property
    def repeated(self) -> int:
        """The number of rows whose example and position another row has too."""
        return len(self.positions) - len(np.unique((self.example_ids << 32) | self.positions))


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys of a key head, as its query heads use them. `signs` (head_dim,) orient keys and queries."""

    head: KeyHead
    rows: Rows
    groups: KeyGroups
    signs: Float64


class Measuring:
    """Measures the heads of a dataset. Safe to use from several threads."""

    def __init__(self, dataset: Dataset, sampler: Sampler, config: PlasticityConfig) -> None:
        self._dataset, self._sampler, self._config = dataset, sampler, config

    def keys(self, head: KeyHead) -> Keys:
        """Reads the keys of a key head, which its query heads share.

        Raises:
            StoreError: the file is missing, damaged or of another dataset.
            HubError: the file cannot be fetched.
        """
        rows = self._rows(head.layer, head.head, "k", KEY_ROWS)
        groups = KeyGroups(rows.buckets, rows.example_ids, rows.positions)
        signs = orientation(rows.vectors, rows.buckets) if len(rows.vectors) else np.ones(rows.vectors.shape[1])
        return Keys(head, rows, groups, signs)

    def query_head(self, keys: Keys, head: int) -> HeadResult:
        """Measures a query head.

        Raises:
            StoreError: the file is missing, damaged or of another dataset.
            HubError: the file cannot be fetched.
        """
        queries = self._rows(keys.head.layer, head, "q", QUERY_ROWS)
        return _QueryHead(self._config, self._sampler, keys, head, queries).result()

    def _rows(self, layer: int, head: int, kind: str, what: int) -> Rows:
        # The numbers of another dataset's rows would be taken for those of this one for good.
        vectors, positions, example_ids = self._dataset.vectors(layer, head, kind, intact=True)
        kept = np.flatnonzero(np.isfinite(vectors).all(axis=1))
        dropped = len(vectors) - len(kept)
        if len(kept) > self._config.max_tokens_per_head:
            random = generator(self._config.seed, layer, head, what)
            kept = np.sort(random.choice(kept, self._config.max_tokens_per_head, replace=False, shuffle=False))
        if len(kept) < len(vectors):
            vectors, positions, example_ids = vectors[kept], positions[kept], example_ids[kept]
        if len(positions) and positions.min() < 0:
            raise StoreError(f"{head_file(layer, head, kind)} of {self._dataset} has negative positions; {WAY_OUT}")
        # The keys use the buckets of the queries, even if they have their own sampler.
        buckets = self._sampler.bucket("q", positions).astype(np.int64)
        if (number := int(buckets.max(initial=0)) + 1) > MAX_BUCKETS:
            raise StoreError(
                f"{head_file(layer, head, kind)} of {self._dataset} has positions in {number:,} buckets, of which "
                f"plasticity compares all pairs; it takes at most {MAX_BUCKETS:,}. Capture with a larger "
                "sampler.min_bucket_size"
            )
        return Rows(vectors, positions.astype(np.int64), example_ids.astype(np.int64), buckets, dropped)


class _QueryHead:
    """A query head that is being measured."""

    def __init__(self, config: PlasticityConfig, sampler: Sampler, keys: Keys, head: int, queries: Rows) -> None:
        self.config, self.sampler, self.keys, self.head, self.queries = config, sampler, keys, head, queries
        self.lowest = int(sampler.bucket("q", [0])[0])
        self.notes: list[str] = []

    def result(self) -> HeadResult:
        count, width = self.queries.vectors.shape
        metrics: dict[str, float | int] = {
            "n_q_tokens": count,
            "n_k_tokens": len(self.keys.rows.vectors),
            "d_model": width,
            **dict.fromkeys(QUERY_METRICS, np.nan),
        }
        for rows, kind in ((self.queries, "queries"), (self.keys.rows, "keys")):
            if rows.dropped:
                self.notes.append(notes.DROPPED.format(count=f"{rows.dropped:,}", kind=kind))
            if repeated := rows.repeated:
                self.notes.append(notes.REPEATED.format(count=f"{repeated:,}", kind=kind))
        r2 = np.full(width, np.nan)
        estimator = replicates = None
        if len(np.unique(self.queries.positions)) < 2:
            if count:  # log2(p + 1) is its own mean
                metrics |= {"q_mae_baseline": 0.0, "q_mae_proj": 0.0, "q_mae_ratio": 1.0}
        else:
            drift = fit_drift(components(self.queries.vectors, self.keys.signs), self.queries.positions)
            r2 = drift.r2
            replicates = self._replicates(drift)  # first: `_measure_queries` rotates the residuals in place
            variances = self._measure_queries(drift, metrics)
            estimator = self._estimator(drift, variances)
        buckets = self._plasticity(estimator, replicates)
        values = np.array([value for _, _, value in buckets])
        metrics["ap_overall"] = float(np.nanmean(values)) if np.isfinite(values).any() else np.nan
        head = self.keys.head
        uncertainty = None if replicates is None else self._uncertainty(replicates)
        self.notes += notes.of_queries(metrics, len(buckets))
        if estimator is not None:
            self._note_small_sample(uncertainty)
        return HeadResult(
            head.layer, self.head, head.head, metrics, buckets, r2.tolist(), self.notes, uncertainty=uncertainty
        )

    def _replicates(self, drift: Drift) -> PlasticityReplicates | None:
        """Estimates the numbers of the queries alone, and prepares the replicates of plasticity.

        None without replicates, or without a text to leave out.
        """
        queries, keys, config = self.queries, self.keys, self.config
        ids = np.union1d(queries.example_ids, keys.rows.example_ids)
        if not config.replicates or len(ids) < 2:
            return None
        clusters = Clusters(ids, text_weights(config.seed, ids, config.replicates))
        texts, buckets = clusters.of(queries.example_ids), queries.buckets - self.lowest
        signs = first_signs(
            keys.rows.vectors, keys.rows.buckets, clusters.of(keys.rows.example_ids), clusters, keys.signs[0]
        )
        found = replicate_drift(drift, queries.positions, buckets, texts, clusters, signs)
        self.of_queries = of_queries(of_lines(found) | along_drift(drift, queries.positions, texts, clusters, found))
        self.of_components = of_components(found.r2)
        if (alpha := config.estimator.alpha) is not None:
            vectors = queries.vectors * keys.signs.astype(np.float32)
            samples = Clusters(ids, left_out(config.seed, ids))
            return FullCovarianceReplicates(vectors, queries.positions, buckets, texts, samples, self.lowest, alpha)
        return PlasticityReplicates(found, clusters, self.lowest, buckets, texts)

    def _uncertainty(self, replicates: PlasticityReplicates) -> Uncertainty:
        found = replicates.result()
        found.of_head |= self.of_queries
        found.components, found.weights = self.of_components
        return found

    def _measure_queries(self, drift: Drift, metrics: dict[str, float | int]) -> Float64:
        """Fills in the metrics of the queries alone. Returns the variances of the rotated residuals."""
        metrics["q_R2_pos"] = float(drift.r2.mean())
        metrics["q_beta_norm"] = float(np.sqrt(np.einsum("d,d->", drift.beta, drift.beta)))
        metrics |= predictability(drift, self.queries.positions)
        variances = rotate_residuals(drift)
        is_constant = variances <= CONSTANT * drift.largest_variance
        if count := int(is_constant.sum()):
            self.notes.append(notes.CONSTANT.format(components=counted(count, "constant component")))
        others = np.arange(1, len(variances))
        if len(others) > self.config.normality_max_dims:
            random = generator(self.config.seed, self.keys.head.layer, self.head, COMPONENTS)
            others = np.sort(random.choice(others, self.config.normality_max_dims, replace=False))
        metrics |= normality(drift.residuals, variances, is_constant, others, self.config.p_alpha)
        return variances

    def _estimator(self, drift: Drift, variances: Float64) -> Estimator:
        positions, buckets = self.queries.positions, self.queries.buckets - self.lowest
        with np.errstate(invalid="ignore"):
            mean_positions = np.bincount(buckets, positions) / np.bincount(buckets)
        if self.config.estimator.alpha is not None:
            return FullCovariance(self.queries.vectors, positions, mean_positions, self.config.estimator.alpha)
        return Regression(drift, self.keys.signs, variances, mean_positions)

    def _plasticity(
        self, estimator: Estimator | None, replicates: PlasticityReplicates | None
    ) -> list[tuple[int, int, float]]:
        """Pairs every query bucket, up to the last one with rows, with every earlier bucket that it sees."""
        queries_of = self._seen_from()
        found = {(query, key): np.nan for key, queries in queries_of.items() for query in queries}
        if estimator is not None:
            self._fill_in(found, queries_of, estimator, replicates)
        return [(query, key, value) for (query, key), value in sorted(found.items())]

    def _fill_in(
        self,
        found: dict[tuple[int, int], float],
        queries_of: dict[int, range],
        estimator: Estimator,
        replicates: PlasticityReplicates | None,
    ) -> None:
        lowest, without_pairs = self.lowest, []
        random = generator(self.config.seed, self.keys.head.layer, self.head, PAIRS)
        for key, queries in queries_of.items():
            first, second = estimator.draw(self.keys.groups, key, self.config.num_pairs_per_bucket, random)
            if not len(first):
                without_pairs.append(key)
                continue
            z = estimator.z(self._differences(first, second), slice(queries.start - lowest, queries.stop - lowest))
            means = plasticity(z).mean(axis=1).tolist()
            found.update(((query, key), mean) for query, mean in zip(queries, means, strict=True))
            if replicates is not None:
                texts = replicates.clusters.of(self.keys.rows.example_ids[first])
                replicates.add(key, queries, partial(self._oriented_differences, first, second), texts)
        self._note_gaps(queries_of, without_pairs)

    def _differences(self, first: Int64, second: Int64) -> Float64:
        """Of the keys of pairs (m, head_dim)."""
        vectors = self.keys.rows.vectors
        differences: Float64 = vectors[first].astype(np.float64) - vectors[second]
        return differences

    def _oriented_differences(self, first: Int64, second: Int64) -> Float64:
        return self._differences(first, second) * self.keys.signs

    def _seen_from(self) -> dict[int, range]:
        """The query buckets that see a key bucket: from the next one to the last one near enough."""
        highest = int(self.queries.buckets.max(initial=self.lowest))
        first_position = {bucket: self.sampler.span("q", bucket)[0] for bucket in range(self.lowest, highest + 1)}
        seen = {}
        for key in range(self.lowest, highest):
            last_key = first_position[key + 1] - 1
            stop = key + 1
            while stop <= highest and self.keys.head.sees(first_position[stop], last_key):
                stop += 1
            if stop > key + 1:
                seen[key] = range(key + 1, stop)
        return seen

    def _note_gaps(self, queries_of: dict[int, range], without_pairs: list[int]) -> None:
        asked = {query for queries in queries_of.values() for query in queries}
        if empty := asked - set(self.queries.buckets.tolist()):
            self.notes.append(notes.EMPTY_BUCKETS.format(buckets=compact_ranges(empty)))
        if without_pairs:
            self.notes.append(notes.NO_PAIRS.format(buckets=compact_ranges(without_pairs)))

    def _note_small_sample(self, uncertainty: Uncertainty | None) -> None:
        """Warns of few texts or rows. The direction of the bias is that of the head's own correction."""
        texts = len(np.unique(self.queries.example_ids))
        rows = np.bincount(self.queries.buckets, minlength=1)
        is_asked = np.isin(np.arange(len(rows)), [query for queries in self._seen_from().values() for query in queries])
        bias = self._bias(uncertainty)
        if texts < ENOUGH_TEXTS:
            self.notes.append(notes.FEW_TEXTS.format(texts=counted(texts, "text"), enough=ENOUGH_TEXTS, bias=bias))
        if (is_asked & (rows > 0) & (rows < ENOUGH_ROWS)).any():
            self.notes.append(notes.FEW_QUERIES.format(enough=ENOUGH_ROWS, bias=bias))

    def _bias(self, uncertainty: Uncertainty | None) -> str:
        found = None if uncertainty is None else uncertainty.of_head.get("ap_overall")
        value, corrected = (np.nan, np.nan) if found is None else (found.value, found.corrected)
        has_replicates = bool(self.config.replicates)
        return notes.bias(value, corrected, is_line=self.config.estimator.alpha is None, has_replicates=has_replicates)
