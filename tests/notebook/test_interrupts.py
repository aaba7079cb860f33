"""Ctrl-C in a pass, at any line: the pass counts whole or not at all, and so do all others. A pass inside a pass."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from support.live import LLAMA, random_ids

import qk_sniffer
from qk_sniffer.corpus.contents import ids_hash
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import CaptureError
from qk_sniffer.notebook.captured import Captured
from qk_sniffer.notebook.passes import PassRecorder

PACKAGE = str(Path(qk_sniffer.__file__).parent)


@pytest.fixture(autouse=True)
def _default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class CtrlC:
    """Sends SIGINT at line number `at` of those that the package runs; from inside `function` on, if one is named."""

    def __init__(self, at: int, function: str | None = None) -> None:
        self.at = at
        self.function = function
        self.seen = 0
        self.inside = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if frame.f_code.co_name == self.function:
            self.inside += 1
        return self.line

    def line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "return" and frame.f_code.co_name == self.function:
            self.inside -= 1
        if event == "line" and (self.inside or self.function is None):
            self.seen += 1
            if self.seen == self.at:
                signal.raise_signal(signal.SIGINT)
        return self.line


def interrupted(model: Any, ids: torch.Tensor, ctrl_c: CtrlC) -> bool:
    """Runs a pass with Ctrl-C. Returns whether the signal was sent."""
    before = sys.gettrace()
    sys.settrace(ctrl_c)
    try:
        model(input_ids=ids)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return ctrl_c.seen >= ctrl_c.at


def hash_of(ids: torch.Tensor) -> str:
    return ids_hash(ids[0].numpy().astype(np.int32))


def sweep(captured: Captured, model: Any, function: str | None, step: int) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Interrupts a pass at each line, with a whole pass after it. Returns all texts by hash, and the whole ones."""
    texts, whole = {}, set()
    grad = torch.is_grad_enabled()
    for at in range(1, 100_000, step):
        first, second = random_ids(1, 5 + at % 7, seed=2 * at), random_ids(1, 4 + at % 5, seed=2 * at + 1)
        texts |= {hash_of(ids): ids for ids in (first, second)}
        was_sent = interrupted(model, first, CtrlC(at, function))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert torch.is_grad_enabled() is grad
        model(input_ids=second)
        whole.add(hash_of(second))
        if not was_sent:
            assert at > 10
            return texts, whole | {hash_of(first)}
    raise AssertionError("the pass has too many lines")


def check(captured: Any, model: Any, texts: dict[str, torch.Tensor], whole: set[str], **settings: Any) -> None:
    """Checks that each example has the rows of its own text, all of them, and that no whole text is missing."""
    examples = captured.examples
    hashes = examples["text_hash"].to_pylist()
    assert len({*hashes}) == len(hashes)
    assert whole <= {*hashes} <= texts.keys()
    assert len(hashes) < len(texts)
    with torch.no_grad(), qk_sniffer.capture(model, **settings) as alone:
        for each in hashes:
            model(input_ids=texts[each])
    assert alone.examples["text_hash"].to_pylist() == hashes
    ids = examples["example_id"].to_numpy()
    for layer, head, kind in alone.heads:
        vectors, positions, of_example = captured.vectors(layer, head, kind)[:3]
        expected = alone.vectors(layer, head, kind)
        assert np.array_equal(of_example, ids[expected.example_ids])
        assert np.array_equal(positions, expected.positions)
        np.testing.assert_allclose(vectors, expected.vectors, atol=1e-5)
    if settings.get("statistics"):
        found, expected_statistics = captured.statistics(0, "k"), alone.statistics(0, "k")
        assert found.count.tolist() == expected_statistics.count.tolist()
        np.testing.assert_allclose(found.mean, expected_statistics.mean, atol=1e-5)


ROWS: dict[str, Any] = {"layers": [0], "kinds": "qkvo", "attention": True}

