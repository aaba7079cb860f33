"""Finds all problems in the values of a config at once, before anything heavy is imported.

A problem found here follows from the config alone, or from the existence of a path. Problems with a model, a dataset or
the Hub are found later, on their first use. `cli/schema.py` finds wrong types and unknown keys.
"""

import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from qk_sniffer.capture import sampling
from qk_sniffer.config import (
    AUTO,
    DTYPES,
    KIND_SETTINGS,
    MOST_COUNT,
    MOST_SHARDS,
    MOST_SLUG,
    MOST_TOP_K,
    OTHER_NAMES_OF_DTYPES,
    STAGES,
    Config,
    DatasetConfig,
    ModelConfig,
    OutputConfig,
)
from qk_sniffer.errors import ConfigError
from qk_sniffer.resolved import is_template, resolve, template_file
from qk_sniffer.text import (
    as_yaml,
    enumerated,
    expand_home,
    is_branch_name,
    is_utf8_path,
    not_one_of,
    path_problem,
    utf8_way_out,
)

SPECIAL_TOKENS = ("auto", "true", "false")
MOST_TEMPLATE = 1 << 20
OVERLONG = ("truncate", "split")
MAX_INT32 = 2**31 - 1
MAX_SEED = 2**63 - 1

_OF_RENDERING = (
    *("messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now", "self"),
)
"""Arguments of the function of transformers that renders a template, which are not for the template."""

_HUB_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_SLUG = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")


def check(config: Config) -> None:
    """Checks the values of `config`.

    Raises:
        ConfigError: `config` has problems; the error lists all of them.
    """
    if wrong := problems(config):
        raise ConfigError(wrong)


def problems(config: Config) -> list[str]:
    """Returns a line for every value that cannot be right. Each line begins with the key. Empty for a valid config."""
    return [
        *_model(config.model),
        *_dataset(config.dataset),
        *capture_problems(config),
        *_special_tokens(config),
        *_segments(config),
        *_inference_and_shard(config),
        *output_problems(config.output),
        *_derived(config),
        *_root_in_source(config),
        *_dry_run(config),
    ]


def capture_problems(config: Config) -> list[str]:
    """Returns the problems with what is captured, whatever the model and the texts: with `sampler` and `capture`."""
    return [
        *sampling.problems(config.sampler),
        *_at_least("sampler.seed", config.sampler.seed, 0, MAX_SEED),
        *_capture(config),
    ]


def _model(model: ModelConfig) -> Iterator[str]:
    yield from _slug("model.slug", model.slug)
    if model.name is None:
        yield "model.name is not given; model=hf needs model.name=org/name, or a folder that holds a checkpoint"
    else:
        yield from _source("model.name", model.name, "a folder")
        if model.gguf_file is None:  # Python reads GGUF files
            yield from _loadable("model.name", model.name)
    yield from _revision("model.revision", model.revision, "model.name", model.name, default="main")
    if model.dtype not in (*DTYPES, AUTO):
        problem = not_one_of("model.dtype", model.dtype, (*DTYPES, AUTO), OTHER_NAMES_OF_DTYPES)
        yield f"{problem} (the checkpoint's own)"
    if not isinstance(model.device_map, str | int | dict | None) or isinstance(model.device_map, bool):
        yield (
            f"model.device_map is {as_yaml(model.device_map)}; it must be a name (auto, cpu, cuda:0, ...), "
            "a mapping of modules to devices, or null"
        )
    if model.adapter is not None:
        yield from _source("model.adapter", model.adapter, "a folder")
        yield from _loadable("model.adapter", model.adapter)
    elif model.merge_adapter:
        yield "model.merge_adapter is true, but model.adapter is not given; set it to a folder or to org/name"
    for key in ("attn_implementation", "gguf_file", "family"):
        yield from _not_empty(f"model.{key}", getattr(model, key))
    if model.name and model.gguf_file and (why := path_problem(Path(model.name, model.gguf_file))) is not None:
        yield f"model.gguf_file is {model.gguf_file!r}, which {why}"
    tokenizer = model.tokenizer
    if tokenizer.name is not None:
        yield from _source("model.tokenizer.name", tokenizer.name, "a folder")
        yield from _loadable("model.tokenizer.name", tokenizer.name)
    source = tokenizer.name or model.name
    yield from _revision("model.tokenizer.revision", tokenizer.revision, "the tokenizer", source, default="main")
    yield from _at_least("model.tokenizer.max_length", tokenizer.max_length, 1, MAX_INT32)
    if not isinstance(added := tokenizer.add_special_tokens, bool) and added not in SPECIAL_TOKENS:
        yield not_one_of("model.tokenizer.add_special_tokens", added, SPECIAL_TOKENS)
    if tokenizer.overlong not in OVERLONG:
        yield not_one_of("model.tokenizer.overlong", tokenizer.overlong, OVERLONG)
    yield from _at_least("model.long_context.max_length", model.long_context.max_length, 1, MAX_INT32)
    yield from _at_least("model.long_context.min_bucket_size", model.long_context.min_bucket_size, 1, MAX_INT32)


