"""Checks command lines, alone and as sweeps, before Hydra runs them."""

import itertools
import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra._internal.utils import get_args
from support.slurm_commands import Commands
from support.store_cases import Captured, make_dataset

from qk_sniffer.cli import preflight
from qk_sniffer.cli.app import APPLICATION
from qk_sniffer.errors import ConfigError
from qk_sniffer.jobs.sweep import PlannedJob

MODEL = ("model=hf", "model.name=org/model")
CHECKPOINTS = [
    *(f"stage1-step-{step}" for step in (40000, 1200000, 2400000, 3440000)),
    *("stage2-step-4200000", "stage3-step-4720000"),
    *("lc-4k-to-32k-step-4000", "lc-4k-to-32k-step-20000", "lc-32k-to-64k-step-4000", "lc-32k-to-64k-step-20000"),
]


def plan(*arguments: str) -> list[PlannedJob]:
    return preflight.planned(get_args(list(arguments)), APPLICATION)


def refusals(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan(*arguments)
    return caught.value.problems


def refusal(*arguments: str) -> str:
    (problem,) = refusals(*arguments)
    return problem


# Refused before anything runs


@pytest.mark.few(8)
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("modle.name=x", r"modle\.name is not a key, did you mean model\.name\?; valid at the top: model, dataset, "),
        ("model.nmae=x", r"model\.nmae is not a key, did you mean model\.name\?; valid in model: slug, name, revision"),
        ("batch_size=4", r"did you mean inference\.batch_size\?"),
        ("model.tokenizer.max_len=4", r"did you mean model\.tokenizer\.max_length\?; valid in model\.tokenizer: name"),
        ("+model.nmae=x", r"model\.nmae is not a key"),
        ("experimnt=sample", r"did you mean \+experiment=\.\.\.\?"),
        ("experiment=sample", r"an experiment is added to a run: \+experiment=sample"),
        ("+experiment=smple", r"no such experiment, did you mean sample\?; valid: attention_plasticity, sample, smol"),
        ("output=hug", r"no such output, did you mean hub\?; valid: hub, local, "),
        ("model=qwen3-8b", r"no such model, did you mean qwen3_8b or .*; valid: .*llama3_1_8b, .*pydoc_tiny"),
        ("model=Qwen/Qwen3-8B", r"for the Hub or a path: model=hf model\.name=Qwen/Qwen3-8B"),
        ("dataset=texts.jsonl", r"for the Hub or a path: dataset=hf dataset\.path=texts\.jsonl"),
        ("+sampler=all", r"sampler has a choice already; change it by sampler=all"),
        ("sampler={type: all}", r"sampler is chosen by name; .* sampler\.<key>=\.\.\."),
        ("sampler=glob(z*)", r"nothing matches; valid: .*log_uniform"),
        ("hydra/launcher=slrum", r"no such hydra/launcher.*; valid: basic, slurm, submitit_local"),
        ("hydra.nope=1", r"hydra\.nope=1: hydra\.nope does not exist, so it cannot be changed"),
        ("sampler.base_rate=fast", r"sampler\.base_rate is 'fast'; it must be a number"),
        ("shard.count=1.5", r"shard\.count is 1\.5; it must be an integer"),
        ("output.private=maybe", r"output\.private is 'maybe'; it must be true or false"),
        ("capture.layers=3", r"capture\.layers is 3; it must be a list of integers such as \[0,1,2\], or null"),
        (
            "capture.statistics.stages=pre",
            r"capture\.statistics\.stages is 'pre'; it must be a list of names such as \[one,two\]",
        ),
        ("capture.layers=0,1", r"a list is written in brackets: capture\.layers=\[0,1\]"),
        (
            "model.config_overrides=3",
            r"is 3; it must be a mapping: add entries to it, as in \+model\.config_overrides\.",
        ),
        ("dataset.filter=lang=fr", r"is 'lang=fr'; it must be a mapping: add entries to it, as in \+dataset\.filter\."),
        ("dataset.filter={lang: fr}", r"has no such entry yet; to add it, write '\+dataset\.filter=\{lang: fr\}'"),
        ("model.config_overrides.x=1", r"to add it, write \+model\.config_overrides\.x=1"),
        ("model.tokenizer=null", r"model\.tokenizer is a section; its keys are name, revision, max_length"),
        ("model.tokenizer={max_length: many}", r"model\.tokenizer\.max_length is 'many'; it must be an integer"),
        ("model.revision=1234e5", r"reads as the number 123400000\.0; quote it as text: 'model\.revision=\"1234e5\"'"),
        ("model.tokenizer={revision: 1e5}", r"a value reads as the number 100000\.0; quote the texts in it"),
        ("+dataset.filter.v=1.10", r"number 1\.1; quote it as text: '\+dataset\.filter\.v=\"1\.10\"'"),
        ("+dataset.filter={v: 1.10, w: 1.1}", r"a value reads as the number 1\.1; quote the texts"),
        ("~sampler.seed", r"sampler\.seed cannot be deleted"),
        ("sampler.seed", r"a setting is written key=value"),
        ("capture.layers=[0,", r"capture\.layers=\[0,: a bracket is not closed"),
        ("dataset.split=train[:9]", r"the value must be quoted, for the shell too: 'dataset\.split=\"train\[:9\]\"'"),
        ("sampler.seed=interval(0,1)", r"an interval cannot be swept"),
        ("sampler.seed=1,2", r"several values are a sweep, which needs --multirun"),
        ("output.data_root=x-${sampler.sed}", r"output\.data_root is x-\$\{sampler\.sed\}: .*'sampler\.sed' not found"),
        ("output.data_root=outputs", r"in which Hydra keeps its own folders \(outputs/\.runs/"),
        (
            "output.data_root=x/.qk_sniffer/y",
            r"output\.data_root is refused: .* is in .*, the work folder of the data root",
        ),
        ("hydra.job.chdir=true", r"hydra\.job\.chdir is true: a job would look for its files, .*; leave it false"),
        ("hydra.run.dir=/dev/null/x", r"/dev/null is not a folder"),
        ("output=hub", r"output\.hf_repo_id is not given"),
        ("capture.sampler.type=all", r"capture\.sampler\.type is a key of the original tool; it is now sampler\.type"),
        ("capture.min_bucket_size=4", r"it is now sampler\.min_bucket_size"),
        ("capture.queue_size=4", r"it is now inference\.queue_mb"),
        ("tokenizer.max_length=5", r"it is now model\.tokenizer\.max_length"),
        ("tokenizer.padding=left", r"original tool that no longer exists: .* always padded on the right"),
        ("inference.autocast_dtype=float16", r"it is now model\.dtype"),
        ("output.readme_path=x", r"no longer exists: the card is always README\.md in output\.data_root"),
    ],
)
def test_an_argument_is_refused(argument: str, message: str) -> None:
    assert re.search(message, refusal(*MODEL, argument))


