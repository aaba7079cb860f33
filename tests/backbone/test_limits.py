"""Tests the limits that a decoder sets to texts: the positions of its config and the rows of its embedding."""

import pytest
import torch
from support.tiny import CUT
from torch import nn
from transformers import AutoModel, GPT2Config, LlamaConfig, PretrainedConfig

from qk_sniffer.backbone.limits import max_positions, num_embeddings, planned_num_embeddings

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=100), 100),
        (LlamaConfig(max_position_embeddings=100, rope_parameters=YARN), 256),
        (LlamaConfig(max_position_embeddings=300, rope_parameters=YARN), 300),
        (LlamaConfig(max_position_embeddings=100, rope_parameters={"rope_type": "linear", "factor": 8.0}), 100),
        (GPT2Config(n_positions=50), 50),
        (PretrainedConfig(), None),
        (PretrainedConfig(max_position_embeddings=0), None),
    ],
)
def test_the_positions_that_a_config_provides_for(config: PretrainedConfig, expected: int | None) -> None:
    assert max_positions(config) == expected


def test_the_rows_of_an_embedding_are_known_without_weights() -> None:
    config = LlamaConfig(**CUT)
    assert num_embeddings(AutoModel.from_config(config)) == CUT["vocab_size"]
    assert planned_num_embeddings(config, CUT["vocab_size"] - 1) is None, "no reason to build the model"
    assert planned_num_embeddings(config, CUT["vocab_size"]) == CUT["vocab_size"]
    assert torch.empty(1).device.type == "cpu"


@pytest.mark.slow
def test_rows_that_are_not_known() -> None:
    assert num_embeddings(nn.Linear(2, 2)) is None
    assert planned_num_embeddings(PretrainedConfig(), 10) is None
