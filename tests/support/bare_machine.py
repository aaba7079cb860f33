"""A pytest plugin: quick tests run as on a machine without SLURM, and a skipped test fails in CI."""

import os
from collections.abc import Generator

import pytest

from support.hide_slurm import path_without_slurm

NO_SKIPS = "QK_SNIFFER_NO_SKIPS"
"""The environment variable that CI sets to 1: every test must be able to run there."""

_path = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Runs a quick test, with every fixture that it sets up, in an environment without SLURM.

    A fixture cannot do this: pytest sets up the fixtures of a session or module before those of a test.
    """
    if item.get_closest_marker("slow") is not None:
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", _path_of(item))
        for name in os.environ:
            if name.startswith(("SLURM_", "SBATCH_")):
                patch.delenv(name)
        return (yield)


def _path_of(item: pytest.Item) -> str:
    """The PATH without SLURM, made once a session."""
    if _path not in item.config.stash:
        factory: pytest.TempPathFactory = item.config._tmp_path_factory  # type: ignore[attr-defined]
        item.config.stash[_path] = path_without_slurm(os.environ.get("PATH", os.defpath), factory.mktemp("path"))
    return item.config.stash[_path]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fails a skipped test in CI; an expected failure is none."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        _fail_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fails a skipped module in CI. Workers of xdist do not report one."""
    report = yield
    if report.skipped:
        _fail_in_ci(report)
    return report


def _fail_in_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get(NO_SKIPS) == "1":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{reason}; and {NO_SKIPS}=1"
