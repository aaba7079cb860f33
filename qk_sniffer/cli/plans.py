"""Shows the plans of a command line's jobs (`dry_run`), one after another, and launches none of them."""

import sys
from collections.abc import Sequence

from qk_sniffer.cli.environment import read_environment
from qk_sniffer.errors import QkSnifferError
from qk_sniffer.jobs.sweep import PlannedJob
from qk_sniffer.machine import release_memory
from qk_sniffer.text import say, say_text


def is_dry(jobs: Sequence[PlannedJob]) -> bool:
    """Whether the jobs are shown and not run."""
    return jobs[0].config.dry_run is not False


def mixed(jobs: Sequence[PlannedJob]) -> list[str]:
    """Returns what is wrong if some jobs are to be shown and others to be run."""
    asked = {str(job.config.dry_run).lower() for job in jobs}
    return [f"dry_run is {' and '.join(sorted(asked))}; give all jobs of a sweep the same"] if len(asked) > 1 else []


def show_plans(jobs: Sequence[PlannedJob]) -> int:
    """Prints the plan of each job; returns the exit code. The error of a job does not keep the others from it."""
    codes: list[int] = []
    needed = free = 0
    for job in jobs:
        if len(jobs) > 1:
            say(*([""] if codes else []), f"Plan of {job}")
        if codes:
            plan = None  # it holds the model of the job before
            release_memory()
        try:
            read_environment()
            from qk_sniffer.jobs.dry_run import show_plan

            if (plan := show_plan(job.config)) is not None:
                needed, free = needed + plan.needed, plan.free
                plan.check_space()
            codes.append(0)
        except QkSnifferError as error:
            say_text(error, to=sys.stderr)
            codes.append(error.exit_code)
    if len(jobs) > 1 and needed:
        from qk_sniffer.jobs.plan_lines import size_of

        say("", f"All jobs together need {size_of(needed)} of disk; {size_of(free)} are free.")
    return min((code for code in codes if code), default=0)
