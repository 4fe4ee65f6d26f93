"""A headless Chromium that opens a page of ours, without the network: driven by its DevTools protocol."""

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium")
"""None where it is not installed."""
_ADDRESS = re.compile(rb"DevTools listening on (ws://\S+)")


class Browser:
    """One tab. faults: everything that a console would show in red or yellow."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, session: str) -> None:
        self.faults: list[str] = []
        self._socket, self._session, self._numbers = socket, session, itertools.count(1)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result. Collects faults meanwhile."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, "sessionId": self._session}
        await self._socket.send_json(message)
        while True:
            answer = await self._socket.receive_json()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._collect(answer)

    def _collect(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(parameters["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled":
            if parameters["type"] in ("error", "warning", "assert"):
                self.faults.append(json.dumps(parameters["args"]))
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.faults.append(json.dumps(parameters["entry"]))

    async def open(self, address: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show an address in a window of this size. width, height: CSS pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Page.navigate", url="about:blank")
        await self.call("Page.navigate", url=address)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def value(self, expression: str) -> Any:
        """The value of a JavaScript expression, a promise's result included."""
        result = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until the expression is true."""
        while not await self.value(f"Boolean({expression})"):
            await asyncio.sleep(0.02)

    async def press(self, key: str) -> None:
        """Press and release a key, such as "Tab" or "ArrowRight"."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "Home": 36, "End": 35}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        code = codes.get(key, ord(key[0].upper()))
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        for kind in ("keyDown", "keyUp"):
            parameters = {"type": kind, "key": key, "windowsVirtualKeyCode": code}
            if kind == "keyDown" and text:
                parameters["text"] = text
            await self.call("Input.dispatchKeyEvent", **parameters)

    async def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write what is shown as PNG; whole: the page to its end."""
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Browser]:
    """Start Chromium with an empty profile in this folder, and end it. It can reach loopback only."""
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio"),
        *("--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
        *("--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"),
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        env=os.environ | {"HOME": str(profile)},
    )
    assert process.stderr is not None
    try:
        while (found := _ADDRESS.search(await process.stderr.readline())) is None:
            assert process.returncode is None
        drain = asyncio.create_task(process.stderr.read())
        async with (
            aiohttp.ClientSession() as client,
            client.ws_connect(found[1].decode(), max_msg_size=2**28) as socket,
        ):
            yield await _first_tab(socket)
            await socket.send_json({"id": 0, "method": "Browser.close"})
            await process.wait()
        await drain
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _first_tab(socket: aiohttp.ClientWebSocketResponse) -> Browser:
    await socket.send_json({"id": -1, "method": "Target.createTarget", "params": {"url": "about:blank"}})
    target = (await _answer(socket, -1))["targetId"]
    attach = {"targetId": target, "flatten": True}
    await socket.send_json({"id": -2, "method": "Target.attachToTarget", "params": attach})
    tab = Browser(socket, (await _answer(socket, -2))["sessionId"])
    for domain in ("Page", "Runtime", "Log"):
        await tab.call(f"{domain}.enable")
    return tab


async def _answer(socket: aiohttp.ClientWebSocketResponse, number: int) -> dict[str, Any]:
    while (answer := await socket.receive_json()).get("id") != number:
        pass
    return answer["result"]
