"""What a job that has something to do needs in memory: tokenizer, model, and which of its heads are captured."""

import logging
from dataclasses import dataclass

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.backbone.loading import check_model, load_backbone
from qk_sniffer.capture.selection import Selection, select
from qk_sniffer.corpus.tokenizer import TextTokenizer, load_tokenizer
from qk_sniffer.errors import ConfigError
from qk_sniffer.hub.revisions import hub_commit_of
from qk_sniffer.resolved import ResolvedConfig
from qk_sniffer.timing import Stages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    """What is loaded; `selection` names heads of `layers`."""

    tokenizer: TextTokenizer
    backbone: Backbone
    layers: list[LayerFacts]
    selection: Selection


class LazyComponents:
    """Loads tokenizer and model when they are first asked for, which may be never."""

    def __init__(self, config: ResolvedConfig, commits: dict[str, str | None], stages: Stages) -> None:
        self._config, self._commits, self._stages = config, commits, stages
        self._parts: Components | None = None

    def __call__(self) -> Components:
        """The parts; loads them the first time.

        Raises:
            SourceError: a part cannot be found or loaded.
            ConfigError: the model cannot do what is asked for.
        """
        if self._parts is None:
            with self._stages("load model"):
                self._parts = _load(self._config, self._commits)
        return self._parts


def _load(config: ResolvedConfig, commits: dict[str, str | None]) -> Components:
    check_model(config.model, commit=commits["model"])
    tokenizer = load_tokenizer(config.model, hub_commit_of(commits["tokenizer"]))
    backbone = load_backbone(
        config.model,
        commit=commits["model"],
        pre_rope=config.capture.capture_pre_rope,
        banded_attention=config.inference.banded_attention,
        # To say that none of the layers asked for has full attention, all of them must be seen.
        layers=None if config.capture.full_attention_only else config.capture.layers,
    )
    limit, max_length = backbone.num_positions, config.model.tokenizer.max_length
    if limit is not None and max_length > limit:
        raise ConfigError(
            [f"model.tokenizer.max_length is {max_length}, but this model has positions for {limit}: set it so"]
        )
    layers = backbone.probe()
    selection = select([layer.heads for layer in layers], config.capture)
    if selection.note:
        log.warning("%s", selection.note)
    log.info(
        "%s: %d of %d query heads, %d files; %s on %s",
        config.model.slug,
        selection.drawn,
        sum(layer.heads.num_q_heads for layer in layers),
        selection.num_heads,
        str(backbone.dtype).removeprefix("torch."),
        backbone.device,
    )
    return Components(tokenizer, backbone, layers, selection)
