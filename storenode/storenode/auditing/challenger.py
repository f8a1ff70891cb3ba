"""An audit of one cell of a file at all of its other holders, and what comes out of it.

Law: one nonce goes to all holders of a stripe, so that their tags can be compared; nothing that one of them says is believed of another.
Who does not answer is asked again after a pause before it counts as late. Answers that convict their holder are kept as evidence with the
manifest; a word against the word of others is said to be that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol.audit import Answer, Challenge, Claim, Verdict, answer_bytes_max, audit_path, nonce_size, sign_answer
from medshard_protocol.crosscheck import Agreement, allowance, compare, tag
from medshard_protocol.erasure import code
from medshard_protocol.errors import Absent, Damaged, Malformed, MedshardError, Refused, Unavailable
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.manifest import Manifest
from medshard_protocol.messages import unpack_error
from medshard_protocol.repair import holders
from medshard_protocol.repairorder import counted
from medshard_protocol.rosters import pack_links
from storenode.auditing.answering import show
from storenode.auditing.findings import Findings
from storenode.evidence import Evidence
from storenode.ledger.channel import PeerCaller
from storenode.metrics import Metrics
from storenode.repairing import ground
from storenode.routes import Node
from storenode.watching.verdict import rosters_name

pauses_s: Final = (1.0, 5.0)  # before an answer that did not come is asked for again
slow_s: Final = 1.0  # nobody is called slow who answers within this
slow_times: Final = 8  # as long as the others take
at_once_max: Final = 16  # holders that are asked at a time
witnesses_max: Final = 60  # a file of evidence has room for so many; k + 1 of them are enough
evidence_manifest_bytes_max: Final = 4 << 20

log = logging.getLogger(__name__)


class Heard(NamedTuple):
    """What one holder said, or that it said nothing."""

    verdict: Verdict
    answer: Answer | None
    seconds: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """A file that is audited: what this node knows of it, and who holds it."""

    manifest: Manifest
    present: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """One audit, with what came of it: for each shard its holder, the verdict and the reason."""

    file_id: FileId
    cell: int
    compared: bool
    verdicts: Mapping[int, tuple[NodeId, Heard]]


class Challenger:
    """One node's audits of others. Lives in one event loop."""

    def __init__(
        self,
        node: Node,
        key: Ed25519PrivateKey,
        peers: PeerCaller,
        findings: Findings,
        evidence: Evidence,
        metrics: Metrics,
        *,
        chain: Callable[[], bytes] = lambda: pack_links(()),
        answer_s: float = 15.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._node, self._peers, self._findings, self._evidence, self._metrics = node, peers, findings, evidence, metrics
        self._key, self._chain, self._answer_s, self._clock = key, chain, answer_s, clock

    async def audit(self, file_id: FileId, *, patient: bool = True, tagged: bool = False) -> Round:
        """Challenge all other holders of a file for a cell of chance. Raises MedshardError where this node does not know the file.

        ``patient``: ask again who does not answer. ``tagged``: ask for tags also where the cell had its turn lately.
        """
        subject = await asyncio.to_thread(self.subject, file_id)
        manifest = subject.manifest
        cell = random.Random(os.urandom(16)).randrange(manifest.layout.stripes)
        size, times = allowance(manifest.layout, cell, 0)
        asked = 0
        if times and manifest.layout.n > manifest.layout.k:
            asked = await asyncio.to_thread(self._findings.ask, file_id, cell, self._clock(), anyhow=tagged)
        challenge = Challenge(cell, os.urandom(nonce_size), asked > 0)
        own, heard = await asyncio.gather(
            asyncio.to_thread(self._own, subject, challenge, size), self._ask_all(subject, challenge, patient=patient)
        )
        told = heard if own is None else heard | {own.shard: Heard(Verdict.GOOD, own, 0.0)}
        agreement = await self._compare(manifest, told, None if own is None else own.shard, size) if asked else None
        due = self._tags_due(subject) if 0 < asked <= times else frozenset()
        verdicts = {shard: _judged(shard, each, agreement, due) for shard, each in heard.items()}
        for shard, each in verdicts.items():
            if each.verdict is Verdict.WRONG:
                await asyncio.to_thread(self._keep, subject, shard, told, agreement)
        await self._note(subject, verdicts)
        return Round(file_id, cell, agreement is not None, {i: (subject.present[i], each) for i, each in verdicts.items()})

    def subject(self, file_id: FileId) -> Subject:
        """Who holds a file by this node's own mirror and manifest. Blocking. Raises Absent, Damaged or Refused."""
        ledger = self._node.ledger
        try:
            known = ground.standing(ledger, file_id)
        except ground.Denied as denied:
            raise Refused(f"this file is not audited: {denied.objection.reason}") from None
        manifest = Manifest.from_bytes(self._node.store.manifest(file_id))
        if not ground.is_described(manifest, known):
            raise Damaged("the manifest on this node's disk is not the registered one")
        moves = counted(manifest, known.given, ground.institutions(ledger.state))
        return Subject(manifest, holders(manifest, moves))

    # -- parts

    def _own(self, subject: Subject, challenge: Challenge, size: int) -> Answer | None:
        """What this node itself would answer, if its own cell is whole; what is not is noted. Blocking."""
        manifest, me = subject.manifest, self._node.id
        if me not in subject.present:
            return None
        index, now = subject.present.index(me), self._clock()
        answer = Answer(manifest.file_id, index, challenge.cell, challenge.nonce, me, Claim.ABSENT, int(now))
        try:
            cell, answer = show(self._node.store, answer, self._node.store.shard_at(manifest.file_id, index), manifest)
        except (Absent, Damaged) as error:
            verdict = Verdict.ABSENT if isinstance(error, Absent) else Verdict.DAMAGED
            self._findings.report(manifest.file_id, index, me, verdict, now)
            return None
        return replace(answer, tag=tag(manifest.file_id, challenge.cell, challenge.nonce, cell, size)) if challenge.tagged else answer

    def _tags_due(self, subject: Subject) -> frozenset[int]:
        """Shards whose holders owe this node a tag: nobody else of its institution asks, and nobody else had the shard."""
        roster, me = self._node.ledger.roster, self._node.id
        own = next((node.institution for node in roster.nodes if node.id == me), None)
        if sum(node.institution == own for node in roster.nodes) != 1:
            return frozenset()
        return frozenset(i for i, ref in enumerate(subject.manifest.shards) if subject.present[i] == ref.node)

    async def _compare(self, manifest: Manifest, told: Mapping[int, Heard], trusted: int | None, size: int) -> Agreement | None:
        tags = {shard: each.answer.tag for shard, each in told.items() if each.answer is not None and len(each.answer.tag) == size}
        return await asyncio.to_thread(compare, code(manifest.layout.k, manifest.layout.n), tags, trusted)

    async def _note(self, subject: Subject, verdicts: Mapping[int, Heard]) -> None:
        file_id = subject.manifest.file_id
        results = [
            (file_id, shard, subject.present[shard], each.verdict, each.answer.to_bytes() if each.answer else b"", each.seconds)
            for shard, each in verdicts.items()
        ]
        await asyncio.to_thread(self._findings.report_all, results, self._clock())
        for shard, each in verdicts.items():
            self._metrics.audited(each.verdict)
            if each.verdict.is_bad:
                node = subject.present[shard].hex()
                log.warning(
                    "audit: a shard is %s", each.verdict, extra={"file": file_id.hex(), "shard": shard, "node": node, "why": each.why}
                )

    async def _ask_all(self, subject: Subject, challenge: Challenge, *, patient: bool) -> dict[int, Heard]:
        slots = asyncio.Semaphore(at_once_max)
        listed = {node.id for node in self._node.ledger.roster.nodes}

        async def one(shard: int, node: NodeId) -> Heard:
            if node not in listed:
                return Heard(Verdict.ABSENT, None, 0.0, "its holder is not in the roster any more")
            async with slots:
                return await self._ask(subject, shard, node, challenge, patient=patient)

        asked = {shard: node for shard, node in enumerate(subject.present) if node != self._node.id}
        heard = await asyncio.gather(*(one(shard, node) for shard, node in asked.items()))
        usual = statistics.median([each.seconds for each in heard if each.answer is not None] or [0.0])
        limit = max(slow_s, slow_times * usual)
        return {
            shard: each._replace(verdict=Verdict.SLOW) if each.verdict is Verdict.SAID and each.seconds > limit else each
            for shard, each in zip(asked, heard, strict=True)
        }

    async def _ask(self, subject: Subject, shard: int, node: NodeId, challenge: Challenge, *, patient: bool) -> Heard:
        path, body = f"{audit_path(subject.manifest.file_id)}/{shard}", challenge.to_bytes()
        why = ""
        for pause in (0.0, *(pauses_s if patient else ())):
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            began = time.monotonic()
            try:
                status, data = await self._peers(node, "POST", path, body, self._answer_s)
                if status != 200:
                    raise unpack_error(status, data, "it")
                answer = self._read(subject, shard, node, challenge, data)
            except Unavailable as error:  # also one that is starting, or busy
                why = str(error)
                continue
            except (Refused, Malformed) as error:
                return Heard(Verdict.REFUSED, None, time.monotonic() - began, str(error))
            except MedshardError as error:
                return Heard(Verdict.REFUSED, None, time.monotonic() - began, f"answers {error}")
            took = time.monotonic() - began
            if answer.claim is not Claim.HELD:
                verdict = Verdict.ABSENT if answer.claim is Claim.ABSENT else Verdict.DAMAGED
                return Heard(verdict, answer, took, "it says so")
            if not answer.leads_to_root(subject.manifest):
                return Heard(Verdict.WRONG, answer, took, "its hashes do not lead to the registered root")
            return Heard(Verdict.SAID, answer, took)
        return Heard(Verdict.LATE, None, 0.0, why)

    def _read(self, subject: Subject, shard: int, node: NodeId, challenge: Challenge, data: bytes) -> Answer:
        if len(data) > answer_bytes_max:
            raise Malformed("the answer is too long")
        roster = self._node.ledger.roster
        answer = Answer.from_bytes(data)
        answer.verify(roster.origin, roster.node(node).tls_key)
        asked = (subject.manifest.file_id, shard, challenge.cell, challenge.nonce, self._node.id)
        if (answer.file_id, answer.shard, answer.cell, answer.nonce, answer.auditor) != asked:
            raise Malformed("the answer is to another question")
        return answer

    def _keep(self, subject: Subject, shard: int, told: Mapping[int, Heard], agreement: Agreement | None) -> Path | None:
        """Keep what convicts a holder. Blocking."""
        roster, convicted = self._node.ledger.roster, told[shard].answer
        assert convicted is not None, "wrong by its answer"
        fits = agreement.fit if agreement is not None and shard in agreement.wrong else frozenset()
        documents = {"answer": convicted.to_bytes(), rosters_name: self._chain()}
        if len(manifest := subject.manifest.to_bytes()) <= evidence_manifest_bytes_max:
            documents["manifest"] = manifest
        for witness in sorted(fits)[:witnesses_max]:
            answer = told[witness].answer
            assert answer is not None, "it gave a tag"
            own = subject.present[witness] == self._node.id
            documents[f"witness {witness}"] = (sign_answer(roster.origin, answer, self._key.sign) if own else answer).to_bytes()
        node = roster.node(subject.present[shard])
        details: dict[str, str | int] = {"node": node.name, "node id": node.id.hex(), "shard": shard}
        try:
            return self._evidence.keep("false-tag" if fits else "false-cell", details, documents)
        except (ValueError, OSError):
            log.exception("evidence could not be kept")
            return None


def _judged(shard: int, heard: Heard, agreement: Agreement | None, due: frozenset[int]) -> Heard:
    if agreement is None or heard.verdict not in (Verdict.SAID, Verdict.SLOW):
        return heard
    if shard in due and shard not in agreement.fit | agreement.wrong:
        return heard._replace(verdict=Verdict.REFUSED, why="gives no tag, and one is due")
    if shard in agreement.wrong:
        return heard._replace(verdict=Verdict.WRONG, why="its tag does not fit those of the others")
    return heard._replace(verdict=Verdict.GOOD) if shard in agreement.fit and heard.verdict is Verdict.SAID else heard
