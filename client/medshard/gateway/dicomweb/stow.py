"""STOW-RS: instances that come in over HTTP (PS3.18 section 10.5).

A request is read as it comes: each part goes to the spool as bytes, and is decided about while the next one is read. Memory is a few
chunks, however large the request.

Law: 200 is said when every instance of the request is durable, as its files came, byte for byte; what was refused is named with its
reason, and the rest is kept (202). Packing into the store begins when the answer has been given.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web

from medshard.gateway import model, tags
from medshard.gateway.describing import describe
from medshard.gateway.dicomweb import datasets, multipart
from medshard.gateway.dicomweb.http import answer, datasets_answer, dumped, path_of, uids
from medshard.gateway.dicomweb.media import DICOM
from medshard.gateway.intake import Intake
from medshard.gateway.model import Outcome, Verdict
from medshard.gateway.spool import Arrival
from medshard_protocol.errors import Full, Malformed, MedshardError

chunk_bytes: Final = 1024 * 1024  # handed to the spool at once
deciding_max: Final = 4  # instances that are being made durable while the next one is read
silence_s: Final = 60.0  # a client that sends nothing for so long has gone
instances_max: Final = 50_000  # in one request; their verdicts are kept in memory
instance_bytes_max: Final = 16 * 1024**3

REFERENCED: Final = 0x00081199
FAILED: Final = 0x00081198
FAILURE_REASON: Final = 0x00081197
WARNING_REASON: Final = 0x00081196
REFERENCED_CLASS: Final = 0x00081150
REFERENCED_INSTANCE: Final = 0x00081155
KEPT_BESIDE: Final = 0xB000  # coercion of data elements is the nearest that PS3.18 has; nothing is changed


class Stow:
    """The route."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._tasks: set[asyncio.Task[None]] = set()

    def routes(self, prefix: str) -> list[web.RouteDef]:
        """With a study in the path, only instances of it are taken."""
        return [web.post(prefix + "/studies", self.store), web.post(prefix + "/studies/{study}", self.store)]

    async def close(self) -> None:
        """End what is being packed; it waits in the spool."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def store(self, request: web.Request) -> web.StreamResponse:
        """Take in a request."""
        study = uids(request)[0] if "study" in request.match_info else ""
        if request.headers.get("Content-Encoding", "identity") != "identity":
            return answer(415, "compressed bodies are not taken", "send the parts as they are")
        said = multipart.parameters(request.headers.get("Content-Type", ""))
        if said is None or said.get("type", DICOM).lower() != DICOM:
            return answer(415, "the body has to be multipart/related; type=application/dicom")
        taking = _Taking(self._intake, study)
        parser = multipart.Parser(said.get("boundary", ""))
        try:
            async for data in _chunks(request):
                for event in parser.feed(data):
                    await taking.take(event)
            parser.finish()
            verdicts = await taking.finish()
        except (Malformed, TimeoutError) as error:
            verdicts = await taking.break_off()
            if not verdicts:
                return answer(400, str(error) or "the request broke off")
            verdicts.append(Verdict(Outcome.REFUSED, model.NOT_UNDERSTOOD, "the request broke off"))
        finally:
            taking.abandon()
        self._settle({(each.study, each.series) for each in verdicts if each.outcome is not Outcome.REFUSED})
        return await _answer(request, study, verdicts)

    def _settle(self, series: set[tuple[str, str]]) -> None:
        async def settle() -> None:
            with contextlib.suppress(MedshardError, OSError):  # the spool has them, and the archive tries again
                await self._intake.settle(series)

        if series:
            task = asyncio.create_task(settle())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


async def _chunks(request: web.Request) -> AsyncIterator[bytes]:
    """The body in chunks of about a megabyte. Raises TimeoutError."""
    parts: list[bytes] = []
    size = 0
    while True:
        async with asyncio.timeout(silence_s):
            data = await request.content.readany()
        parts.append(data)
        size += len(data)
        if size >= chunk_bytes or not data:
            yield b"".join(parts)
            parts, size = [], 0
        if not data:
            return


@dataclass
class _Taking:
    """One request's instances on their way into the spool."""

    intake: Intake
    study: str
    arrival: Arrival | None = None
    refused: Verdict | None = None  # why the part in hand is not taken
    deciding: list[asyncio.Task[Verdict]] = field(default_factory=list)
    size: int = 0

    async def take(self, event: multipart.Event) -> None:
        """Take what the parser found. Raises Malformed."""
        match event:
            case multipart.Begin(headers):
                if len(self.deciding) >= instances_max:
                    raise Malformed("more than 50,000 instances in one request")
                kind = headers.get("content-type", DICOM).partition(";")[0].strip().lower()
                self.arrival, self.size = None, 0
                self.refused = None if kind == DICOM else Verdict(Outcome.REFUSED, model.NOT_UNDERSTOOD, f"a part of type {kind[:60]}")
            case multipart.Data(data):
                self.size += len(data)
                if self.size > instance_bytes_max:
                    raise Malformed("an instance of more than 16 GiB")
                if self.refused is None:
                    await asyncio.to_thread(self._write, data)
            case multipart.End():
                await self._decide()

    async def finish(self) -> list[Verdict]:
        """What became of each, in their order."""
        return list(await asyncio.gather(*self.deciding))

    async def break_off(self) -> list[Verdict]:
        """What became of those that came whole."""
        self.abandon()
        return await self.finish()

    def abandon(self) -> None:
        """Drop what did not come whole. Idempotent."""
        if self.arrival is not None:
            self.arrival.drop()
            self.arrival = None

    def _write(self, data: memoryview) -> None:
        try:
            self.arrival = self.arrival or self.intake.take()
            self.arrival.write(data)
        except Full as error:
            self.arrival, self.refused = None, Verdict(Outcome.REFUSED, model.OUT_OF_RESOURCES, str(error))

    async def _decide(self) -> None:
        arrival, self.arrival = self.arrival, None
        if arrival is None:
            refused = self.refused or Verdict(Outcome.REFUSED, model.NOT_UNDERSTOOD, "an empty part")
            self.deciding.append(asyncio.create_task(_said(refused)))
            return
        self.deciding.append(asyncio.create_task(asyncio.to_thread(self._admit, arrival)))
        busy = [task for task in self.deciding[-deciding_max - 1 :] if not task.done()]
        if len(busy) > deciding_max:
            await asyncio.wait(busy, return_when=asyncio.FIRST_COMPLETED)

    def _admit(self, arrival: Arrival) -> Verdict:
        if self.study:
            with contextlib.suppress(Malformed):  # which the archive finds and tells
                said = describe(arrival.read, arrival.size)
                if said.study != self.study:
                    arrival.drop()
                    why = "the instance is of another study than the request"
                    return Verdict(Outcome.REFUSED, model.MISMATCH, why, sop_class=said.sop_class, sop_uid=said.uid)
        return self.intake.admit(arrival)


