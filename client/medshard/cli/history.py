"""log and auditor-key."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, run, sha256, shared

if TYPE_CHECKING:
    from medshard.grants import Happened
    from medshard.hpke import PrivateKey

_file = click.Path(dir_okay=False, allow_dash=True, path_type=Path)


@click.command(
    epilog=examples(
        "medshard log 3b1f…",
        "medshard log 3b1f… --csv reads.csv",
        "medshard log --auditor auditors.key --fhir audit.json",
    )
)
@click.argument("sha256", required=False, type=sha256, metavar="[SHA256]")
@click.option("--auditor", type=click.Path(dir_okay=False, path_type=Path), metavar="KEYFILE", help="The whole log, with reasons opened.")
@click.option("--csv", "csv_file", type=_file, metavar="FILE", help="Write a table too; - is standard output.")
@click.option("--fhir", "fhir_file", type=_file, metavar="FILE", help="Write FHIR R4 AuditEvents too; - is standard output.")
@shared
def log(session: Session, sha256: bytes | None, auditor: Path | None, csv_file: Path | None, fhir_file: Path | None) -> int:
    """Say who read a file, when, and under whose grant.

    Comes from the ledger: every line is proved by a checkpoint that a quorum of institutions cosigned, and more of them are asked
    than could conspire to leave one out. With --auditor it is everything in the log, for which the whole of it is read and its root
    computed; the auditors' key opens the reasons of emergency reads.
    """
    if (sha256 is None) == (auditor is None):
        raise click.UsageError("name one file by its SHA-256, or give the auditors' key file with --auditor")
    key = None if auditor is None else _auditors_key(auditor)

    async def work() -> tuple[Iterable[Happened], str]:
        async with session.vault() as vault:
            origin = vault.roster.origin
            if sha256 is not None:
                return await vault.shares.log(sha256), origin
            with output.meter(wanted=not (session.quiet or session.json)) as progress:
                return await vault.shares.audit(key, progress), origin

    happened, origin = run(work())
    to_pipe = _export(happened, origin, csv_file, fhir_file)
    if session.json and not to_pipe:
        output.documents("log", happened)
    elif not to_pipe:
        for each in happened:
            _tell(each, files=auditor is not None)
    return Exit.OK


def _auditors_key(path: Path) -> PrivateKey:
    from medshard import auditors
    from medshard.cli import passphrase

    return auditors.load(path, passphrase.of_auditors(path))


def _export(happened: Iterable[Happened], origin: str, csv_file: Path | None, fhir_file: Path | None) -> bool:
    """Write what was asked for; whether standard output is taken."""
    from medshard.durable import write_durably
    from medshard.export import as_csv, as_fhir

    taken = False
    for path, pieces in ((csv_file, as_csv(happened)), (fhir_file, as_fhir(happened, origin, int(time.time())))):
        if path is not None and str(path) == "-":
            sys.stdout.writelines(pieces)
            taken = True
        elif path is not None:
            write_durably(path, (piece.encode("utf-8", "backslashreplace") for piece in pieces), mode=0o600)
    return taken


def _tell(each: Happened, *, files: bool) -> None:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.time)) if each.time else "-" * 19
    who = each.author_name or f"{each.author.hex()[:16]}…"
    parts = [f"{each.index:>8}", when if each.exact or not each.time else f"≤ {when}", each.what, f"by {who}"]
    if each.institution:
        parts[-1] += f" ({each.institution})"
    if each.what in ("granted", "revoked", "void grant", "void revocation"):
        way = "to" if each.what in ("granted", "void grant") else "from"
        parts.append(f"{way} {each.reader_name or f'{each.reader.hex()[:16]}…'}")
    if each.until:
        parts.append(time.strftime("until %Y-%m-%d %H:%M", time.localtime(each.until)))
    if each.purpose and each.purpose != "unspecified":
        parts.append(f"for {each.purpose}")
    if each.grant_index >= 0 and each.what not in ("granted", "void grant"):
        parts.append(f"under grant {each.grant_index}" if each.what.startswith("read") else f"grant {each.grant_index}")
    if files:
        parts.append(f"{output.files(len(each.file_ids))} {each.file_ids[0].hex()[:16]}…")
    output.line("  ".join(parts))
    if each.reason or each.sealed_reason:
        output.line(f"{'':>10}reason: {each.reason or 'sealed to the auditors'}")


@click.group("auditor-key", epilog=examples("medshard auditor-key create auditors.key > auditors.pub"))
def auditor_key() -> None:
    """The auditors' key, to which reasons of emergency reads are sealed."""


@auditor_key.command(
    "create", epilog=examples("medshard auditor-key create auditors.key > auditors.pub", "storenode roster propose --auditors auditors.pub")
)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
@shared
def create_auditor_key(session: Session, file: Path) -> int:
    """Make the auditors' private key in FILE, and print the public one.

    The public key goes into the roster. Keep FILE and its passphrase with the auditors; without them no reason is ever read.
    """
    from medshard import auditors
    from medshard.cli import passphrase

    made = auditors.create(file, passphrase.of_auditors(file, new=True))
    if session.json:
        output.document({"file": output.plain(file), "public": made.public.hex()})
    else:
        output.line(made.public.hex())
    return Exit.OK
