"""Checks that Hydra's own settings are refused before Hydra fails with them."""

import logging
import re
from pathlib import Path

import pytest
from hydra._internal.utils import get_args
from omegaconf import OmegaConf

from qk_sniffer.cli import app, hydra_settings, preflight
from qk_sniffer.errors import ConfigError
from qk_sniffer.plasticity import cli as plasticity

LOG = "hydra.job_logging"


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        preflight.planned(get_args(list(arguments)), app.APPLICATION)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            f"+{LOG}.formatters.simple.format=%z",
            rf"{LOG}\.formatters\.simple: Invalid format '%z' for '%' style; correct",
        ),
        (f"{LOG}.handlers.file.class=logging.Nope", rf"{LOG}\.handlers\.file: Cannot resolve 'logging\.Nope'"),
        (f"{LOG}.root.level=LOUD", rf"{LOG}\.root\.level: Unknown level: 'LOUD'; correct it, or leave it out"),
        ("hydra.verbose=5", r"hydra\.verbose is 5; it must be true, false, or the names of loggers"),
        (
            "hydra.sweeper._target_=nope.X",
            r"_target_ is 'nope\.X'; it must be an installed sweeper of Hydra: choose one",
        ),
        ("hydra.job.chdir=${nope}", r"hydra\.job\.chdir: Interpolation key 'nope' not found"),
        (f"{LOG}.formatters.full.format='%(nope)s'", r"formatters\.full: Formatting field not found in record: 'nope'"),
        (f"+{LOG}.handlers.file.nope=1", r"handlers\.file: got an unexpected keyword argument 'nope'"),
        (f"{LOG}.handlers.file=5", r"handlers\.file is 5, which is no mapping"),
        (f"+{LOG}.handlers.more.level=INFO", r"handlers\.more has no class"),
        (
            f"{LOG}.handlers.file.formatter=nope",
            r"\.formatter has 'nope', which is not one of its formatters: bare, full",
        ),
        (f"{LOG}.root.handlers=[console,nope]", r"\.root\.handlers has 'nope', which is not one of its handlers: con"),
        (f"{LOG}.root=5", r"hydra\.job_logging\.root is 5, which is no mapping"),
        (f"~{LOG}.root", r"hydra\.job_logging has no root"),
        ("hydra.hydra_logging.version=2", r"hydra\.hydra_logging\.version is 2, and must be 1"),
        ("hydra.hydra_logging.handlers.console.stream=ext://sys.nope", r"handlers\.console: .*nope"),
        ("+hydra.hydra_logging.loggers.mine.level=[]", r"loggers\.mine"),
        (
            "~hydra.callbacks.launch",
            r"hydra\.callbacks\.launch must be qk_sniffer\.cli\.launching\.LaunchCallback, which",
        ),
        ("hydra.callbacks.launch=null", r"hydra\.callbacks\.launch must be"),
        ("hydra.job.name=a/b", r"hydra\.job\.name is 'a/b', which cannot be the name of the log of a job"),
        (f"hydra.job.name={'a' * 252}", r"a', which cannot be the name of the log of a job"),
        ("hydra.verbose=[1]", r"hydra\.verbose is \[1\]"),
        ("hydra.verbose=null", r"hydra\.verbose is None"),
        ("hydra.launcher=null", r"hydra\.launcher names no class \(_target_\); it must be an installed launcher"),
        ("hydra.sweeper=null", r"hydra\.sweeper names no class \(_target_\)"),
        ("hydra.launcher._target_=os.getcwd", r"hydra\.launcher\._target_ is 'os\.getcwd'"),
        ("hydra.sweeper.max_batch_size=0", r"hydra\.sweeper\.max_batch_size is 0; it must be at least 1, or null"),
        ("+hydra.job.env_set.A=${nope:x}", r"hydra\.job\.env_set\.A refers to nothing"),
        ("hydra.verbose=${nope}", r"hydra\.verbose refers to nothing: Interpolation key 'nope' not found; correct it"),
    ],
)
def test_a_setting_of_hydra_is_refused(argument: str, message: str) -> None:
    assert re.search(message, refusal(argument))


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("same", r"hydra\.sweep\.subdir is 'same' for several jobs, .* add \$\{hydra\.job\.num\} to it"),
        ("${model.slug}/.", "is 'pydoc-tiny/.' for several jobs"),
        ("../x", r"which leads out of the folder of the sweep; leave it out"),
        ("/tmp/x", r"which leads out of the folder of the sweep; leave it out"),
    ],
)
def test_jobs_of_a_sweep_have_folders_of_their_own_in_its_folder(name: str, message: str) -> None:
    swept = ("--multirun", "sampler.seed=1,2", "output.data_root=outputs/${sampler.seed}")
    assert re.search(message, refusal(*swept, f"hydra.sweep.subdir='{name}'"))
    for good in ("${hydra.job.num}", "job-${hydra.job.num}", "${sampler.seed}", "deeper/${sampler.seed}"):
        assert len(preflight.planned(get_args([*swept, f"hydra.sweep.subdir='{good}'"]), app.APPLICATION)) == 2


@pytest.mark.parametrize(("setting", "least"), [("timeout_min=0", 1), ("timeout_min=-5", 1), ("cpus_per_task=-1", 0)])
def test_a_number_that_submitit_fails_with_is_refused(setting: str, least: int) -> None:
    said = refusal("--multirun", "hydra/launcher=submitit_local", f"hydra.launcher.{setting}")
    assert said == f"hydra.launcher.{setting.replace('=', ' is ')}; it must be at least {least}"


def test_all_other_problems_are_named_too() -> None:
    with pytest.raises(ConfigError) as caught:
        preflight.planned(get_args([f"{LOG}.root.level=LOUD", "sampler.base_rate=-1"]), app.APPLICATION)
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == [
        f"{LOG}.root.level:",
        "sampler.base_rate",
    ]


def test_a_variable_that_cannot_be_set_is_named() -> None:
    hydra = {"sweeper": {}, "launcher": {}, "verbose": False, "hydra_logging": {}, "job_logging": {}, "callbacks": {}}
    found = hydra_settings.problems(
        OmegaConf.create(hydra | {"job": {"name": "x", "env_set": {"a=b": "1", "c": "\0", "d": "1"}}}), {}
    )
    assert [re.findall("has '(.*)', which is no variable", problem) for problem in found if "env_set" in problem] == [
        ["a=b"],
        ["c"],
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("hydra/job_logging=default", "hydra/hydra_logging=default", "hydra.verbose=true"),
        ("hydra/job_logging=none", "hydra/hydra_logging=disabled", "hydra.verbose=[qk_sniffer,hydra]"),
        (
            f"{LOG}.root.level=10",
            f"+{LOG}.handlers.all={{class: logging.handlers.RotatingFileHandler, filename: all.log, level: DEBUG}}",
            f"{LOG}.root.handlers=[console,file,all]",
            "hydra.verbose=qk_sniffer",
            "hydra.sweeper.max_batch_size=2",
        ),
    ],
)
def test_what_hydra_can_run_with_is_not_refused_and_changes_nothing_yet(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = [*logging.getLogger().handlers], logging.getLogger().level
    for application, own in ((app.APPLICATION, ()), (plasticity.APPLICATION, ("data_root=org/m",))):
        assert preflight.planned(get_args([*own, *arguments]), application)
    assert before == ([*logging.getLogger().handlers], logging.getLogger().level)
    assert not [*tmp_path.iterdir()]
