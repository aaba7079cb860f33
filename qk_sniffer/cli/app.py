"""Runs the capture from its command line: checks it, has Hydra run the jobs, and reports how they ended.

Exit codes: 0 all jobs are done, 1 a job failed, 2 the command line or the configuration is wrong, 130 and 143 ended by
SIGINT and SIGTERM.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hydra._internal.utils import run_and_report
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qk_sniffer import validation
from qk_sniffer.cli import process, renamed_keys
from qk_sniffer.cli.application import Application
from qk_sniffer.cli.collisions import collisions
from qk_sniffer.cli.environment import read_environment
from qk_sniffer.cli.flags import initialized, only_prints, parse_flags, show
from qk_sniffer.cli.hydra_jobs import run_jobs
from qk_sniffer.cli.launching import Launch, LaunchCallback, search_last_folder
from qk_sniffer.cli.overrides import key_of
from qk_sniffer.cli.plans import is_dry, mixed, show_plans
from qk_sniffer.cli.preflight import Composer, planned
from qk_sniffer.cli.programs import listed, mistaken
from qk_sniffer.cli.schema import Schema
from qk_sniffer.config import Config, from_omegaconf, register
from qk_sniffer.errors import ConfigError, QkSnifferError, StoreError
from qk_sniffer.hub.endpoint import check_address
from qk_sniffer.jobs import job_status, sweep
from qk_sniffer.jobs.signals import WARNING, Stopped, Stopping
from qk_sniffer.logs import escape_libraries, logger
from qk_sniffer.machine import release_memory
from qk_sniffer.resolved import ResolvedConfig, fill_slugs, resolve
from qk_sniffer.store.places import refuse_inside
from qk_sniffer.text import hide_in_addresses, path_problem, say, say_text

log = logger(__name__)

# A launcher's worker imports this module to find `task`, and then composes the job's config.
register()
OmegaConf.register_new_resolver("qk_sniffer.programs", listed, replace=True)


def main() -> int:
    """Runs `python -m qk_sniffer` and `sniff-qk`; returns the exit code."""
    return process.run(_main)


def _main(arguments: list[str]) -> int:
    if arguments and (problem := mistaken(arguments[0])) is not None:
        raise ConfigError([problem])
    args = parse_flags(arguments)
    if only_prints(args):
        return show(APPLICATION, task, args, lambda: planned(args, APPLICATION))
    check_address()
    with initialized(args) as loader:
        composer = Composer(loader, APPLICATION, args)
        jobs = composer.planned()
        return show_plans(jobs) if is_dry(jobs) else _run(jobs, composer)


def task(node: DictConfig) -> str:
    """Runs one job, wherever Hydra's launcher starts it; returns its state, which it also writes to its status file."""
    escape_libraries()
    search_last_folder()
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    number = 0 if OmegaConf.is_missing(hydra_config.job, "num") else hydra_config.job.num
    if number:
        release_memory()
    fill_slugs(node)
    composed = resolve(from_omegaconf(node))
    hide_in_addresses(repr(composed))
    choice, name = hydra_config.runtime.choices["model"], composed.model.name
    if choice != "hf" and "model.name" in map(key_of, hydra_config.overrides.task):
        log.info("%s is captured with the slug %s and the settings of model=%s", name, composed.model.slug, choice)
    try:
        # Hydra composes `node` in the job, from files that may have changed since the job was submitted.
        is_sweep = hydra_config.mode == RunMode.MULTIRUN
        config = (sweep.submitted(Path(hydra_config.sweep.dir), number) if is_sweep else None) or composed
        status = job_status.Status.here(number, config)
        with job_status.recorded(status, folder) as record:
            _run_job(config, status, record)
    except QkSnifferError as error:
        log.error("%s", error)
        return job_status.FAILED
    return status.state


def _run_job(config: ResolvedConfig, status: job_status.Status, record: Callable[[], None]) -> None:
    """Runs a job, and notes its end in its status. `record` writes the status file."""
    try:
        with Stopping():
            read_environment()
            from qk_sniffer.jobs.run import run_job

            def begin() -> None:
                status.began = True
                record()

            outcome = run_job(config, begin)
            status.succeed(outcome.rows, outcome.url, outcome.manifest)
    except QkSnifferError as error:
        log.error("%s", error)
        status.fail(str(error), code=error.exit_code)
    except Stopped as stopped:
        _stopped(stopped, status, record)
    except Exception as error:
        log.exception("Unexpected error:")
        status.began = True  # nobody refused it
        status.fail(f"{type(error).__name__}: {error}")


