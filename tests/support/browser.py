"""A real browser without a window, controlled through a pair of pipes: no port is opened."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_SILENCE_SECONDS = 120.0
_KEY_CODES = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36} | {
    f"Arrow{side}": 37 + place for place, side in enumerate(("Left", "Up", "Right", "Down"))
}


class Tab:
    """One page. events: what the browser has reported so far, by the protocol's names."""

    def __init__(self, commands: int, answers: int) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._commands, self._answers = commands, answers
        self._numbers, self._rest = count(1), b""
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def look(self, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Give the window a size in CSS pixels, and the person a preference for light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path | str) -> None:
        """Load a file or an address, and wait until it is loaded and its script has run."""
        if isinstance(page, str):  # one that differs in what follows its # would not be loaded again
            self._load("about:blank")
        self._load(page if isinstance(page, str) else page.as_uri())

    def _load(self, address: str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=address)
        while "Page.loadEventFired" not in self.names():
            self._receive()

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; the page's policy does not apply to it."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + _SILENCE_SECONDS
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Press and release a key, such as "Tab" or "ArrowRight"."""
        code = _KEY_CODES.get(key, ord(key[0].upper()))
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        stroke = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **stroke, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **stroke)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        path.write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        )

    def faults(self) -> list[str]:
        """What a console would show in red or yellow since the page was opened."""
        found = []
        for name, event in self.events:
            level = (
                event.get("type")
                if name == "Runtime.consoleAPICalled"
                else event.get("entry", {}).get("level")
            )
            if name == "Runtime.exceptionThrown" or level in ("error", "warning", "assert"):
                found.append(json.dumps(event))
        return found

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], _SILENCE_SECONDS)
            piece = os.read(self._answers, 1 << 16) if ready else b""
            assert piece, "the browser has ended, or hangs"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """Start Chromium with its files in `folder`, and end it with all its processes."""
    assert CHROMIUM is not None
    command_end, commands = os.pipe()
    answers, answer_end = os.pipe()
    options = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe"
    # The browser reads commands from descriptor 3 and answers to descriptor 4.
    start = f'exec "$0" {options} "--user-data-dir=$1" about:blank 3<&{command_end} 4>&{answer_end}'
    process = subprocess.Popen(
        ["bash", "-c", start, CHROMIUM, str(folder)],
        pass_fds=(command_end, answer_end),
        stderr=subprocess.DEVNULL,
    )
    for end in (command_end, answer_end):
        os.close(end)
    try:
        tab = Tab(commands, answers)
        yield tab
    finally:
        os.close(commands)  # the browser ends with its controller
        try:
            process.wait(_SILENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        os.close(answers)
