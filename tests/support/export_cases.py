"""Makes datasets with statistics for exports, and float64 numbers from their rows."""

from pathlib import Path
from typing import Any

import numpy as np

import qk_sniffer
from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.store import manifest as manifests
from support.jobs import run


def statistics(**values: Any) -> dict[str, Any]:
    """The section `capture` of a job with statistics of both stages."""
    return {"statistics": {"enabled": True, "stages": ["pre", "post"]} | values}


def without_rows(folder: Path, texts: Path, root: Path, **capture: Any) -> Dataset:
    """The dataset of a job with statistics alone."""
    sections = {"sampler": {"type": "none"}, "verify": {"examples": 0}}
    return qk_sniffer.open_dataset(run(folder, texts, root, capture=statistics() | capture, **sections))


def edited(root: Path, **changes: Any) -> Dataset:
    """The dataset at `root` with `changes` in the manifest's description of its last layer."""
    manifest = manifests.read(root)
    manifest["model"]["layers"][-1] |= changes
    (root / "manifest.json").write_bytes(manifests.encode(manifest))
    return qk_sniffer.open_dataset(root)


def rows_of(dataset: Dataset, layer: int, head: int, kind: str = "q", skip: int = 0) -> np.ndarray:
    """The vectors of a head from position `skip` on, in float64."""
    found = dataset.vectors(layer, head, kind)
    return found.vectors[found.positions >= skip].astype(np.float64)


def halves(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., d) as complex numbers (..., d / 2) of the components that RoPE rotates together in halves."""
    half = vectors.shape[-1] // 2
    return vectors[..., :half] + 1j * vectors[..., half:]
