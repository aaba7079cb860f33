"""GGUF: a model in one file, config and tokenizer included, as llama.cpp runs it. Needs the extra `gguf`."""

import math
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.utils.hub import cached_file

from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import ConfigError

_ROTARY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def check_gguf(config: ModelConfig) -> None:
    """Whether `model.gguf_file` can be read at all, as far as can be told without the Hub.

    Raises:
        ConfigError: the extra `gguf` is not installed, or the file is not one that a job can be pinned to.
    """
    file, name = str(config.gguf_file), Path(str(config.name))
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError(
            [f"model.gguf_file={file} needs the package gguf: pip install 'qk-sniffer[gguf]', or pip install gguf"]
        ) from None
    if not file.endswith(".gguf"):
        raise ConfigError([f"model.gguf_file is {file!r}; it must be the name of a .gguf file"])
    if not name.is_dir():
        return
    if Path(file).name != file:
        raise ConfigError(
            [f"model.gguf_file is {file!r}; it must be the name of a file that lies in model.name itself"]
        )
    if not (name / file).is_file():
        there = ", ".join(sorted(path.name for path in name.glob("*.gguf")))
        raise ConfigError(
            [f"model.gguf_file is {file!r}, which is not in {name}; it has {there or 'no .gguf file at all'}"]
        )


def gguf_source(file: str, source: dict[str, Any]) -> dict[str, Any]:
    """The arguments for transformers that load the GGUF `file` of the folder or repository of `source`.

    By its whole path: of a bare name, transformers would look into the current directory first.

    Raises:
        OSError: the repository cannot be read, or has no such file.
    """
    name = source["pretrained_model_name_or_path"]
    where = {key: source[key] for key in ("revision", "local_files_only") if key in source}
    path = cached_file(name, file, **where)
    assert path is not None
    return {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": str(Path(path).absolute())}


def refuse_lost_rotary(text: PretrainedConfig, config: ModelConfig, path: str) -> None:
    """Refuses a file with rotary parameters that transformers does not read from it: other vectors, in silence.

    Raises:
        ConfigError: `model.config_overrides` does not say what they are.
    """
    if {"rope_parameters", "rope_scaling", "rope_theta"} & config.config_overrides.keys():
        return
    rope = getattr(text, "rope_parameters", None) or {}
    each = [rope, *(one for one in rope.values() if isinstance(one, dict))]
    bases = [one["rope_theta"] for one in each if one.get("rope_theta") is not None]
    is_plain = all(one.get("rope_type", "default") == "default" for one in each)
    metadata, tensors = read_gguf_metadata(path)
    lost = [name for name in tensors if is_plain and name in _ROTARY_TENSORS]
    for key, value in metadata.items():
        if (
            (key.endswith(".rope.scaling.type") and is_plain and value != "none")
            or (key.endswith((".rope.scaling.factor", ".rope.scale_linear")) and is_plain and value not in (0, 1))
            or (key.endswith(".rope.freq_base") and bases and not any(math.isclose(value, base) for base in bases))
        ):
            lost.append(f"{key}={value}")
    if lost:
        raise ConfigError(
            [
                f"model.gguf_file={config.gguf_file} has rotary parameters that transformers does not read from it "
                f"({', '.join(lost)}): give model.config_overrides.rope_parameters as they are in the config.json of "
                "the original model (rope_theta, rope_type, factor, ...)"
            ]
        )
