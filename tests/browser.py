"""A real browser for tests: headless Chromium, driven over its DevTools protocol, by what a person would do."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp

chromium: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
wait_s: Final = 60.0  # a busy machine starts a browser in ten


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol; its result. Events are passed over."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(wait_s):
            while True:
                told: dict[str, Any] = json.loads((await self._socket.receive()).data)
                if told.get("id") == number:
                    assert "error" not in told, told
                    result: dict[str, Any] = told["result"]
                    return result

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        told = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, script: str) -> Any:
        """Wait for an expression to be true; its value."""
        async with asyncio.timeout(wait_s):
            while not (value := await self.run(script)):
                await asyncio.sleep(0.05)
        return value

    async def open(self, url: str) -> None:
        """Go to an address, and wait until its page is there."""
        await self.call("Page.navigate", url="about:blank")
        await self.until("location.href === 'about:blank'")
        await self.call("Page.navigate", url=url)
        await self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    async def picture(self, path: Path) -> None:
        """Write what is seen, as PNG."""
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot", captureBeyondViewport=True))["data"]))


@asynccontextmanager
async def browser(folder: Path, *, width: int = 1000, height: int = 760) -> AsyncIterator[Page]:
    """A browser with a profile of its own; what it saves lies in ``folder``."""
    assert chromium is not None
    profile = folder / "profile"
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--remote-debugging-port=0")
    process = await asyncio.create_subprocess_exec(
        chromium, *options, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(wait_s):
            while not (port := profile / "DevToolsActivePort").exists() or not port.read_text().strip():
                await asyncio.sleep(0.05)
        async with aiohttp.ClientSession() as session:
            base = f"http://127.0.0.1:{port.read_text().split()[0]}"
            async with session.get(f"{base}/json/list") as answer:
                (tab,) = [each for each in await answer.json() if each["type"] == "page"]
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=2**28) as socket:
                page = Page(socket)
                await page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
                yield page
    finally:
        process.terminate()
        await process.wait()
