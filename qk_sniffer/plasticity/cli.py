"""Runs plasticity from its command line: checks it, in every job of a sweep, and has Hydra run the jobs.

Exit codes: 0 done, 1 a job failed or left out a head, 2 the command line or a setting is wrong, 130 interrupted.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from qk_sniffer import config as main_config
from qk_sniffer.cli import process
from qk_sniffer.cli.application import Application
from qk_sniffer.cli.collisions import place_of, shared_place
from qk_sniffer.cli.environment import read_environment
from qk_sniffer.cli.flags import initialized, only_prints, parse_flags, show
from qk_sniffer.cli.hydra_jobs import run_jobs
from qk_sniffer.cli.preflight import Composer, planned
from qk_sniffer.cli.programs import mistaken_part
from qk_sniffer.errors import ConfigError, QkSnifferError
from qk_sniffer.hub.endpoint import check_address
from qk_sniffer.jobs.sweep import Job, describe
from qk_sniffer.logs import escape_libraries, logger
from qk_sniffer.plasticity.config import SCHEMA, PlasticityConfig, from_omegaconf, problems, register, resolved

log = logger(__name__)

# A launcher's worker imports this module to find `task`, and then composes the job's config.
main_config.register()
register()


def main() -> int:
    """Runs `python -m qk_sniffer.plasticity`; returns the exit code."""
    return process.run(_main, interrupted="interrupted; rerun the command to measure the heads that are missing")


def _main(arguments: list[str]) -> int:
    if arguments and (problem := mistaken_part("plasticity", arguments[0])) is not None:
        raise ConfigError([problem])
    args = parse_flags(arguments, first_key="data_root")
    if only_prints(args):
        return show(APPLICATION, task, args, lambda: planned(args, APPLICATION))
    check_address()
    with initialized(args) as loader:
        composer = Composer(loader, APPLICATION, args)
        composer.planned()
        return max(_run(composer.config_name, args.overrides, is_sweep=composer.is_sweep))


def task(node: DictConfig) -> int:
    """Runs one job, wherever Hydra's launcher starts it; returns its exit code."""
    escape_libraries()
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        log.info("%s", describe(hydra.job.num, hydra.overrides.task))
    try:
        read_environment()
        from qk_sniffer.plasticity.run import run

        return run(resolved(from_omegaconf(node)))
    except QkSnifferError as error:
        log.error("%s", error)
        return error.exit_code


def _run(config_name: str, arguments: list[str], *, is_sweep: bool) -> list[int]:
    """Has Hydra run the jobs; returns their exit codes."""
    return [job.return_value for job in run_jobs(config_name, task, arguments, is_sweep=is_sweep)]


def _problems(config: PlasticityConfig, hydra_folder: Path | None) -> list[str]:
    return problems(config)


def _collisions(jobs: Sequence[Job[PlasticityConfig]]) -> Iterator[str]:
    folders: dict[str, Job[PlasticityConfig]] = {}
    for job in jobs:
        earlier = folders.setdefault(place_of(job.config.folder), job)
        if earlier is not job:
            place = shared_place(job.config.folder, earlier.config.folder)
            yield f"{earlier} and {job} would both write to {place}; give each its own output_dir"


APPLICATION = Application(
    config_name="plasticity",
    schema=SCHEMA,
    problems=_problems,
    prepare=lambda node: None,
    resolve=resolved,
    collisions=_collisions,
    default_groups=("estimator",),
    other_groups=dict.fromkeys(("model", "dataset", "sampler", "output", "experiment"), "python -m qk_sniffer"),
)
"""Plasticity, as the check of its command line sees it."""