def test_a_data_root_in_the_folder_of_a_head_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "root", Captured(num_examples=4))
    said = refusal(*MODEL, f"output.data_root={tmp_path}/root/l00h00q")
    assert "output.data_root is refused" in said and "has its own files; choose another output.data_root" in said
    assert plan(*MODEL, f"output.data_root={tmp_path}/root/other")


@pytest.mark.slow
def test_numbers_that_may_be_texts_are_taken_as_they_are_written() -> None:
    filters = ["v=1.1", "v=7", "v=nan", "v=null", "v=true", 'v="1.10"', "v='007'", "v=007"]
    good = [*(f"+dataset.filter.{each}" for each in filters), '+dataset.filter={v: 1.1, w: 7, x: "1e5"}']
    for argument in (*good, "+model.config_overrides.rope_theta=1e6"):
        assert plan(*MODEL, argument)
    assert len(plan("--multirun", *MODEL, "model.slug=range(3)")) == 3
    for sweep in ("model.revision=1e5,main", "+dataset.filter.v=1.1,1.10"):
        assert "a value reads as the number" in refusal("--multirun", *MODEL, sweep)


@pytest.mark.slow
def test_everything_wrong_is_named_at_once() -> None:
    found = refusals("model=qwen", "modle.name=x", "sampler.base_rate=-1", "shard.index=two", "model.dtype=bf16")
    assert [re.split(r"[ :]", problem)[0] for problem in found] == [
        "model=qwen",
        "modle.name",
        "shard.index",
        "model.dtype",
        "sampler.base_rate",
    ]
    found = refusals("model=hf", "dataset=hf", "output=hub", "sampler.base_rate=-1", "hydra.x=1", "tokenizer.name=x")
    assert [re.split(r"[ :]", problem)[0] for problem in found] == [
        "tokenizer.name",
        "hydra.x=1",
        "model.name",
        "dataset.path",
        "sampler.base_rate",
        "output.hf_repo_id",
    ]


