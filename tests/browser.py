"""Headless Chromium, driven over its DevTools protocol through a pipe: nothing is needed beside the browser."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
PATIENCE = 60.0  # seconds for anything to happen; a test that fails waits this long

# What the browser would ask for by itself stays unasked, and no name is looked up.
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
          "--disable-background-networking", "--disable-component-update", "--disable-sync",
          "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--hide-scrollbars", "--remote-debugging-pipe")

# Chromium reads commands from descriptor 3 and writes to 4; these may be taken in our own process.
_LAUNCH = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])"""


class Browser:
    """A browser with one page.

    Args:
        profile: an empty folder for its files.

    Attributes:
        requests: the addresses of all that the page asked for, data: and blob: included.
        complaints: what it wrote to its console as warnings and errors, scripts that failed included.
    """

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._number, self._rest, self._session = 0, b"", {}
        (commands, self._commands), (self._messages, messages) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, messages)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *map(str, high), CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=high, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (commands, messages, *high):
            os.close(end)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        os.close(self._commands)  # it ends when nobody is there to command it
        self._process.wait(PATIENCE)
        os.close(self._messages)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; events that come meanwhile are noted."""
        number = self._post(method, parameters)
        while (answer := self._receive()).get("id") != number:
            pass
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _post(self, method: str, parameters: dict[str, Any]) -> int:
        """Call a method and go on; the number that its answer will have."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        return self._number

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._messages], [], [], PATIENCE)[0], "the browser says nothing"
            received = os.read(self._messages, 1 << 20)
            assert received, "the browser is gone"
            self._rest += received
        message, _, self._rest = self._rest.partition(b"\0")
        event = json.loads(message)
        self._note(event.get("method"), event.get("params"))
        return event

    def _note(self, method: str | None, event: Any) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.requests.append(event["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(event["exceptionDetails"]["exception"]["description"])
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("warning", "error"):
            self.complaints.append(event["entry"]["text"])

    def open(self, address: str) -> None:
        """Go to an address and wait until it is loaded."""
        assert "errorText" not in self.send("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page, once it is settled if it is a promise."""
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str) -> Any:
        """Wait for an expression to become true, and return its value."""
        deadline = time.monotonic() + PATIENCE
        while not (value := self.evaluate(script)):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        """What is to be read in the first element that a CSS selector finds."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def place(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width, height of an element, in the window's pixels."""
        box = self.evaluate(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        return box["x"], box["y"], box["width"], box["height"]

    def drag(self, points: Sequence[tuple[float, float]]) -> None:
        """Press the mouse at the first point, move it through the others, let it go."""
        events = [("mousePressed", points[0]), *(("mouseMoved", point) for point in points[1:])]
        for kind, (x, y) in events:  # a page takes them as they come; only the end is waited for
            self._post("Input.dispatchMouseEvent", self._mouse(kind, x, y))
        self.send("Input.dispatchMouseEvent", **self._mouse("mouseReleased", *points[-1]))

    @staticmethod
    def _mouse(kind: str, x: float, y: float) -> dict[str, Any]:
        return {"type": kind, "x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}

    def click(self, selector: str) -> None:
        """Click the middle of an element."""
        left, top, width, height = self.place(selector)
        self.drag([(left + width / 2, top + height / 2)])

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key, by its name in KeyboardEvent.key; modifiers: 8 is Shift."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = {"Tab": 9, "Enter": 13, " ": 32}.get(key, 0)
        event = {"key": key, "modifiers": modifiers, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **event,
                  **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def look(self, *, width: int = 1040, height: int = 820, dark: bool = False) -> None:
        """Set the window's size in pixels and the colours that its user prefers."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """Write the page as a PNG; only the window's part of it unless ``whole``."""
        taken = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(taken["data"]))
