"""Captures the forward passes that the user runs on a model: watches its decoder, and writes the rows of each pass.

Before a pass, the tokens to keep are chosen from its positions, as a job does. In the pass, each (layer, kind) costs
one gather. When the pass ends, its rows count, all at once; those of a pass that fails or is interrupted are dropped.
The pass itself is not changed.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import GenerationMixin, StoppingCriteriaList

from qk_sniffer.backbone.caches import changes_of
from qk_sniffer.backbone.slots import Slots
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.capture.attention_summary import Summarizer
from qk_sniffer.capture.gather import DeviceIndices, TokenIndices, send
from qk_sniffer.capture.moments import states_by_stage
from qk_sniffer.capture.row_writer import BatchRows, RowWriter, other_states_by_kind, states_by_kind
from qk_sniffer.capture.sampling import Picks, Sampler
from qk_sniffer.errors import CaptureError, StoreError
from qk_sniffer.machine import available_memory
from qk_sniffer.notebook.facts import CaptureFacts
from qk_sniffer.notebook.interrupts import deferred_interrupts
from qk_sniffer.notebook.memory import PassSink
from qk_sniffer.notebook.settings import naming_arguments
from qk_sniffer.notebook.statistics import PassStatistics
from qk_sniffer.notebook.tokens import Example, Examples, PassTokens
from qk_sniffer.store.layout import KIND_NAMES, KINDS, WIDTHS
from qk_sniffer.text import compact_ranges, in_mb
from qk_sniffer.timing import Stages

MEMORY_SHARE = 0.9
"""The largest share of the available memory that the rows of a pass may take."""

SMALL_BYTES = 16 << 20
"""The rows of a pass for which the available memory is not looked up, which takes as long as a step of decoding."""

Key = tuple[int, str]


@dataclass(eq=False)
class _Pass:
    """A pass that runs."""

    frame: FrameType
    """The call that runs it."""
    arguments: "_Arguments"
    tokens: PassTokens
    rows: BatchRows
    wanted: dict[Key, DeviceIndices]
    """The tokens to capture of each (layer, kind) that the pass has not shown yet, by their places in the pass."""
    caches: list[Any]
    spans: list[list[tuple[int, int]]] = field(default_factory=list)
    shown: set[int] = field(default_factory=set)
    """The captured layers that have called attention."""

    def is_around(self, frame: FrameType | None) -> bool:
        """Returns whether `frame` is called in the pass. One that failed runs no more."""
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


class _Arguments:
    """The arguments of a call of the decoder that tell its tokens."""

    NAMES = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values")

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The names are those of the class: a forward that the user or a library has put in its place may have none.
        named = dict(zip([*inspect.signature(type(module).forward).parameters][1:], args, strict=False)) | kwargs
        self.by_name = {name: named.get(name) for name in self.NAMES}
        self._changes = {name: changes_of(value) for name, value in self.by_name.items()}

    def differing(self, later: "_Arguments") -> list[str]:
        """Returns the names of those that are others in a later look at the same call."""
        return [
            name
            for name, value in self.by_name.items()
            if later.by_name[name] is not value or later._changes[name] != self._changes[name]
        ]


class PassRecorder:
    """Records the passes of a decoder, in the thread that opens it."""

    def __init__(
        self,
        facts: CaptureFacts,
        sampler: Sampler,
        sink: PassSink,
        examples: Examples,
        *,
        statistics: PassStatistics | None = None,
        summarizer: Summarizer | None = None,
        room: Callable[[int], str | None] | None = None,
    ) -> None:
        """`room`, if given, receives the number of rows that a pass will add. It returns why it must not, or None."""
        self._backbone = facts.backbone
        self._sampler = sampler
        self._sink = sink
        self._writer = RowWriter(facts.selection, sink, Stages())
        self._examples = examples
        self._statistics = statistics
        self._summarizer = summarizer
        self._room = room
        widths = {layer.heads.layer: layer.to_dict() for layer in facts.layers}
        self._row_bytes = {
            (layer, kind): len(heads) * widths[layer][WIDTHS[kind]] * facts.backbone.dtype.itemsize
            for layer, kind, heads in facts.selection
        }
        self._both_stages = facts.both_stages
        self._layers = {layer for layer, _ in self._writer.heads}
        self._pass: _Pass | None = None
        self._thread = threading.get_ident()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Records the passes of this thread inside the context. On exit, all examples are complete."""
        self._thread = threading.get_ident()
        watching = ExitStack()
        with deferred_interrupts():
            watching.enter_context(self._watching())
        has_failed = True
        try:
            yield
            has_failed = False
        finally:
            # The error that ended the block comes before that of a change that was not made whole.
            with deferred_interrupts(), watching, suppress(CaptureError) if has_failed else nullcontext():
                self._close()

    @contextmanager
    def _watching(self) -> Iterator[None]:
        decoder = self._backbone.decoder
        shows_outputs = any(kind == "o" for _, kind in self._writer.heads)
        with ExitStack() as stack:
            stack.enter_context(
                self._backbone.tapped(
                    self._on_call,
                    on_output=self._on_output if shows_outputs else None,
                    both_stages=self._both_stages,
                    slots=self._slots,
                    in_words=naming_arguments,
                )
            )
            stack.enter_context(_generation_watched(decoder, self._note_generation, self._note_stops))
            for handle in (
                register_optimizer_step_post_hook(lambda optimizer, *_: self._backbone.note_step(optimizer)),
                decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
                decoder.register_forward_hook(self._end, with_kwargs=True),
            ):
                stack.callback(handle.remove)
            yield

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            return
        frame = sys._getframe(1)
        if self._pass is not None and self._pass.is_around(frame):
            raise CaptureError(
                f"a forward pass of {type(module).__name__} began inside another one, as a hook runs it: their rows "
                "cannot be told apart. Run it before the other one, or outside of the block"
            )
        self._drop()
        self._backbone.begin_pass()
        arguments = _Arguments(module, args, kwargs)
        with self._apart():
            tokens = self._examples.begin(arguments.by_name)
            picks = self._picks(tokens)
            self._check_room(picks)
            device = self._backbone.device
            distinct = {id(each): each for each in picks.values()}
            places = {key: TokenIndices.of(_placed(each, tokens), device) for key, each in distinct.items()}
            index = np.array([example.number for example in tokens.examples], np.int64)
            self._pass = _Pass(
                frame,
                arguments,
                tokens,
                BatchRows(index, np.zeros_like(index), position=tokens.position),
                send({key: places[id(each)] for key, each in picks.items()}, device),
                [arguments.by_name["past_key_values"]],
                [] if self._statistics is None else tokens.spans(self._statistics.skip_tokens),
            )

    def _end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() != self._thread or self._pass is None:
            return
        try:
            self._backbone.check_pass()
        except CaptureError:
            self._drop()
            raise
        if differing := self._pass.arguments.differing(_Arguments(module, args, kwargs)):
            self._drop()
            raise CaptureError(
                f"{' and '.join(differing)} of {type(module).__name__} changed after the capture had seen this forward "
                "pass begin, as by a hook that was registered inside of the block: register it before the block"
            )
        if wanted := self._pass.wanted:
            layers = compact_ranges({layer for layer, _ in wanted})
            kinds = [KIND_NAMES[kind] for kind in KINDS if any(kind == each for _, each in wanted)]
            self._drop()
            raise CaptureError(
                f"this forward pass showed no {' and no '.join(kinds)} of layers {layers}, as if it ended early or "
                "skipped them: its rows are dropped. Leave these layers out with layers=, or run such passes outside "
                "of the block"
            )
        values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        with self._apart(), self._sink.changes.change(StoreError):
            running, self._pass = self._pass, None
            self._backbone.keep_state()
            self._sink.end_pass()
            if self._statistics is not None:
                self._statistics.end_pass()
            self._complete(self._examples.end(running.tokens, [*running.caches, *values]))

    def _drop(self) -> None:
        """Drops the pass that has not ended: it failed, or the user ended it."""
        if self._pass is None:
            return
        with self._sink.changes.change():
            running, self._pass = self._pass, None
            self._sink.drop_pass([example.number for example in running.tokens.examples])
            if self._statistics is not None:
                self._statistics.drop_pass()
            self._examples.drop(running.caches)

    def _close(self) -> None:
        self._drop()
        with self._sink.changes.change(StoreError):
            self._complete(self._examples.take_open())

    def _complete(self, examples: list[Example]) -> None:
        if records := [example.record() for example in examples if example.stop]:
            self._sink.complete(records)

    def _note_generation(self, is_generating: bool) -> None:
        with self._sink.changes.change():
            self._examples.generates(is_generating)

    def _note_stops(self, ids: torch.Tensor, stops: list[bool]) -> None:
        with self._sink.changes.change():
            self._examples.note_stops(ids, stops)

    def _apart(self) -> AbstractContextManager[None]:
        return _apart(self._backbone.device.type)

    def _slots(self, layer: int) -> Slots | None:
        # No pass of the decoder runs in the recomputation of gradient checkpointing.
        return None if self._pass is None or layer not in self._layers else self._pass.tokens.slots

    def _on_call(self, call: AttentionCall) -> None:
        if self._pass is None or call.layer not in self._layers:
            return
        if call.layer in self._pass.shown:
            raise CaptureError(
                f"layer {call.layer} called attention twice in one forward pass, as if a hook runs it: its rows cannot "
                "be told apart. Run it outside of the pass, or leave it out with layers="
            )
        self._pass.shown.add(call.layer)
        with self._apart():
            queries = self._pass.wanted.get((call.layer, "q"))
            states, others = states_by_kind(call), other_states_by_kind(call)
            for kind, of_kind in states.items():
                self._write(self._pass, call.layer, kind, of_kind, others.get(kind))
            if queries is not None and self._summarizer is not None:
                self._writer.write_summary(self._pass.rows, call, queries, self._summarizer)

    def _on_output(self, call: AttentionCall, output: torch.Tensor | None) -> None:
        if self._pass is not None and output is not None:
            with self._apart():
                self._write(self._pass, call.layer, "o", output, None)

    def _write(self, running: _Pass, layer: int, kind: str, states: torch.Tensor, others: torch.Tensor | None) -> None:
        if (tokens := running.wanted.pop((layer, kind), None)) is None:
            return
        try:
            self._writer.write(running.rows, layer, kind, states, tokens)
        except ValueError as error:
            raise CaptureError(
                f"the rows of layer {layer} cannot be kept: {error}. All passes of a capture must compute in one dtype"
            ) from error
        if self._statistics is not None:
            stage = "pre" if self._backbone.pre_rope else "post"
            self._statistics.add(layer, kind, states_by_stage(stage, kind, states, others), running.spans)

    def _picks(self, tokens: PassTokens) -> dict[Key, Picks]:
        """Returns the kept tokens of a pass for each (layer, kind), by row and position."""
        limit = self._sampler.config.max_rows_per_example
        if limit is not None and any(example.stop > example.first for example in tokens.examples):
            raise CaptureError(
                "sampler.max_rows_per_example compares the tokens of a whole example, and this pass continues one: "
                "leave it out"
            )
        return self._sampler.plan(
            [example.number for example in tokens.examples],
            tokens.lengths.tolist(),
            list(self._writer.heads),
            starts=tokens.starts.tolist(),
        )

    def _check_room(self, picks: Mapping[Key, Picks]) -> None:
        """Checks that the rows of a pass fit in memory, and that they are not too many.

        Raises:
            CaptureError: they do not, or are.
        """
        if self._room is None:
            return
        rows = sum(len(self._writer.heads[key].numbers) * len(each.row) for key, each in picks.items())
        nbytes = sum(self._row_bytes[key] * len(each.row) for key, each in picks.items())
        reason = self._room(rows)
        if reason is None and nbytes > SMALL_BYTES and nbytes > MEMORY_SHARE * available_memory():
            reason = f"and {in_mb(available_memory())} of memory are available"
        if reason is not None:
            raise CaptureError(
                f"this forward pass would add {rows:,} rows, {in_mb(nbytes)}, {reason}. Capture fewer layers or heads, "
                "sample tokens (sampler='log_uniform'), or write to disk (to='folder')"
            )


