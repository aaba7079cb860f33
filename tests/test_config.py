"""Tests the config keys, the shipped choices, the values derived from them, and the values that are refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from settings_table import table
from support.configs import choice, composed

from qk_sniffer import conf
from qk_sniffer.config import (
    CaptureConfig,
    ChatConfig,
    Config,
    DatasetConfig,
    HeadSamplingConfig,
    KeySamplerConfig,
    LongContextConfig,
    ModelConfig,
    OutputConfig,
    SamplerConfig,
    ShardConfig,
    StatisticsConfig,
    TokenizerConfig,
    schema,
    settings,
)
from qk_sniffer.errors import ConfigError
from qk_sniffer.resolved import fingerprint, resolve
from qk_sniffer.validation import check, problems

CONF = Path(conf.__file__).parent
SNAPSHOT = Path(__file__).parent / "data" / "config.yaml"

YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
SMOLLM3 = "HuggingFaceTB/SmolLM3-3B-checkpoints"
# For each slug: name on the Hub, then max_length, min_bucket_size and config_overrides of its long_context.
PRODUCTION: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "llama3.1-8b": ("meta-llama/Llama-3.1-8B", 131072, 8192, {}),
    "llama3.2-1b": ("meta-llama/Llama-3.2-1B", 131072, 8192, {}),
    "llama3.2-3b": ("meta-llama/Llama-3.2-3B", 131072, 8192, {}),
    "llama3.2-11b": ("meta-llama/Llama-3.2-11B-Vision", 131072, 8192, {}),
    "ministral3-3b": ("mistralai/Ministral-3-3B-Base-2512", 131072, 8192, {}),
    "ministral3-8b": ("mistralai/Ministral-3-8B-Base-2512", 131072, 8192, {}),
    "ministral3-14b": ("mistralai/Ministral-3-14B-Base-2512", 131072, 8192, {}),
    "mistral-v0.2-7b": ("mistralai/Mistral-7B-Instruct-v0.2", 32768, 8192, {}),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", 131072, 8192, YARN),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", 131072, 8192, YARN),
    "qwen3-4b": ("Qwen/Qwen3-4B", 131072, 8192, YARN),
    "qwen3-8b": ("Qwen/Qwen3-8B", 131072, 8192, YARN),
    "qwen3-14b": ("Qwen/Qwen3-14B", 131072, 8192, YARN),
    "smollm3-3b-stage1-step-40000": (SMOLLM3, 4096, 256, {}),
    "smollm3-3b-stage1-step-1200000": (SMOLLM3, 4096, 256, {}),
    "smollm3-3b-stage1-step-2400000": (SMOLLM3, 4096, 256, {}),
    "smollm3-3b-stage1-step-3440000": (SMOLLM3, 4096, 256, {}),
    "smollm3-3b-stage2-step-4200000": (SMOLLM3, 4096, 256, {}),
    "smollm3-3b-stage3-step-4720000": (SMOLLM3, 4096, 256, {}),
    "smollm3-3b-lc-4k-to-32k-step-4000": (SMOLLM3, 32768, 2048, {}),
    "smollm3-3b-lc-4k-to-32k-step-20000": (SMOLLM3, 32768, 2048, {}),
    "smollm3-3b-lc-32k-to-64k-step-4000": (SMOLLM3, 65536, 4096, {}),
    "smollm3-3b-lc-32k-to-64k-step-20000": (SMOLLM3, 65536, 4096, {}),
}
OTHER_FAMILIES = {
    "google/gemma-3-1b-pt",
    "google/gemma-3-4b-pt",
    "THUDM/glm-4-9b-hf",
    "THUDM/GLM-4-9B-0414",
    "Qwen/Qwen2.5-0.5B",
    "mistralai/Ministral-8B-Instruct-2410",
}
TO_BE_GIVEN = {
    ("sampler", "none"): ["capture.statistics.enabled=true"],
    ("model", "hf"): ["model.name=org/name"],
    ("dataset", "hf"): ["dataset.path=org/texts"],
    ("output", "hub"): ["output.hf_repo_id=me/vectors"],
}
CHOICES = [
    (group, file.stem)
    for group in ("model", "dataset", "sampler", "output", "experiment")
    for file in sorted((CONF / group).glob("*.yaml"))
]


def test_keys_and_defaults_are_those_of_the_snapshot() -> None:
    # The keys are an interface: a change breaks the commands of users. Change the file only with an intended change.
    assert OmegaConf.to_yaml(schema()) == SNAPSHOT.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes_to_a_valid_config(group: str, name: str) -> None:
    plus = "+" if group == "experiment" else ""
    config = composed(f"{plus}{group}={name}", *TO_BE_GIVEN.get((group, name), []))
    assert problems(config) == []


def test_every_production_model_has_a_choice_and_nothing_is_left_over() -> None:
    files = {name: OmegaConf.load(CONF / "model" / f"{name}.yaml") for group, name in CHOICES if group == "model"}
    del files["hf"], files["pydoc_tiny"]
    assert all(re.sub(r"[-.]", "_", model["slug"]) == name for name, model in files.items())
    names = {model["slug"]: model["name"] for model in files.values()}
    others = {slug: name for slug, name in names.items() if slug not in PRODUCTION}
    assert names.keys() - others.keys() == PRODUCTION.keys()
    assert set(others.values()) == OTHER_FAMILIES | {"HuggingFaceTB/SmolLM2-135M"}


@pytest.mark.slow
@pytest.mark.parametrize("slug", PRODUCTION)
def test_a_production_model_alone_and_in_the_study(slug: str) -> None:
    name, max_length, min_bucket_size, overrides = PRODUCTION[slug]
    alone = composed(choice(slug))
    assert (alone.model.name, alone.model.dtype, alone.model.slug) == (name, "bfloat16", slug)
    assert alone.model.config_overrides == {} and alone.model.tokenizer.max_length == 4096
    assert alone.sampler == SamplerConfig()

    study = composed("+experiment=attention_plasticity", choice(slug))
    assert study.model.tokenizer.max_length == max_length
    assert study.model.config_overrides == overrides
    assert study.sampler == SamplerConfig(type="uniform", base_rate=1.0, min_bucket_size=min_bucket_size)
    assert study.capture == CaptureConfig(head_sampling=HeadSamplingConfig(300, 0), full_attention_only=True)
    assert study.inference.batch_size == 1
    assert study.output.hf_repo_id == "viktoroo/sniffed-qk"
    dataset = study.dataset
    assert (dataset.path, dataset.split) == ("viktoroo/longbench-pro-128k-plus", "test")
    assert (dataset.text_column, dataset.id_column) == ("text", "id")
    for config in (alone, study):
        revision = slug.removeprefix("smollm3-3b-") if name == SMOLLM3 else "main"
        tokenizer = resolve(config).model.tokenizer
        assert config.model.revision == revision
        expected = ("HuggingFaceTB/SmolLM3-3B", None) if name == SMOLLM3 else (name, "main")
        assert (tokenizer.name, tokenizer.revision) == expected
    assert resolve(study).output.hf_branch == f"{slug}-longbench-pro-128k-plus-uniform"
    assert resolve(study).output.data_root == f"outputs/{slug}-longbench-pro-128k-plus-uniform"


def test_the_sample_run() -> None:
    config = resolve(composed("+experiment=sample"))
    assert (config.model.name, config.model.dtype) == ("HuggingFaceTB/SmolLM2-135M", "float16")
    assert (config.model.tokenizer.max_length, config.sampler.min_bucket_size) == (512, 32)
    assert config.output.hf_repo_id == "viktoroo/test-sniffer-qk"
    assert config.output.hf_branch == "smollm2-135m-longbench-pro-128k-plus-uniform"


def test_choices_given_with_an_experiment_win() -> None:
    config = composed("+experiment=sample", "output=local", "dataset=pydoc", "sampler=all", "model=qwen3_8b")
    assert (config.output.hf_repo_id, config.dataset.path, config.sampler.type) == (None, "pydoc", "all")
    assert config.model.tokenizer.max_length == 131072


def test_a_model_config_override_is_added_to_those_of_the_study() -> None:
    study = ("+experiment=attention_plasticity", "model=qwen3_8b")
    config = composed(*study, "+model.config_overrides.sliding_window=4096")
    assert config.model.config_overrides == YARN | {"sliding_window": 4096}


def test_the_long_rows_of_longbench_v2() -> None:
    dataset = resolve(composed("dataset=longbench_v2_long")).dataset
    assert (dataset.path, dataset.split, dataset.slug) == ("zai-org/LongBench-v2", "train", "longbench-v2-long")
    assert (dataset.text_column, dataset.id_column, dataset.filter) == ("context", "_id", {"length": "long"})


MODEL, DATASET = ModelConfig(name="org/Some.Model-7B"), DatasetConfig(path="org/Texts")
GOOD = Config(model=MODEL, dataset=DATASET)


@pytest.mark.parametrize(
    ("config", "branch"),
    [
        (GOOD, "some.model-7b-texts"),
        (replace(GOOD, model=ModelConfig(name="/models/My Model/")), "my-model-texts"),
        (replace(GOOD, model=replace(MODEL, revision="step-5")), "some.model-7b-step-5-texts"),
        (replace(GOOD, model=replace(MODEL, revision="a" * 40)), f"some.model-7b-{'a' * 12}-texts"),
        (replace(GOOD, model=replace(MODEL, slug="x-step-5", revision="step-5")), "x-step-5-texts"),
        (replace(GOOD, model=replace(MODEL, revision="b")), "some.model-7b-b-texts"),
        (replace(GOOD, dataset=DatasetConfig(path="data/my texts.jsonl")), "some.model-7b-my-texts"),
        (replace(GOOD, capture=CaptureConfig(capture_pre_rope=True)), "some.model-7b-texts-pre-rope"),
        (replace(GOOD, sampler=SamplerConfig(share="example")), "some.model-7b-texts-shared"),
        (replace(GOOD, sampler=SamplerConfig(type="all")), "some.model-7b-texts-all"),
        (
            replace(GOOD, sampler=SamplerConfig(type="uniform", keys=KeySamplerConfig(type="all"), share="example")),
            "some.model-7b-texts-uniform-keys-all-shared",
        ),
        (replace(GOOD, output=OutputConfig(hf_branch="mine")), "mine"),
    ],
)
def test_branch_and_data_root(config: Config, branch: str) -> None:
    output = resolve(config).output
    assert (output.hf_branch, output.data_root) == (branch, f"outputs/{branch}")


def test_the_home_folder_is_filled_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "texts").mkdir()
    config = replace(GOOD, dataset=DatasetConfig(path="~/texts"), output=OutputConfig(data_root="~/vectors"))
    assert problems(config) == []
    assert resolve(config).dataset.path == str(tmp_path / "texts")
    assert resolve(config).data_root == tmp_path / "vectors"
    in_scratch = resolve(replace(config, output=OutputConfig(folder="~/scratch")))
    assert in_scratch.data_root == tmp_path / "scratch" / "some.model-7b-texts"


def in_chat(**settings: Any) -> Config:
    return replace(GOOD, dataset=replace(DATASET, messages_column="m", chat=ChatConfig(**settings)))


BAD: list[tuple[str, Config]] = [
    (r"model\.name is not given; .*model\.name=org/name", replace(GOOD, model=ModelConfig())),
    (r"model\.name is './nowhere', which does not exist", replace(GOOD, model=ModelConfig(name="./nowhere"))),
    (r"model\.name is 'a/b/c', which is neither", replace(GOOD, model=ModelConfig(name="a/b/c"))),
    (r"model\.name is empty", replace(GOOD, model=ModelConfig(name=" "))),
    (r"model\.slug is 'a/b'", replace(GOOD, model=replace(MODEL, slug="a/b"))),
    (r"model\.revision is 'a b'", replace(GOOD, model=replace(MODEL, revision="a b"))),
    (r"model\.revision is 'v2', but model\.name is '\.'", replace(GOOD, model=ModelConfig(name=".", revision="v2"))),
    (
        r"model\.dtype is 'bf16', did you mean bfloat16\?; valid: bfloat16, float16, float32, auto ",
        replace(GOOD, model=replace(MODEL, dtype="bf16")),
    ),
    (r"model\.dtype is 'fp16', did you mean float16\?", replace(GOOD, model=replace(MODEL, dtype="fp16"))),
    (r"model\.device_map is \[0\]", replace(GOOD, model=replace(MODEL, device_map=[0]))),
    (r"model\.family is empty", replace(GOOD, model=replace(MODEL, family=""))),
    (
        r"model\.tokenizer\.max_length is 0",
        replace(GOOD, model=replace(MODEL, tokenizer=TokenizerConfig(max_length=0))),
    ),
    (
        r"model\.tokenizer\.name is '/nowhere', which does not exist",
        replace(GOOD, model=replace(MODEL, tokenizer=TokenizerConfig(name="/nowhere"))),
    ),
    (
        r"model\.long_context\.max_length is -1",
        replace(GOOD, model=replace(MODEL, long_context=LongContextConfig(max_length=-1))),
    ),
    (r"dataset\.path is not given; .*dataset\.path=org/name", replace(GOOD, dataset=DatasetConfig())),
    (r"dataset\.path is '\.\./no\.txt', which does not exist", replace(GOOD, dataset=DatasetConfig(path="../no.txt"))),
    (r"dataset\.path is 'no\.jsonl'; there is no such file", replace(GOOD, dataset=DatasetConfig(path="no.jsonl"))),
    (r"dataset\.data_files='\*\.parquet'", replace(GOOD, dataset=DatasetConfig(path="d/*.parquet"))),
    (r"dataset\.path is '/.x00', which does not exist", replace(GOOD, dataset=DatasetConfig(path="/\0"))),
    (r"dataset\.revision is 'v1', but", replace(GOOD, dataset=DatasetConfig(path="pydoc", revision="v1"))),
    (r"dataset\.name and dataset\.data_files", replace(GOOD, dataset=DatasetConfig(path="pydoc", name="x"))),
    (r"dataset\.split is empty", replace(GOOD, dataset=replace(DATASET, split=""))),
    (r"dataset\.text_column is empty", replace(GOOD, dataset=replace(DATASET, text_column=""))),
    (
        r"dataset\.messages_column and dataset\.tokens_column are given; .* give one",
        replace(GOOD, dataset=replace(DATASET, messages_column="m", tokens_column="t")),
    ),
    (
        r"dataset\.text_column and dataset\.messages_column are given; .* give one",
        replace(GOOD, dataset=replace(DATASET, messages_column="m", text_column="body")),
    ),
    (
        r"dataset\.segments_column is given, and dataset\.tokens_column",
        replace(GOOD, dataset=replace(DATASET, segments_column="s")),
    ),
    (r"dataset\.tokens_column is empty", replace(GOOD, dataset=replace(DATASET, tokens_column=" "))),
    (
        r"dataset\.chat is given, and dataset\.messages_column is not",
        replace(GOOD, dataset=replace(DATASET, chat=ChatConfig(True))),
    ),
    (r"dataset\.chat\.template is 'no/such\.jinja', a file that cannot be read", in_chat(template="no/such.jinja")),
    (r"dataset\.chat\.template is 'pyproject\.txt', a file that", in_chat(template="pyproject.txt")),
    (r"dataset\.chat\.template has 1,200,002 bytes; a template may have", in_chat(template="{{" + "a" * 1_200_000)),
    (r"dataset\.chat\.template is '/dev/zero', which is no regular file", in_chat(template="/dev/zero")),
    (r"dataset\.chat\.date is '26 July'; it must be a day", in_chat(date="26 July")),
    (r"dataset\.chat\.date is '20250131'", in_chat(date="20250131")),
    (r"dataset\.chat\.kwargs\.tokenize is no variable of a template", in_chat(kwargs={"tokenize": True})),
    (
        r"model\.tokenizer\.add_special_tokens is true, but dataset\.messages_column is given",
        replace(in_chat(), model=replace(MODEL, tokenizer=TokenizerConfig(add_special_tokens="true"))),
    ),
    (
        r"capture\.capture_offsets is true, but dataset\.tokens_column is given: token ids have no characters",
        replace(GOOD, dataset=replace(DATASET, tokens_column="t"), capture=CaptureConfig(capture_offsets=True)),
    ),
    (
        r"capture\.capture_segments is true, but no column has segments",
        replace(GOOD, dataset=replace(DATASET, tokens_column="t"), capture=CaptureConfig(capture_segments=True)),
    ),
    (r"dataset\.max_samples is 0", replace(GOOD, dataset=replace(DATASET, max_samples=0))),
    (r"dataset\.data_files is \[\]", replace(GOOD, dataset=replace(DATASET, data_files=[]))),
    (r"dataset\.data_files is \{train: 3\}", replace(GOOD, dataset=replace(DATASET, data_files={"train": 3}))),
    (r"dataset\.filter\.a is \[1\]", replace(GOOD, dataset=replace(DATASET, filter={"a": [1]}))),
    (
        r"sampler\.type is 'random'; valid: uniform, log_uniform, all",
        replace(GOOD, sampler=SamplerConfig(type="random")),
    ),
    (r"sampler\.share is 'head'", replace(GOOD, sampler=SamplerConfig(share="head"))),
    (r"sampler\.base_rate is 0", replace(GOOD, sampler=SamplerConfig(base_rate=0.0))),
    (r"sampler\.base_rate is inf", replace(GOOD, sampler=SamplerConfig(base_rate=float("inf")))),
    (r"sampler\.min_bucket_size is 0", replace(GOOD, sampler=SamplerConfig(min_bucket_size=0))),
    (r"sampler\.max_rows_per_example is 0", replace(GOOD, sampler=SamplerConfig(max_rows_per_example=0))),
    (r"sampler\.seed is -1", replace(GOOD, sampler=SamplerConfig(seed=-1))),
    (r"sampler\.keys\.type is 'some'", replace(GOOD, sampler=SamplerConfig(keys=KeySamplerConfig(type="some")))),
    (
        r"sampler\.type is none and capture\.statistics\.enabled is false: nothing",
        replace(GOOD, sampler=SamplerConfig(type="none")),
    ),
    (
        r"sampler\.type is none and capture\.statistics",
        replace(
            GOOD,
            sampler=SamplerConfig(type="none", keys=KeySamplerConfig(type="all")),
            capture=CaptureConfig(capture_keys=False),
        ),
    ),
    (r"are all false", replace(GOOD, capture=CaptureConfig(capture_queries=False, capture_keys=False))),
    (
        r"capture\.capture_values is true, and capture\.statistics\.stages is \[pre\], a stage that values",
        replace(
            GOOD,
            sampler=SamplerConfig(keys=KeySamplerConfig(type="none")),
            capture=CaptureConfig(capture_values=True, statistics=StatisticsConfig(enabled=True, stages=["pre"])),
        ),
    ),
    (
        r"capture\.capture_outputs is true, and capture\.statistics\.stages is \[pre\]",
        replace(
            GOOD,
            capture=CaptureConfig(
                capture_queries=False,
                capture_keys=False,
                capture_outputs=True,
                statistics=StatisticsConfig(enabled=True, stages=["pre"]),
            ),
        ),
    ),
    (r"capture\.layers is \[-1\]", replace(GOOD, capture=CaptureConfig(layers=[-1]))),
    (r"capture\.layers is \[\]", replace(GOOD, capture=CaptureConfig(layers=[]))),
    (r"capture\.heads is \[3, 3\]; it names 3 more", replace(GOOD, capture=CaptureConfig(heads=[3, 3]))),
    (r"head_sampling\.count is 0", replace(GOOD, capture=CaptureConfig(head_sampling=HeadSamplingConfig(0)))),
    (r"head_sampling\.seed is -5", replace(GOOD, capture=CaptureConfig(head_sampling=HeadSamplingConfig(1, -5)))),
    (r"inference\.batch_size is 0", replace(GOOD, inference=replace(GOOD.inference, batch_size=0))),
    (r"inference\.queue_mb is 0", replace(GOOD, inference=replace(GOOD.inference, queue_mb=0))),
    (r"inference\.lookahead is -3", replace(GOOD, inference=replace(GOOD.inference, lookahead=-3))),
    (r"shard\.count is 0", replace(GOOD, shard=ShardConfig(0, 0))),
    (r"shard\.index is 2; with shard\.count=2 it must be 0 to 1", replace(GOOD, shard=ShardConfig(2, 2))),
    (r"verify\.examples is -1", replace(GOOD, verify=replace(GOOD.verify, examples=-1))),
    (r"output\.data_root is '.*', which is a file", replace(GOOD, output=OutputConfig(data_root=__file__))),
    (r"output\.hf_repo_id is not given", replace(GOOD, output=OutputConfig(hf_repo_id=""))),
    *(
        (r"output\.hf_repo_id is .* it must be org/name", replace(GOOD, output=OutputConfig(hf_repo_id=repo)))
        for repo in ("name", "a/b/c", "me/a b", "me/a--b", "me/a.git", "-me/a")
    ),
    *(
        (r"output\.hf_branch is .* git does not accept", replace(GOOD, output=OutputConfig(hf_branch=branch)))
        for branch in ("a b", "a..b", "a.lock", "/a", "a/", "a//b", ".a", "a/.b", "-a", "@", "a@{1}", "a:b", "a~1", "")
    ),
    (r"output\.folder is empty", replace(GOOD, output=OutputConfig(folder=" "))),
    (r"output\.folder is '.*', which is a file", replace(GOOD, output=OutputConfig(folder=__file__))),
    (r"output\.hf_branch is 'main'", replace(GOOD, output=OutputConfig(hf_branch="main"))),
    (r"output\.hf_branch is 'refs/pr/1'", replace(GOOD, output=OutputConfig(hf_branch="refs/pr/1"))),
    (r"output\.hf_branch is 'm\.\.x-texts', which git", replace(GOOD, model=replace(MODEL, slug="m..x"))),
    (r"output\.resume_from_hub is true", replace(GOOD, output=OutputConfig(resume_from_hub=True))),
]


def test_a_good_config_has_no_problems() -> None:
    assert problems(GOOD) == []
    check(GOOD)


@pytest.mark.parametrize(("message", "config"), BAD, ids=[f"{number}" for number in range(len(BAD))])
def test_a_bad_value_is_named_alone(message: str, config: Config) -> None:
    (found,) = problems(config)
    assert re.search(message, found)


def test_all_bad_values_are_named_at_once() -> None:
    config = Config(
        model=ModelConfig(dtype="int8"),
        dataset=DatasetConfig(max_samples=-1),
        sampler=SamplerConfig(type="some", base_rate=-1.0),
        shard=ShardConfig(5, 2),
    )
    with pytest.raises(ConfigError) as caught:
        check(config)
    keys = [problem.split(" ")[0] for problem in caught.value.problems]
    assert keys == [
        "model.name",
        "model.dtype",
        "dataset.path",
        "dataset.max_samples",
        "sampler.type",
        "sampler.base_rate",
        "shard.index",
    ]
    assert "7 problems" in str(caught.value)


def test_the_page_of_settings_has_the_table() -> None:
    assert table() in (Path(__file__).parents[1] / "docs" / "settings.md").read_text()


def test_every_setting_of_the_schema_has_a_help_text() -> None:
    def keys(node: Any, prefix: str = "") -> set[str]:
        return {
            key
            for name, value in node.items()
            for key in (keys(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name})
        }

    assert {setting.key for setting in settings()} == keys(OmegaConf.to_container(schema()))
    assert all(setting.help for setting in settings())


def test_the_fingerprint_leaves_out_only_settings_that_cannot_change_a_row_or_a_vector() -> None:
    left_out = {setting.key for setting in settings()} - fingerprint(resolve(GOOD)).keys()
    assert left_out == {
        *("model.slug", "model.device_map", "model.allow_pickle"),
        *(f"model.long_context.{name}" for name in ("max_length", "min_bucket_size", "config_overrides")),
        *("dataset.slug", "dataset.max_samples", "dataset.streaming"),
        *("inference.queue_mb", "inference.segment_mb", "inference.debug_logging"),
        *("shard.index", "verify.examples", "dry_run", "snapshot"),
        *(f"output.{name}" for name in ("folder", "data_root", "hf_repo_id", "hf_branch", "private", "overwrite")),
        "output.resume_from_hub",
    }


@pytest.mark.parametrize(
    ("given", "stored"), [(True, True), ("true", True), (False, False), ("false", False), ("auto", "auto")]
)
def test_special_tokens_are_a_flag_or_auto(given: Any, stored: bool | str) -> None:
    tokenizer = TokenizerConfig(add_special_tokens=given)
    config = Config(model=ModelConfig(name="org/model", tokenizer=tokenizer), dataset=DatasetConfig(path="org/texts"))
    assert problems(config) == []
    value = fingerprint(resolve(config))["model.tokenizer.add_special_tokens"]
    assert value == stored and type(value) is type(stored)


def test_other_values_of_special_tokens_are_refused() -> None:
    for wrong in (1, "yes", None):
        model = ModelConfig(name="org/model", tokenizer=TokenizerConfig(add_special_tokens=wrong))
        (problem,) = problems(Config(model=model, dataset=DatasetConfig(path="org/texts")))
        assert problem == f"model.tokenizer.add_special_tokens is {wrong!r}; valid: auto, true, false"


def test_a_chat_template_is_read_from_its_file_and_identified_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    read, given = in_chat(template=str(file)), in_chat(template="{{ messages }}")
    assert problems(read) == [] == problems(given)
    assert resolve(read).dataset.chat.template == "{{ messages }}"
    key = "dataset.chat.template"
    assert fingerprint(resolve(read))[key] == fingerprint(resolve(given))[key]
    assert re.fullmatch("sha256:[0-9a-f]{64}", fingerprint(resolve(read))[key])
    assert fingerprint(resolve(in_chat(template="tool_use")))[key] == "tool_use"
    file.write_text("no template")
    assert any("a file without a template of Jinja" in line for line in problems(read))
