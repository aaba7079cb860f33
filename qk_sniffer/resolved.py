"""Resolves a config: fills in slugs, tokenizer, branch and data root. Also derives its fingerprint and public names."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path, PureWindowsPath
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qk_sniffer.config import (
    ChatConfig,
    Config,
    DatasetConfig,
    InferenceConfig,
    ModelConfig,
    OutputConfig,
    SamplerConfig,
    Setting,
    TokenizerConfig,
    settings,
)
from qk_sniffer.markdown import code
from qk_sniffer.text import DATA_FILE, OPEN_PROTOCOLS, expand_home, is_address, is_surrogate, leads_out, path_text

_BATCHING = {name: f"inference.{name}" for name in InferenceConfig().batching()}


@dataclass(frozen=True)
class ResolvedConfig(Config):
    """A config with every derived value filled in. `resolve` returns one."""

    @property
    def data_root(self) -> Path:
        """The folder of the dataset."""
        assert self.output.data_root is not None
        return Path(self.output.data_root)

    @cached_property
    def located(self) -> ModelConfig:
        """`model`, with the folders that its names led to when this was first asked for.

        Whatever reads model, tokenizer and adapter takes them from here: a link may lead elsewhere a moment later.
        """
        model, tokenizer = self.model, self.model.tokenizer
        return replace(
            model,
            name=_located(model.name),
            adapter=_located(model.adapter),
            tokenizer=replace(tokenizer, name=_located(tokenizer.name)),
        )


def resolve(config: Config) -> ResolvedConfig:
    """Fills in slugs, tokenizer, branch and data root, and expands `~`. Returns a resolved `config` unchanged."""
    if isinstance(config, ResolvedConfig):
        return config
    expanded = _with_expanded_paths(config)
    model, dataset, output = expanded.model, expanded.dataset, expanded.output
    model_slug, dataset_slug = _model_slug(model), _dataset_slug(dataset)
    branch = output.hf_branch or "-".join([model_slug, dataset_slug, *_differences(config)])
    tokenizer = model.tokenizer
    if tokenizer.name is None:
        tokenizer = replace(tokenizer, name=model.name, revision=tokenizer.revision or model.revision)
    if tokenizer.add_special_tokens in ("true", "false"):
        tokenizer = replace(tokenizer, add_special_tokens=tokenizer.add_special_tokens == "true")
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return ResolvedConfig(
        **values
        | {
            "model": replace(model, slug=model_slug, tokenizer=tokenizer),
            "dataset": replace(dataset, slug=dataset_slug, chat=_with_template(dataset.chat)),
            "output": replace(output, hf_branch=branch, data_root=output.data_root or str(Path(output.folder, branch))),
        }
    )


def _located(name: str | None) -> str | None:
    """Returns the folder that links lead to from `name`; `name` itself if there is no link, or no folder."""
    if name is None or (real := Path(os.path.realpath(name))) == Path(name).absolute():
        return name
    return str(real) if real.is_dir() else name


def is_template(text: str) -> bool:
    """Whether a text is the source of a chat template, and not the name of one."""
    return "{{" in text or "{%" in text


def template_file(text: str) -> Path | None:
    """Returns the path of the file that `dataset.chat.template` names; None if it is a template, or the name of one."""
    is_path = text.endswith((".jinja", ".jinja2", ".j2", ".txt")) or "/" in text
    return Path(expand_home(text)) if is_path and not is_template(text) else None


def _with_template(chat: ChatConfig) -> ChatConfig:
    """Puts the content of a file in the place of its name. The file may change, or be on another machine."""
    file = None if chat.template is None else template_file(chat.template)
    with suppress(OSError, ValueError):  # validation says so
        if file is not None and file.is_file():
            return replace(chat, template=file.read_text(encoding="utf-8"))
    return chat


def fill_slugs(node: DictConfig) -> None:
    """Fills in the slugs of a composed config, in place, so that its other values can refer to them.

    A slug stays as it is where it follows from a value that is not given or refers to nothing.
    """
    with suppress(OmegaConfBaseException):
        model = {key: node.model[key] for key in ("slug", "revision", "adapter", "name")}
        if model["name"] is not None:
            node.model.slug = _model_slug(ModelConfig(**model))
    with suppress(OmegaConfBaseException):
        dataset = {key: node.dataset[key] for key in ("slug", "path")}
        if dataset["path"] is not None:
            node.dataset.slug = _dataset_slug(DatasetConfig(**dataset))


def with_output(config: Config, output: OutputConfig) -> ResolvedConfig:
    """Resolves `config` with another `output`."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return resolve(Config(**values | {"output": output}))


