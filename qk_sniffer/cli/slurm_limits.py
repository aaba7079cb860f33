"""Compares what a sweep requests from SLURM with the limits of its partitions, before anything is submitted."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from omegaconf import DictConfig

from qk_sniffer.jobs import slurm
from qk_sniffer.jobs.slurm import Partition
from qk_sniffer.text import closest, did_you_mean, shortened

Limit = Callable[[Partition], float | None]


def problems(launcher: DictConfig) -> Iterator[str]:
    """Yields each request of the launcher's settings that no job of its partitions can ever get.

    Yields nothing where SLURM does not tell its limits, or where a job goes to another cluster.
    """
    request = _Request(launcher)
    if request.value("clusters", "clusters", "SBATCH_CLUSTERS") or os.environ.get("SLURM_CLUSTERS"):
        return
    known = slurm.partitions()
    if not known:
        return
    names, setting = request.named("partition", "partition", "SBATCH_PARTITION")
    wanted = str(names).split(",") if names else [each.name for each in known if each.is_default]
    valid = [each.name for each in known]
    for name in wanted:
        if name not in valid:
            guess = did_you_mean(closest(name, valid))
            yield f"{setting} is {names!r}: SLURM has no partition {name!r}{guess}; valid: {shortened(valid, 10)}"
            return
    chosen = [each for each in known if each.name in wanted]
    if not chosen:
        return
    if all(each.state in ("drain", "inact") for each in chosen):
        valid = [each.name for each in known if each.state == "up"]
        yield f"{_names(chosen)} accepts no jobs now ({chosen[0].state}); wait, or use another {setting}" + (
            f": {shortened(valid, 5)}" if valid else ""
        )
    yield from _time_problems(request, chosen, known)
    if all(each.cpus is not None for each in chosen):  # there are nodes
        yield from _size_problems(request, chosen, known)


class _Request:
    """Finds the values that sbatch takes: variables precede additional parameters, and these the launcher's keys."""

    def __init__(self, launcher: DictConfig) -> None:
        self.launcher = launcher
        self.extra = {
            str(key).replace("_", "-"): (value, f"hydra.launcher.additional_parameters.{key}")
            for key, value in (launcher.get("additional_parameters") or {}).items()
        }

    def named(self, key: str, option: str, variable: str) -> tuple[Any, str]:
        """Returns a value, and the name of the setting that gives it."""
        if os.environ.get(variable):
            return os.environ[variable], variable
        return self.extra.get(option) or (self.launcher.get(key), f"hydra.launcher.{key}")

    def value(self, key: str, option: str, variable: str) -> Any:
        """Returns a value."""
        return self.named(key, option, variable)[0]

    def is_plain(self, *options: str) -> bool:
        """Whether the launcher's own keys alone determine a resource, and none of these options of sbatch."""
        variables = (f"SBATCH_{option.upper().replace('-', '_')}" for option in options)
        return not (set(options) & set(self.extra) or any(variable in os.environ for variable in variables))


def _time_problems(request: _Request, chosen: Sequence[Partition], known: Sequence[Partition]) -> Iterator[str]:
    value, setting = request.named("timeout_min", "time", "SBATCH_TIMELIMIT")
    minutes = slurm.parse_minutes(str(value))
    limit = _largest(chosen, lambda each: each.minutes)
    if minutes is None or limit is None or minutes <= limit:
        return
    qos = request.value("qos", "qos", "SBATCH_QOS")
    if qos and slurm.may_exceed_partition(str(qos)):
        return
    yield (
        f"{setting} is {value}, but the time limit of {_names(chosen)} is {math.floor(limit)} minutes; use "
        f"{setting}={math.floor(limit)} (a job that reaches its time limit is requeued and resumes)"
        f"{_others(known, lambda each: each.minutes, minutes)}"
    )


def _size_problems(request: _Request, chosen: Sequence[Partition], known: Sequence[Partition]) -> Iterator[str]:
    tasks = max(request.launcher.get("tasks_per_node") or 1, 1)
    each_task = f" for each of {tasks} tasks" if tasks > 1 else ""
    memory = ("mem", "mem-per-node", "mem-per-cpu", "mem-per-gpu")
    gpus, cpus = ("gpus", "gpus-per-node", "gres"), ("cpus-per-task", "ntasks-per-node")
    sizes: tuple[tuple[str, int, str, Limit, str, str, tuple[str, ...]], ...] = (
        ("mem_gb", 1024, "", lambda each: each.memory_mb, "memory", " MB", memory),
        ("gpus_per_node", 1, "", lambda each: each.gpus, "GPUs", "", gpus),
        ("cpus_per_task", tasks, each_task, lambda each: each.cpus, "CPUs", "", cpus),
    )
    for key, factor, suffix, limit_of, noun, unit, options in sizes:
        value, limit = request.launcher.get(key), _largest(chosen, limit_of)
        if value and limit is not None and value * factor > limit and request.is_plain(*options):
            yield (
                f"hydra.launcher.{key} is {value}{suffix}, but no node of {_names(chosen)} has more {noun} than "
                f"{limit:,}{unit}; use hydra.launcher.{key}={limit // factor:.0f}"
                f"{_others(known, limit_of, value * factor)}"
            )


def _largest(partitions: Sequence[Partition], limit_of: Limit) -> float | None:
    """The largest limit, because a job may run in any of the partitions; None if one of the limits is not known."""
    limits = [limit_of(each) for each in partitions]
    return None if None in limits else max(limit for limit in limits if limit is not None)


def _names(chosen: Sequence[Partition]) -> str:
    names = ", ".join(each.name for each in chosen)
    return f"partition {names}" if len(chosen) == 1 else f"the partitions {names}"


def _others(known: Sequence[Partition], limit_of: Limit, least: float) -> str:
    fitting = [each.name for each in known if each.state == "up" and (limit_of(each) or 0) >= least]
    return f", or another hydra.launcher.partition: {shortened(fitting, 5)}" if fitting else ""