def _dataset(dataset: DatasetConfig) -> Iterator[str]:
    yield from _slug("dataset.slug", dataset.slug)
    if dataset.path is None:
        yield (
            "dataset.path is not given; dataset=hf needs dataset.path=org/name, "
            "or a folder or file (parquet, jsonl, csv, txt)"
        )
    else:
        yield from _source("dataset.path", dataset.path, "a folder or file")
    yield from _revision("dataset.revision", dataset.revision, "dataset.path", dataset.path, default=None)
    for key in ("name", "split", "text_column", "messages_column", "tokens_column", "segments_column", "id_column"):
        yield from _not_empty(f"dataset.{key}", getattr(dataset, key))
    yield from _contents(dataset)
    if dataset.path == "pydoc" and (dataset.name is not None or dataset.data_files is not None):
        yield "dataset.name and dataset.data_files must be null: dataset.path is 'pydoc', which has neither"
    yield from _data_files(dataset.data_files)
    for column, value in dataset.filter.items():
        if not isinstance(value, str | int | float | bool | None):
            yield f"dataset.filter.{column} is {as_yaml(value)}; it must be one value, to compare the column with"
    yield from _at_least("dataset.max_samples", dataset.max_samples, 1, MOST_COUNT)


def _contents(dataset: DatasetConfig) -> Iterator[str]:
    usual = DatasetConfig()
    keys = [key for key in ("text_column", "messages_column", "tokens_column") if getattr(dataset, key) is not None]
    given = [key for key in keys if getattr(dataset, key) != getattr(usual, key)]
    if len(given) > 1:
        yield f"{enumerated([f'dataset.{key}' for key in given])} are given; an example is of one of them: give one"
    if dataset.segments_column is not None and dataset.tokens_column is None:
        yield "dataset.segments_column is given, and dataset.tokens_column is not; segments are of its tokens"
    chat = dataset.chat
    if dataset.messages_column is None and chat != usual.chat:
        yield "dataset.chat is given, and dataset.messages_column is not; set it to the column of the messages"
    if chat.template is not None:
        yield from _template(chat.template)
    if chat.date is not None and not _is_day(chat.date):
        yield f"dataset.chat.date is {chat.date!r}; it must be a day such as 2025-01-31"
    for key in chat.kwargs:
        if key in _OF_RENDERING:
            yield f"dataset.chat.kwargs.{key} is no variable of a template; see the other keys of dataset.chat"


def _special_tokens(config: Config) -> Iterator[str]:
    columns = {"messages": "a chat template writes special tokens itself", "tokens": "token ids are taken as they are"}
    for name, why in columns.items():
        key = f"{name}_column"
        if getattr(config.dataset, key) is not None and config.model.tokenizer.add_special_tokens in (True, "true"):
            yield f"model.tokenizer.add_special_tokens is true, but dataset.{key} is given: {why}; leave it auto"


