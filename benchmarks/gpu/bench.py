"""Holds what all parts of a run share: the device, the models, the budget and the results."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3Model

from gpu.clock import Timing
from gpu.results import Budget, Results
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import find_family
from qk_sniffer.backbone.layers import LayerFacts

VOCABULARY = 1000
"""Token ids are below this number, which every model here has."""

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 16}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY},
    "Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151_936},
    "Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151_936},
}
LONGEST = 131_072


@dataclass(frozen=True)
class Model:
    """A model of a shape, with random weights in bfloat16."""

    name: str
    backbone: Backbone
    layers: list[LayerFacts]

    def plain_pass(self, ids: torch.Tensor) -> None:
        """Runs a forward pass over ids (B, n) as a user would: with the kernels that torch chooses, without us."""
        with torch.inference_mode():
            self.backbone.decoder(input_ids=ids.to(self.backbone.device), use_cache=False)


@dataclass
class Figures:
    """The measurements of the plain passes of a length, or of those of a way to capture, over all rounds."""

    device_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    """A pass, until the rows of all are durable in the journal."""
    mb_s: list[float] = field(default_factory=list)
    """Of the journal."""
    peak_gb: float | None = None
    kernel: str | None = None
    """Of attention; None if it was not looked at."""
    took_s: float = 0.0

    def add(self, whole: Timing, apart: Timing | None, *, nbytes: int = 0) -> None:
        """Adds a round: passes until durable, which wrote `nbytes`, and passes for the times of device and host."""
        self.wall_ms.append(1e3 * whole.wall_s / len(whole.host_ms))
        self.mb_s.append(nbytes / whole.wall_s / 1e6)
        self.peak_gb = whole.peak_gb
        if apart is not None:
            self.device_ms += apart.device_ms
            self.host_ms += apart.host_ms


@dataclass
class Bench:
    device: torch.device
    tiny: bool
    """Whether models and texts are tiny, for a run that tries the programs."""
    folder: Path
    """Of the journals."""
    budget: Budget
    results: Results
    plain: dict[tuple[str, int], Figures] = field(default_factory=dict)
    """The measured plain passes, by model and tokens."""
    _models: dict[str, Model] = field(default_factory=dict)

    def model(self, shape: str) -> Model:
        """Returns the model of a shape, which is made once."""
        name = "tiny" if self.tiny else shape
        if name not in self._models:
            config = Qwen3Config(max_position_embeddings=LONGEST, attn_implementation="sdpa", **SHAPES[name])
            torch.manual_seed(0)
            backbone = Backbone(made(config, self.device, torch.bfloat16), find_family("qwen3"))
            self._models[name] = Model(name, backbone, backbone.probe())
        return self._models[name]

    def forget_models(self) -> None:
        """Frees the memory of the models."""
        self._models.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def tokens(self, count: int) -> int:
        """Returns the tokens of a text of `count`; fewer in a tiny run."""
        return 48 + count // 512 if self.tiny else count


def made(config: Qwen3Config, device: torch.device, dtype: torch.dtype) -> Qwen3Model:
    """Returns a decoder with random weights, made in `dtype`. The rotary frequencies stay in float32: converting the
    decoder afterwards would round them."""
    with device:
        decoder = Qwen3Model._from_config(config, dtype=dtype).eval()
    assert decoder.rotary_emb.inv_freq.dtype == torch.float32 and decoder.dtype == dtype
    return decoder


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCABULARY, size=shape)