def fingerprint(config: ResolvedConfig) -> dict[str, Any]:
    """Returns every setting that can change a row or a vector, as `section.key: value`."""
    config = replace(config, model=config.located)
    keys = {setting.key: _value(config, setting.key) for setting in settings() if setting.changes_rows}
    # A local checkpoint or file may move: the commits contain its digest, and every text is compared.
    for setting in settings():
        if setting.names_source and keys[setting.key] is not None:
            keys[setting.key] = public_name(keys[setting.key])
        if setting.is_digested and isinstance(value := keys[setting.key], str) and is_template(value):
            keys[setting.key] = f"sha256:{sha256(path_text(value).encode()).hexdigest()}"
    plain: dict[str, Any] = json.loads(json.dumps(keys))  # the values as JSON stores them
    return with_public_files({key: public_values(value) for key, value in plain.items()})


def completed(fingerprint: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored fingerprint as this version makes it: with all settings, and without paths of a machine.

    A setting that it lacks is that of the stored `config`: earlier versions have it there alone, or nowhere.
    """
    stored = {setting.key: _stored(config, setting) for setting in settings() if setting.changes_rows}
    return stored | with_public_files(fingerprint)


def _stored(config: Mapping[str, Any], setting: Setting) -> Any:
    """Returns the value of a setting in a stored config; its default if it is not there."""
    value: Any = config
    for name in setting.key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return setting.default
        value = value[name]
    return value


def public_values(values: Any) -> Any:
    """Returns nested values with all texts as they are published: in valid Unicode, whatever the locale."""
    if isinstance(values, dict):
        return {public_values(key): public_values(value) for key, value in values.items()}
    if isinstance(values, list):
        return [public_values(value) for value in values]
    return path_text(values) if isinstance(values, str) and any(map(is_surrogate, values)) else values


def batching_of(settings: Mapping[str, Any]) -> dict[str, int | None]:
    """Returns the batch settings in a fingerprint: those of the first start of the dataset's job."""
    return {name: settings[key] for name, key in _BATCHING.items()}


def without_batching(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a fingerprint that must not change before the job is finished."""
    return {key: value for key, value in settings.items() if key not in _BATCHING.values()}


def rule(config: SamplerConfig) -> str:
    """Describes the samplers of queries and keys, with their rates, in Markdown."""
    queries = _rule(config.type, config.base_rate)
    keys = _rule(
        config.keys.type or config.type, config.base_rate if config.keys.base_rate is None else config.keys.base_rate
    )
    return queries if keys == queries else f"{queries} (keys: {keys})"


def public_name(name: str) -> str:
    """Returns a Hub id unchanged, and only the last part of a local path: no path of this machine is published.

    What has another form than an id is a path too, even if nothing is there any more.
    """
    if Path(name).exists():
        return path_text(Path(name).resolve().name)
    if "://" in name or _ID.fullmatch(name):
        return name
    return folder_name(name)


_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]*[A-Za-z0-9_-])?", flags=re.ASCII)
"""The form of a Hub id, or of a single name."""


def folder_name(name: str) -> str:
    """Returns the last part of a path, also of one of Windows."""
    return path_text(PureWindowsPath(name).name or name)


def public_files(names: Any) -> Any:
    """Returns the names of a source's files, in a text, a list or a mapping, as they are published.

    A path within the source stays as it is. Of another path only the last part stays. Of an address outside the Hub
    stays the name of the file if it is certain to be one: any other part may be a password, a token or a signature.
    """
    if isinstance(names, Mapping):
        return {key: public_files(value) for key, value in names.items()}
    if isinstance(names, list):
        return [public_files(name) for name in names]
    return "::".join(_public_hops(names.split("::"))) if isinstance(names, str) else names


def _public_hops(hops: list[str]) -> Iterator[str]:
    for number, hop in enumerate(hops):
        if is_address(hop) and not hop.startswith(OPEN_PROTOCOLS):
            yield _public_address("::".join(hops[number:]))  # a host may hold `::` too
            return
        is_elsewhere = "://" not in hop and (hop.startswith("~") or leads_out(hop))
        yield Path(hop).name if is_elsewhere else hop


def _public_address(address: str) -> str:
    """Returns the name of the file at an address, or `address` where that may be something else."""
    path = re.fullmatch(r"[^:]+:/+[^/?#]+/([^?#]*/)?([^/?#]+)([?#].*)?", address, flags=re.DOTALL)
    return path[2] if path and DATA_FILE.fullmatch(path[2]) else "address"


def with_public_files(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a fingerprint whose settings name the files of sources by `public_files`."""
    named = {setting.key for setting in settings() if setting.names_files}
    return {key: public_files(value) if key in named else value for key, value in fingerprint.items()}


def last_part(name: str) -> str:
    """Returns `name` for `org/name`, `/data/name/` and `data/name.jsonl`: the last part without its suffix."""
    last = Path(name).name or "root"
    return re.sub(r"(\.(parquet|jsonl?|csv|txt|gz|bz2|xz|zst))+$", "", last, flags=re.IGNORECASE) or last


def safe_name(text: str) -> str:
    """Replaces the characters of `text` that are not safe in a path or a git branch."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.") or "unnamed"


def _model_slug(model: ModelConfig) -> str:
    slug = model.slug or safe_name(last_part(expand_home(model.name or "model")))
    parts = [] if model.revision == "main" else [_short_revision(model.revision)]
    parts += [] if model.adapter is None else [safe_name(last_part(expand_home(model.adapter)))]
    for part in parts:
        slug = slug if f"-{slug}".endswith(f"-{part}") else f"{slug}-{part}"
    return slug


def _dataset_slug(dataset: DatasetConfig) -> str:
    return dataset.slug or safe_name(last_part(expand_home(dataset.path or "dataset")))


def _differences(config: Config) -> Iterator[str]:
    """Yields the parts of a branch that set a dataset apart from the default one of its model and texts."""
    sampler = config.sampler
    if config.capture.capture_pre_rope:
        yield "pre-rope"
    if sampler.type != SamplerConfig().type:
        yield safe_name(sampler.type)
    if sampler.keys.type not in (None, sampler.type):
        yield f"keys-{safe_name(sampler.keys.type)}"
    if sampler.segments is not None:
        yield from map(safe_name, sampler.segments)
    if sampler.share == "example":
        yield "shared"
    if config.model.tokenizer.overlong != TokenizerConfig().overlong:
        yield safe_name(config.model.tokenizer.overlong)


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _short_revision(revision: str) -> str:
    return revision[:12] if re.fullmatch(r"[0-9a-f]{40}", revision) else safe_name(revision)


def _with_expanded_paths(config: Config) -> Config:
    def expanded(path: str | None) -> str | None:
        return None if path is None else expand_home(path)

    tokenizer = replace(config.model.tokenizer, name=expanded(config.model.tokenizer.name))
    return replace(
        config,
        model=replace(
            config.model,
            name=expanded(config.model.name),
            adapter=expanded(config.model.adapter),
            tokenizer=tokenizer,
        ),
        dataset=replace(config.dataset, path=expanded(config.dataset.path)),
        output=replace(
            config.output,
            folder=expand_home(config.output.folder),
            data_root=expanded(config.output.data_root),
        ),
    )


def _rule(sampler_type: str, base_rate: float) -> str:
    return code(sampler_type) if sampler_type in ("all", "none") else f"{code(sampler_type)}, base_rate {base_rate:g}"