def _stopped(stopped: Stopped, status: job_status.Status, record: Callable[[], None]) -> None:
    """Ends a job that a signal stopped. Requeues it if the signal is the warning before its time limit."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        raise stopped
    log.warning("%s", stopped)
    if stopped.number == WARNING:
        status.state = job_status.REQUEUED
        record()
        try:
            signal.raise_signal(WARNING)  # submitit handles it: it requeues the job and exits
        except Exception as error:
            status.fail(str(error))
            raise
    raise SystemExit(stopped.exit_code)  # an interrupt would leave a traceback in the log of the job


def _run(jobs: Sequence[sweep.PlannedJob], composer: Composer[ResolvedConfig]) -> int:
    """Has Hydra run the jobs, and reads their end from their status files; returns the exit code."""
    code = 0
    launch = Launch(jobs)
    returned: list[str] = []
    try:
        with launch:
            try:
                _launch(composer, returned)
            except QkSnifferError as error:
                say_text(error, to=sys.stderr)
                code = error.exit_code
            except SystemExit as error:  # Hydra has printed the error of its launcher
                code = 1 if error.code else 0
                if launch.error is not None:
                    say_text(launch.error, to=sys.stderr)
            launch.wait()
    except KeyboardInterrupt as error:
        code = process.say_interrupted(error)
        launch.wait_for_exit()
    found = {} if launch.folder is None else sweep.statuses(launch.folder)
    if len(jobs) > 1:
        say_text(sweep.table(jobs, found, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
        say(f"Logs: {launch.folder}")
    codes = [found[job.number].code if job.number in found else 1 for job in jobs]
    all_done = all(job.number in found and found[job.number].state in job_status.GOOD for job in jobs)
    if not launch.is_announced:
        # A job that could not record its state leaves that of an earlier run in its folder.
        all_done &= all(state in job_status.GOOD for state in returned)
    if launch.is_announced and all_done:
        return 0  # the launcher may have given up on a job that SLURM restarted
    return code or (0 if all_done else min((code for code in codes if code), default=1))


def _launch(composer: Composer[ResolvedConfig], returned: list[str]) -> None:
    """Has Hydra run the jobs. `returned` gets the states that they return, as far as the launcher tells them."""
    problem: QkSnifferError | None = None

    def call() -> None:
        nonlocal problem
        try:
            done = run_jobs(composer.config_name, task, list(composer.arguments), is_sweep=composer.is_sweep)
            returned.extend(job.return_value for job in done if job.status is JobStatus.COMPLETED)
        except QkSnifferError as error:
            problem = error

    run_and_report(call)  # Hydra's own report of any other error
    if problem is not None:
        raise problem


def _problems(config: Config, hydra_folder: Path | None) -> Iterator[str]:
    hide_in_addresses(repr(config))  # no message shows what may be secret in one
    yield from validation.problems(config)
    root = resolve(config).data_root
    if (problem := path_problem(root)) is not None:
        if config.output.data_root is None:  # otherwise it is among the problems above
            yield f"output.data_root is null, which is {str(root)!r}, which {problem}; choose a folder"
        return
    try:
        refuse_inside(root, "output.data_root")
    except StoreError as error:
        yield f"output.data_root is refused: {error}"
    if hydra_folder is not None and hydra_folder.resolve().is_relative_to(root.resolve()):
        yield (
            f"output.data_root is {str(root)!r}, in which Hydra keeps its own folders ({hydra_folder}); "
            "give the dataset a folder of its own, such as outputs/mine"
        )


APPLICATION = Application(
    config_name="config",
    schema=Schema(Config, former=renamed_keys.answer),
    problems=_problems,
    prepare=fill_slugs,
    resolve=resolve,
    collisions=lambda jobs: mixed(jobs) or collisions(jobs),
    default_groups=("model", "dataset", "sampler", "output"),
    other_groups={"estimator": "python -m qk_sniffer.plasticity"},
    open_choices={"model": "model=hf model.name", "dataset": "dataset=hf dataset.path"},
    described={"model": "model.name"},
    filled_by_experiments=("model.config_overrides",),
    callbacks={"launch": f"{LaunchCallback.__module__}.{LaunchCallback.__name__}"},
)
"""The capture, as the check of its command line sees it."""
