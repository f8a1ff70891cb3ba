"""The four reports of a vault. What is told of access and keys comes from the ledger, what is told of shards from asking their holders now.

Law: an empty table says that nothing was found in what was looked at, and the facts say what that was. A restore drill leaves no plaintext:
what it reads is hashed and forgotten.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from cryptography.x509 import load_der_x509_certificate

from medshard.grants import Happened
from medshard.model import HolderReport, OnProgress, Progress, Row, VerifyReport
from medshard.reports.model import Bars, Report, Table, moment
from medshard.restoring import Nowhere
from medshard.vault import Vault
from medshard_protocol.errors import MedshardError
from medshard_protocol.ids import FileId

day_s: Final = 86_400
soon_s: Final = 60 * day_s  # a certificate that runs out within this is worth a line
emergency: Final = "read in an emergency"
trespass: Final = "tried to read without a right"
reading: Final = ("read", emergency, trespass)
tops: Final = 12  # bars in a chart
listed_max: Final = 200  # documents that one line names


class Reports:
    """Of one open vault."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    async def access(self, start: int, end: int, progress: OnProgress | None = None) -> Report:
        """Who read this vault's files, or was given or lost the right to, from ``start`` to before ``end`` (Unix seconds).

        The whole log is read and its root computed, so no node can leave anything out. Emergency reads come first, then those that had no
        right.
        """
        gone = {ended.file_id: [digest for _, digest in ended.documents] for ended in self._vault.custody.all_ended()}
        own = {FileId(each) for each in self._vault.file_ids()} | gone.keys()
        everything = await self._vault.shares.audit(None, progress)
        happened = [each for each in everything if start <= each.time < end and own.intersection(each.file_ids)]
        happened.sort(key=lambda each: (each.what != emergency, each.what != trespass, each.index))
        reads = [each for each in happened if each.what in reading]
        others = [each for each in reads if self._vault.keys.of(each.author) is None]
        emergencies = sum(each.what == emergency for each in reads)
        refused = sum(each.what == trespass for each in reads)
        facts = (
            ("entries about this vault's files", str(len(happened))),
            ("reads announced", str(len(reads))),
            ("of these by other vaults", str(len(others))),
            ("in emergencies", str(emergencies)),
            ("without a right (nodes refuse these)", str(refused)),
            ("entries of the whole log that were read", str(max((each.index for each in everything), default=-1) + 1)),
        )
        columns = ("time (UTC)", "what", "who", "institution", "purpose", "documents (sha256)", "under", "to or from", "reason", "entry")
        lines = tuple((*self._line(each)[:5], self._documents(each, own, gone), *self._line(each)[5:]) for each in happened)
        title = "What happened: reads in emergencies first, then those without a right"
        table = Table(title, columns, lines, emergencies + refused)
        by_day = Counter(moment(each.time)[:10] for each in reads)
        charts = (
            Bars("Reads by day", tuple((day, float(count)) for day, count in sorted(by_day.items())[-31:])),
            Bars("Reads by purpose", _top(Counter(each.purpose or "not said" for each in reads))),
            Bars("Reads by reader", _top(Counter(self._who(each) for each in reads))),
        )
        return Report(
            "access",
            "Access review",
            int(time.time()),
            _period(start, end),
            facts,
            (table,),
            charts,
            not (emergencies or refused),
        )

    async def integrity(self, sample: int | None = None, progress: OnProgress | None = None) -> Report:
        """Ask every holder of every file, or of ``sample`` of them drawn at random, to prove its shard."""
        rows = _one_of_each(self._vault.ls())
        chosen = rows if sample is None or sample >= len(rows) else random.sample(rows, sample)
        names = {row.sha256: row for row in chosen}
        found: list[VerifyReport] = []
        async for each in self._vault.verify_each(list(names)):
            found.append(each)
            if progress:
                progress(Progress(len(found), len(chosen), "files", names[each.sha256].sha256.hex()[:16]))
        states = Counter(holder.state for each in found for holder in each.holders)
        whole = sum(each.ok for each in found)
        facts = (
            ("objects of this vault", str(len(rows))),
            ("asked about now", str(len(found))),
            ("with every shard proven", str(whole)),
            ("least margin (proven shards beyond those that a restore needs)", str(min((each.margin for each in found), default=0))),
            ("shards proven", str(states["proven"])),
            ("shards unproven (the ledger had no quorum)", str(states["unproven"])),
            ("shards damaged, missing or unreachable", str(sum(states.values()) - states["proven"] - states["unproven"])),
            *_audit_facts(found),
        )
        worst = sorted((each for each in found if not each.ok), key=lambda each: each.margin)
        lines = tuple(
            (
                each.sha256.hex(),
                str(each.margin),
                _holders(each.holders),
            )
            for each in worst
        )
        columns = ("sha256", "margin", "holders")
        tables = (
            Table("Objects that are not whole, the worst first", columns, lines, len(lines)),
            _audits(found),
            await self._moved(chosen),
        )
        charts = (
            Bars("Shards by state", _top(states)),
            Bars(
                "Objects by margin",
                tuple((str(margin), float(count)) for margin, count in sorted(Counter(each.margin for each in found).items())),
            ),
        )
        period = "now, of all objects" if len(chosen) == len(rows) else f"now, of {len(chosen)} objects drawn at random"
        return Report("integrity", "Integrity", int(time.time()), period, facts, tables, charts, whole == len(found))

    async def restore_drill(self, count: int = 10, progress: OnProgress | None = None) -> Report:
        """Read ``count`` files drawn at random, whole, compare their hashes and forget them; how long each took."""
        rows = list({row.sha256: row for row in self._vault.ls()}.values())
        chosen = random.sample(rows, min(count, len(rows)))
        lines, times, failed = [], list[float](), 0
        for number, row in enumerate(chosen, 1):
            started = time.monotonic()
            try:
                await self._vault.get(row.sha256, out=Nowhere())
                outcome = "whole"
            except MedshardError as error:
                outcome, failed = str(error), failed + 1
            took = time.monotonic() - started
            times.append(took)
            lines.append((row.sha256.hex(), str(row.size), f"{took:.3f}", _rate(row.size / took), outcome))
            if progress:
                progress(Progress(number, len(chosen), "files", row.sha256.hex()[:16]))
        total = sum(row.size for row in chosen)
        facts = (
            ("files of this vault", str(len(rows))),
            ("read and compared", str(len(chosen))),
            ("that came back whole", str(len(chosen) - failed)),
            ("bytes", f"{total:,}"),
            ("seconds, all together", f"{sum(times):.2f}"),
            ("seconds, the slowest", f"{max(times, default=0.0):.3f}"),
        )
        table = Table("Files", ("sha256", "bytes", "seconds", "MB/s", "outcome"), tuple(lines))
        charts = (Bars("Seconds for each file", tuple((line[0][:8], float(line[2])) for line in lines[:tops]), "s"),)
        return Report(
            "restore-drill", "Restore drill", int(time.time()), f"{len(chosen)} files drawn at random", facts, (table,), charts, not failed
        )

    async def keys(self) -> Report:
        """How this vault's keys stand: certificate, escrow, what is granted, and to whom."""
        from medshard.escrow import Escrow

        vault, now = self._vault, time.time()
        certificate = load_der_x509_certificate(vault.home.certificate_bytes())
        runs_out = certificate.not_valid_after_utc.timestamp()
        shared = await vault.shares.all()
        given = [each for each in shared if each.given]
        standing = [each for each in given if not each.ended and not 0 < each.until < now]
        endless = [each for each in standing if not each.until]
        deposited = Escrow(vault).deposited()
        facts = (
            ("this vault's key", vault.keys.public.hex()),
            ("certificate valid until", f"{moment(runs_out)} UTC"),
            ("shares of the root key with custodians", str(max((len(rows) for rows in deposited.values()), default=0))),
            ("grants that stand", str(len(standing))),
            ("of these without an end", str(len(endless))),
            ("grants that have ended", str(len(given) - len(standing))),
            ("contacts", str(len(vault.contacts.all()))),
        )
        columns = ("to", "institution", "sha256", "purpose", "until (UTC)", "grant", "state")
        lines = tuple(
            (
                each.peer_name or each.peer.hex()[:16],
                each.institution,
                each.sha256.hex(),
                each.purpose,
                moment(each.until) if each.until else "for good",
                str(each.grant_index),
                "ended" if each not in standing else "stands",
            )
            for each in sorted(given, key=lambda each: (each not in standing, each.until, each.grant_index))
        )
        charts = (Bars("Standing grants by reader", _top(Counter(each.peer_name or each.peer.hex()[:8] for each in standing))),)
        attention = runs_out - now < soon_s or not deposited
        table = Table("Grants, those that stand first", columns, lines)
        return Report("keys", "Keys and grants", int(now), "now", facts, (table,), charts, not attention)

    # -- parts

    async def _moved(self, rows: Sequence[Row]) -> Table:
        """Repairs of these objects, as the whole ledger tells of them."""
        hashes = {row.file_id: row.sha256.hex() for row in rows}
        lines = tuple(
            (moment(each.time), hashes[file_id], each.institution or each.author.hex()[:16], str(each.index))
            for each in await self._vault.shares.audit(None)
            if each.what == "shard moved"
            for file_id in each.file_ids
            if file_id in hashes
        )
        return Table("Shards that were moved or made again", ("time (UTC)", "sha256", "by", "entry"), lines)

    def _line(self, each: Happened) -> tuple[str, ...]:
        grant = f"grant {each.grant_index}" if each.grant_index >= 0 else ""
        other = each.reader_name or each.reader.hex()[:16]
        reason = each.reason or ("sealed to the auditors" if each.sealed_reason else "")
        about = ("" if each.exact or not each.time else "before ") + moment(each.time)
        return (
            about,
            each.what,
            self._who(each),
            each.institution,
            each.purpose,
            grant,
            other,
            reason,
            str(each.index),
        )

    def _documents(self, each: Happened, own: set[FileId], gone: Mapping[FileId, Sequence[bytes]]) -> str:
        """The documents of this vault that an entry is about, by their hashes; of a pack the first, with how many more lie in it."""
        told = []
        for file_id in (FileId(each_id) for each_id in each.file_ids if each_id in own):
            hashes = gone.get(file_id) or [row.sha256 for row in self._vault.documents_in(file_id)]
            if hashes:
                told.append(hashes[0].hex() + (f" (and {len(hashes) - 1} more in one pack)" if len(hashes) > 1 else ""))
        rest = len(told) - listed_max
        return "; ".join(told[:listed_max]) + (f"; and {rest} more" if rest > 0 else "")

    @staticmethod
    def _who(each: Happened) -> str:
        return each.author_name or f"{each.author.hex()[:16]}…"


