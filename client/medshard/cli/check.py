"""verify, doctor and reindex."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import click

from medshard.cli import output
from medshard.cli.exits import Exit, exit_of
from medshard.cli.options import Session, dicom_index, examples, run, sha256, shared
from medshard.model import Audited, Finding, Progress, VerifyReport
from medshard_protocol.errors import Damaged, MedshardError

if TYPE_CHECKING:
    from medshard.vault import Vault

_marks = {
    "proven": "✓",
    "unproven": "?",
    "damaged": "✗",
    "missing": "✗",
    "unreachable": "?",
    "slow": "?",
    "ok": "✓",
    "warn": "!",
    "bad": "✗",
}


@click.command(epilog=examples("medshard verify 3b1f…", "medshard verify --all --json"))
@click.argument("hashes", nargs=-1, type=sha256, metavar="[SHA256...]")
@click.option("--all", "everything", is_flag=True, help="Every file of the vault.")
@shared
def verify(session: Session, hashes: tuple[bytes, ...], everything: bool) -> int:
    """Ask every holder to prove its shard.

    A holder re-reads and re-hashes its whole shard, and shows a few cells that we choose with their Merkle paths. The shards
    themselves are not downloaded. Like every read it is announced in the ledger first; without a quorum there is only the holders'
    word, and nothing is proven. What the holders' own audits found of each other lately is shown beside it.
    """
    if everything == bool(hashes):
        raise click.UsageError("name the files by their SHA-256, or say --all")
    reports = run(_verify(session, hashes))
    if session.json:
        output.document({"ok": all(report.ok for report in reports), "files": output.plain(reports)})
    states = {holder.state for report in reports for holder in report.holders}
    if states & {"damaged", "missing"}:
        return Exit.DAMAGED
    return Exit.UNAVAILABLE if states - {"proven"} else Exit.OK


async def _verify(session: Session, hashes: tuple[bytes, ...]) -> list[VerifyReport]:
    reports: list[VerifyReport] = []
    async with session.vault() as vault:
        wanted = list(hashes) or _one_of_each(vault)
        with output.meter(wanted=not (session.quiet or session.json) and len(wanted) > 1) as progress:
            async for report in _each(vault, wanted):
                reports.append(report)
                if progress:
                    progress(Progress(len(reports), len(wanted), "files", report.sha256.hex()))
                if not session.json:
                    _tell_verified(report, whole=bool(hashes))
    if not session.json and not session.quiet and not hashes:
        bad = sum(not report.ok for report in reports)
        output.line(f"{len(reports)} stored objects: {len(reports) - bad} whole, {bad} with holders that did not prove their shard")
    return reports


async def _each(vault: Vault, wanted: Iterable[bytes]) -> AsyncIterator[VerifyReport]:
    async for report in vault.verify_each(list(wanted)):
        yield report


def _one_of_each(vault: Vault) -> list[bytes]:
    """One file of every stored object: members of one pack share their shards."""
    return list({row.file_id: row.sha256 for row in vault.ls()}.values())


def _tell_verified(report: VerifyReport, *, whole: bool) -> None:
    proven = sum(holder.state == "proven" for holder in report.holders)
    if report.margin < 0:
        verdict = f"CANNOT BE RESTORED NOW: {-report.margin} shards are wanting"
    else:
        verdict = f"can be restored; {report.margin} more shards may be lost"
    output.line(f"{report.sha256.hex()}  {proven} of {len(report.holders)} shards proven, {verdict}")
    for holder in report.holders:
        if whole or holder.state != "proven":
            cells = f", bad cells {', '.join(map(str, holder.bad_cells[:8]))}" if holder.bad_cells else ""
            detail = f"  ({holder.detail})" if holder.detail else ""
            who = output.holder(holder.node, holder.institution)
            output.line(f"  {_marks[holder.state]} shard {holder.shard:>3}  {holder.state:<11} {who}{cells}{detail}")
    _tell_audits(report.audits, whole=whole)


def _tell_audits(audits: Sequence[Audited], *, whole: bool) -> None:
    """What the holders say that they found of each other; each one's word."""
    bad = [each for each in audits if each.is_bad]
    if audits and whole:
        auditors, last = {each.auditor for each in audits}, max(each.checked for each in audits)
        good = f"{len(audits) - len(bad)} of {len(audits)} results are good"
        output.line(f"    audits by {len(auditors)} holders, the last {datetime.fromtimestamp(last):%Y-%m-%d %H:%M}: {good}")
    for each in bad:
        since = f"{datetime.fromtimestamp(each.since):%Y-%m-%d %H:%M}"
        output.line(f"  ! {each.auditor} found shard {each.shard} of {each.node} {each.verdict}, {each.times} times since {since}")


@click.command(epilog=examples("medshard doctor", "medshard doctor --json"))
@shared
def doctor(session: Session) -> int:
    """Explain what is wrong, and what to do.

    Looks at everything that storing and restoring needs: the vault's files, its certificate, this disk, each node, the ledger.
    Changes nothing.
    """

    async def work() -> list[Finding]:
        async with session.vault() as vault:
            return await vault.doctor()

    code = Exit.OK
    try:
        findings = run(work())
    except MedshardError as error:
        findings, code = [Finding("bad", str(error), "the vault cannot be opened", error.hint)], exit_of(error)
    if any(finding.level == "bad" for finding in findings):
        code = code or Exit.DAMAGED
    if session.json:
        output.document({"ok": code == Exit.OK, "findings": output.plain(findings)})
    else:
        for finding in findings:
            if finding.level != "ok" or not session.quiet:
                _tell_finding(finding)
    return code


def _tell_finding(finding: Finding) -> None:
    output.line(f"{_marks[finding.level]} {finding.what}")
    for label, text in (("why", finding.why), ("fix", finding.fix)):
        if text and finding.level != "ok":
            output.line(f"    {label}: {text}")


@click.command(
    epilog=examples("medshard reindex", "medshard reindex --index 'postgresql://gateway@db.example/medshard?sslmode=verify-full'")
)
@dicom_index
@shared
def reindex(session: Session, index: str) -> int:
    """Rebuild the local index.

    From the ledger, any nodes that live, and the keys. Nothing is lost with the index: it is a cache, and this makes it again;
    a gateway's index of DICOM instances too.
    A damaged index is set aside as index.sqlite.damaged.
    """
    count = run(_reindex(session, index))
    if session.json:
        output.document({"files": count})
    elif not session.quiet:
        output.line(output.files(count))
    return Exit.OK


async def _reindex(session: Session, address: str) -> int:
    try:
        return await _reindex_once(session, address)
    except Damaged:
        # The index itself, most likely. Were it anything else, trying with a new index shows it.
        from medshard.home import Home

        path = Home(session.home).index
        if not path.exists():
            raise
        path.replace(path.with_name(path.name + ".damaged"))
        for end in ("-wal", "-shm"):
            path.with_name(path.name + end).unlink(missing_ok=True)
    return await _reindex_once(session, address)


async def _reindex_once(session: Session, address: str) -> int:
    async with session.vault() as vault:
        with output.meter(wanted=not (session.quiet or session.json)) as progress:
            rows = await vault.reindex(progress)
        if address or (session.home / "dicom.sqlite").exists():  # a gateway has worked here
            import asyncio

            from medshard.gateway.indexing import rebuild

            await asyncio.to_thread(rebuild, vault, address)
        return rows
