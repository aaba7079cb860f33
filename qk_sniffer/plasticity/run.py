"""Measures a dataset: reads its heads, measures them in parallel, writes tables, a record and pictures.

Each head is stored as soon as it is measured.

Threads, not processes: numpy releases the interpreter lock in sorts and passes over arrays, and each process would
import scipy again.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from tqdm import tqdm

from qk_sniffer.dataset.heads import captured_heads
from qk_sniffer.dataset.reader import Dataset, open_dataset, sampler_of
from qk_sniffer.drawing.style import PAPER_SUFFIXES
from qk_sniffer.errors import QkSnifferError, StoreError
from qk_sniffer.logs import logger
from qk_sniffer.machine import num_threads, workers
from qk_sniffer.plasticity.config import INSTALL, PlasticityConfig
from qk_sniffer.plasticity.figures import check_places, draw_all
from qk_sniffer.plasticity.intervals import in_words
from qk_sniffer.plasticity.measure import KeyHead, Keys, Measuring
from qk_sniffer.plasticity.results import Results, fingerprint, manifest_sha256, summary
from qk_sniffer.plasticity.tables import TABLES, HeadResult
from qk_sniffer.store.layout import Head, HeadKey, head_name
from qk_sniffer.store.locks import TakenAwayError
from qk_sniffer.text import compact_ranges, counted, say, shortened

log = logger(__name__)


def run(config: PlasticityConfig) -> int:
    """Measures a dataset. Returns the exit code: 1 if a head could not be measured.

    Args:
        config: without problems, and resolved.

    Raises:
        QkSnifferError: nothing can be measured, or the results cannot be written.
    """
    if find_spec("scipy") is None:
        raise QkSnifferError(f"scipy is not installed, which plasticity needs: {INSTALL}")
    dataset = open_dataset(config.data_root, config.revision)
    key_heads, without_keys = plan(dataset)
    results, job = Results(config.folder, is_default=config.has_default_folder), fingerprint(dataset, config)
    with results.claim():
        if config.pictures:
            check_places(results)
        facts = _facts(dataset, key_heads, without_keys)
        if results.is_finished(job, facts, _notes(dataset.manifest)):
            log.info("Nothing to do: %s has these results.", results.folder)
        else:
            if not config.overwrite:
                results.refuse_other(job, config, dataset)
            results.begin(job)
            damaged = _measure_missing(dataset, key_heads, config, results)
            heads = sorted((each.layer, head) for each in key_heads for head in each.query_heads)
            found = [result for key in heads if (result := results.load(*key)) is not None]
            if not found:
                reasons = dict.fromkeys(damaged.values())
                raise StoreError(f"no head of {dataset} could be measured:", *reasons)
            record = _record(facts, dataset.manifest, config, job, found, damaged)
            results.finish(found, record)
        pictures = draw(results) if config.pictures else []
        record = results.record()  # another start may replace the results when the lock is released
        intervals = results.table("mean_intervals", record)
    report(results, record, intervals, pictures)
    return 1 if record["damaged"] else 0


def plan(dataset: Dataset) -> tuple[list[KeyHead], list[str]]:
    """Lists the key heads with captured query heads, by layer, and the names of query heads without captured keys.

    Raises:
        StoreError: there are no queries, or none with keys, or their sampler keeps no rows.
    """
    sampler = sampler_of(dataset.manifest)
    if sampler.keeps_none("q") or sampler.keeps_none("k"):
        raise StoreError(
            f"{dataset} was captured with sampler=none, which keeps no rows: plasticity needs queries and keys; "
            "capture the dataset again with another sampler"
        )
    captured = set(dataset.heads)
    of_keys: dict[tuple[int, int], list[Head]] = defaultdict(list)
    without_keys = []
    for head in captured_heads(dataset.manifest):
        if head.kind != "q":
            continue
        if HeadKey(head.layer, head.key_head, "k") in captured:
            of_keys[head.layer, head.key_head].append(head)
        else:
            without_keys.append(head.name)
    key_heads = [
        KeyHead(layer, key, tuple(head.head for head in heads), heads[0].sliding_window, heads[0].attention_chunk)
        for (layer, key), heads in sorted(of_keys.items())
    ]
    if not key_heads:
        missing = "keys (capture.capture_keys=false)" if without_keys else "queries (capture.capture_queries=false)"
        raise StoreError(f"{dataset} has no {missing}: plasticity needs both; capture the dataset again with both")
    return key_heads, without_keys


def _measure_missing(
    dataset: Dataset, key_heads: Sequence[KeyHead], config: PlasticityConfig, results: Results
) -> dict[str, str]:
    """Measures the heads that no earlier start measured. Returns the errors of the others, by the head's name."""
    missing = []
    for each in key_heads:
        heads = tuple(head for head in each.query_heads if results.load(each.layer, head) is None)
        if heads:
            missing.append(replace(each, query_heads=heads))
    total, left = (sum(len(each.query_heads) for each in some) for some in (key_heads, missing))
    if left < total:
        log.info("%s of %s were measured by an earlier start", f"{total - left:,}", counted(total, "head"))
    dataset.fetch([key for each in missing for key in _files(each)])
    measuring = Measuring(dataset, sampler_of(dataset.manifest), config)
    damaged: dict[str, str] = {}
    bar = tqdm(total=total, initial=total - left, unit="head", desc="plasticity", disable=None, dynamic_ncols=True)

    is_stopped = Event()

    def work(each: KeyHead) -> None:
        keys: Keys | StoreError
        try:
            keys = measuring.keys(each)
        except StoreError as error:
            keys = error
        for head in each.query_heads:
            if is_stopped.is_set():
                return
            try:
                if isinstance(keys, StoreError):
                    raise keys
                results.save(measuring.query_head(keys, head))
            except TakenAwayError:
                raise
            except StoreError as error:
                damaged[head_name(each.layer, head, "q")] = str(error)
            bar.update()

    threads = num_threads()
    with bar, workers(threads) as pool:
        try:
            for future in as_completed([pool.submit(work, each) for each in portions(missing, threads)]):
                future.result()
        except BaseException:
            is_stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return dict(sorted(damaged.items()))


