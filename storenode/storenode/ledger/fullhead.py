"""Heads that carry both kinds of cosignature, made when somebody needs one.

Law: daily work rests on Ed25519 cosignatures, which are small. An ML-DSA-44 cosignature has 2420 bytes, so nobody sends one unasked. A node
gives its second signature only for a text that it cosigned a moment ago, with the same time: it says again, with another key, what
it has said. So no decision is made here; ``mirror`` made it. Any node collects a full head by asking the others, and keeps the
newest, so that a log can be exported or proved from while others are away.

When the roster changes, the old roster's cosigners are asked once more, with their keys of before: what they sign covers the entries that
decided the change, and lets a proof cross it without resting on Ed25519 alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from medshard_protocol.canonical import Fields, decode, encode
from medshard_protocol.checkpoint import Note, Signature, cosigner_verifier, log_verifiers, open_published, pq_verifier
from medshard_protocol.errors import Absent, Malformed, MedshardError, Unavailable
from medshard_protocol.ids import NodeId
from medshard_protocol.roster import Roster
from storenode import durable
from storenode.ledger.channel import PeerCaller
from storenode.ledger.journal import Published

cosign_path: Final = "/v1/ledger/cosign"
text_bytes_max: Final = 1024
lines_bytes_max: Final = 16 * 1024
remembered_max: Final = 64  # at ten checkpoints a second, those of the last six seconds
ask_wait_s: Final = 2.0
again_after_s: Final = 0.3
tries: Final = 4
refresh_every_s: Final = 60.0
watch_every_s: Final = 0.5  # for another roster

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lines:
    """One node's two cosignatures of one text."""

    ed25519: Signature
    ml_dsa: Signature

    def to_bytes(self) -> bytes:
        """Answer to POST /v1/ledger/cosign."""
        return encode([1, self.ed25519.line().encode(), self.ml_dsa.line().encode()])

    @classmethod
    def from_bytes(cls, data: bytes) -> Lines:
        """Parse. Raises Malformed."""
        fields = Fields(decode(data, bytes_max=lines_bytes_max, what="cosignatures"), count=3, what="cosignatures")
        fields.uint(least=1, most=1)
        try:
            return cls(*(Signature.from_line(fields.bytes(most=lines_bytes_max).decode()) for _ in range(2)))
        except UnicodeDecodeError:
            raise Malformed("cosignatures: not UTF-8") from None


