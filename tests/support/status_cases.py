"""Sweeps and runs of `tests/jobs`, and the states that `status` tells of them."""

from pathlib import Path
from typing import Any

from qk_sniffer.config import Config, from_dict
from qk_sniffer.jobs.job_status import Status, recorded
from qk_sniffer.jobs.status import look
from qk_sniffer.jobs.sweep import PlannedJob
from qk_sniffer.resolved import resolve


def planned(*roots: Path) -> list[PlannedJob]:
    configs = (resolve(from_dict({"model": {"name": "org/m"}, "output": {"data_root": str(root)}})) for root in roots)
    return [PlannedJob(number, (), config) for number, config in enumerate(configs)]


def states(folder: Path) -> dict[str, str]:
    return {Path(line.status.data_root).name: line.status.state for line in look(folder)}


def begin(folder: Path, config: Config, number: int = 0) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return recorded(Status.here(number, config), folder)


def job_of(status: dict[str, Any]) -> dict[str, Any]:
    return {"status": status, "config": {}}
