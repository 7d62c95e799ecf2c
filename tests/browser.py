"""A browser that tests drive by its keys: Chromium over its DevTools protocol."""

import asyncio
import json
import shutil
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
_CODES = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Page:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.socket, self.sent = socket, 0

    async def call(self, method: str, **parameters) -> dict:
        self.sent += 1
        await self.socket.send_json({"id": self.sent, "method": method, "params": parameters})
        while True:
            got = json.loads((await self.socket.receive(timeout=30)).data)
            if got.get("id") == self.sent:
                assert "error" not in got, got
                return got["result"]

    async def value(self, script: str):
        """What a JavaScript expression is."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str) -> None:
        """Waits until an expression is true."""
        for _ in range(100):
            if await self.value(script):
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"{script} did not become true")

    async def press(self, *keys: str) -> None:
        for key in keys:
            text = "\r" if key == "Enter" else key if len(key) == 1 else ""
            what = {"key": key, "windowsVirtualKeyCode": _CODES.get(key, ord(key[0].upper()))}
            await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **what)
            await self.call("Input.dispatchKeyEvent", type="keyUp", **what)


@asynccontextmanager
async def opened(address: str, profile: Path):
    """A page of a browser of its own, which ends with it."""
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-port=0", address]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        told = profile / "DevToolsActivePort"
        for _ in range(300):
            if told.exists() and told.read_text():
                break
            await asyncio.sleep(0.1)
        port = told.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as listed:
                [url] = [page["webSocketDebuggerUrl"] for page in await listed.json() if page["type"] == "page"]
            async with session.ws_connect(url) as socket:
                yield Page(socket)
    finally:
        browser.terminate()
        browser.wait(30)
