"""Frequencies that depend on a text's length: each text has the vectors that it has alone, after any other text."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.jobs import heads_of, run, tokens_of, vectors
from support.rope import BOUNDARY, DYNAMIC, LONGROPE
from support.tiny import ALPHABET, save_checkpoint
from support.zoo import Case
from tiny_configs import tiny_config
from transformers import AutoModel

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import find_family
from qk_sniffer.backbone.tap import AttentionCall

pytestmark = pytest.mark.floor

CASES = {
    "dynamic": Case("dynamic", "LlamaConfig", {"rope_parameters": DYNAMIC, "max_position_embeddings": BOUNDARY}, 8),
    "longrope": Case("longrope", "LlamaConfig", {"rope_parameters": LONGROPE, "max_position_embeddings": 96}, 8),
}
LENGTHS = [40, 20, 60, 24, 25, 41, 22, 80]
TEXTS = [("".join(ALPHABET) * 2)[5 * i : 5 * i + length] for i, length in enumerate(LENGTHS)]


def alone(folder: Path, text: str) -> dict[tuple[int, str], np.ndarray]:
    """Returns the vectors of a text (heads, n, d) by (layer, kind), from a model that has run no other text."""
    seen: dict[tuple[int, str], np.ndarray] = {}

    def keep(call: AttentionCall) -> None:
        seen[call.layer, "q"], seen[call.layer, "k"] = call.query[0].numpy(), call.key[0].numpy()

    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode(), Backbone(model, find_family("llama")).tapped(keep):
        model(input_ids=tokens_of(text), use_cache=False)
    return seen


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_text_is_captured_as_if_it_were_alone(name: str, texts: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(CASES[name], tmp_path / name)
    root = run(folder, texts, tmp_path / "out", inference={"batch_size": 8})
    expected = {example: alone(folder, text) for example, text in enumerate(TEXTS)}
    examples = {row["index"]: row["example_id"] for row in _examples(root)}
    for head, table in heads_of(root).items():
        layer, number, kind = int(head[1:3]), int(head[4:6]), head[6]
        rows = vectors(table)
        for example in range(len(TEXTS)):
            mine = np.array(table["example_id"]) == examples[example]
            wanted = expected[example][layer, kind][number]
            np.testing.assert_allclose(rows[mine], wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_code_of_the_card_rotates_the_rows_of_a_job(
    name: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts are on both sides of the boundary."""
    folder = save_checkpoint(CASES[name], tmp_path / name)
    capture = {"capture_pre_rope": True, "layers": [0], "heads": [1]}
    root = run(folder, texts, tmp_path / "out", capture=capture, verify={"examples": 0})
    monkeypatch.chdir(root)
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if "def rotate" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    rotated = names["rotated"]
    assert len(rotated) == len(TEXTS)
    for row in _examples(root):
        expected = alone(folder, TEXTS[row["index"]])[0, "q"][1]
        np.testing.assert_allclose(rotated[row["example_id"]], expected, rtol=2e-4, atol=2e-5)


def _examples(root: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(root / "examples" / "data.parquet").to_pylist()
    return rows


def test_texts_do_depend_on_what_shares_their_forward() -> None:
    """Shows that the test above can fail."""
    for case in CASES.values():
        model: Any = case.model().get_decoder()
        short, long = tokens_of(TEXTS[1]), tokens_of(TEXTS[0])
        padded = torch.nn.functional.pad(short, (0, long.shape[1] - short.shape[1]))
        with torch.inference_mode():
            own = model(input_ids=short, use_cache=False)[0]
            together = model(input_ids=padded, use_cache=False)[0][:, : short.shape[1]]
        assert not torch.allclose(own, together, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_slow_rotation_is_told_from_rounding(dtype: torch.dtype) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e6, "factor": 64.0}
    case = Case("slow", "LlamaConfig", {"rope_parameters": rope, "head_dim": 64}, 64)
    facts = Backbone(case.decoder(dtype=dtype), find_family("llama")).probe()
    expected = {"frequencies": "rotary_emb", "pairs": "halves", "first": 0, "direction": 1, "changed_after": False}
    assert [fact.rotation for fact in facts] == [expected] * 3


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_with_the_keys_of_an_earlier_one_turn_as_it_does(model_type: str) -> None:
    torch.manual_seed(0)
    decoder = AutoModel.from_config(tiny_config(model_type)).eval().get_decoder()
    facts = Backbone(decoder, find_family(model_type)).probe()
    names = [fact.rotation["frequencies"] for fact in facts if isinstance(fact.rotation, dict)]
    assert names == [f"rotary_emb.{kind}_attention" for kind in ("sliding", "full", "sliding", "full")]


BY_KIND = Case(
    "by_kind",
    "Gemma3TextConfig",
    {
        "head_dim": 16,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "max_position_embeddings": BOUNDARY,
    },
    16,
)


@pytest.mark.parametrize("case", [CASES["dynamic"], BY_KIND], ids=["one kind", "by kind of layer"])
def test_the_probe_and_earlier_texts_leave_no_trace(case: Case) -> None:
    backbone = Backbone(case.decoder(), find_family(case.config().model_type))
    assert backbone.length_boundary == BOUNDARY

    def keys(text: str) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        backbone.forward(tokens_of(text), lambda call: seen.append(call.key.clone()))
        return seen

    first = keys(TEXTS[0])
    keys(TEXTS[7])
    assert all(map(torch.equal, first, keys(TEXTS[0])))
