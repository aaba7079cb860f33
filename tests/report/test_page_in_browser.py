"""Opens reports in a real Chromium: no error, no request, and its maps answer the mouse. Needs Debian's chromium."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import Page, browser, needs_chromium
from support.hostile import TERMINAL
from support.plasticity_cases import measure
from support.verify_cases import edit

import qk_sniffer
from qk_sniffer.report.facts import report_facts
from qk_sniffer.report.page import page
from qk_sniffer.report.plasticity import read

pytestmark = [pytest.mark.slow, needs_chromium]

SECTIONS: dict[str, Any] = {
    "capture": {
        "attention": {"enabled": True, "top_k": 4, "sink_tokens": 2},
        "statistics": {"enabled": True, "stages": ["pre", "post"]},
        "capture_values": True,
        "capture_outputs": True,
    },
    "verify": {"examples": 1},
}
HOSTILE = f"</script><img src=x onerror=alert(1)>{TERMINAL}"


@pytest.fixture(scope="module")
def made(undisturbed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A page with every section, of a dataset with a hostile name, and its facts."""
    root = Path(shutil.copytree(undisturbed(**SECTIONS), tmp_path_factory.mktemp("report") / "dataset"))

    def rename(manifest: dict[str, Any]) -> None:
        manifest["proof"]["largest_difference_by_layer"] |= {"0": 0.0, "1": 1e-7}
        for key in ("model.name", "model.tokenizer.name"):
            manifest["fingerprint"][key] = HOSTILE
        manifest["config"]["model"]["name"] = HOSTILE
        manifest["model"]["attn_implementation"] = HOSTILE

    edit(root, rename)
    assert measure(root, root.with_name("dataset-plasticity")) == 0
    dataset = qk_sniffer.open_dataset(root)
    facts = report_facts(dataset, read(dataset, None))
    path = root.with_name("report.html")
    path.write_bytes(page(facts))
    return path, json.loads(json.dumps(facts))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@pytest.fixture
def opened(chromium: Page, made: tuple[Path, dict[str, Any]]) -> Page:
    """The page in a window of a desktop, drawn."""
    chromium.problems.clear()
    chromium.size(1280, 900)
    chromium.open(made[0])
    return chromium


def test_it_has_every_section_and_no_error(opened: Page, made: tuple[Path, dict[str, Any]]) -> None:
    sections = opened.value("[...document.querySelectorAll('section')].map((each) => each.id)")
    assert sections == ["capture", "heads", "coverage", "norms", "outliers", "rotary", "timings"]
    assert opened.value("document.querySelector('h1').textContent") == made[1]["title"]
    assert opened.value("document.querySelectorAll('img, iframe, object').length") == 0
    texts = opened.value("[...document.querySelectorAll('svg text')].map((each) => each.textContent)")
    assert "0" in texts and "-0" not in texts
    circles = "document.querySelectorAll('#capture svg circle').length"
    assert opened.value(circles) == len(made[1]["proof"]["differences"]), "a layer without a difference has a point"
    empty = "[...document.querySelectorAll('svg')].filter((each) => !each.childElementCount).length"
    assert opened.value(empty) == 0
    for scheme in ("dark", "light"):
        for kind in range(4):
            opened.value(f"document.querySelectorAll('#heads .controls button')[{kind}].click()")
            names = opened.value("[...document.querySelector('#score').options].map((each) => each.value)")
            for name in names:
                opened.value(
                    f"{{ const one = document.querySelector('#score'); one.value = {name!r}; "
                    "one.dispatchEvent(new Event('change')); }"
                )
                opened.wait("document.querySelector('#maps canvas')")
        opened.size(1280, 900, scheme)
    assert opened.problems == []


def test_pointing_at_a_cell_tells_its_head_and_clicking_shows_it(
    opened: Page, made: tuple[Path, dict[str, Any]]
) -> None:
    """The middle of a cell of the first map: layers upward, query heads to the right."""
    shown = opened.value("document.querySelector('#score').selectedOptions[0].textContent")
    (values,) = [one["values"] for one in made[1]["maps"] if (one["kind"], one["label"]) == ("q", shown)]
    queries = [head for head in made[1]["heads"] if head[1] == "q"]
    opened.value("document.querySelector('#maps').scrollIntoView({block: 'center'})")
    for layer, head in ((0, 1), (2, 3), (1, 0)):
        # The axes take 44 points at the left, and 4 and 34 above and below the cells.
        box = opened.value(
            "(({x, y, width, height}) => ({x, y, width, height}))"
            "(document.querySelector('#maps canvas').getBoundingClientRect())"
        )
        cell, tall = min(44, (box["width"] - 48) / 4), (box["height"] - 38) / 3
        x, y = box["x"] + 44 + (head + 0.5) * cell, box["y"] + 4 + (2 - layer + 0.5) * tall
        opened.mouse("mouseMoved", x, y)
        place = next(index for index, one in enumerate(queries) if one[2:4] == [layer, head])
        tip = opened.value("document.querySelector('#tip').textContent")
        assert tip.startswith(f"l{layer:02d}h{head:02d}q, layer {layer}, head {head}\n{shown}: ")
        assert float(tip.rpartition(" ")[2]) == pytest.approx(values[place], rel=5e-3)
        opened.mouse("click", x, y)
        opened.wait(f"document.querySelector('#head h3').textContent.startsWith('l{layer:02d}h{head:02d}q')")
        assert opened.value("location.hash") == f"#l{layer:02d}h{head:02d}q"
        opened.wait("document.querySelectorAll('#head svg circle').length > 20")
        opened.wait("document.querySelector('#maps canvas')")
    opened.value("document.querySelector('#maps canvas').focus()")
    opened.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight")
    opened.wait("document.querySelector('#head h3').textContent.startsWith('l01h01q')")
    assert opened.problems == []


def test_a_head_is_opened_by_its_name_in_the_address(chromium: Page, made: tuple[Path, dict[str, Any]]) -> None:
    chromium.call("Page.navigate", url="about:blank")  # else the page would only scroll
    chromium.open(made[0], "#l02h01k")
    assert chromium.value("document.querySelector('#head h3').textContent") == "l02h01k: layer 2, key head 1"


@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_a_window_of_any_width_in_light_and_dark(opened: Page, width: int) -> None:
    colours = []
    for scheme in ("light", "dark"):
        opened.size(width, 800, scheme)
        opened.wait(f"innerWidth === {width} && document.querySelector('#maps canvas').clientWidth < {width}")
        assert opened.value("document.documentElement.scrollWidth") <= width
        colours.append(opened.value("getComputedStyle(document.body).backgroundColor"))
    assert len({*colours}) == 2
    opened.value("document.querySelector('header button').click()")
    assert opened.value("getComputedStyle(document.body).backgroundColor") == colours[0], "its button changes it"
    opened.value("delete document.documentElement.dataset.theme")
    assert opened.problems == []


def test_another_script_does_not_run(made: tuple[Path, dict[str, Any]], chromium: Page, tmp_path: Path) -> None:
    """The policy of the page holds: this is what a text would do that left its block."""
    changed = tmp_path / "changed.html"
    text = made[0].read_text(encoding="utf-8")
    changed.write_text(text.replace("</body>", "<script>document.title = 'owned'</script></body>"), encoding="utf-8")
    chromium.open(changed)
    assert chromium.value("document.title") != "owned"
    assert any("Content Security Policy" in problem for problem in chromium.problems)
