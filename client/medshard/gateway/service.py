"""The running gateway: an archive, a DICOM node in front of it, a status page, and an orderly end.

Law: composes and decides nothing. On a signal no new work is taken, what runs is ended, and what waits in the spool is stored if the
nodes take it in time; what is left is there at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from medshard.gateway import sendonly
from medshard.gateway.archive import Archive
from medshard.gateway.blocks import CachedBlocks
from medshard.gateway.cache import BlockCache
from medshard.gateway.dimse.server import DimseServer, Listening, loopback
from medshard.gateway.indexing import gateway_id, open_catalog
from medshard.gateway.intake import Intake, Rules
from medshard.gateway.objects import StoreObjects
from medshard.gateway.spool import Spool
from medshard.gateway.sweeping import Sweeper
from medshard.gateway.web import WebRules, serving
from medshard.keys import VaultKeys
from medshard.sealing import hkdf
from medshard.sender import Sender
from medshard.vault import Vault
from medshard_protocol.errors import Malformed, MedshardError, Unavailable

associations_end_s: Final = 10.0
last_puts_s: Final = 60.0
cache_bytes_least: Final = 64 * 1024 * 1024  # frame tables and metadata of what is looked at need some room
follow_s: Final = 2.0  # how soon what another process has put into the vault is found
ask_s: Final = 10.0  # how soon what a sender elsewhere has put for it is
log = logging.getLogger("medshard.gateway")


@dataclass(frozen=True, slots=True)
class Settings:
    """All that ``serve`` needs."""

    folder: Path
    spool_bytes_max: int
    rules: Rules
    dimse: Listening | None
    status: tuple[str, int] | None
    web: WebRules | None = None
    cache_bytes_max: int = cache_bytes_least
    index: str = ""  # where the DICOM index is, unless in the vault's home


def cache_key(keys: VaultKeys) -> bytes:
    """What segments of the cache derive their keys from."""
    return hkdf(keys.at_home.root, b"", b"medshard/vault/v1/gateway-cache")


def spool_key(keys: VaultKeys) -> bytes:
    """What segments of the spool derive their keys from."""
    return hkdf(keys.at_home.root, b"", b"medshard/vault/v1/spool")


@asynccontextmanager
async def archive_of(vault: Vault, settings: Settings) -> AsyncIterator[Archive]:
    """An archive over a vault, started. Raises Conflict where another gateway has the spool."""
    settings.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.ExitStack() as stack:
        spool = Spool(settings.folder / "spool", spool_key(vault.keys), bytes_max=settings.spool_bytes_max)
        stack.callback(spool.close)
        catalog = await asyncio.to_thread(open_catalog, vault, settings.index, gateway_id(settings.folder))
        stack.callback(catalog.close)
        archive = Archive(vault, spool, catalog, StoreObjects(vault), settings.rules)
        await archive.start()
        yield archive


@asynccontextmanager
async def sending(sender: Sender, settings: Settings) -> AsyncIterator[Intake]:
    """The intake of what only sends, started. Raises Conflict where another gateway has the spool."""
    settings.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = sender.keys.derived("spool")
    with contextlib.closing(Spool(settings.folder / "spool", key, bytes_max=settings.spool_bytes_max)) as spool:
        async with sendonly.intake_of(sender, spool, settings.rules) as intake:
            yield intake


class Gateway:
    """What runs, as the status page shows it."""

    def __init__(self, archive: Intake, dimse: DimseServer | None) -> None:
        self.archive = archive
        self.dimse = dimse
        self._since = time.time()

    def status(self) -> dict[str, Any]:
        """Numbers, and no word of any patient."""
        waiting, open_series = self.archive.waiting()
        spool = self.archive.spool
        found: dict[str, Any] = {
            "up_seconds": round(time.time() - self._since),
            "spool": {
                "instances": waiting,
                "series": open_series,
                "bytes": spool.used_bytes,
                "bytes_max": spool.bytes_max,
                "damaged": len(self.archive.damaged),
            },
            "received": dict(self.archive.counts),
            "last_failure": self.archive.last_failure,
        }
        if isinstance(self.archive, Archive):
            try:
                found["archive"] = dict(zip(("studies", "series", "instances"), self.archive.catalog.counts(), strict=True))
            except Unavailable as error:
                found["last_failure"] = str(error)
        if self.dimse is not None:
            found["dimse"] = {"associations": self.dimse.associations, **self.dimse.counts}
        return found

    def metrics(self) -> str:
        """The same for Prometheus."""
        lines: list[str] = []
        for part, values in self.status().items():
            pairs = values.items() if isinstance(values, dict) else [("", values)]
            for name, value in pairs:
                if isinstance(value, int):
                    metric = "_".join(filter(None, ("medshard_gateway", part, name))).replace("-", "_")
                    lines.append(f"{metric} {value}")
        return "\n".join(lines) + "\n"


async def serve(source: Vault | Sender, settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Raises what opening raises, and OSError where an address cannot be listened on."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    opening = sending(source, settings) if isinstance(source, Sender) else archive_of(source, settings)
    async with opening as archive, contextlib.AsyncExitStack() as stack:
        dimse = DimseServer(archive, settings.dimse) if settings.dimse else None
        gateway = Gateway(archive, dimse)
        where: dict[str, str] = {}
        if settings.status is not None:
            await _status_page(stack, gateway, settings.status)
        if settings.web is not None:
            cache = await _cached(stack, archive, settings) if isinstance(archive, Archive) else None
            where["http"] = await stack.enter_async_context(serving(archive, cache, settings.web))
        if dimse is not None:
            dimse.start()
        works = [archive.watch, lambda: _follow(archive)] if isinstance(archive, Archive) else [archive.watch]
        tasks = [asyncio.create_task(_for_ever(work)) for work in works]
        tasks.append(asyncio.create_task(asyncio.to_thread(archive.spool.provide)))
        where |= {"dimse": f"{settings.dimse.host}:{dimse.port}"} if dimse and settings.dimse else {}
        _say("started", spooled=archive.waiting()[0], **where)
        try:
            await stop.wait()
        finally:
            _say("stopping")
            if dimse is not None:
                await asyncio.to_thread(dimse.stop, associations_end_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await _last_puts(archive)
            _say("stopped", left_in_spool=archive.waiting()[0])


async def _cached(stack: contextlib.AsyncExitStack, archive: Archive, settings: Settings) -> BlockCache:
    """What is read of this archive's vault goes through this cache from now on; nothing is in it of what was erased."""
    vault = archive.vault
    cache = BlockCache(settings.folder / "cache", cache_key(vault.keys), bytes_max=max(settings.cache_bytes_max, cache_bytes_least))
    stack.callback(cache.close)
    vault.ranges.blocks = blocks = CachedBlocks(cache)
    sweeper = Sweeper(vault.custody, blocks, settings.folder / "swept")
    await sweeper.sweep()
    archive.after_changes.append(sweeper.sweep)
    return cache


