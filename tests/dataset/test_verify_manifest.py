"""Tests that verify finds and reports each contradiction in a manifest."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.verify_cases import FILE, QUERY_1, edit, verified, wrong

from qk_sniffer.dataset.verify import verify


def both(section: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Returns a change of a setting in config and fingerprint."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["config"][section][key] = value
        manifest["fingerprint"][f"{section}.{key}"] = value

    return change


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("change", "checks", "message"),
    [
        (
            lambda m: m["config"]["sampler"].update(seed=1),
            {"manifest", "sampler"},
            "sampler.seed is 1 in config, 0 in fingerprint",
        ),
        (lambda m: m["config"]["model"].update(dtype="float16"), {"manifest"}, "model.dtype is 'float16' in config"),
        (both("sampler", "seed", 1), {"sampler"}, "chooses are missing"),
        (both("sampler", "share", "example"), {"sampler"}, "in all 12 query heads; all 6 key heads)"),
        (both("sampler", "base_rate", 8.0), {"sampler", "manifest"}, "inclusion in manifest.json differs from"),
        (
            both("sampler", "min_bucket_size", 32),
            {"sampler", "manifest", "bucket"},
            "inclusion in manifest.json differs from",
        ),
        (lambda m: m.update(rows=7), {"manifest"}, "contradicts itself rows is 7, files has"),
        (
            lambda m: m["rows_by_bucket"]["q"].update({"0": 5}),
            {"manifest"},
            "in manifest.json differs from the files",
        ),
        (lambda m: m["inclusion"].pop("k"), {"manifest"}, "settings kind k"),
        (
            lambda m: m.update(source_rows=30),
            {"manifest"},
            "source_rows is 30, but examples is 24 and skipped_rows 0",
        ),
        (lambda m: m["files"][FILE].update(rows=1), {"manifest", "parquet"}, "instead of 1 way out"),
        (lambda m: m["files"].pop(FILE), {"heads"}, f"does not list the file of a captured head ({QUERY_1})"),
        (
            lambda m: m["model"]["layers"][0]["captured"]["q"].remove(1),
            {"heads", "manifest"},
            f"no layer captures {FILE}",
        ),
        (
            lambda m: m["model"]["layers"][0].update(sliding_window=None),
            {"metadata", "sliding_window"},
            "sliding_window is 12 instead of null",
        ),
        (lambda m: m["model"]["layers"][1].update(head_dim=8), {"schema"}, "instead of fixed_size_list<"),
        (
            lambda m: m["commits"].update(model="abc1" * 10),
            {"manifest", "metadata"},
            "json (all 12 query heads; all 6 key heads) ",
        ),
        (lambda m: m["proof"].update(model_commit="abc"), {"manifest"}, "in commits, abc in proof"),
        (
            lambda m: m["proof"].update(largest_difference_by_layer={}),
            {"manifest"},
            "contradicts itself (proof is of no layer)",
        ),
        (
            lambda m: m["proof"]["largest_difference_by_layer"].update({"1": None}),
            {"manifest"},
            "Expected `float`, got `null` - at",
        ),
        (lambda m: m.update(files={}), {"manifest"}, "contradicts itself (it lists no heads)"),
        (
            lambda m: [layer.update(captured={}) for layer in m["model"]["layers"]],
            {"manifest"},
            "its layers list 0 captured heads",
        ),
        (
            lambda m: m["model"].update(
                layers=[
                    m["model"]["layers"][0]
                    | {"layer": number, "num_q_heads": 10_000, "captured": {"q": list(range(10_000))}}
                    for number in range(14)
                ]
            ),
            {"manifest"},
            "captured heads, not 1 to 131,072",
        ),
        (lambda m: m.update(rows_by_bucket={}), {"manifest"}, "rows_by_bucket lacks the kind k"),
        (
            lambda m: (m.update(longest_example=2**31 - 1), m["config"]["sampler"].update(min_bucket_size=1)),
            {"manifest"},
            "its positions have more than 1,048,576 buckets",
        ),
        (lambda m: m["proof"].update(proven=False), {"proof"}, "the job's proof of the vectors failed 4,0"),
        (lambda m: m["proof"].pop("heads"), {"manifest"}, "contradicts itself (proof lacks heads)"),
        (
            lambda m: m["proof"].update(summaries={"rows": 1, "heads": 1, "uncovered": [], "tolerance": 1.0}),
            {"manifest"},
            "(the proof of attention summaries lacks largest_difference_by_layer)",
        ),
        (
            lambda m: m["proof"]["attention"][0].update(passed=False),
            {"manifest"},
            "(proof is not false, and a check of attention failed)",
        ),
        (
            lambda m: (m["proof"].update(proven=False), m["proof"]["attention"][1].update(passed=None)),
            {"manifest"},
            "(the check of attention in layer 1 does not say what is wrong)",
        ),
        (
            lambda m: m.pop("model"),
            {"manifest"},
            "(Object missing required field `model`)",
        ),
        (
            lambda m: m.update(files=[1]),
            {"manifest"},
            "got `array` - at `$.files`)",
        ),
        (lambda m: m["config"]["model"].pop("name"), {"manifest"}, "missing required field `name`"),
        (lambda m: m["config"]["dataset"].pop("max_samples"), {"manifest"}, "missing required field `max_samples`"),
        (
            lambda m: m["config"]["sampler"].update(kind="x"),
            {"manifest"},
            "unknown settings sampler.kind)",
        ),
        (
            lambda m: m["config"]["sampler"].update(type="x"),
            {"manifest"},
            "at `$.config.sampler.type`)",
        ),
        (lambda m: m["proof"].update(tolerance=10**400), {"manifest"}, "an integer has more than 64 bits"),
        (lambda m: m.update(format="qk-sniffer/9"), {"manifest"}, "format 'qk-sniffer/1' way out: use the version of"),
    ],
)
def test_a_manifest_that_differs_from_its_dataset(
    change: Callable[[dict[str, Any]], object], checks: set[str], message: str, root: Path
) -> None:
    edit(root, change)
    text = verified(root)
    assert wrong(text).keys() == checks, text
    assert any(message in words for words in wrong(text).values()), text


def test_a_manifest_that_is_not_json(root: Path) -> None:
    os.truncate(root / "manifest.json", 100)
    assert "manifest.json is not JSON (" in wrong(verified(root))["manifest"]


@pytest.mark.slow
def test_nonsense_in_a_manifest_is_never_a_traceback(root: Path) -> None:
    whole = json.loads((root / "manifest.json").read_text())
    places = [(key,) for key in whole]
    places += [(key, name) for key in ("config", "model", "proof", "commits") for name in whole[key]]
    places += [("files", FILE), ("files", FILE, "rows"), ("rows_by_bucket", "q"), ("config", "dataset", "path")]
    for place in places:
        for nonsense in (None, float("inf"), []):

            def spoil(manifest: dict[str, Any], place: tuple[str, ...] = place, nonsense: Any = nonsense) -> None:
                *above, last = place
                for key in above:
                    manifest = manifest[key]
                manifest[last] = nonsense

            edit(root, spoil)
            assert str(verify(root)), place
            edit(root, lambda manifest: manifest.update(whole))