def test_nothing_is_said_of_what_only_follows_from_another_mistake() -> None:
    assert refusal("model=hf", "model.name=x(y", "+sampler.keys.base_rate=2").startswith("model.name=x(y: ")
    assert refusal(*MODEL, "shard.count=x", "shard.index=3") == "shard.count is 'x'; it must be an integer"
    assert refusal("+experiment=attention_plasticity", "model=qwen").startswith("model=qwen: no such model")


def test_an_experiment_says_what_a_model_lacks_for_it() -> None:
    found = refusals("+experiment=attention_plasticity", *MODEL)
    assert [problem.partition(" comes from ")[2] for problem in found] == [
        f"{key}, which is null here; give {key}=..."
        for key in ("model.long_context.max_length", "model.long_context.min_bucket_size")
    ]
    given = ("model.long_context.max_length=999", "model.long_context.min_bucket_size=99")
    (job,) = plan("+experiment=attention_plasticity", *MODEL, *given)
    assert (job.config.model.tokenizer.max_length, job.config.sampler.min_bucket_size) == (999, 99)
    whole = refusal("+experiment=attention_plasticity", "model=qwen3_8b", "+model.config_overrides={a: 1}")
    assert "one by one: +model.config_overrides.a=..." in whole


# What a shell does to a setting


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("capture.layers=[0,", "1]"), "a setting with spaces is quoted: 'capture.layers=[0, 1]'"),
        (("capture.layers=[", "0,1", "]"), "a setting with spaces is quoted: 'capture.layers=[ 0,1 ]'"),
        (
            ("+model.config_overrides={a:", "{b:", "1}}"),
            "a setting with spaces is quoted: '+model.config_overrides={a: {b: 1}}'",
        ),
        (("dataset.path=org/my", "own", "texts"), "a setting with spaces is quoted: 'dataset.path=org/my own texts'"),
        (("sampler.type", "=", "uniform"), "a setting is one word: sampler.type=uniform"),
        (("sampler.type=", "uniform"), "a setting is one word: sampler.type=uniform"),
        (("sampler.type", "=uniform"), "a setting is one word: sampler.type=uniform"),
        (("capture.layers", "=", "[0,", "1]"), "a setting with spaces is quoted: 'capture.layers=[0, 1]'"),
    ],
)
def test_a_setting_that_the_shell_splits_is_one_problem(arguments: tuple[str, ...], message: str) -> None:
    found = refusals("model=pydoc_tiny", *arguments, "shard.index=0")
    assert found[0] == f"{' '.join(arguments)}: {message}"
    assert all(problem.startswith("dataset.path is 'org/my own texts'") for problem in found[1:])
    (as_told,) = shlex.split(message.partition(": ")[2])
    if not as_told.startswith("dataset.path"):
        assert plan(as_told)


@pytest.mark.parametrize("argument", ["sampler.type = uniform", "sampler.type =uniform", " sampler.type = uniform "])
def test_a_setting_with_spaces_around_its_sign_is_told_the_way_out(argument: str) -> None:
    assert refusals("model=pydoc_tiny", argument) == [
        f"{argument}: a setting has no spaces around =: sampler.type=uniform"
    ]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("arguments", "rule", "way_out"),
    [
        (
            ("dataset.filter={lang:", "fr}"),
            "a setting with spaces is quoted",
            "the mapping has no such entry yet; to add it, write '+dataset.filter={lang: fr}'",
        ),
        (
            ("dataset.filter", "=", "{lang:fr}"),
            "a setting is one word",
            "the mapping has no such entry yet; to add it, write '+dataset.filter={lang:fr}'",
        ),
        (
            ("experiment", "=", "sample"),
            "a setting is one word",
            "an experiment is added to a run: +experiment=sample",
        ),
        (
            ("capture.layers", "=", "0,1"),
            "a setting is one word",
            "a list is written in brackets: capture.layers=[0,1]",
        ),
    ],
)
def test_a_setting_that_was_split_and_is_wrong_gets_one_advice(
    arguments: tuple[str, ...], rule: str, way_out: str
) -> None:
    assert refusals("model=pydoc_tiny", *arguments) == [f"{' '.join(arguments)}: {rule}; {way_out}"]