def _template(template: str) -> Iterator[str]:
    key = "dataset.chat.template"
    yield from _not_empty(key, template)
    size = len(template)
    if (file := template_file(template)) is not None and (problem := path_problem(file)) is not None:
        yield f"{key} is {template!r}, which {problem}"
    elif file is not None and file.exists() and not file.is_file():
        yield f"{key} is {template!r}, which is no regular file"
    elif file is not None:
        try:
            size = file.stat().st_size
            if not is_template(file.read_text(encoding="utf-8") if size <= MOST_TEMPLATE else "{{"):
                yield f"{key} is {template!r}, a file without a template of Jinja (no {{{{ and no {{%)"
        except (OSError, ValueError) as error:
            yield f"{key} is {template!r}, a file that cannot be read ({error}); give its path from {Path.cwd()}"
    if size > MOST_TEMPLATE:
        yield f"{key} has {size:,} bytes; a template may have {MOST_TEMPLATE:,}"


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _capture(config: Config) -> Iterator[str]:
    capture = config.capture
    kinds = capture.kinds()
    if not kinds:
        yield f"{enumerated([*KIND_SETTINGS.values()])} are all false: nothing would be captured"
    own_type = {"q": config.sampler.type, "k": config.sampler.keys.type or config.sampler.type}
    without_rows = [kind for kind in kinds if own_type[sampling.POSITIONS_OF[kind]] == "none"]
    if kinds and without_rows == kinds and not capture.statistics.enabled:
        yield "sampler.type is none and capture.statistics.enabled is false: nothing would be captured"
    if capture.statistics.enabled and capture.statistics.stages == ["pre"]:
        in_vain = without_rows if {"q", "k"} & {*kinds} else kinds
        for kind in (kind for kind in in_vain if kind in ("v", "o")):
            yield (
                f"{KIND_SETTINGS[kind]} is true, and capture.statistics.stages is [pre], a stage that values and "
                "outputs do not have: add post"
            )
    for key, numbers in (("capture.layers", capture.layers), ("capture.heads", capture.heads)):
        if numbers is None:
            continue
        if not numbers:
            yield f"{key} is []; null means all of them"
        if any(number < 0 for number in numbers):
            yield f"{key} is {numbers}; numbers start from 0"
        if repeated := sorted({number for number in numbers if numbers.count(number) > 1}):
            yield f"{key} is {numbers}; it names {', '.join(map(str, repeated))} more than once"
    yield from _at_least("capture.head_sampling.count", capture.head_sampling.count, 1)
    yield from _at_least("capture.head_sampling.seed", capture.head_sampling.seed, 0, MAX_SEED)
    if capture.attention.enabled and not capture.capture_queries:
        yield "capture.attention.enabled is true, but capture.capture_queries is false: its rows are the queries'"
    if capture.attention.enabled and config.sampler.type == "none":
        yield "capture.attention.enabled is true, but sampler.type is none, which keeps no query"
    yield from _at_least("capture.attention.top_k", capture.attention.top_k, 1, MOST_TOP_K)
    yield from _at_least("capture.attention.sink_tokens", capture.attention.sink_tokens, 1, MAX_INT32)
    stages = capture.statistics.stages
    if not stages or len({*stages}) < len(stages) or not {*stages} <= {*STAGES}:
        yield f"capture.statistics.stages is {stages}; valid: [pre], [post], [pre,post]"
    yield from _at_least("capture.statistics.skip_tokens", capture.statistics.skip_tokens, 0, MOST_COUNT)


def _segments(config: Config) -> Iterator[str]:
    """Yields a line for each setting that needs segments or characters, if the examples have none."""
    dataset = config.dataset
    if config.capture.capture_offsets and dataset.tokens_column is not None:
        yield "capture.capture_offsets is true, but dataset.tokens_column is given: token ids have no characters"
    if dataset.messages_column is not None or dataset.segments_column is not None:
        return
    way_out = "no column has segments: set dataset.messages_column, or dataset.tokens_column and segments_column"
    if config.capture.capture_segments:
        yield f"capture.capture_segments is true, but {way_out}"
    if config.sampler.segments is not None:
        yield f"sampler.segments is {config.sampler.segments}, but {way_out}"


def _inference_and_shard(config: Config) -> Iterator[str]:
    for key in ("batch_size", "max_batch_tokens", "lookahead", "queue_mb", "segment_mb"):
        yield from _at_least(f"inference.{key}", getattr(config.inference, key), 1, MOST_COUNT)
    index, count = config.shard.index, config.shard.count
    yield from _at_least("shard.count", count, 1, MOST_SHARDS)
    if index < 0 or index >= max(count, 1):
        yield f"shard.index is {index}; with shard.count={count} it must be 0 to {max(count, 1) - 1}"
    yield from _at_least("verify.examples", config.verify.examples, 0)


def output_problems(output: OutputConfig) -> Iterator[str]:
    """Yields a line for every wrong value of the dataset's destination. Each line begins with the key."""
    yield from _place("output.folder", output.folder)
    yield from _place("output.data_root", output.data_root)
    repo = output.hf_repo_id
    if repo == "":
        yield "output.hf_repo_id is not given; output=hub needs output.hf_repo_id=org/name, the repository"
    elif repo is not None and (
        not re.fullmatch(f"{_HUB_NAME}/{_HUB_NAME}", repo) or re.search(r"--|\.\.|\.git$", repo)
    ):
        yield f"output.hf_repo_id is {repo!r}; it must be org/name, in letters, digits, '-', '_' and '.'"
    if output.resume_from_hub and repo is None:
        yield "output.resume_from_hub is true, but output.hf_repo_id is not given; set it to org/name to resume from"
    if output.hf_branch is not None:
        yield from _branch("output.hf_branch", output.hf_branch)


def _derived(config: Config) -> Iterator[str]:
    # The branch follows from several values. It is checked only if each of them is valid alone.
    given = (config.model.name, config.dataset.path)
    slugs = (config.model.slug, config.dataset.slug)
    if config.output.hf_branch is None and all(given) and not any(slug and list(_slug("", slug)) for slug in slugs):
        branch = resolve(config).output.hf_branch
        assert branch is not None
        yield from _branch("output.hf_branch", branch)