def portions(key_heads: Sequence[KeyHead], threads: int) -> Iterator[KeyHead]:
    """Splits the query heads of key heads among the threads, if there are fewer key heads than threads."""
    parts = -(-threads // max(1, len(key_heads)))
    for each in key_heads:
        size = -(-len(each.query_heads) // parts)
        for start in range(0, len(each.query_heads), size):
            yield replace(each, query_heads=each.query_heads[start : start + size])


def _files(each: KeyHead) -> list[HeadKey]:
    return [HeadKey(each.layer, each.head, "k"), *(HeadKey(each.layer, head, "q") for head in each.query_heads)]


def _facts(dataset: Dataset, key_heads: Sequence[KeyHead], without_keys: Sequence[str]) -> dict[str, Any]:
    """What `plasticity.json` says of the dataset, and of its heads without keys."""
    manifest = dataset.manifest
    model = manifest["config"]["model"]
    return {
        "dataset": {
            "name": str(dataset),
            "commit": dataset.commit,
            "manifest_sha256": manifest_sha256(dataset),
            "model": {key: model[key] for key in ("slug", "name", "revision")},
            "texts": manifest["config"]["dataset"]["slug"],
            "commits": manifest["commits"],
            "sampler": manifest["config"]["sampler"],
            "rope_stage": manifest["model"]["rope_stage"],
            "limited_layers": sorted({each.layer for each in key_heads if each.is_limited}),
        },
        "without_keys": list(without_keys),
    }


def _record(
    facts: Mapping[str, Any],
    manifest: dict[str, Any],
    config: PlasticityConfig,
    job: str,
    found: Sequence[HeadResult],
    damaged: dict[str, str],
) -> dict[str, Any]:
    """The content of `plasticity.json`."""
    of_heads: dict[str, list[str]] = defaultdict(list)
    for result in found:
        for note in result.notes:
            of_heads[note].append(head_name(result.layer, result.q_head, "q"))
    values = np.array([result.metrics["ap_overall"] for result in found])
    return {
        **facts,
        "fingerprint": job,
        "settings": {key: value for key, value in asdict(config).items() if key != "overwrite"},
        "versions": {name: version(name) for name in ("numpy", "scipy", "pyarrow")},
        **summary(values),
        "notes": {**_notes(manifest), **of_heads},
        "damaged": damaged,
    }


def _notes(manifest: dict[str, Any]) -> dict[str, list[str]]:
    """The notes on the whole dataset, or on layers of it."""
    notes = {}
    if manifest["model"]["rope_stage"] == "pre":
        notes["captured before RoPE: the vectors carry no position of the rotary embedding"] = ["all heads"]
    for key, meaning in (
        ("position_bias", "attention adds a bias to the logits, which is not measured"),
        ("sparse_attention", "a query sees only some of the keys, and the dataset does not store which"),
    ):
        if layers := [layer["layer"] for layer in manifest["model"]["layers"] if layer.get(key)]:
            notes[meaning] = [f"layers {compact_ranges(layers)}"]
    limits = ("sliding_window", "attention_chunk", "sparse_attention")
    unknown = [
        layer["layer"]
        for layer in manifest["model"]["layers"]
        if layer.get("full_attention") is False and not any(layer.get(key) for key in limits)
    ]
    if unknown:
        notes["a query does not see all earlier keys, and the dataset does not say which"] = [
            f"layers {compact_ranges(unknown)}"
        ]
    return notes


def draw(results: Results) -> list[Path]:
    """Draws the pictures of the results. Without matplotlib, logs a warning and draws none."""
    if find_spec("matplotlib") is None:
        log.warning("no pictures: matplotlib is not installed: %s, and rerun the same command", INSTALL)
        return []
    return draw_all(results)


def report(results: Results, record: Mapping[str, Any], intervals: Mapping[str, Any], pictures: Sequence[Path]) -> None:
    """Prints a summary of the results of `record` and of the table `mean_intervals`, with every note and error."""
    mean = record["mean_ap_overall"]
    count = record["heads_with_plasticity"]
    of_which = "" if count == record["heads"] else f" of {count}"
    summary = "no plasticity" if mean is None else f"mean plasticity {mean:.4f}{of_which}"
    say(f"{counted(record['heads'], 'head')} measured, {summary}.")
    for line in in_words(intervals):
        say(line)
    for note, heads in record["notes"].items():
        say(f"  - {note}: {shortened(heads, 6)}")
    if record["without_keys"]:
        say(f"  - not measured, because their keys were not captured: {shortened(record['without_keys'], 6)}")
    for head, reason in record["damaged"].items():
        say(f"  - {head} is NOT measured: {reason}")
    if record["damaged"]:
        say("Restore these files and rerun the same command: it measures the missing heads.")
    tables = [name for name in TABLES if len(intervals["value"]) or not name.endswith("_intervals")]
    say(f"Tables: {results.folder}/{', '.join(tables)} (csv, parquet)")
    if pictures:
        names = dict.fromkeys(path.stem for path in pictures)
        say(f"Pictures: {results.pictures}/{', '.join(names)} ({', '.join(PAPER_SUFFIXES)})")