async def _said(verdict: Verdict) -> Verdict:
    return verdict


async def _answer(request: web.Request, study: str, verdicts: list[Verdict]) -> web.Response:
    """The store instances response (PS3.18 annex I.2), with the status that its table asks for."""
    stored, failed, studies = [], [], set()
    for each in verdicts:
        item = {
            datasets.key(REFERENCED_CLASS): datasets.of_text(tags.SOP_CLASS, each.sop_class),
            datasets.key(REFERENCED_INSTANCE): datasets.of_text(tags.SOP_UID, each.sop_uid),
        }
        if each.outcome is Outcome.REFUSED:
            failed.append({**item, datasets.key(FAILURE_REASON): datasets.element("US", each.status)})
            continue
        studies.add(each.study)
        url = path_of(each.study, each.series, each.sop_uid)
        item[datasets.key(datasets.RETRIEVE_URL)] = datasets.element("UR", datasets.root + url)
        if each.outcome is Outcome.KEPT_BESIDE:
            item[datasets.key(WARNING_REASON)] = datasets.element("US", KEPT_BESIDE)
        stored.append(dict(sorted(item.items())))
    found = {}
    if study or len(studies) == 1:
        found[datasets.key(datasets.RETRIEVE_URL)] = datasets.element("UR", datasets.root + path_of(study or next(iter(studies))))
    if failed:
        found[datasets.key(FAILED)] = datasets.element("SQ", *failed)
    if stored:
        found[datasets.key(REFERENCED)] = datasets.element("SQ", *stored)
    if not verdicts:
        return answer(400, "there is no instance in the request")
    full = all(each.status == model.OUT_OF_RESOURCES for each in verdicts)
    remarks = any(each.outcome is Outcome.KEPT_BESIDE for each in verdicts)
    status = (503 if full else 409) if not stored else 202 if failed or remarks else 200
    return await datasets_answer(request, dumped(found), status=status)
