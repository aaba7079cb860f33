"""The code and the commands of the page about adding a model, run as a reader runs them."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.jobs import heads_of, vectors

pytestmark = pytest.mark.floor

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "models" / "ADDING.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files of the page, with the checkpoint that one of them makes. Its modules can be imported."""
    folder = tmp_path_factory.mktemp("mine")
    for name, code in re.findall(r"```\w+\n# (\S+\.(?:py|yaml))\n(.*?)```", PAGE, flags=re.DOTALL):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)
    assert "python make_checkpoint.py" in PAGE
    subprocess.run([sys.executable, "make_checkpoint.py"], cwd=folder, check=True)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


COMMANDS = re.findall(r"^python -m qk_sniffer (.*)$", PAGE, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "pre_rope"),
    [(0, False), (0, True), (1, False)],
    ids=["post_rope", "pre_rope", "short_name"],
)
def test_the_commands_of_the_page_capture_the_vectors_of_its_model(folder: Path, number: int, pre_rope: bool) -> None:
    import mine

    assert len(COMMANDS) == 2
    command = COMMANDS[number]
    root = folder / f"out-{number}-{pre_rope}"
    more = ["dataset.max_samples=2", "sampler=all", "capture.capture_token_ids=true", f"output.data_root={root}"]
    more += [f"capture.capture_pre_rope={str(pre_rope).lower()}", "model.tokenizer.max_length=300"]
    more += ["capture.capture_values=true", "capture.capture_outputs=true"]
    arguments = [sys.executable, "-m", "qk_sniffer", *command.split(), *more]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    proof = json.loads((root / "manifest.json").read_text())["proof"]
    assert proof["proven"] is True and proof["uncovered"] == []

    model = mine.MineModel.from_pretrained(folder / "checkpoint", dtype=torch.bfloat16).eval()
    heads = heads_of(root)
    assert len(heads) == 3 * 4 * 4
    for example in (0, 1):
        expected = by_hand(model, mine.turn, ids_of(heads["l00h00q"], example), pre_rope=pre_rope)
        for name, table in heads.items():
            layer, head, kind = int(name[1:3]), int(name[4:6]), name[6]
            stored = vectors(table)[np.array(table["example_id"]) == example]
            difference = np.linalg.norm(stored - expected[layer, kind][head])
            assert difference <= 0.02 * np.linalg.norm(stored)


def ids_of(table: Any, example: int) -> torch.Tensor:
    mine = np.array(table["example_id"]) == example
    assert np.array(table["position"])[mine].tolist() == list(range(mine.sum()))
    return torch.from_numpy(np.array(table["token_id"])[mine].astype(np.int64))[None]


def by_hand(model: Any, turn: Any, ids: torch.Tensor, *, pre_rope: bool) -> dict[tuple[int, str], np.ndarray]:
    """Returns (heads, n, d) by (layer, kind), from the outputs of the first projections and the inputs of the last."""
    made: dict[tuple[int, str], np.ndarray] = {}
    hooks = []
    for layer, mixer in enumerate(model.mixers):

        def keep(_: Any, inputs: Any, fused: torch.Tensor, layer: int = layer) -> None:
            for kind, part in zip("qkv", fused[0].chunk(3, dim=-1), strict=True):
                states = part.unflatten(-1, (4, 16)).transpose(0, 1)
                made[layer, kind] = (states if pre_rope or kind == "v" else turn(states)).float().numpy()

        def keep_output(_: Any, inputs: Any, layer: int = layer) -> None:
            made[layer, "o"] = inputs[0][0].unflatten(-1, (4, 16)).transpose(0, 1).float().numpy()

        hooks.append(mixer.fused.register_forward_hook(keep))
        hooks.append(mixer.out.register_forward_pre_hook(keep_output))
    with torch.inference_mode():
        model(ids)
    for hook in hooks:
        hook.remove()
    return made


def test_every_file_and_method_that_the_page_names_exists() -> None:
    from qk_sniffer.backbone.family import Family

    table = PAGE[PAGE.index("| difference |") : PAGE.index("If vectors before RoPE")]
    names = set(re.findall(r"`(\w+)`", table))
    assert names == {name for name in vars(Family) if not name.startswith("_")}
    for path in re.findall(r"`(?:python )?((?:scripts|tests|models)/[\w/]+\.py)", PAGE):
        assert (ROOT / path).exists()
