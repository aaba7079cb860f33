"""Collects all facts that the report of a dataset shows, as plain data for the script of its page."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qk_sniffer.config import STAGE_NAMES, STAGES
from qk_sniffer.dataset.card_facts import CardFacts
from qk_sniffer.dataset.card_names import title
from qk_sniffer.dataset.head_scores import ranges_of
from qk_sniffer.dataset.heads import captured_heads
from qk_sniffer.dataset.proof_words import (
    attention,
    compared,
    largest_difference,
    of_rows,
    of_statistics,
    of_summaries,
    whence,
    why,
)
from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.dataset.weights import computed_in, quantized
from qk_sniffer.drawing import statistics as drawn
from qk_sniffer.report.coverage import coverage
from qk_sniffer.report.heads import Heads, Score, by_layer, channels, map_of, measured_heads, outliers
from qk_sniffer.report.packed import Json, grid, number, numbers
from qk_sniffer.report.plasticity import Measured
from qk_sniffer.report.unchanged import Unchanged
from qk_sniffer.resolved import rule
from qk_sniffer.store.layout import KIND_NAMES, KIND_PLURALS, KINDS, HeadKey
from qk_sniffer.text import compact_ranges, counted, in_mb, numbered, printable

Statistics = Mapping[str, Mapping[str, Mapping[int, Any]]]
"""The statistics of layers, by stage, kind and layer."""


def report_facts(dataset: Dataset, plasticity: Measured | None) -> Json:
    """Returns the facts of a dataset's report.

    Raises:
        StoreError: a file of the dataset is missing, damaged or of another one, or was replaced or written meanwhile.
        HubError: a file cannot be fetched.
    """
    manifest = dataset.manifest
    facts = CardFacts.of(manifest)
    unchanged = Unchanged(dataset)
    heads = measured_heads(dataset, unchanged)
    statistics = _statistics(dataset)
    maps = [*heads.maps(), *_of_statistics(statistics, heads), *([] if plasticity is None else plasticity.maps(heads))]
    found = {
        "title": printable(title(facts)),
        "place": printable(dataset if dataset.folder is None else dataset.folder.resolve().name),
        "about": [[label, printable(value)] for label, value in _about(dataset, facts)],
        "proof": _proof(manifest, heads),
        "coverage": coverage(dataset),
        "norms": [*by_layer(heads)],
        "all_norms": _all_norms(statistics),
        "bins": heads.bins,
        "longest": manifest["longest_example"],
        "heads": [_head(head, dataset) for head in captured_heads(manifest)],
        "maps": maps,
        "details": {key.name: detail for key, detail in heads.details.items()},
        "example": heads.example if heads.has_maps else None,
        "attention": _attention(dataset, heads),
        "plasticity": None if plasticity is None else [[label, printable(value)] for label, value in plasticity.about],
        "channels": [*channels(heads)],
        "outliers": outliers(heads),
        "rotary": [*_rotary(manifest)],
        "rotary_maps": [*_rotary_maps(statistics.get("pre", {}))],
        "sampled_rows": sum(one.rows for one in heads.measures.values()),
        "rows": manifest["rows"],
        "timings": sorted(((printable(stage), number(s)) for stage, s in manifest["timings"].items()), key=_longest),
    }
    unchanged.check_all()
    return found


def _about(dataset: Dataset, facts: CardFacts) -> Iterator[tuple[str, str]]:
    manifest, config = dataset.manifest, facts.config
    model = manifest["model"]
    kinds = [(kind, sum(key.kind == kind for key in dataset.heads)) for kind in facts.kinds]
    layers = {key.layer for key in dataset.heads}
    yield "Captured", ", ".join(counted(number, f"{KIND_NAMES[kind]} head") for kind, number in kinds)
    of_layers = "" if model.get("num_layers") is None else f" of {model['num_layers']:,}"
    yield "Layers", f"{compact_ranges(layers)} ({len(layers):,}{of_layers})"
    yield "Rows", f"{manifest['rows']:,}"
    yield "Stage", "before the rotary embedding" if config.capture.capture_pre_rope else "after the rotary embedding"
    yield "Further", ", ".join(_further(dataset)) or "none"
    examples = counted(manifest["examples"], "example")
    if manifest["truncated_examples"]:
        examples += f", {manifest['truncated_examples']:,} cut at {config.model.tokenizer.max_length:,} tokens"
    yield "Texts", f"{examples}; {manifest['tokens']:,} tokens, the longest has {manifest['longest_example']:,}"
    sampler = config.sampler
    buckets = f"min_bucket_size {sampler.min_bucket_size:,}, seed {sampler.seed}"
    yield "Sampler", f"{rule(sampler).replace('`', '')}, {buckets}"  # the rule is in Markdown
    weights = model.get("quantization")
    yield (
        "Computed in",
        computed_in(model["dtype"], model.get("checkpoint_dtype"))
        + ("" if weights is None else f"; {quantized(weights)}"),
    )
    yield "Attention kernel", str(model.get("attn_implementation"))
    for source, commit in (("Model", facts.model_commit), ("Dataset", facts.dataset_commit)):
        if commit is not None:
            yield f"{source} commit", commit
    if dataset.commit is not None:
        yield "Commit of this dataset", dataset.commit
    yield "Files", f"{len(manifest['files']):,}, {in_mb(sum(entry['bytes'] for entry in manifest['files'].values()))}"
    yield "Software", ", ".join(f"{name} {version}" for name, version in sorted(manifest["versions"].items()))
    if nonfinite := manifest.get("nonfinite_rows"):
        yield "NaN or Inf", f"{counted(sum(nonfinite.values()), 'row')} of {counted(len(nonfinite), 'head')}"


def _further(dataset: Dataset) -> Iterator[str]:
    capture = dataset.manifest["config"]["capture"]
    if capture["attention"]["enabled"]:
        yield "attention summaries"
    if dataset.stages:
        yield f"statistics of all tokens ({', '.join(STAGE_NAMES[stage] for stage in dataset.stages)})"
    names = {
        "capture_segments": "segments",
        "capture_token_ids": "token ids",
        "capture_token_strings": "token strings",
        "capture_offsets": "offsets",
    }
    yield from (name for setting, name in names.items() if capture[setting])


def _proof(manifest: Mapping[str, Any], heads: Heads) -> Json:
    """Returns the state of the proof ("proven", "not proven" or "failed"), its words, and differences by layer."""
    proof = manifest["proof"]
    if not proof["proven"]:
        is_wrong = proof["proven"] is False
        reason = proof.get("reason")
        words = [why(proof) if is_wrong and reason is None else str(reason)]
        if "attention" in proof:
            words.append(attention(proof))
        return {"state": "failed" if is_wrong else "not proven", "words": [printable(each) for each in words]}
    layers = len({key.layer for key in heads.measures})
    queries = sum(key.kind == "q" for key in heads.measures)
    words = []
    if of_rows(proof):
        words.append(
            f"{compared(proof, heads=len(heads.measures), layers=layers)}, from "
            + (whence(proof, manifest["examples"]))
        )
    words += [
        of_summaries(proof, heads=queries, layers=layers),
        of_statistics(proof, heads=len(heads.measures), layers=layers, examples=manifest["examples"]),
        attention(proof),
    ]
    part = proof if of_rows(proof) else proof["statistics"]
    return {
        "state": "proven",
        "words": [printable(each) for each in words if each],
        "largest": number(largest_difference(proof)),
        "tolerance": number(part["tolerance"]),
        "differences": sorted(
            [int(layer), number(value)] for layer, value in part["largest_difference_by_layer"].items()
        ),
    }


def _head(head: Any, dataset: Dataset) -> list[Any]:
    """Returns name, kind, layer, head, key head, size of a vector and rows of a head, and its attention in words."""
    rows = dataset.manifest["files"].get(head.file, {}).get("rows", 0)
    limits = [] if head.sliding_window is None else [f"sliding window of {head.sliding_window:,}"]
    if head.attention_chunk is not None:
        limits.append(f"chunks of {head.attention_chunk:,}")
    if head.sparse_attention:
        limits.append("sparse")
    words = ", ".join(limits) or ("not full" if head.full_attention is False else "full")
    return [head.name, head.kind, head.layer, head.head, head.key_head, head.head_dim, rows, words]


def _attention(dataset: Dataset, heads: Heads) -> Json | None:
    if not heads.attention:
        return None
    ranges = ranges_of(dataset)
    return {"close": ranges.local_distance, "far": ranges.far_distance, "sink_tokens": ranges.sink_tokens} | {
        "first_position": ranges.first_position
    }


def _statistics(dataset: Dataset) -> Statistics:
    """Reads the statistics of all tokens: by stage, kind and layer. Empty if the dataset has none."""
    if dataset.manifest.get("statistics") is None:
        return {}
    return {stage: drawn.read(dataset, stage) for stage in STAGES if stage in dataset.stages}


def _all_norms(statistics: Statistics) -> list[Json]:
    """Returns the mean and the standard deviation of the norms of all tokens by kind, stage and layer."""
    found = []
    for stage, of_kinds in statistics.items():
        for kind, layers in of_kinds.items():
            values = np.array([drawn.pooled(one) for one in layers.values()])
            found.append(
                {
                    "kind": kind,
                    "name": KIND_PLURALS[kind],
                    "stage": STAGE_NAMES[stage],
                    "layers": [*layers],
                    "mean": numbers(values[:, 0]),
                    "sd": numbers(values[:, 1]),
                }
            )
    return found


def _of_statistics(statistics: Statistics, heads: Heads) -> Iterator[Json]:
    """Yields the maps of what the statistics say of all tokens."""
    for stage, of_kinds in statistics.items():
        of = f"of all tokens, {STAGE_NAMES[stage]}"
        norm = Score(f"norm_{stage}", f"norm, {STAGE_NAMES[stage]}", f"mean Euclidean norm {of}")
        largest = Score(f"largest_{stage}", f"largest, {STAGE_NAMES[stage]}", f"largest absolute value {of}")
        for kind, layers in of_kinds.items():
            found: dict[HeadKey, tuple[float, float]] = {}
            for layer, one in layers.items():
                for index, head in enumerate(one.heads.tolist()):
                    values = float(one.norm_mean[index]), float(np.fmax.reduce(one.absmax[index]))
                    found[HeadKey(layer, head, kind)] = values
            of_heads = [found.get(key, (math.nan, math.nan)) for key in heads.measures if key.kind == kind]
            for score, values in zip((norm, largest), zip(*of_heads, strict=True), strict=True):
                yield map_of(kind, score, "statistics of all tokens", values)


def _rotary(manifest: Mapping[str, Any]) -> Iterator[Json]:
    """Yields the frequencies of each rotary embedding as wavelengths in tokens, fastest first, and its layers."""
    for name, one in manifest["model"]["rotary"].get("frequencies", {}).items():
        layers = [
            layer["layer"]
            for layer in manifest["model"]["layers"]
            if isinstance(layer.get("rotation"), dict) and layer["rotation"]["frequencies"] == name
        ]
        if not layers:
            continue
        frequencies = {"": one["inv_freq"]}
        long = one.get("long")
        if isinstance(long, dict) and "inv_freq" in long:
            frequencies[f", in texts of more than {one['boundary']:,} tokens"] = long["inv_freq"]
        for words, values in frequencies.items():
            yield {
                "name": f"{numbered('layer', layers)}{words}",
                "wavelengths": numbers(2 * math.pi / value if value > 0 else math.nan for value in values),
                "scaling": number(one["attention_scaling"]),
            }


def _rotary_maps(of_kinds: Mapping[str, Mapping[int, Any]]) -> Iterator[Json]:
    """Yields for each kind how far the pairs of components point in one direction before RoPE, by layer."""
    for kind in sorted(of_kinds, key=KINDS.index):
        rotated = {layer: one for layer, one in of_kinds[kind].items() if one.frequency_modulus is not None}
        if rotated:
            yield {
                "kind": kind,
                "name": KIND_NAMES[kind],
                "layers": [*rotated],
                "modulus": grid(drawn.mean_of(drawn.finite(one.frequency_modulus)) for one in rotated.values()),
                "concentration": grid(drawn.mean_of(drawn.concentration(one)) for one in rotated.values()),
            }


def _longest(item: Sequence[Any]) -> float:
    return -(item[1] or 0)
