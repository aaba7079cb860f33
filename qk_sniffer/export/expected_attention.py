"""Encodes the folder that `ExpectedAttentionStats.from_pretrained` of kvpress loads.

`model.safetensors` has float32 `query_mean` (layers, heads, d) and `query_cov` (layers, heads, d, d), with divisor
count - 1, of the queries before RoPE. `config.json` has the arguments of the class. kvpress leaves out the first tokens
of each text, `n_sink`.
"""

import json
from collections.abc import Iterator, Mapping

import numpy as np
from safetensors.numpy import save

from qk_sniffer.export.source import Source

N_SINK = 4
"""The default of kvpress."""


def problems(source: Source) -> Iterator[str]:
    """Yields the reasons why the dataset cannot be exported."""
    yield from source.needs("pre", "q", covariance=True)
    yield from source.needs_one_shape("num_q_heads", "head_dim")
    yield from source.needs_all_layers()
    yield from source.needs_all_heads("q")
    yield from source.needs_whole_rotation(of_every_layer=True)
    yield from source.needs_no_bias()
    if source.settings.enabled and not source.settings.skip_tokens:
        yield (
            "its statistics have the first tokens of each text, which the press keeps and does not score: capture with "
            f"capture.statistics.skip_tokens={N_SINK}, the n_sink of kvpress"
        )


def encode(source: Source) -> Mapping[str, bytes]:
    """Returns the files of the folder."""
    layers = [source.statistics(layer, "q", "pre", covariance=True) for layer in source.layers]
    mean = np.stack([found.mean for found in layers])
    covariance = np.stack([found.covariance for found in layers if found.covariance is not None])
    provenance = source.provenance()
    arguments = {
        "num_layers": source.num_layers,
        "num_heads": source.shape["num_q_heads"],
        "head_dim": source.shape["head_dim"],
        "dataset_name": provenance["dataset"],
        "model_name": provenance["model"],
        "num_samples": provenance["examples"],
        "sample_seq_len": provenance["longest_example"],
        "n_sink": source.settings.skip_tokens,
    }
    tensors = {"query_mean": np.ascontiguousarray(mean), "query_cov": np.ascontiguousarray(covariance)}
    return {
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
        "config.json": (json.dumps(arguments, indent=2) + "\n").encode(),
    }
