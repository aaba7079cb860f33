"""Streams and events of simulated CUDA devices.

A stream is a queue of work. An item waits there until the host needs its result, or until the order of the machine
lets it run. Items of one stream run one after the other; between streams, only events give an order.
"""

import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

ORDERS = ("at once", "late", "computing first", "copying first", "random")
"""When queued work runs.

`at once`: before the call returns. `late`: when the host waits for it, and then nothing that it does not need.
`computing first`: the default streams at once, others late. `copying first`: the reverse. `random`: some, at times.
"""


@dataclass(eq=False)
class Mark:
    """A place in a stream; done once all items before it have run."""

    stream: "Stream"
    done: bool = False


@dataclass(eq=False)
class Wait:
    """An item that holds its stream up until a mark, of any stream, is done."""

    mark: Mark


Item = Callable[[], None] | Mark | Wait


class Machine:
    """The streams of all devices. `waits` lists what made the host wait, as (operation, place in the code)."""

    def __init__(self, order: str, seed: int = 0) -> None:
        assert order in ORDERS, order
        self.order = order
        self.lock = threading.RLock()
        self.waits: list[tuple[str, str]] = []
        self.streams: list[Stream] = []
        self._random = random.Random(seed)
        self._default: dict[torch.device, Stream] = {}
        self._current: dict[torch.device, Stream] = {}

    def current(self, device: "torch.device | str") -> "Stream":
        """Returns the stream that work on a device goes to."""
        place = numbered(device)
        if place not in self._default:
            self._default[place] = Stream(self, place)
        return self._current.get(place, self._default[place])

    def enter(self, stream: "Stream") -> None:
        """Makes `stream` the current one of its device."""
        self._current[stream.device] = stream

    def queue(self, stream: "Stream", item: Item) -> None:
        """Queues an item, and runs what the order lets run now."""
        with self.lock:
            stream.items.append(item)
            if self.order == "at once":
                self._drain(self.streams)
            elif self.order == "computing first":
                self._drain(self._default.values())
            elif self.order == "copying first":
                self._drain([each for each in self.streams if each not in self._default.values()])
            elif self.order == "random" and self._random.random() < 0.5:
                for _ in range(self._random.randrange(4)):
                    self._run_any()

    def wait_for(self, mark: Mark) -> None:
        """Runs work until `mark` is done."""
        with self.lock:
            while not mark.done:
                if self.order == "random":
                    self._run_any()
                    continue
                stream = mark.stream
                while not stream.may_run():
                    item = stream.items[0]
                    assert isinstance(item, Wait)
                    stream = item.mark.stream
                stream.run_next()

    def wait_for_device(self, device: torch.device) -> None:
        """Runs all work of a device."""
        for stream in [each for each in self.streams if each.device == device]:
            stream.synchronize()

    def host_waits(self, device: torch.device, operation: str) -> None:
        """Notes that the host waits for the current stream of a device, and runs its work."""
        self.waits.append((operation, _place()))
        self.current(device).synchronize()

    def _drain(self, streams: Iterable["Stream"]) -> None:
        streams = list(streams)
        while ready := [stream for stream in streams if stream.may_run()]:
            for stream in ready:
                stream.run_next()

    def _run_any(self) -> None:
        if ready := [stream for stream in self.streams if stream.may_run()]:
            self._random.choice(ready).run_next()


@dataclass(eq=False)
class Stream:
    """Has the interface of `torch.cuda.Stream`."""

    machine: Machine
    device: torch.device
    items: deque[Item] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.machine.streams.append(self)

    def may_run(self) -> bool:
        """Whether the next item can run now."""
        if not self.items:
            return False
        item = self.items[0]
        return not isinstance(item, Wait) or item.mark.done

    def run_next(self) -> None:
        item = self.items.popleft()
        if isinstance(item, Mark):
            item.done = True
        elif not isinstance(item, Wait):
            with torch.inference_mode():  # the memory may be that of inference tensors
                item()

    def mark(self) -> Mark:
        mark = Mark(self)
        self.machine.queue(self, mark)
        return mark

    def wait_event(self, event: "Event") -> None:
        if event.mark is not None:
            self.machine.queue(self, Wait(event.mark))

    def wait_stream(self, other: "Stream") -> None:
        self.machine.queue(self, Wait(other.mark()))

    def synchronize(self) -> None:
        self.machine.wait_for(self.mark())


class Event:
    """Has the interface of `torch.cuda.Event`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.mark: Mark | None = None  # of the last `record`

    def record(self, stream: Stream | None = None) -> None:
        self.mark = (stream or self._machine.current("cuda")).mark()

    def synchronize(self) -> None:
        if self.mark is not None:
            self._machine.wait_for(self.mark)

    def query(self) -> bool:
        return self.mark is None or self.mark.done


def numbered(device: "torch.device | str") -> torch.device:
    """Returns the device with its number: `cuda` is `cuda:0`."""
    place = torch.device(device)
    return torch.device("cuda", 0) if place.type == "cuda" and place.index is None else place


def _place() -> str:
    """Names the innermost line of code that is neither torch's nor the simulator's."""
    frame = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or "/simulated_cuda/" in frame.f_code.co_filename:
        assert frame.f_back is not None
        frame = frame.f_back
    file = "/".join(frame.f_code.co_filename.rsplit("/", 2)[1:])
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