def test_a_setting_that_was_split_is_checked_too() -> None:
    found = refusals("sampler.type", "=", "unform", "sampler.base_rate=-1")
    assert [problem.partition(" is ")[0] for problem in found][1:] == ["sampler.type", "sampler.base_rate"]
    assert len(refusals("=", "sampler.base_rate=-1")) == 2, "a mistake without a key hides no other"


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("qwen3_8b", "did you mean model=qwen3_8b?"),
        ("uniform", "did you mean sampler=uniform?"),
        ("model", "did you mean model=...?"),
        ("sampler.seed", "did you mean sampler.seed=...?"),
        ("org/texts", "did you mean model=hf model.name=org/texts or dataset=hf dataset.path=org/texts?"),
    ],
)
def test_a_word_alone_is_answered_with_the_settings_that_it_may_be_of(word: str, meant: str) -> None:
    assert refusal("sampler.seed=1", word) == f"{word}: a setting is written key=value, {meant}"


def test_a_comma_in_a_text_is_no_sweep() -> None:
    told = "one value with a comma is quoted, for the shell too: 'dataset.path=\"a,b.txt\"'"
    assert told in refusal("dataset=hf", "dataset.path=a,b.txt")
    assert refusal("dataset=hf", 'dataset.path="a,b.txt"').startswith("dataset.path is 'a,b.txt', which")


# A name without its group


def test_a_model_that_is_named_without_a_choice_is_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "PATIENCE_S", 600.0)
    said = refusal("model.name=org/other", "sampler.seed=1")
    assert said == (
        "model.name=org/other is given without model=..., so it would get the slug and the settings of "
        "model=pydoc_tiny: set model=hf model.name=org/other"
    )
    assert refusal("model.name=null").startswith("model.name is not given; ")
    found = refusals("--multirun", "model.name=a/x,b/x")
    assert len(found) == 2 and all("set model=hf model.name=" in problem for problem in found)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nmodel: {name: org/other}\n")
    assert "model=hf" in refusal("--config-dir", str(tmp_path), "+experiment=mine")


def test_a_model_that_is_named_next_to_its_choice_keeps_the_slug_of_the_choice() -> None:
    (job,) = plan("model=qwen3_8b", "model.name=org/copy")
    assert (job.config.model.slug, job.config.model.tokenizer.name) == ("qwen3-8b", "org/copy")
    (job,) = plan("+experiment=sample", "model.name=org/copy")  # an experiment with a model of its own
    assert job.config.model.slug == "smollm2-135m"
    (job,) = plan(*MODEL)
    assert (job.config.model.slug, job.config.model.dtype) == ("model", "auto")


def test_texts_that_are_named_without_a_choice_get_no_settings_of_another_choice() -> None:
    (job,), (same,) = plan("dataset.path=org/texts"), plan("dataset=hf", "dataset.path=org/texts")
    assert job.config == same.config and job.config.dataset.slug == "texts"


# Sweeps


@pytest.mark.slow
def test_a_sweep_is_expanded_as_hydra_does() -> None:
    jobs = plan("-m", "model=qwen3_8b,llama3_1_8b", "shard.index=range(2)", "shard.count=2")
    assert [str(job) for job in jobs] == [
        f"job {number} (model={model} shard.index={index})"
        for number, (model, index) in enumerate(itertools.product(("qwen3_8b", "llama3_1_8b"), (0, 1)))
    ]
    assert [job.config.model.slug for job in jobs] == ["qwen3-8b", "qwen3-8b", "llama3.1-8b", "llama3.1-8b"]
    assert len(plan("-m", "model=glob(qwen3_*)")) == 5