@contextmanager
def _generation_watched(
    decoder: nn.Module, generates: Callable[[bool], None], note: Callable[[torch.Tensor, list[bool]], None]
) -> Iterator[None]:
    """Watches calls of `generate`, in this thread, of models that have the decoder.

    Calls `generates` when one begins and when it ends, and `note` after each of its steps, with the tokens and the rows
    that it stops. Other callers of the same stopping criteria may go on with a row that they stop.
    """
    thread = threading.get_ident()
    generate, stops_of = GenerationMixin.generate, StoppingCriteriaList.__call__
    running: list[bool] = []  # whether each of the calls, one in the other, is of such a model

    @functools.wraps(generate)
    def generating(model: Any, *args: Any, **arguments: Any) -> Any:
        if threading.get_ident() != thread:
            return generate(model, *args, **arguments)
        is_own = not any(running) and any(module is decoder for module in model.modules())
        running.append(is_own)
        try:
            if is_own:
                generates(True)
            return generate(model, *args, **arguments)
        finally:
            running.pop()
            if is_own:
                generates(False)

    @functools.wraps(stops_of)
    def noting(criteria: StoppingCriteriaList, input_ids: torch.Tensor, *args: Any, **arguments: Any) -> Any:
        stops = stops_of(criteria, input_ids, *args, **arguments)
        if threading.get_ident() == thread and running and running[-1]:
            note(input_ids, stops.tolist())
        return stops

    GenerationMixin.generate = generating  # type: ignore[method-assign, assignment]
    StoppingCriteriaList.__call__ = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        StoppingCriteriaList.__call__ = stops_of  # type: ignore[method-assign]
        GenerationMixin.generate = generate  # type: ignore[method-assign]


def _placed(picks: Picks, tokens: PassTokens) -> Picks:
    """Returns the tokens by row and place in the pass."""
    return Picks(picks.row, tokens.place(picks.row, picks.position))


@contextmanager
def _apart(device_type: str) -> Iterator[None]:
    """Computes apart from the pass: without gradients, in the dtypes of the tensors, and outside of inference mode.

    A tensor that is made in inference mode cannot be changed outside of it. An interrupt between these contexts would
    leave one of them open.
    """
    without_casts = torch.autocast(device_type, enabled=False)
    with deferred_interrupts(), torch.inference_mode(mode=False), torch.no_grad(), without_casts:
        yield
