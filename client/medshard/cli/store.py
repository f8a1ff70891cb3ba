"""put and get."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, purpose, run, sha256, shared, tag
from medshard.model import GetReport, PutReport
from medshard.text import shown

_local = click.Path(path_type=Path)


@click.command(
    epilog=examples(
        "medshard put scan.dcm policy.pdf",
        "medshard put studies/ > studies.sha256      # sha256sum -c checks the originals later",
        "medshard put --policy-number VN-7 --tag branch=life policy.pdf",
    )
)
@click.argument("paths", nargs=-1, required=True, type=_local, metavar="PATH...")
@click.option("--policy-number", metavar="NUMBER", help="Number of the policy that the files belong to; find looks for it.")
@click.option(
    "--tag", "tags", multiple=True, type=tag, metavar="NAME=VALUE", help="Your own mark on the files, sealed like the rest. Repeatable."
)
@shared
def put(session: Session, paths: tuple[Path, ...], policy_number: str | None, tags: tuple[tuple[str, str], ...]) -> int:
    """Store files and folders; print SHA256 PATH.

    A line is printed when the file is safe: its shards fsynced on nodes of w institutions and its entry in a ledger checkpoint
    that a quorum cosigned. A file that is broken, or cannot be read, stops none of the others. An interrupted put can be run
    again: it finishes without sending stored shards twice.
    """
    _check_policy_number(policy_number)

    async def work() -> tuple[PutReport, str]:
        async with session.storing() as vault:
            with output.meter(wanted=not (session.quiet or session.json)) as progress:
                report = await vault.put(paths, tags=dict(tags), policy_number=policy_number, progress=progress)
            # Of what is stored already no node was asked anything.
            idle = bool(report.stored) and all(stored.already for stored in report.stored)
            return report, await vault.shares.withdrawn_by() if idle and isinstance(vault, Vault) else ""

    from medshard.vault import Vault

    started = time.monotonic()
    report, institution = run(work())
    code = tell_put(session, report, time.monotonic() - started)
    if institution and not session.quiet:
        told = "all of this was stored before, and nothing else will be: see `medshard doctor`"
        output.note(f"medshard: {institution} has withdrawn this vault's key; {told}")
    return code


def tell_put(session: Session, report: PutReport, took_s: float = 0.0) -> int:
    """Say what a put did; the exit code."""
    if session.json:
        output.document(output.plain(report))
    else:
        _tell_put(session, report, took_s)
    failed = [problem for problem in report.problems if not problem.stored]
    if not failed:
        return Exit.OK
    return Exit.PARTIAL if report.stored else Exit.LOCAL


def _check_policy_number(number: str | None) -> None:
    from medshard.model import check_attributes
    from medshard_protocol.errors import Malformed

    try:
        check_attributes({"policy-number": number or ""})
    except Malformed as error:
        raise click.BadParameter(str(error).removeprefix("header: "), param_hint="--policy-number") from None


def _tell_put(session: Session, report: PutReport, took_s: float) -> None:
    for stored in report.stored:
        output.hashed(stored.sha256, os.fsencode(stored.path))
    sys.stdout.flush()
    for problem in report.problems:
        if not problem.stored:
            output.problem(f"{shown(os.fsencode(problem.path))}: {problem.message}; not stored")
        elif not session.quiet:
            output.note(f"medshard: {shown(os.fsencode(problem.path))}: {problem.message}; stored as it is")
    if session.quiet:
        return
    if not report.stored and not report.problems:
        output.note("medshard: there are no files to store in what was named")
    elif report.stored and sys.stderr.isatty():
        fresh = sum(stored.size for stored in report.stored if not stored.already)
        already = sum(stored.already for stored in report.stored)
        known = f", {already} of them stored before" if already else ""
        rate = f", {output.size(int(fresh / took_s))}/s" if fresh and took_s else ""
        output.note(f"{output.files(len(report.stored))}{known}, {output.size(fresh)} in {took_s:.1f} s{rate}")


@click.command(
    epilog=examples(
        "medshard get 3b1f…                     # under its own name, here",
        "medshard get 3b1f… -o back.dcm",
        "medshard get 3b1f… -o - | dcmdump -",
        "medshard get 3b1f… --purpose treatment",
        "medshard get 'https://share.clinic.example/link#shlink:/eyJ1…' -o letters/",
        "medshard find --patient doe --json | jq -r '.files[].sha256' | xargs medshard get -o restored/",
        "medshard get 3b1f… --break-glass 'patient unconscious, emergency room 3'",
    )
)
@click.argument("wanted", nargs=-1, required=True, metavar="SHA256...|LINK")
@click.option("-o", "--output", "destination", type=_local, metavar="PATH", help="File or folder to write to; - is standard output.")
@click.option("-f", "--force", is_flag=True, help="Replace a file of the same name that is here already.")
@purpose("What the files are read for, as the ledger will say.")
@click.option("--break-glass", metavar="REASON", help="Read even if the ledger is out of reach; auditors will see the REASON.")
@shared
def get(session: Session, wanted: tuple[str, ...], destination: Path | None, force: bool, purpose: int, break_glass: str | None) -> int:
    """Restore files by their SHA-256: this vault's, or shared with it. Or whatever a link opens, for which no vault is needed.

    Every byte is checked on the way, and the whole against its SHA-256, before the file gets its name: there is the right file,
    or none. Several files go into a folder, under the names they were put with.

    The read is written into the ledger before a node gives out anything. When the ledger has no quorum, nothing is read; an identity
    that the roster marks for emergencies may read with --break-glass, which is written down as soon as the ledger is back.
    """
    if any("shlink:/" in text for text in wanted):
        from medshard.cli.links import open_link

        if len(wanted) > 1:
            raise click.UsageError("one link at a time")
        return open_link(session, wanted[0], destination or Path(), overwrite=force)
    hashes = tuple(map(sha256, wanted))
    _check_reason(break_glass)
    to_pipe = destination is not None and str(destination) == "-"
    if len(hashes) > 1 and destination is not None and not to_pipe and destination.exists() and not destination.is_dir():
        raise click.BadParameter(f"{destination} is a file; several files need a folder", param_hint="-o")
    why = _Why(purpose, break_glass)
    reports = run(_restore(session, hashes, destination, why, to_pipe=to_pipe, replace=force))
    if session.json and not to_pipe:
        output.document({"restored": output.plain(reports)})
    elif not to_pipe:
        for report in reports:
            output.hashed(report.sha256, os.fsencode(report.path or "-"))
    if not session.quiet:
        _remark(reports)
    return Exit.OK


class _Why(NamedTuple):
    purpose: int
    break_glass: str | None


def _check_reason(reason: str | None) -> None:
    if reason is None:
        return
    from medshard.envelopes import reason_text_bytes_max

    if not 1 <= len(reason.strip().encode()) <= reason_text_bytes_max:
        raise click.BadParameter(f"a reason has 1 to {reason_text_bytes_max} bytes of text", param_hint="--break-glass")


async def _restore(
    session: Session, hashes: tuple[bytes, ...], destination: Path | None, why: _Why, *, to_pipe: bool, replace: bool
) -> list[GetReport]:
    async with session.vault() as vault:
        with output.meter(wanted=not (session.quiet or session.json)) as progress:
            if to_pipe:
                out: BinaryIO = sys.stdout.buffer
                return [await vault.get(wanted, out=out, progress=progress, **why._asdict()) for wanted in hashes]
            if len(hashes) == 1:
                named = destination is not None and not destination.is_dir()
                return [await vault.get(hashes[0], destination, progress=progress, overwrite=replace or named, **why._asdict())]
            folder = destination or Path()
            folder.mkdir(parents=True, exist_ok=True)
            return await vault.get_many(hashes, folder, progress=progress, overwrite=replace, **why._asdict())


def _remark(reports: list[GetReport]) -> None:
    bad: dict[str, int] = {}
    for node, _shard, _cell in {cell for report in reports for cell in report.bad_cells}:
        bad[node] = bad.get(node, 0) + 1
    for node, count in sorted(bad.items()):
        output.note(f"medshard: {node} gave {count} damaged cells; they were made good from other nodes. See `medshard verify`.")
    if not all(report.recorded for report in reports):
        output.note(
            "medshard: the ledger is out of reach: this was an EMERGENCY read. Its signed record, with the reason, is kept by the nodes "
            "and here, and will stand flagged in the ledger."
        )
