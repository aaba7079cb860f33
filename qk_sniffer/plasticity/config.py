"""Declares the settings of the program, checks their values, and derives the folder of the results."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from qk_sniffer.cli.schema import Schema
from qk_sniffer.config import structured
from qk_sniffer.hub.revisions import is_hub_id
from qk_sniffer.resolved import last_part, safe_name
from qk_sniffer.text import expand_home, not_one_of, path_problem

INSTALL = "pip install scipy matplotlib"
ESTIMATORS = ("regression", "full_covariance")
MAX_PAIRS = 1_000_000
MIN_REPLICATES, MAX_REPLICATES = 20, 10_000
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class EstimatorConfig:
    """The estimator of the distribution of the queries at a position; only full_covariance has an `alpha`."""

    name: str = "regression"
    alpha: float | None = field(
        default=None, metadata={"help": "forgetting factor of full_covariance, above 0 and below 1"}
    )


@dataclass(frozen=True)
class PlasticityConfig:
    """The dataset, the measurement, and the folder of the results."""

    data_root: str = field(metadata={"help": "the folder of a dataset, or a dataset repository of the Hub: me/my"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a repository"})
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder of the results; null: <data_root>-plasticity, or outputs/<revision>-plasticity",
            "is_place": True,
        },
    )
    estimator: EstimatorConfig = field(
        default_factory=EstimatorConfig, metadata={"help": "regression (the default), or full_covariance"}
    )
    max_tokens_per_head: int = field(
        default=50_000, metadata={"help": "maximum rows of a head; of more, these are drawn"}
    )
    normality_max_dims: int = field(
        default=64,
        metadata={"help": "maximum components for the Kolmogorov-Smirnov test; of more, these are drawn"},
    )
    p_alpha: float = field(default=0.01, metadata={"help": "a component whose p is below this counts as not normal"})
    seed: int = field(default=0, metadata={"help": "seed of every draw"})
    num_pairs_per_bucket: int = field(default=256, metadata={"help": "pairs of keys for each bucket of keys"})
    replicates: int = field(
        default=200, metadata={"help": "replicates of the texts, from which intervals follow; 0: no intervals"}
    )
    pictures: bool = field(default=True, metadata={"help": "draw the pictures, next to the tables"})
    overwrite: bool = field(
        default=False, metadata={"help": "replace results of other settings or of another dataset in output_dir"}
    )

    @property
    def folder(self) -> Path:
        """The folder of the results. Needs a config that `resolved` returned."""
        assert self.output_dir is not None
        return Path(self.output_dir)

    @property
    def has_default_folder(self) -> bool:
        """Whether `folder` is the one that a config without `output_dir` gets."""
        return self.output_dir == resolved(replace(self, output_dir=None)).output_dir

    def measures(self) -> dict[str, Any]:
        """Returns the settings that the numbers depend on."""
        return measures(asdict(self))


def measures(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the settings, as plain data, that the numbers depend on."""
    others = ("data_root", "revision", "output_dir", "pictures", "overwrite")
    return {key: settings[key] for key in settings if key not in others}


def _of_another_program(key: str) -> str | None:
    """Answers the key of several results, which a user may give to this program."""
    if key != "runs":
        return None
    return (
        "runs is a setting of plasticity.compare, which draws several results: python -m qk_sniffer.plasticity.compare "
        "runs=first-plasticity,second-plasticity"
    )


SCHEMA = Schema(PlasticityConfig, former=_of_another_program)


def problems(config: PlasticityConfig) -> list[str]:
    """Returns a line for every wrong value of `config`, which begins with its key."""
    return [*_source(config), *_numbers(config), *_estimator(config.estimator)]