class FullHeads:
    """One node's second kind of cosignature, and the full heads it knows. Lives in one event loop."""

    def __init__(
        self,
        folder: Path,
        node: NodeId,
        key: MLDSA44PrivateKey | None,
        call: PeerCaller,
        roster: Callable[[], Roster],
        published: Callable[[], Published | None],
    ) -> None:
        self._folder = folder
        self._node = node
        self._key = key
        self._call = call
        self._roster = roster
        self._published = published
        self._signed: OrderedDict[str, tuple[Roster, Signature]] = OrderedDict()
        self._lines: OrderedDict[str, Lines] = OrderedDict()
        self._newest: Published | None = None
        self._gathering = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read what was kept, and keep it fresh from now on."""
        self._newest = self._kept()
        self._task = asyncio.create_task(self._keep_fresh())

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # -- this node's signatures

    def remember(self, text: str, signature: Signature) -> None:
        """Take note that this node has just cosigned a text."""
        self._signed[text] = self._roster(), signature
        self._signed.move_to_end(text)
        if len(self._signed) > remembered_max:
            self._signed.popitem(last=False)

    def own_line(self, text: str) -> Signature | None:
        """This node's Ed25519 cosignature of a text, if it cosigned that lately."""
        known = self._signed.get(text)
        return known[1] if known else None

    def lines(self, text: str) -> Lines:
        """Both cosignatures of a text that this node cosigned lately. Raises Absent."""
        roster, ed25519 = self._signed.get(text, (None, None))
        if roster is None or ed25519 is None:
            raise Absent("this node has not cosigned that checkpoint, or not lately")
        verifier = pq_verifier(roster, self._node)
        if self._key is None or self._key.public_key().public_bytes_raw() != verifier.key:
            raise Absent("this node has no ML-DSA key that the roster lists")
        lines = self._lines.get(text)
        if lines is None or lines.ed25519 != ed25519:
            lines = Lines(ed25519, verifier.sign(text, self._key.sign, int.from_bytes(ed25519.value[:8], "big")))
            self._lines[text] = lines
            if len(self._lines) > remembered_max:
                self._lines.popitem(last=False)
        return lines

    # -- full heads

    @property
    def newest(self) -> Published | None:
        """The newest head with a quorum of each kind that this node has."""
        return self._newest

    def sealed(self, number: int) -> bytes | None:
        """A head that the cosigners of an earlier roster signed with both kinds of key after that roster was replaced, if one was had."""
        path = self._folder / f"full-checkpoint-{number}"
        return path.read_bytes() if path.exists() else None

    async def full(self) -> Published:
        """The newest published head with both kinds of cosignature, made now if need be. Raises Unavailable."""
        async with self._gathering:
            for attempt in range(tries):
                published = self._published()
                if published is not None and self._newest is not None and published.checkpoint == self._newest.checkpoint:
                    return self._newest
                if published is not None and (note := await self._gather(published, self._roster())) is not None:
                    self._newest = Published(published.checkpoint, note)
                    await asyncio.to_thread(durable.replace, self._folder / "full-checkpoint", note, mode=0o644)
                    return self._newest
                if attempt < tries - 1:
                    await asyncio.sleep(again_after_s)
        raise Unavailable("no quorum gives its ML-DSA cosignatures now", hint="try again later; older proofs hold")

    async def _gather(self, published: Published, roster: Roster) -> bytes | None:
        note = Note.from_bytes(published.note)
        by_log = [line for line in note.signatures if any(each.made(line) for each in log_verifiers(roster))]
        chosen: dict[NodeId, Lines] = {}
        async for node, lines in self._asked(note.text, roster):
            if node in roster.voices:
                chosen[node] = lines
            if len(chosen) == roster.quorum.q:
                break
        signatures = [*by_log, *(each.ed25519 for each in chosen.values()), *(each.ml_dsa for each in chosen.values())]
        full = Note(note.text, tuple(signatures)).to_bytes()
        try:
            open_published(full, roster, pq=True)
        except MedshardError as error:
            _log.info("no full head: %s", error)
            return None
        return full

    async def _asked(self, text: str, roster: Roster) -> AsyncIterator[tuple[NodeId, Lines]]:
        """Each node's lines as they come, checked."""
        tasks = [asyncio.create_task(self._ask(node.id, text, roster)) for node in roster.nodes if node.pq_key and node.id in roster.voices]
        try:
            for coming in asyncio.as_completed(tasks):
                answer = await coming
                if answer is not None:
                    yield answer
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, node: NodeId, text: str, roster: Roster) -> tuple[NodeId, Lines] | None:
        try:
            if node == self._node:
                lines = self.lines(text)
            else:
                status, answer = await self._call(node, "POST", cosign_path, text.encode(), ask_wait_s)
                if status != 200:
                    return None
                lines = Lines.from_bytes(answer)
            for verifier, line in ((cosigner_verifier(roster, node), lines.ed25519), (pq_verifier(roster, node), lines.ml_dsa)):
                if not verifier.made(line):
                    return None
                verifier.verify(text, line)
        except (MedshardError, OSError, TimeoutError, aiohttp.ClientError):
            return None
        return node, lines

    # -- over time

    def _kept(self) -> Published | None:
        path = self._folder / "full-checkpoint"
        try:
            note = path.read_bytes()
            return Published(open_published(note, self._roster(), pq=True), note)
        except (OSError, MedshardError):
            return None

    async def _keep_fresh(self) -> None:
        roster = self._roster()
        due = 0.0
        while True:
            await asyncio.sleep(watch_every_s)
            now = self._roster()
            try:
                if now.number != roster.number:
                    await self._seal(roster)
                    roster, due = now, 0.0
                due -= watch_every_s
                if due <= 0 and self._worth_while(now):
                    due = refresh_every_s
                    await self.full()
            except Unavailable:
                continue
            except (MedshardError, OSError) as error:
                _log.warning("no full head could be kept: %s", error)

    def _worth_while(self, roster: Roster) -> bool:
        published = self._published()
        grown = published is not None and (self._newest is None or published.checkpoint.size > self._newest.checkpoint.size)
        return grown and roster.has_quorum(node.id for node in roster.nodes if node.pq_key)

    async def _seal(self, old: Roster) -> None:
        for _ in range(tries):
            published = self._published()
            if published is not None and (note := await self._gather(published, old)) is not None:
                await asyncio.to_thread(durable.replace, self._folder / f"full-checkpoint-{old.number}", note, mode=0o644)
                return
            await asyncio.sleep(again_after_s)
        _log.warning("the cosigners of roster %d did not sign its end with both kinds of key", old.number)


def with_line(note: bytes, line: Signature | None) -> bytes:
    """A published note with one more cosignature, unless it has that."""
    if line is None:
        return note
    parsed = Note.from_bytes(note)
    if any((each.name, each.key_id) == (line.name, line.key_id) for each in parsed.signatures):
        return note
    return parsed.signed_by([line]).to_bytes()