async def _last_puts(archive: Intake) -> None:
    try:
        async with asyncio.timeout(last_puts_s):
            await archive.settle()
    except (MedshardError, OSError, TimeoutError) as error:
        _say("not-stored", why=str(error))  # the spool has it


async def _for_ever(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Begin again after an error nobody foresaw: a gateway that stores nothing any more must not look as if it did."""
    while True:
        try:
            await work()
        except Exception:
            log.exception(json.dumps({"event": "bug"}))
        await asyncio.sleep(follow_s)


async def _follow(archive: Archive) -> None:
    asked = 0.0
    while True:
        await asyncio.sleep(follow_s)
        with contextlib.suppress(MedshardError):
            if time.monotonic() - asked > ask_s:
                asked = time.monotonic()
                await archive.ask()
            await archive.catch_up()


async def _status_page(stack: contextlib.AsyncExitStack, gateway: Gateway, where: tuple[str, int]) -> None:
    async def status(_: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(gateway.status))

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text=await asyncio.to_thread(gateway.metrics))

    application = web.Application()
    application.router.add_get("/status", status)
    application.router.add_get("/metrics", metrics)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, *where).start()


def _say(event: str, **about: object) -> None:
    log.info(json.dumps({"event": event, **about}))


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, and what the message, itself JSON, says."""

    def format(self, record: logging.LogRecord) -> str:
        """Put time and level in front; of an exception its kind and place, never its values."""
        message = record.getMessage()
        about = json.loads(message) if message.startswith("{") else {"event": "log", "text": message}
        if record.exc_info and record.exc_info[2] is not None:
            trace, kind = record.exc_info[2], record.exc_info[0]
            while trace.tb_next:
                trace = trace.tb_next
            about |= {"kind": kind.__name__ if kind else "", "at": f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"}
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        return json.dumps({"at": at, "level": record.levelname.lower(), **about}, ensure_ascii=False)


def check_status(where: tuple[str, int]) -> tuple[str, int]:
    """The status page has no lock, so it is for this machine alone. Raises Malformed."""
    if not loopback([where[0]]):
        raise Malformed("the status page answers on this machine alone", hint="give --status an address of 127.0.0.1")
    return where
