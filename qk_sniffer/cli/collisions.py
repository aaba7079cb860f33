"""Finds the jobs of a sweep that would write to the same place, before the first of them starts."""

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qk_sniffer.config import ShardConfig
from qk_sniffer.jobs.sweep import PlannedJob
from qk_sniffer.resolved import ResolvedConfig
from qk_sniffer.text import shortened


def collisions(jobs: Sequence[PlannedJob]) -> list[str]:
    """Returns what is wrong with `jobs` when they run next to each other. Shards of one job may share a folder."""
    by_root: dict[str, list[PlannedJob]] = {}
    by_branch: dict[tuple[str, str], list[PlannedJob]] = {}
    for job in jobs:
        by_root.setdefault(place_of(job.config.data_root), []).append(job)
        output = job.config.output
        if output.hf_repo_id and output.hf_branch:
            by_branch.setdefault((output.hf_repo_id, output.hf_branch), []).append(job)
    problems = []
    for group in by_root.values():
        if clash := _first_clash(group):
            roots = [job.config.data_root for job in clash]
            problems.append(_described(*clash, "output.data_root", str(roots[0]), shared_place(*roots)))
    for (_, branch), group in by_branch.items():
        others = [job for job in group if place_of(job.config.data_root) != place_of(group[0].config.data_root)]
        if others:
            problems.append(_described(group[0], others[0], "output.hf_branch", branch, branch))
    return problems


def place_of(folder: Path) -> str:
    """Returns a name that two folders share if they are one, or are one on some file systems.

    Those of macOS and Windows find a name by its letters, in capitals or not, and by its accents, however encoded.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", str(folder.resolve())).casefold())


def shared_place(one: Path, other: Path) -> str:
    """Returns how a message names two folders with the same `place_of`."""
    return str(one) if one.resolve() == other.resolve() else f"{one}, which some file systems take for {other}"


def _first_clash(jobs: Sequence[PlannedJob]) -> tuple[PlannedJob, PlannedJob] | None:
    """Returns two jobs that are not two shards of one job; None if all are."""
    first = jobs[0]
    shards: dict[int, PlannedJob] = {}
    for job in jobs:
        if _unsharded(job.config) != _unsharded(first.config):
            return first, job
        if job.config.shard.index in shards:
            return shards[job.config.shard.index], job
        shards[job.config.shard.index] = job
    return None


def _unsharded(config: ResolvedConfig) -> ResolvedConfig:
    return replace(config, shard=ShardConfig(0, config.shard.count))


def _described(one: PlannedJob, other: PlannedJob, key: str, value: str, place: str) -> str:
    problem = f"{one} and {other} would both write to {key}={place}"
    values, others = _flat(one.config.to_dict()), _flat(other.config.to_dict())
    different = [name for name in values | others if values.get(name) != others.get(name)]
    if not different:
        return f"{problem}; they are the same job twice"
    problem += f", though they differ in {shortened(different, 3)}"
    if key == "output.data_root" and one.config.output.hf_branch != other.config.output.hf_branch:
        return f"{problem}; leave {key} out, so that each gets its own folder"
    swept = [name for name in different if f"{name}={values[name]}" in one.arguments and str(values[name]).isalnum()]
    if not swept:
        return f"{problem}; run them one by one, each with its own {key}"
    return f"{problem}; give each its own place, as in '{key}={value}-${{{swept[0]}}}'"


def _flat(values: dict[str, Any], section: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{section}{name}.") if isinstance(value, dict) else {section + name: value}
    return flat
