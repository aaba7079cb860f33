"""Writes the file that a KV-cache method starts from, from the statistics of a dataset.

capture.statistics makes the statistics of a dataset. The formats, and the statistics that each needs:

  triattention        a .pt file for TriAttention and TensorRT-LLM: queries, stage pre
  tria                a .tria file, version 2, for the ports of TriAttention to ggml and MLX: queries, stage pre
  expected_attention  a folder for ExpectedAttentionStatsPress of kvpress: queries, stage pre, skip_tokens=4
  qfilters            a folder for QFilters of kvpress: queries, stage post
  kv_scales           a folder with ranges of keys for KV-cache quantization, such as vLLM's: keys, stage post

A layout that a format cannot express is refused, with the reason. docs/kv_cache.md describes each method.

Exit codes: 0 written, 1 the dataset cannot be exported to the format, 2 the settings are wrong, 130 interrupted.
"""

from dataclasses import dataclass, field
from pathlib import Path

from qk_sniffer.cli import program
from qk_sniffer.dataset.reader import open_dataset
from qk_sniffer.export.formats import FORMATS, format_named
from qk_sniffer.export.write import export
from qk_sniffer.text import say


@dataclass(frozen=True)
class Settings:
    """The settings of the program."""

    data_root: str = field(metadata=program.DATA_ROOT)
    format: str = field(metadata={"help": f"one of {', '.join(FORMATS)}"})
    revision: str | None = field(default=None, metadata=program.REVISION)
    output: Path | None = field(
        default=None,
        metadata={"help": "file or folder to write; null: <data_root>-<format>, or outputs/<revision>-<format>"},
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an output that exists"})


def main() -> int:
    """Runs `python -m qk_sniffer.export`; returns the exit code."""
    return program.run("qk_sniffer.export", __doc__ or "", Settings, _program)


def _program(settings: Settings) -> int:
    format_named(settings.format)  # a wrong name is answered before the dataset is opened
    dataset = open_dataset(settings.data_root, settings.revision)
    say(f"Written: {export(dataset, settings.format, settings.output, overwrite=settings.overwrite)}")
    return 0
