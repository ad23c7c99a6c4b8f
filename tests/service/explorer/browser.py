"""A headless Chromium, driven over the pipe of its DevTools protocol: nothing to install beside it."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_S = 30.0
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-features=BackForwardCache",  # a page that was left would keep its feed waiting
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-pipe",
)
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "ArrowRight": (39, ""), "ArrowDown": (40, ""), "Escape": (27, "")}


def find() -> str | None:
    """A Chromium, where one is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab of a browser that was just started, and all it complained of and asked for.

    Attributes:
        complaints: Errors and warnings of the console, exceptions, and what the page's policy refused.
        requests: The URLs that were asked for.
    """

    def __init__(self, executable: str, profile: Path) -> None:
        from_us, to_browser = os.pipe()
        from_browser, to_us = os.pipe()
        # The browser reads its commands from file 3 and writes its answers to file 4.
        script = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, executable, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(from_us, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self._to, self._from = to_browser, from_browser
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self._events: deque[dict[str, Any]] = deque()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers to a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression on the page, awaited."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str, timeout_s: float = TIMEOUT_S) -> None:
        """Return once an expression is true, or an element is there."""
        deadline = time.monotonic() + timeout_s
        while not self._is_true(expression):
            if time.monotonic() > deadline:
                page = self.evaluate("document.body.innerText")
                raise AssertionError(f"after {timeout_s} s not yet: {expression}\n{self.complaints[:9]}\n{page}")
            time.sleep(0.02)

    def _is_true(self, expression: str) -> bool:
        try:
            return bool(self.evaluate(f"!!({expression})"))
        except AssertionError as error:
            if "navigated" not in str(error) and "context" not in str(error):
                raise
            return False  # of a page that was just being left

    def open(self, url: str) -> None:
        """Go there, with nothing noted yet."""
        self.command("Page.navigate", url="about:blank")
        self.complaints.clear()
        self.requests.clear()
        self.command("Page.navigate", url=url)
        page = url.partition("?")[0]  # the page may have written its address anew by then
        self.until(f"location.href.startsWith({json.dumps(page)}) && document.readyState === 'complete'")

    def press(self, key: str) -> None:
        """A key, as a hand presses it."""
        code, text = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            self.command(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **({"text": text} if kind == "keyDown" else {}),
            )

    def look(self, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """See the page by a screen of this size."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """The page as a PNG."""
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole=whole))
        path.write_bytes(base64.b64decode(shot["data"]))

    def hosts(self) -> set[str]:
        """Whom was asked for anything, data within the page aside."""
        return {urlsplit(url).netloc for url in self.requests if urlsplit(url).scheme not in {"data", "blob", "about"}}

    def close(self) -> None:
        """End it."""
        self._session = None
        try:
            self.command("Browser.close")
            self._process.wait(10)
        except (OSError, AssertionError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def _clip(self, *, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.command("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        """Keep what the page complains of and asks for."""
        notes: dict[str, Callable[[dict[str, Any]], None]] = {
            "Network.requestWillBeSent": lambda told: self.requests.append(told["request"]["url"]),
            "Network.webSocketCreated": lambda told: self.requests.append(told["url"]),
            "Runtime.exceptionThrown": lambda told: self.complaints.append(str(told["exceptionDetails"])),
            "Runtime.consoleAPICalled": self._console,
            "Log.entryAdded": self._logged,
        }
        if note := notes.get(event.get("method", "")):
            note(event["params"])

    def _console(self, told: dict[str, Any]) -> None:
        if told["type"] in {"error", "warning", "assert"}:
            self.complaints.append(str(told["args"]))

    def _logged(self, told: dict[str, Any]) -> None:
        entry = told["entry"]
        if entry["level"] in {"error", "warning"}:
            self.complaints.append(f"{entry['source']}: {entry['text']} {entry.get('url', '')}")