STEP = int(os.environ.get("INTERRUPT_STEP", "7"))
"""The lines from one interrupt to the next. 1 takes five minutes."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "step", "settings"),
    [
        pytest.param("_end", 3, {"layers": [0], "statistics": True}, id="end"),
        pytest.param(None, STEP, ROWS, id="all"),
        pytest.param(None, STEP + 6, ROWS | {"statistics": True}, id="statistics"),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True], ids=["memory", "stream"])
def test_an_interrupted_pass_counts_whole_or_not_at_all(
    tmp_path: Path, function: str | None, step: int, settings: dict[str, Any], is_streamed: bool
) -> None:
    model = LLAMA.model()
    folder = tmp_path / "dataset"
    with torch.no_grad(), qk_sniffer.capture(model, to=folder if is_streamed else None, **settings) as captured:
        texts, whole = sweep(captured, model, function, step)
    check(captured, model, texts, whole, **settings)
    if not is_streamed:
        captured.save(folder)
    assert verify(folder).problems == 0
    check(qk_sniffer.open_dataset(folder), model, texts, whole, **settings)


@pytest.mark.slow
def test_rows_stay_when_a_read_is_interrupted() -> None:
    model = LLAMA.model()
    before = sys.gettrace()
    with torch.no_grad(), qk_sniffer.capture(model, layers=[0], statistics=True) as captured:
        for at in range(1, 1000, 2):
            model(input_ids=random_ids(1, 5, at))
            ctrl_c = CtrlC(at)
            sys.settrace(ctrl_c)
            try:
                captured.vectors(0, 0, "k")
                captured.statistics(0, "k")
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(before)
            tokens = 5 * captured.examples.num_rows
            assert len(captured.vectors(0, 0, "k").positions) == captured.statistics(0, "k").count[0] == tokens
            if ctrl_c.seen < at:
                assert at > 20
                return
    raise AssertionError("the read has too many lines")


@pytest.mark.parametrize("is_streamed", [False, True], ids=["memory", "stream"])
def test_a_capture_whose_pass_was_taken_in_part_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_streamed: bool
) -> None:
    model = LLAMA.model()
    original = PassRecorder._complete

    def interrupted_twice(self: PassRecorder, examples: Any) -> None:
        original(self, examples)
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    folder = tmp_path / "dataset"
    captured = qk_sniffer.capture(model, to=folder if is_streamed else None)
    with pytest.raises(CaptureError, match=r"interrupted twice.*Capture again"), torch.no_grad(), captured:
        model(input_ids=random_ids(1, 5))
        monkeypatch.setattr(PassRecorder, "_complete", interrupted_twice)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=random_ids(1, 5, seed=1))
        monkeypatch.undo()
        with pytest.raises(CaptureError, match="interrupted twice"):
            model(input_ids=random_ids(1, 5, seed=2))
    assert not (folder / "manifest.json").exists()
    with pytest.raises(CaptureError):
        captured.vectors(0, 0, "q")
    with pytest.raises(CaptureError):
        captured.save(tmp_path / "other")


class EnoughError(Exception):
    """The user's hook needs no more layers."""


@pytest.mark.parametrize("is_caught", [False, True])
def test_a_pass_inside_a_pass_is_refused(is_caught: bool) -> None:
    model: Any = LLAMA.model()
    outer, inner = random_ids(1, 12), random_ids(1, 12, seed=1)
    errors = []

    def hook(*_: Any) -> None:
        if errors:
            return
        try:
            model(input_ids=inner)
        except CaptureError as error:
            errors.append(str(error))
            if not is_caught:
                raise

    model.model.layers[1].register_forward_hook(hook)
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        if is_caught:
            model(input_ids=outer)
        else:
            with pytest.raises(CaptureError):
                model(input_ids=outer)
        model(input_ids=inner)
    assert "began inside another one" in errors[0]
    texts = {hash_of(ids): ids for ids in (outer, inner, random_ids(1, 3))}
    check(captured, model, texts, {hash_of(outer), hash_of(inner)} if is_caught else {hash_of(inner)})


def test_a_layer_that_a_hook_calls_in_a_pass_is_refused() -> None:
    model: Any = LLAMA.model()
    ids = random_ids(1, 12)

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        handle.remove()
        states = output[0] if isinstance(output, tuple) else output
        model.model.layers[2](torch.zeros_like(states), **kwargs)

    handle = model.model.layers[1].register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        with pytest.raises(CaptureError, match=r"layer 2 .* twice"):
            model(input_ids=ids, use_cache=False)
        model(input_ids=ids)
    check(captured, model, {hash_of(ids): ids, "": ids}, {hash_of(ids)})


def test_a_pass_that_a_hook_stops_early_is_dropped() -> None:
    model: Any = LLAMA.model()
    first, second = random_ids(1, 12), random_ids(1, 12, seed=1)

    def hook(*_: Any) -> None:
        handle.remove()
        raise EnoughError

    handle = model.model.layers[1].register_forward_hook(hook)
    with torch.no_grad(), qk_sniffer.capture(model) as captured:
        with pytest.raises(EnoughError):
            model(input_ids=first)
        model(input_ids=second)
    check(captured, model, {hash_of(first): first, hash_of(second): second}, {hash_of(second)})