def resolved(config: PlasticityConfig) -> PlasticityConfig:
    """Fills in `output_dir`, and expands `~`."""
    data_root = expand_home(config.data_root)
    if config.output_dir is not None:
        return replace(config, data_root=data_root, output_dir=expand_home(config.output_dir))
    if Path(data_root).is_dir() or not is_hub_id(data_root):
        # "." and ".." have no last part to append to.
        base = str(Path(data_root).resolve()) if Path(data_root).name in ("", "..") else data_root.rstrip("/")
    else:
        base = f"outputs/{safe_name(config.revision or last_part(data_root))}"
    ending = "" if config.estimator.name == ESTIMATORS[0] else f"-{config.estimator.name.replace('_', '-')}"
    return replace(config, data_root=data_root, output_dir=f"{base}-plasticity{ending}")


def from_omegaconf(node: DictConfig) -> PlasticityConfig:
    """Returns the typed config of a composed Hydra config."""
    config = OmegaConf.to_object(node)
    assert isinstance(config, PlasticityConfig)
    return config


def register() -> None:
    """Registers with Hydra the schema that `conf/plasticity.yaml` starts from.

    `${qk_sniffer.plasticity_settings:}` lists the settings.
    """
    ConfigStore.instance().store(name="plasticity_schema", node=structured(PlasticityConfig))
    OmegaConf.register_new_resolver("qk_sniffer.plasticity_settings", SCHEMA.help, replace=True)


def _source(config: PlasticityConfig) -> Iterator[str]:
    if not config.data_root:
        yield "data_root is empty; it is the folder of a dataset, or a dataset repository of the Hub: me/my"
        return
    places = {"data_root": config.data_root, "output_dir": config.output_dir}
    found = {key: path_problem(value) for key, value in places.items() if value is not None}
    wrong = [f"{key} is {places[key]!r}, which {problem}" for key, problem in found.items() if problem is not None]
    if wrong:
        yield from wrong
        return
    root = Path(expand_home(config.data_root))
    if root.is_dir():
        if config.revision is not None:
            yield f"revision is {config.revision!r}, but {root} is a folder, which has none; leave it out"
    elif not is_hub_id(config.data_root):
        yield f"data_root is {config.data_root!r}; there is no such folder (the current folder is {Path.cwd()})"
    if config.revision == "":
        yield "revision is empty; null is the default branch"
    if config.output_dir == "":
        yield "output_dir is empty; null is a folder next to the dataset"
    elif (
        config.output_dir is not None
        and root.is_dir()
        and Path(expand_home(config.output_dir)).resolve().is_relative_to(root.resolve())
    ):
        yield f"output_dir is {config.output_dir!r}, in the dataset itself; give the results a folder of their own"


def _numbers(config: PlasticityConfig) -> Iterator[str]:
    for key in ("max_tokens_per_head", "normality_max_dims", "num_pairs_per_bucket"):
        if getattr(config, key) < 1:
            yield f"{key} is {getattr(config, key)}; it must be at least 1"
    if config.num_pairs_per_bucket > MAX_PAIRS:  # all differences are in memory at once
        yield f"num_pairs_per_bucket is {config.num_pairs_per_bucket}; it must be at most {MAX_PAIRS:,}"
    if config.replicates != 0 and not MIN_REPLICATES <= config.replicates <= MAX_REPLICATES:
        yield (
            f"replicates is {config.replicates}; it must be {MIN_REPLICATES} to {MAX_REPLICATES:,}, or 0 for results "
            "without intervals"
        )
    if not 0 < config.p_alpha < 1:
        yield f"p_alpha is {config.p_alpha}; it must be above 0 and below 1"
    if not 0 <= config.seed <= MAX_SEED:
        yield f"seed is {config.seed}; it must be 0 to {MAX_SEED}"


def _estimator(estimator: EstimatorConfig) -> Iterator[str]:
    if estimator.name not in ESTIMATORS:
        yield not_one_of("estimator.name", estimator.name, list(ESTIMATORS))
    elif estimator.name == "full_covariance":
        if estimator.alpha is None or not (0 < estimator.alpha < 1 and math.isfinite(estimator.alpha)):
            yield f"estimator.alpha is {estimator.alpha}; it must be above 0 and below 1"
    elif estimator.alpha is not None:
        yield "estimator.alpha belongs to estimator=full_covariance; leave it out, or choose that"
