"""Going around: ask every source for its head, check it by itself, beside the others, and against everything seen before.

Law: the anchor is the newest head that was proved, by tiles folded to its root, to continue every anchor before it; every head of every
source is proved to be a prefix of it or a continuation (``proving``), so any two heads ever seen are consistent or evidence is kept.

The watch stops nobody and decides nothing: it keeps evidence, counts, and tells. What does not answer is listed, and is no finding.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from medshard_protocol.errors import MedshardError
from medshard_protocol.roster import Roster
from medshard_protocol.tiles import TileName
from storenode.evidence import Evidence
from storenode.watching.heads import Finding, Head, forks, laggards, read_head, rollback, stale_after_s
from storenode.watching.memory import Memory
from storenode.watching.proving import Proving, sources_at_once
from storenode.watching.sources import Source
from storenode.watching.tilereader import Fetch
from storenode.watching.verdict import rosters_name

every_s: Final = 15.0
anchor_name: Final = "the newest head before"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trust:
    """The rosters that heads may be of, genesis first, and the links that lead from one to the next (``pack_links``; empty for none)."""

    rosters: tuple[Roster, ...]
    links: bytes = b""


@dataclass(frozen=True, slots=True)
class Report:
    """One round."""

    heads: tuple[Head, ...]
    silent: tuple[tuple[str, str], ...]  # (source, why)
    findings: tuple[Finding, ...]
    kept: tuple[Path, ...]  # evidence

    def to_json(self) -> dict[str, object]:
        """For --json and for a node's status."""
        return {
            "heads": [{"source": h.source, "size": h.checkpoint.size, "root": h.checkpoint.root.hex(), "at": h.at} for h in self.heads],
            "silent": [{"source": source, "why": why} for source, why in self.silent],
            "findings": [{"kind": f.kind, "source": f.source, "text": f.text} for f in self.findings],
            "evidence": [str(path) for path in self.kept],
        }


