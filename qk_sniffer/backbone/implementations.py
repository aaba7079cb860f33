"""Removes the implementations of attention and experts that a checkpoint names for itself.

transformers loads an implementation such as `kernels-community/name` from the Hub, which is code. Only
`model.attn_implementation` may name one.
"""

from transformers import PretrainedConfig

_NAMES = ("_attn_implementation_internal", "_experts_implementation_internal")


def without_implementations(config: PretrainedConfig) -> PretrainedConfig:
    """Sets the implementations in `config`, and in the configs in it at any depth, to transformers' defaults."""
    for name in _NAMES:
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    for value in vars(config).values():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for part in parts:
            if isinstance(part, PretrainedConfig):
                without_implementations(part)
    return config
