"""The settings of the program: one frozen dataclass, what is wrong with its values, and where the results go."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from qk_sniffer.hub.revisions import is_hub_id
from qk_sniffer.resolved import last_part, safe_name
from qk_sniffer.text import expand_home

MAX_PAIRS = 1_000_000

ESTIMATORS = ("regression", "full_covariance")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class EstimatorConfig:
    """How the distribution of the queries at a position is estimated; `alpha` is full_covariance's alone."""

    name: str = "regression"
    alpha: float | None = None


@dataclass(frozen=True)
class PlasticityConfig:
    """What is measured, of which dataset, and where the results go."""

    data_root: str | None = None
    revision: str | None = None
    output_dir: str | None = None
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    max_tokens_per_head: int = 50_000
    normality_max_dims: int = 64
    p_alpha: float = 0.01
    seed: int = 0
    num_pairs_per_bucket: int = 256
    pictures: bool = True

    @property
    def folder(self) -> Path:
        """Of the results; call on a config that `resolved` returned."""
        assert self.output_dir is not None
        return Path(self.output_dir)

    def measures(self) -> dict[str, Any]:
        """The settings that the numbers depend on."""
        values = asdict(self)
        return {key: values[key] for key in values if key not in ("data_root", "revision", "output_dir", "pictures")}


def problems(config: PlasticityConfig) -> list[str]:
    """Every value of `config` that cannot be right, one line each that begins with its key; empty when all is well."""
    return [*_source(config), *_numbers(config), *_estimator(config.estimator)]


def resolved(config: PlasticityConfig) -> PlasticityConfig:
    """`config` with its `output_dir` filled in; `~` is the home folder."""
    assert config.data_root is not None
    data_root = expand_home(config.data_root)
    if config.output_dir is not None:
        return replace(config, data_root=data_root, output_dir=expand_home(config.output_dir))
    if Path(data_root).is_dir() or not is_hub_id(data_root):
        # Of its name and not of its last part, which "." or ".." has none of.
        beside = str(Path(data_root).resolve()) if Path(data_root).name in ("", "..") else data_root.rstrip("/")
    else:
        beside = f"outputs/{safe_name(config.revision or last_part(data_root))}"
    ending = "" if config.estimator.name == ESTIMATORS[0] else f"-{config.estimator.name.replace('_', '-')}"
    return replace(config, data_root=data_root, output_dir=f"{beside}-plasticity{ending}")


def schema() -> DictConfig:
    """The defaults as an OmegaConf node that knows the type of every key; writable."""
    node = OmegaConf.structured(PlasticityConfig)
    assert isinstance(node, DictConfig)
    # OmegaConf makes nodes of frozen dataclasses read-only, but Hydra must merge into them.
    OmegaConf.set_readonly(node, None)
    OmegaConf.set_readonly(node.estimator, None)
    return node


def from_omegaconf(node: DictConfig) -> PlasticityConfig:
    """The typed config of a composed Hydra config."""
    config = OmegaConf.to_object(node)
    assert isinstance(config, PlasticityConfig)
    return config


def register() -> None:
    """Makes known to Hydra the schema that `conf/plasticity.yaml` starts from."""
    ConfigStore.instance().store(name="plasticity_schema", node=schema())


def _source(config: PlasticityConfig) -> Iterator[str]:
    if not config.data_root:
        yield "data_root is not given; it is the folder of a dataset, or a dataset repository of the Hub: me/my"
        return
    root = Path(expand_home(config.data_root))
    if root.is_dir():
        if config.revision is not None:
            yield f"revision is {config.revision!r}, but {root} is a folder, which has none; leave it out"
    elif not is_hub_id(config.data_root):
        yield f"data_root is {config.data_root!r}; there is no such folder (seen from {Path.cwd()})"
    if config.revision == "":
        yield "revision is empty; null is the default branch"
    if config.output_dir == "":
        yield "output_dir is empty; null is a folder beside the dataset"
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
    if config.num_pairs_per_bucket > MAX_PAIRS:  # the differences of so many are held at once
        yield f"num_pairs_per_bucket is {config.num_pairs_per_bucket}; it must be at most {MAX_PAIRS:,}"
    if not 0 < config.p_alpha < 1:
        yield f"p_alpha is {config.p_alpha}; it must be above 0 and below 1"
    if not 0 <= config.seed <= MAX_SEED:
        yield f"seed is {config.seed}; it must be 0 to {MAX_SEED}"


def _estimator(estimator: EstimatorConfig) -> Iterator[str]:
    if estimator.name not in ESTIMATORS:
        yield f"estimator.name is {estimator.name!r}; valid: {', '.join(ESTIMATORS)}"
    elif estimator.name == "full_covariance":
        if estimator.alpha is None or not (0 < estimator.alpha < 1 and math.isfinite(estimator.alpha)):
            yield f"estimator.alpha is {estimator.alpha}; it must be above 0 and below 1"
    elif estimator.alpha is not None:
        yield "estimator.alpha belongs to estimator=full_covariance; leave it out, or choose that"


INSTALL = "pip install 'qk-sniffer[analysis]'"