def _one_of_each(rows: Iterable[Row]) -> list[Row]:
    """One row for each object: its holders are the same for all members of a pack."""
    return list({row.file_id: row for row in rows}.values())


def _rate(bytes_per_second: float) -> str:
    """In MB/s."""
    return f"{bytes_per_second / 1e6:.1f}" if bytes_per_second >= 1e5 else "<0.1"


def _period(start: int, end: int) -> str:
    if start % day_s or end % day_s:
        return f"{moment(start)} to {moment(end)} UTC"
    return f"{moment(start)[:10]} to {moment(end - 1)[:10]}, days in UTC"


def _holders(holders: Sequence[HolderReport]) -> str:
    """What each holder said that did not prove its shard; those that said the same together."""
    said: dict[tuple[str, str], list[str]] = {}
    for each in holders:
        if each.state != "proven":
            said.setdefault((each.state, each.detail.removeprefix(f"{each.node}: ")), []).append(each.node)
    return "; ".join(f"{', '.join(nodes)}: {state}{f' ({why})' if why else ''}" for (state, why), nodes in said.items())


def _audit_facts(found: Sequence[VerifyReport]) -> tuple[tuple[str, str], ...]:
    audits = [audit for each in found for audit in each.audits]
    if not audits:
        return (("results of holders' own audits of each other", "none yet"),)
    bad = sum(audit.is_bad for audit in audits)
    last = moment(max(audit.checked for audit in audits))
    return (("results of holders' own audits of each other", f"{len(audits)}, of these {bad} bad, the last {last} UTC"),)


def _audits(found: Sequence[VerifyReport]) -> Table:
    columns = ("sha256", "holder", "shard", "verdict", "by", "since (UTC)", "last checked (UTC)")
    lines = tuple(
        (each.sha256.hex(), audit.node, str(audit.shard), audit.verdict, audit.auditor, moment(audit.since), moment(audit.checked))
        for each in found
        for audit in each.audits
        if audit.is_bad
    )
    return Table("What holders have found wanting of each other", columns, lines, len(lines))


def _top(counts: Counter[Any]) -> tuple[tuple[str, float], ...]:
    listed = [(str(name), float(count)) for name, count in counts.most_common(tops)]
    rest = sum(counts.values()) - sum(count for _, count in listed)
    return (*listed, ("others", rest)) if rest else tuple(listed)
