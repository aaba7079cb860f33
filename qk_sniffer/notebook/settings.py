"""Turns the arguments of `capture` into the settings of a job, and finds the heads that they select in a model."""

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn

from qk_sniffer.backbone.family import Family
from qk_sniffer.capture.attention_summary import refusal
from qk_sniffer.capture.selection import select
from qk_sniffer.config import (
    KIND_SETTINGS,
    AttentionConfig,
    CaptureConfig,
    Config,
    ModelConfig,
    SamplerConfig,
    StatisticsConfig,
    TokenizerConfig,
)
from qk_sniffer.errors import CaptureError, ConfigError, QkSnifferError
from qk_sniffer.hub.revisions import hub_commit_of
from qk_sniffer.jobs.components import check_captured, model_facts, shows_both_stages, unknown_attention
from qk_sniffer.jobs.from_python import LONGEST
from qk_sniffer.notebook.facts import CaptureFacts
from qk_sniffer.notebook.model import UserBackbone
from qk_sniffer.resolved import folder_name, public_name
from qk_sniffer.store.layout import KIND_NAMES, KINDS
from qk_sniffer.text import expand_home, path_problem
from qk_sniffer.validation import capture_problems

Settings = TypeVar("Settings", AttentionConfig, StatisticsConfig)

_ARGUMENTS = {
    "capture.capture_pre_rope=false": "pre_rope=False",
    "capture.attention.enabled=false": "attention=False",
    "capture.attention.enabled": "attention",
    "capture.attention.": "attention.",
    "capture.statistics.enabled": "statistics",
    "capture.statistics.": "statistics.",
    "capture.layers": "layers",
    "capture.heads": "heads",
    "model.family=": "family=",
    "model.attn_implementation": "from_pretrained's attn_implementation",
    "model.config_overrides.": "model.config.",
    **{f"Set {setting}=false": f"Leave {kind!r} out of kinds" for kind, setting in KIND_SETTINGS.items()},
    **{f"{setting} is true": f"kinds has {kind!r}" for kind, setting in KIND_SETTINGS.items()},
    **{f"{setting} is false": f"kinds has no {kind!r}" for kind, setting in KIND_SETTINGS.items()},
}
"""The settings of jobs that messages name, and the arguments of `capture` that stand for them."""


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Lets the errors of the block name the arguments of `capture` instead of the settings of jobs."""
    try:
        yield
    except QkSnifferError as error:
        for setting, argument in _ARGUMENTS.items():
            error.args = tuple(line.replace(setting, argument) for line in error.args)
        raise


def config_of(
    *,
    layers: Iterable[int] | int | None,
    heads: Iterable[int] | int | None,
    kinds: Iterable[str],
    sampler: str | SamplerConfig,
    pre_rope: bool,
    attention: bool | AttentionConfig,
    statistics: bool | StatisticsConfig,
) -> Config:
    """Returns the settings with these arguments of `capture`.

    Raises:
        ConfigError: a value is wrong.
    """
    for name, value, kind in (("attention", attention, AttentionConfig), ("statistics", statistics, StatisticsConfig)):
        if not isinstance(value, bool | kind):
            raise ConfigError([f"{name} is {value!r}; give True, False or a qk_sniffer.config.{kind.__name__}"])
    if not isinstance(pre_rope, bool):
        raise ConfigError([f"pre_rope is {pre_rope!r}; give True or False"])
    if not isinstance(sampler, str | SamplerConfig):
        raise ConfigError([f"sampler is {sampler!r}; give the name of a sampler or a qk_sniffer.config.SamplerConfig"])
    wanted = _kinds(kinds)
    on_off: dict[str, Any] = {key.rpartition(".")[2]: kind in wanted for kind, key in KIND_SETTINGS.items()}
    config = Config(
        model=ModelConfig(tokenizer=TokenizerConfig(max_length=LONGEST)),
        sampler=SamplerConfig(type=sampler) if isinstance(sampler, str) else sampler,
        capture=CaptureConfig(
            **on_off,
            layers=_numbers("layers", layers),
            heads=_numbers("heads", heads),
            capture_pre_rope=pre_rope,
            attention=AttentionConfig(enabled=attention) if isinstance(attention, bool) else _on(attention),
            statistics=StatisticsConfig(enabled=statistics) if isinstance(statistics, bool) else _on(statistics),
        ),
    )
    problems = capture_problems(config)
    if config.sampler.segments is not None:
        problems.append(
            f"sampler.segments is {config.sampler.segments}; a capture in Python knows no segments: leave it"
        )
    if problems:
        raise ConfigError(problems)
    return config


def folder_of(name: str, folder: str | Path) -> Path:
    """Returns the folder that the argument `name` gives.

    Raises:
        ConfigError: it gives none.
    """
    if not isinstance(folder, str | Path) or not str(folder).strip():
        raise ConfigError([f"{name} is {folder!r}; give the path of a folder, or '.' for the current one"])
    if (problem := path_problem(folder)) is not None:
        raise ConfigError([f"{name} is {str(folder)!r}, which {problem}; give another folder"])
    return Path(expand_home(str(folder)))


def facts_of(model: nn.Module, config: Config, family: str | Family | None) -> CaptureFacts:
    """Describes the model, and selects the heads to capture.

    Raises:
        ConfigError: the settings name a layer or a head that does not exist.
        CaptureError: the model cannot be captured, or a layer does not show the vectors of a kind.
    """
    backbone = UserBackbone(model, family=family, pre_rope=config.capture.capture_pre_rope)
    layers = backbone.described_layers(both_stages=shows_both_stages(config.capture))
    selection = select([layer.heads for layer in layers], config.capture)
    check_captured(selection, layers, backbone.config.model_type)
    if config.capture.attention.enabled and (reasons := unknown_attention(selection, layers)):
        raise CaptureError(refusal(reasons))
    whole: Any = backbone.model.config
    name, commit = getattr(whole, "_name_or_path", None) or None, getattr(whole, "_commit_hash", None)
    return CaptureFacts(
        replace(config, model=replace(config.model, name=None if name is None else _stated(name, commit))),
        backbone,
        layers,
        selection,
        model_commit=commit,
        adapters=backbone.adapter_settings,
        model=model_facts(backbone, layers, selection),
    )


def _stated(name: str, commit: str | None) -> str:
    """Returns the name of a model as datasets state it, now: its folder, or the current one, may change later.

    A model without a commit is of a folder, even if its name has the form of a Hub id and nothing is there now.
    """
    return folder_name(public_name(name)) if hub_commit_of(commit) is None else public_name(name)


def _on(settings: Settings) -> Settings:
    return replace(settings, enabled=True)


def _numbers(name: str, numbers: Iterable[int] | int | None) -> list[int] | None:
    if numbers is None:
        return None
    try:
        found = [*numbers] if isinstance(numbers, Iterable) else [numbers]
        if any(isinstance(number, bool | np.bool_) for number in found):
            raise TypeError("a truth value is no number of a layer or head")
        return [*map(operator.index, found)]
    except TypeError:
        raise ConfigError([f"{name} is {numbers!r}; give numbers, such as [0, 1]"]) from None


def _kinds(kinds: Iterable[str]) -> list[str]:
    found = [*kinds] if isinstance(kinds, Iterable) else []
    if not found or (unknown := [kind for kind in found if kind not in KINDS]):
        valid = ", ".join(f"{kind!r} ({name})" for kind, name in KIND_NAMES.items())
        what = f"the kind {unknown[0]!r}, which does not exist" if found else "no kind"
        raise ConfigError([f"kinds={kinds!r} names {what}; valid: {valid}"])
    return found
