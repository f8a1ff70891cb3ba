"""A vault for programs without an event loop: it is opened in a thread of its own, and calls wait for their results there.

Law: knows nothing of what is called. After a fork the child opens the vault anew when it first asks, as threads and connections stay
with the parent: data loaders fork.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, TypeVar

from medshard.vault import Vault
from medshard_protocol.errors import Unavailable

close_wait_s: Final = 10.0

Result = TypeVar("Result")


class _Serving:
    """One thread with one open vault."""

    def __init__(self, home: Path, passphrase: str) -> None:
        self._opened: Future[Vault] = Future()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(home, passphrase), name="medshard-vault", daemon=True)
        self._thread.start()
        try:
            self.vault = self._opened.result()
        except BaseException:
            self._thread.join()
            raise

    def _run(self, home: Path, passphrase: str) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(home, passphrase))

    async def _serve(self, home: Path, passphrase: str) -> None:
        try:
            async with Vault.open(home, passphrase) as vault:
                self._opened.set_result(vault)
                await self._stop.wait()
        except BaseException as error:
            if self._opened.done():
                raise
            self._opened.set_exception(error)

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run it there."""
        if not self._thread.is_alive():
            work.close()
            raise Unavailable("the vault was closed", hint="Open it again.")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End the thread, once what it does has ended."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(close_wait_s)


class BlockingVault:
    """Opens when it is first asked. ``passphrase`` is called then, in the thread that asks. Any thread may call."""

    def __init__(self, home: Path, passphrase: Callable[[], str]) -> None:
        self._home = home
        self._passphrase = passphrase
        self._lock = threading.Lock()
        self._serving: _Serving | None = None
        self._pid = 0
        self._end: weakref.finalize[Any, Any] | None = None

    def call(self, work: Callable[[Vault], Coroutine[Any, Any, Result]]) -> Result:
        """Wait for what ``work`` does with the vault. Raises what it raises, and what ``Vault.open`` does."""
        serving = self._ready()
        return serving.call(work(serving.vault))

    def close(self) -> None:
        """Close the vault; the next call opens it again."""
        with self._lock:
            if self._serving is not None and self._pid == os.getpid():
                self._serving.close()
            if self._end is not None:
                self._end.detach()
            self._serving = self._end = None

    def _ready(self) -> _Serving:
        if self._pid != os.getpid():
            self._lock = threading.Lock()  # the parent may have held it
            self._serving = None
        with self._lock:
            if self._serving is None:
                self._serving = _Serving(self._home, self._passphrase())
                self._pid = os.getpid()
                self._end = weakref.finalize(self, _close, self._serving, self._pid)
            return self._serving


def _close(serving: _Serving, pid: int) -> None:
    if pid == os.getpid():
        serving.close()
