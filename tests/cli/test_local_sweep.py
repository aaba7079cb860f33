"""Jobs that run one after another in one process, as those of a sweep without SLURM do."""

import weakref
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from qk_sniffer.cli.app import main
from qk_sniffer.jobs import components, dry_run


@pytest.mark.parametrize("dry", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_model_of_a_job_is_gone_before_the_next_one_is_loaded(
    dry: bool, checkpoint: Path, texts: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []
    load = components.load_components

    def counting(*args: Any) -> components.Components:
        alive.append(sum(model() is not None for model in models))
        loaded = load(*args)
        models.append(weakref.ref(loaded.backbone.decoder))
        return loaded

    monkeypatch.setattr(dry_run if dry else components, "load_components", counting)
    given = ["model=hf", f"model.name={checkpoint}", "model.dtype=float32", "dataset=hf", f"dataset.path={texts}"]
    given += ["output.data_root=${model.slug}-${sampler.seed}", "sampler.seed=0,1,2"]
    monkeypatch.setattr("sys.argv", ["qk_sniffer", "-m", *given, *(["dry_run=measure"] if dry else [])])
    assert main() == 0
    assert alive == [0, 0, 0]