def _root_in_source(config: Config) -> Iterator[str]:
    # A later start would read the files of the dataset as texts.
    path, output = config.dataset.path, config.output
    if not path or not _exists(path) or config.dataset.data_files is not None:
        return
    given = resolve(config).output.data_root or "."
    if path_problem(given) is not None:
        return
    source, root = (Path(expand_home(name)).resolve() for name in (path, given))
    if source.is_dir() and root.is_relative_to(source):
        given = "output.data_root is" if output.data_root else "output.data_root is null, which is"
        yield (
            f"{given} {str(root)!r}, which is inside of dataset.path: its files would be read as texts. Choose a "
            "folder elsewhere, or name the files of the texts in dataset.data_files"
        )


def _dry_run(config: Config) -> Iterator[str]:
    if not isinstance(config.dry_run, bool) and config.dry_run != "measure":
        yield not_one_of("dry_run", config.dry_run, ("false", "true", "measure"))


def _source(key: str, value: str, local: str) -> Iterator[str]:
    # A Hub id or a path. It is certainly wrong if it has the form of a path and does not exist, or the form of neither.
    if not value.strip():
        yield f"{key} is empty; it must be org/name on the Hub, or {local}"
    elif "*" in value:
        yield f"{key} is {value!r}; name the folder, and the files in it by dataset.data_files='*.parquet'"
    elif _exists(value):
        return
    elif value.startswith(("/", "./", "../", "~")) or value in (".", ".."):
        yield f"{key} is {value!r}, which does not exist (the current folder is {Path.cwd()})"
    elif not re.fullmatch(rf"{_HUB_NAME}(/{_HUB_NAME})?", value):
        yield (
            f"{key} is {value!r}, which is neither an existing path (the current folder is {Path.cwd()}) "
            "nor org/name on the Hub"
        )
    elif "/" not in value and re.search(r"\.(parquet|jsonl?|csv|txt)$", value, flags=re.IGNORECASE):
        yield f"{key} is {value!r}; there is no such file in {Path.cwd()}"


def _loadable(key: str, value: str) -> Iterator[str]:
    path = expand_home(value)
    if not is_utf8_path(path) and _exists(value):
        yield f"{key} is {value!r}, which the libraries for weights and tokenizers cannot open: {utf8_way_out(path)}"


def _revision(key: str, revision: str | None, of: str, source: str | None, *, default: str | None) -> Iterator[str]:
    if revision is None or revision == default:
        return
    if not revision or re.search(r"\s", revision):
        yield f"{key} is {revision!r}; it must be a branch, a tag or a commit"
    elif source is not None and (source == "pydoc" or _exists(source)):
        yield f"{key} is {revision!r}, but {of} is {source!r}, which is on this machine and has no revisions"


def _data_files(files: Any) -> Iterator[str]:
    def names(value: Any) -> bool:
        return (isinstance(value, str) and bool(value)) or (
            isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)
        )

    if files is None or names(files):
        return
    if not (isinstance(files, dict) and files and all(names(value) for value in files.values())):
        yield (
            f"dataset.data_files is {as_yaml(files)}; it must be a file name or pattern, a list of them, "
            "or a mapping of splits to them"
        )


def _branch(key: str, name: str) -> Iterator[str]:
    if not is_branch_name(name):
        yield f"{key} is {name!r}, which git does not accept as a branch; use letters, digits, '-', '_' and '.'"
    elif name == "main":
        yield f"{key} is 'main', which lists the other branches; every dataset has its own branch"
    elif name.split("/")[0] == "refs":
        yield f"{key} is {name!r}; names below refs/ belong to the Hub"


def _slug(key: str, slug: str | None) -> Iterator[str]:
    if slug is not None and not _SLUG.fullmatch(slug):
        yield f"{key} is {slug!r}; it becomes part of a path and a branch: use letters, digits, '-', '_' and '.'"
    elif slug is not None and len(slug) > MOST_SLUG:
        yield f"{key} has {len(slug)} characters; it becomes part of a path and a branch: use at most {MOST_SLUG}"


def _at_least(key: str, value: int | None, least: int, most: int | None = None) -> Iterator[str]:
    if value is not None and (value < least or (most is not None and value > most)):
        yield f"{key} is {value}; it must be {f'{least} to {most}' if most else f'at least {least}'}"


def _not_empty(key: str, value: str | None) -> Iterator[str]:
    if value is not None and not value.strip():
        yield f"{key} is empty"


def _place(key: str, value: str | None) -> Iterator[str]:
    """Yields what is wrong with the folder that a job makes, or writes to."""
    yield from _not_empty(key, value)
    if value is None:
        return
    if (problem := path_problem(value)) is not None:
        yield f"{key} is {value!r}, which {problem}; choose another folder"
    elif Path(expand_home(value)).is_file():
        yield f"{key} is {value!r}, which is a file; it must be a folder, or not exist yet"


def _exists(path: str) -> bool:
    try:
        return Path(expand_home(path)).exists()
    except (OSError, ValueError):  # no file can have this name
        return False