@pytest.mark.slow
def test_smollm3_checkpoints_sweeps_by_itself() -> None:
    jobs = plan("+experiment=smollm3_checkpoints")
    assert [job.config.output.hf_branch for job in jobs] == [
        f"smollm3-3b-{checkpoint}-longbench-pro-128k-plus-uniform" for checkpoint in CHECKPOINTS
    ]
    assert [job.config.model.revision for job in jobs] == CHECKPOINTS
    assert jobs[-1].config.model.tokenizer.max_length == 65536 and jobs[0].config.sampler.min_bucket_size == 256


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sampler.seed=0,-1,2",), r"sampler\.seed is -1; .* \[job 1 \(sampler\.seed=-1\)\]"),
        (("sampler.seed=0,1", "shard.index=5"), r"^shard\.index is 5; [^\[]*$"),
        (("sampler.seed=0,1",), r"job 0 \(sampler\.seed=0\) and job 1 .* both write to output\.data_root=outputs/mod"),
        (("sampler.seed=0,1",), r"'output\.data_root=outputs/model-pydoc-\$\{sampler\.seed\}'$"),
        (
            ("model.name=a/x,b/x",),
            r"differ in model\.name, .*; run them one by one, each with its own output\.data_root",
        ),
        (
            ("output.data_root=x/Tiny,x/tiny", "model.dtype=float32"),
            r"output\.data_root=x/Tiny, which some file systems take for x/tiny",
        ),
        (('output.data_root="x/\u00e9","x/e\u0301"',), r"which some file systems take for"),
        (("model.revision=a,b", "output.data_root=x"), r"leave output\.data_root out, so that each gets its own"),
        (("sampler.seed=0,0",), r"job 0 and job 1 .*; they are the same job twice"),
        (("dry_run=true,false",), r"dry_run is false and true; give all jobs of a sweep the same"),
        (("shard.count=2", "shard.index=0,1", "sampler.seed=0,1"), r"differ in sampler\.seed"),
        (
            ("output=hub", "output.hf_repo_id=a/b", "output.data_root=x,y"),
            r"write to output\.hf_branch=model-pydoc, though",
        ),
        (("output.folder=a,b",), r"^hydra\.sweep\.dir is outputs/\.sweeps/.* for a job: .* Give one output\.folder"),
        (("hydra.job.name=a,b",), r"Hydra's own settings cannot be swept"),
    ],
)
def test_a_bad_sweep_is_refused_whole(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "PATIENCE_S", 600.0)  # a loaded machine checks every job too
    assert re.search(message, refusal("-m", *MODEL, *arguments))


def test_a_sweep_that_sets_its_jobs_apart_passes() -> None:
    jobs = plan("-m", *MODEL, "sampler.seed=0,1", "output.data_root=x/${sampler.seed}")
    assert [str(job.config.data_root) for job in jobs] == ["x/0", "x/1"]


@pytest.mark.slow
def test_slugs_may_stand_in_other_values() -> None:
    texts = ("dataset=hf", "dataset.path=org/Some.texts", "output.data_root=x/${model.slug}/${dataset.slug}")
    (job,) = plan("model=hf", "model.name=org/My-Model", *texts)
    assert job.config.data_root == Path("x/my-model/some.texts")
    jobs = plan("-m", "model=qwen3_8b", "model.revision=a,b", *texts)
    assert [str(job.config.data_root) for job in jobs] == ["x/qwen3-8b-a/some.texts", "x/qwen3-8b-b/some.texts"]
    assert any(problem.startswith("model.name is not given") for problem in refusals("model=hf", *texts))


def test_one_folder_holds_all_datasets_of_a_sweep_and_the_folders_of_hydra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    jobs = plan("-m", *MODEL, "model.revision=a,b", 'output.folder="~/scratch"')
    assert [str(job.config.data_root) for job in jobs] == [f"{tmp_path}/scratch/model-{each}-pydoc" for each in "ab"]
    (tmp_path / "scratch").touch()
    found = refusals('output.folder="~/scratch"')
    assert found[0].startswith("output.folder is '~/scratch', which is a file")
    assert f"Hydra's own folder for this run, {tmp_path}/scratch/.runs/" in found[1]


@pytest.mark.parametrize(
    "settings",
    [
        ["hydra.run.dir={root}/l00h00q"],
        ["hydra.run.dir={root}", "hydra.output_subdir=l00h00q"],
        ["-m", "hydra.sweep.dir={root}/l00h00q"],
        ["-m", "hydra.sweep.dir={root}", "hydra.sweep.subdir=l00h00q"],
    ],
)
def test_files_of_hydra_go_into_no_dataset(root: Path, settings: list[str]) -> None:
    (found,) = refusals(*(text.format(root=root) for text in settings))
    assert f"is where the dataset at {root} has its own files" in found