class Watch:
    """Watches one log. ``round`` once, or ``run`` until cancelled."""

    def __init__(
        self,
        trust: Callable[[], Trust],
        sources: Callable[[], Sequence[Source]],
        evidence: Evidence,
        memory: Path,
        *,
        stale_s: float = stale_after_s,
        sample: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._trust = trust
        self._sources = sources
        self._evidence = evidence
        self._path = memory
        self._memory = Memory.load(memory)
        self._stale_s = stale_s
        self._sample = sample  # of how many sources the tiles are read in each round; None for all
        self._clock = clock
        self._known: dict[str, Head] | None = None  # the memory, read: the last head of each source, and the anchor
        self._shrunk: set[str] = set()  # sources that showed a smaller head than before in the last round
        self._bare: set[str] = set()  # sources that showed a head without their own cosignature in the last round
        self._advanced = (0.0, 0.0)  # the newest time of a head, and when (monotonic) it was first seen
        self._active: set[tuple[str, str]] = set()  # kind and source of what was found in the last round
        self.found: Counter[str] = Counter()  # by kind: how often something was found that was not there in the round before
        self.last: Report | None = None

    async def run(
        self, pause_s: float = every_s, lull: Callable[[], Awaitable[None]] | None = None, *, per_pause: int | None = None
    ) -> None:
        """Go around for ever, each time after a ``lull``, with longer pauses where there are more sources than ``per_pause``.

        Only a full or broken disk is told and survived; a bug ends the task.
        """
        while True:
            stretch = max(1.0, len(self._sources()) / per_pause) if per_pause else 1.0
            await asyncio.sleep(pause_s * stretch * random.uniform(0.7, 1.3))
            if lull is not None:
                await lull()
            try:
                await self.round()
            except (MedshardError, OSError) as error:
                _log.error("the watch could not finish its round: %s", error)

    async def round(self) -> Report:
        """Ask everybody once."""
        trust, sources = self._trust(), list(self._sources())
        heads, silent, findings = await self._ask(sources, trust)
        findings = self._without_first_slips(findings)
        if self._known is None:
            self._known = self._read_memory(trust)
        before = dict(self._known)
        anchor = before.pop(anchor_name, None)
        findings += forks(heads, [*([anchor] if anchor else []), *before.values()])
        findings += self._rollbacks(heads, before)
        published = [head for head in heads if head.published]
        by_name = {source.name: source for source in sources}
        proving = Proving(anchor, lambda name: _fetch(by_name[name]))
        best = await proving.settle(published, self._sample)
        findings += proving.findings
        silent += proving.silent
        findings += laggards(heads, self._stale_s) + self._freshness(published)
        findings = list({(finding.kind, finding.source): finding for finding in reversed(findings)}.values())[::-1]  # the first of each
        kept = self._keep(findings, trust)
        bad = {finding.source for finding in findings if finding.kind in ("fork", "rewritten", "damaged-tile")}
        self._remember([head for head in heads if head.source not in bad], best, {source.name for source in sources})
        self.last = Report(tuple(heads), tuple(silent), tuple(findings), tuple(kept))
        return self.last

    # -- asking

    async def _ask(self, sources: Sequence[Source], trust: Trust) -> tuple[list[Head], list[tuple[str, str]], list[Finding]]:
        heads: list[Head] = []
        silent: list[tuple[str, str]] = []
        findings: list[Finding] = []
        gate = asyncio.Semaphore(sources_at_once)

        async def ask(source: Source) -> None:
            try:
                async with gate:
                    data = await source.get("checkpoint")
            except MedshardError as error:
                silent.append((source.name, str(error)))
                return
            head, more = read_head(source.name, source.node, data, trust.rosters)
            findings.extend(more)
            if head is not None:
                heads.append(head)

        await asyncio.gather(*map(ask, sources))
        heads.sort(key=lambda head: (head.checkpoint.size, head.source))
        return heads, silent, findings

    def _read_memory(self, trust: Trust) -> dict[str, Head]:
        """What was seen before the start, by source. Notes that nobody can check any more are left out."""
        ids = {source.name: source.node for source in self._sources()}
        found = {}
        for name, note in {**self._memory.shown, anchor_name: self._memory.anchor}.items():
            if note and (head := read_head(name, ids.get(name), note, trust.rosters)[0]):
                found[name] = head
        return found

    # -- judging

    def _without_first_slips(self, findings: Sequence[Finding]) -> list[Finding]:
        """A node that has just started does not yet know its own cosignature of the head it shows: that counts the second time."""
        bare = {finding.source for finding in findings if finding.kind == "not-cosigned"}
        kept = [finding for finding in findings if finding.kind != "not-cosigned" or finding.source in self._bare]
        self._bare = bare
        return kept

    def _rollbacks(self, heads: Sequence[Head], before: dict[str, Head]) -> list[Finding]:
        findings, shrunk = [], set()
        for head in heads:
            old = before.get(head.source)
            if old is not None and head.checkpoint.size < old.checkpoint.size:
                shrunk.add(head.source)
                if finding := rollback(head, old, again=head.source in self._shrunk):
                    findings.append(finding)
        self._shrunk = shrunk
        return findings

    def _freshness(self, published: Sequence[Head]) -> list[Finding]:
        """Judge the newest head against this machine's clocks: an old one, or a clock here that is wrong."""
        newest = max(published, key=lambda head: head.at, default=None)
        if newest is None:
            return []
        moving = self._advanced[0] and newest.at > self._advanced[0]
        if newest.at > self._advanced[0]:
            self._advanced = (newest.at, time.monotonic())
        off = self._clock() - newest.at
        if abs(off) <= self._stale_s:
            return []
        if moving or off < 0:
            side = "ahead of" if off > 0 else "behind"
            return [Finding("clock", "this machine", f"the clock here is {abs(off):.0f} s {side} the cosigners'")]
        text = f"the newest head of all was cosigned {off:.0f} s ago, or the clock here is wrong"
        return [Finding("stale", "the log", text, {"note 1": newest.note}, {"seconds": int(off)})]

    # -- telling and remembering

    def _keep(self, findings: Sequence[Finding], trust: Trust) -> list[Path]:
        kept = []
        for finding in findings:
            if (finding.kind, finding.source) in self._active:
                continue  # what goes on is not told again
            self.found[finding.kind] += 1
            _log.error("the watch found: %s %s", finding.source, finding.text, extra={"reason": finding.kind})
            if finding.documents:
                documents = dict(finding.documents) | ({rosters_name: trust.links} if trust.links else {})
                details = {"source": finding.source, "text": finding.text, "by": "watch"} | dict(finding.details)
                try:
                    kept.append(self._evidence.keep(finding.kind, details, documents))
                except (OSError, ValueError) as error:
                    _log.error("evidence could not be kept: %s", error)
        self._active = {(finding.kind, finding.source) for finding in findings}
        return kept

    def _remember(self, heads: Sequence[Head], best: Head | None, names: set[str]) -> None:
        known = {name: head for name, head in (self._known or {}).items() if name in names or name == anchor_name}
        # What a source shows is remembered as its newest, unless it is a step back: that is held against it until it comes forward.
        shown = {head.source: head for head in heads if head.source not in self._shrunk}
        anchor = known.get(anchor_name)
        if best is not None and (anchor is None or best.checkpoint.size > anchor.checkpoint.size):
            shown[anchor_name] = replace(best, source=anchor_name)
        grown = any(name not in known or known[name].checkpoint.size != head.checkpoint.size for name, head in shown.items())
        self._known = known | shown
        if grown:  # an idle log gets a fresh date every 5 s, which is not worth a write
            notes = {name: head.note for name, head in self._known.items()}
            Memory(notes.pop(anchor_name, b""), notes).store(self._path)

    def status(self) -> dict[str, object]:
        """What an operator wants to know, as JSON values."""
        return {"evidence": dict(self._evidence.counts()), "last": self.last.to_json() if self.last else None}

    def active(self) -> Counter[str]:
        """How many sources each kind of finding was about in the last round."""
        return Counter(kind for kind, _ in self._active)


def _fetch(source: Source) -> Fetch:
    async def fetch(name: TileName) -> bytes:
        return await source.get(f"tile/{name.path()}")

    return fetch
