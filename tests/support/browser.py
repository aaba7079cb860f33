"""Opens pages in a headless Chromium, by its DevTools protocol over pipes."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAM = shutil.which("chromium")

needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="needs Debian's chromium")

_MOST_S = 60


class Page:
    """A page in the browser. `problems` are messages of the console, errors and requests that leave the machine."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self._seen: set[str] = set()
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol; returns its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer["error"]
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, path: Path, fragment: str = "") -> None:
        """Opens a file, and waits until the report is complete and its charts are drawn."""
        self._seen.discard("Page.loadEventFired")
        self.call("Page.navigate", url=path.as_uri() + fragment)
        while "Page.loadEventFired" not in self._seen:
            self._note(self._next())
        self.wait("document.body?.dataset.ready === 'yes'")
        self.wait("document.querySelectorAll('canvas').length > 0")

    def value(self, script: str) -> Any:
        """Returns the value of an expression, which may be a promise."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Waits, frame by frame, until an expression is true."""
        script = f"""new Promise((done, failed) => {{
            const start = performance.now();
            const look = () => {{
                if ({condition}) done(true);
                else if (performance.now() - start > {1000 * _MOST_S}) failed(new Error("it never came"));
                else requestAnimationFrame(look);
            }};
            look();
        }})"""
        assert self.value(script) is True, condition

    def size(self, width: int, height: int, scheme: str = "light") -> None:
        """Sets the size of the window, and whether its user prefers light or dark pages."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def mouse(self, kind: str, x: float, y: float) -> None:
        """Moves the mouse ("mouseMoved"), or presses and releases its button there ("click")."""
        steps = ("mousePressed", "mouseReleased") if kind == "click" else (kind,)
        for step in steps:
            button = {"button": "left", "clickCount": 1} if kind == "click" else {}
            self.call("Input.dispatchMouseEvent", type=step, x=x, y=y, **button)

    def screenshot(self, path: Path, *, height: float | None = None) -> None:
        """Saves what the window shows, or the page from its top down to a height."""
        clip: dict[str, Any] = {}
        if height is not None:
            width = self.value("innerWidth")
            clip = {
                "captureBeyondViewport": True,
                "clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1},
            }
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **clip)["data"]))

    def _note(self, event: dict[str, Any]) -> None:
        name, facts = event.get("method", ""), event.get("params", {})
        self._seen.add(name)
        if name in (
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
            "Page.javascriptDialogOpening",
        ):
            self.problems.append(json.dumps(facts))
        elif name == "Network.requestWillBeSent" and not facts["request"]["url"].startswith(("file:", "data:")):
            self.problems.append(facts["request"]["url"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def browser() -> Iterator[Page]:
    """Starts a browser with a profile of its own, and yields an empty page."""
    assert PROGRAM is not None
    to_browser, of_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        # The protocol reads from descriptor 3 and writes to 4.
        script = f'exec "$@" 3<&{to_browser[0]} 4>&{of_browser[1]}'
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", PROGRAM, *flags, "--remote-debugging-pipe", "--no-first-run"],
            pass_fds=(to_browser[0], of_browser[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(of_browser[1])
        try:
            yield Page(of_browser[0], to_browser[1])
        finally:
            os.close(to_browser[1])  # the browser ends with its pipe
            os.close(of_browser[0])
            try:
                process.wait(timeout=_MOST_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