# Files of the user's own


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name: [a\nb: : c\n", r"model=mine: while parsing .*mine\.yaml"),
        (b"\xff\xfe\x00", r"model=mine: .*decode"),
        (b"name: a/b\nnmae: c\n", r"model/mine\.yaml: model\.nmae is not a key, did you mean model\.name"),
        (b"name: a/b\ntokenizer: {max_length: x}\n", r"model/mine\.yaml: model\.tokenizer\.max_length: .*'x'"),
        (b"- a\n", r"model/mine\.yaml: .*list"),
        (b"defaults: [nothing]\nname: a/b\n", r"model/mine\.yaml: Could not load 'model/nothing'"),
        (b"name: a/b\ndtype: int8\n", r"model\.dtype is 'int8'"),
    ],
)
def test_a_bad_file_of_the_users_own(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_bytes(text)
    found = refusals("--config-dir", str(tmp_path), "model=mine", "sampler.base_rate=-1")
    assert len(found) == 2 and re.search(message, found[0]) and found[1].startswith("sampler.base_rate is -1")


def test_groups_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: a/b\n")
    for way in (["--config-dir", str(tmp_path)], [f"hydra.searchpath=[{tmp_path}]"]):
        (job,) = plan(*way, "model=mine")
        assert job.config.model.name == "a/b"
    assert "no such folder" in refusal("--config-dir", str(tmp_path / "no"), "model=mine")
    assert "--config-dir" in refusal("--config-path", "conf", "model=mine")


def test_a_launcher_that_would_do_nothing_or_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="hydra/launcher=slurm is for sweeps: add --multirun"):
        plan("hydra/launcher=slurm")
    with pytest.raises(ConfigError, match="this machine has no commands of SLURM"):
        plan("--multirun", "hydra/launcher=slurm")
    assert len(plan("--multirun", "hydra/launcher=submitit_local")) == 1
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert len(plan("--multirun", "hydra/launcher=slurm")) == 1


def test_a_time_limit_above_that_of_the_partition_is_refused_even_if_nobody_set_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands(tmp_path / "bin", monkeypatch)
    commands.say("srun", "")
    commands.say("sinfo", "main*|up|1:00:00|64|gpu:8|500000\nlong|up|infinite|64|gpu:8|500000\n")
    on_slurm = ("--multirun", "hydra/launcher=slurm")
    said = refusal(*on_slurm)
    assert said.startswith("hydra.launcher.timeout_min is 1440, but the time limit of partition main is 60 minutes; ")
    assert f"> `{said}`" in (Path(__file__).parents[2] / "docs" / "slurm.md").read_text(encoding="utf-8").splitlines()
    assert len(plan(*on_slurm, "hydra.launcher.timeout_min=60")) == 1
    assert len(plan(*on_slurm, "hydra.launcher.partition=long")) == 1
    assert len(refusals(*on_slurm, "sampler.base_rate=-1")) == 2, "with all other problems"


