"""The command line: finds what is wrong with it, hands over to Hydra, and says how the jobs ended.

Exit codes: 0 all jobs are done, 1 a job failed, 2 the command line or the configuration is wrong, 130 and 143 ended by
SIGINT and SIGTERM.
"""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qk_sniffer.cli import preflight, renamed_keys
from qk_sniffer.cli.environment import read_environment
from qk_sniffer.cli.launching import Launch
from qk_sniffer.config import from_omegaconf, register
from qk_sniffer.errors import ConfigError, QkSnifferError
from qk_sniffer.jobs import sweep
from qk_sniffer.jobs.signals import WARNING, Stopped, Stopping
from qk_sniffer.resolved import resolve

log = logging.getLogger(__name__)

# A launcher's worker imports this module to find `task`, and then composes the job's config.
register()


def main() -> int:
    """`python -m qk_sniffer` and `sniff-qk`; returns the exit code."""
    try:
        args = parse_flags(sys.argv[1:])
        if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion or args.experimental_rerun:
            return _show()
        return _run(preflight.planned(args))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return _interrupted(error)


def task(node: DictConfig) -> str:
    """One job, wherever Hydra's launcher runs it; returns its state and leaves the same in its status file."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    number = 0 if OmegaConf.is_missing(hydra_config.job, "num") else hydra_config.job.num
    config = None
    if hydra_config.mode == RunMode.MULTIRUN:
        # Composed anew here, from files that may have changed while the job was waiting.
        config = sweep.submitted(Path(hydra_config.sweep.dir), number)
    config = config or resolve(from_omegaconf(node))
    status = sweep.Status.here(number, config)
    with sweep.recorded(status, folder):
        try:
            with Stopping():
                read_environment()
                from qk_sniffer.jobs.run import run_job

                outcome = run_job(config)
                status.succeed(outcome.rows, outcome.url)
        except QkSnifferError as error:
            log.error("%s", error)
            status.fail(str(error), code=2 if isinstance(error, ConfigError) else 1)
        except Stopped as stopped:
            _stopped(stopped, status, folder)
        except Exception as error:
            log.exception("Not an error that qk-sniffer foresees:")
            status.fail(f"{type(error).__name__}: {error}")
    return status.state


def _stopped(stopped: Stopped, status: sweep.Status, folder: Path) -> None:
    """Ends a job that a signal stopped, or has it queued again where the signal says that its time is up."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        raise stopped
    log.warning("%s", stopped)
    if stopped.number == WARNING:
        status.state = sweep.REQUEUED
        status.write(folder)
        try:
            signal.raise_signal(WARNING)  # now to submitit, which asks for the requeue and exits
        except Exception as error:
            status.fail(str(error))
            raise
    raise SystemExit(stopped.exit_code)  # without the traceback that an interrupt leaves in a job's log


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    if any(argument.partition("=")[0] == "--config" for argument in arguments):
        raise ConfigError([renamed_keys.CONFIG_FLAG])
    args, rest = get_args_parser().parse_known_args(arguments)
    unknown = [text for text in rest if text.startswith("-")]
    if unknown:
        raise ConfigError([f"{text}: no such flag; settings are written key=value (see --help)" for text in unknown])
    if rest:
        raise ConfigError([f"{' '.join(rest)}: flags come first, then all settings together"])
    return args


def _show() -> int:
    """Help and the like, which Hydra does by itself."""
    try:
        _hydra_main()
    except Exception as error:  # for these flags Hydra lets errors through as they are
        print(preflight.explain(error), file=sys.stderr)
        return 2
    return 0


def _run(planned: list[sweep.PlannedJob]) -> int:
    """Has Hydra run the jobs, and learns from their status files how they ended."""
    code = 0
    launch = Launch(planned)
    try:
        with launch:
            try:
                _hydra_main()
            except SystemExit as error:  # Hydra's way to end once it has printed what its launcher raised
                code = 1 if error.code else 0
            launch.wait()
    except KeyboardInterrupt as error:
        code = _interrupted(error)
        launch.wait_for_exit()
    found = {} if launch.folder is None else sweep.statuses(launch.folder)
    if len(planned) > 1:
        print(sweep.table(planned, found))
        print(f"Logs: {launch.folder}")
    codes = [found[job.number].code if job.number in found else 1 for job in planned]
    all_done = all(job.number in found and found[job.number].state in sweep.GOOD for job in planned)
    if launch.is_announced and all_done:
        return 0  # the launcher may have given up on a job that was begun anew since
    return code or (0 if all_done else min((code for code in codes if code), default=1))


def _interrupted(error: KeyboardInterrupt) -> int:
    """Says so; returns the exit code."""
    print(str(error) or "interrupted", file=sys.stderr)
    return error.exit_code if isinstance(error, Stopped) else 130


def _hydra_main() -> None:
    decorated = hydra.main(
        version_base=preflight.VERSION_BASE,
        config_path=f"pkg://{preflight.CONFIG_MODULE}",
        config_name=preflight.CONFIG_NAME,
    )(task)
    decorated()