# Variables of the environment


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        "dataset.path=${oc.env:QK_SECRET}.jsonl",
        "model.slug=${oc.env:QK_SECRET}",
        "model.name=${oc.env:QK_SECRET}/model",
        "dataset.data_files=[a.csv,'${oc.env:QK_SECRET}']",
        '+dataset.filter.a="${oc.decode:${oc.env:QK_SECRET}}"',
        '+model.config_overrides.a="${oc.create:{b:${oc.env:QK_SECRET}}}"',
        '+model.config_overrides.a={b:["${oc.env:QK_SECRET}"]}',
        "sampler.seed=${oc.env:QK_SECRET}",
        "output.hf_branch=${output.folder}",
    ],
)
def test_a_setting_that_is_published_does_not_read_the_environment(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QK_SECRET", "a5ecret")
    found = refusals(*MODEL, "dataset=hf", "dataset.path=org/texts", "output.folder=${oc.env:QK_SECRET}", setting)
    key = setting.lstrip("+").partition("=")[0]
    assert any(problem.startswith(key) and "variable of the environment" in problem for problem in found)
    assert "a5ecret" not in str(found) and len(found) == 1, "nothing is said of what replaces the value"


def test_the_folders_of_this_machine_may_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QK_PLACE", "/scratch/me")
    (job,) = plan(*MODEL, "output.folder=${oc.env:QK_PLACE}/out", "hydra.run.dir=outputs/${oc.env:QK_PLACE}")
    assert str(job.config.data_root) == "/scratch/me/out/model-pydoc"
    (job,) = plan(*MODEL, "output.data_root=${oc.env:QK_PLACE}/${model.slug}")
    assert str(job.config.data_root) == "/scratch/me/model"


@pytest.mark.parametrize("name", ["HF_TOKEN", "https_proxy", "HF_ENDPOINT"])
@pytest.mark.parametrize("setting", ["hydra.job.env_copy=[{}]", "+hydra.job.env_set.{}=a5ecret"])
def test_hydra_does_not_store_the_login(setting: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "https://me:a5ecret@host")
    said = refusal(*MODEL, setting.format(name))
    assert f"would store {name} in the files of the job" in said and "a5ecret" not in said


@pytest.mark.parametrize(
    "setting",
    [
        "hydra.job.config.override_dirname.kv_sep=${oc.env:HF_TOKEN}",
        "hydra.run.dir='outputs/${oc.env:HF_TOKEN,none}'",
        "+hydra.job.env_set.MINE=${oc.env:HUGGING_FACE_HUB_TOKEN}",
        "+hydra.job_logging.formatters.simple.format=${oc.env:HF_TOKEN}",
        "output.folder=${oc.env:HF_TOKEN}",
        "output.data_root=${oc.env:HF_ENDPOINT}",
        "output.data_root=${oc.env:https_proxy}",
    ],
)
def test_no_setting_has_the_value_of_the_login(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "hf_a5ecret_of_some_length")
    for name in ("HF_ENDPOINT", "https_proxy"):
        monkeypatch.setenv(name, "https://me:a5ecret@host")
    said = refusal(*MODEL, setting)
    assert re.search("a setting has the value of H|a setting has the value of https_proxy", said)
    assert "a5ecret" not in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("--multirun", "hydra.sweep.subdir=${oc.env:HF_TOKEN}", "sampler.seed=1,2"),
        ('output.folder=${oc.create:{a:"${oc.env:HF_TOKEN}"}}',),
    ],
)
def test_no_message_quotes_the_login_of_a_setting(
    arguments: tuple[str, ...], in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qk_sniffer.cli.app import main

    monkeypatch.setenv("HF_TOKEN", "hf_a5ecret_of_some_length")
    monkeypatch.setattr(sys, "argv", ["qk_sniffer", *arguments])
    assert main() == 2
    assert "a5ecret" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("key", ["output.folder", "hydra.run.dir"])
def test_no_value_names_the_variable_of_another_setting(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a5ecret")
    said = refusal(*MODEL, f'{key}="o-${{oc.env:${{output.hf_branch}}}}"', "output.hf_branch=HF_TOKEN")
    assert "a variable that another value names" in said and "a5ecret" not in said


@pytest.mark.slow
def test_a_sweep_of_more_jobs_than_any_is_refused_before_they_are_made() -> None:
    assert refusal("-m", *MODEL, "sampler.seed=range(9999)", "shard.index=range(9999)").startswith(
        "the sweep has 99,980,001 jobs; run at most 10,000"
    )


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("sampler.seed=range(1000000000)", "has 1,000,000,000 values"),
        ("sampler.seed=shuffle(range(1000000000))", "has 1,000,000,000 values"),
        ("sampler.base_rate=range(2,1,-1e-9)", "has 1,000,000,"),
        ("model@other=range(1000000000)", "has 1,000,000,000 values"),
        ("sampler.base_rate=range(0,inf)", "has no end, or bounds that are no numbers"),
        ("sampler.base_rate=range(0,nan)", "has no end, or bounds that are no numbers"),
    ],
)
def test_a_range_of_more_jobs_than_any_is_refused_before_it_is_listed(argument: str, said: str) -> None:
    answer = refusal("-m", *MODEL, argument)
    assert answer.startswith(f"{argument}: the range {said}") and answer.endswith("; run at most 10,000 jobs at a time")
