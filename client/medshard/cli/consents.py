"""request, requests and consents."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, purpose, run, sha256, shared
from medshard.cli.sharing import short, tell_granted, until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medshard.consent import Read, Request, Used
    from medshard.grants import Shared


this_vault = "this vault"


@click.command(
    epilog=examples(
        "medshard request --from Clinic --patient 'doe jane' --modality CT --purpose treatment --message 'second opinion'",
        "medshard request --from Clinic --from Hospital --modality CT --deidentified --purpose research --until 90d",
    )
)
@click.option("--from", "owners", multiple=True, required=True, metavar="KEY|NAME", help="Whom to ask: keys, or contacts; repeatable.")
@click.option("--patient", default="", metavar="TEXT", help="Words of the name, or the patient id.")
@click.option("--study-date", default="", metavar="DATE", help="2024-01-31, 2024-01, 2024, or a range.")
@click.option("--modality", default="", metavar="TEXT", help="CT, MR, …")
@click.option("--policy-number", default="", metavar="TEXT", help="The number, or a pattern.")
@click.option("--message", default="", metavar="TEXT", help="Why, in your words.")
@click.option("--until", "end", type=until, default=None, metavar="WHEN", help="How long you want to read: 90d, 2026-12-31 [for good].")
@click.option("--deidentified", is_flag=True, help="Ask for copies of scans without names, dates and identifiers, and for nothing else.")
@purpose("What for.")
@shared
def request(session: Session, owners: tuple[str, ...], end: int | None, purpose: int, **parts: Any) -> int:
    """Ask other vaults to let this one read files. Each sees your wish, approves or refuses; nothing is granted by asking.

    Prints the number by which each request is known, in the order in which you named whom to ask.
    """
    from medshard_protocol.errors import Malformed

    async def work() -> list[bytes]:
        from medshard.consent import Consents, Wish

        async with session.vault() as vault:
            keys = [vault.contacts.key(owner) for owner in owners]
            return [await Consents(vault).ask(key, Wish(**parts, purpose=purpose, until=end or 0)) for key in keys]

    try:
        made = run(work())
    except Malformed as error:
        raise click.UsageError(str(error)) from None
    if session.json:
        output.document({"requests": [each.hex() for each in made]})
    else:
        for each in made:
            output.line(each.hex())
    return Exit.OK


@click.group(epilog=examples("medshard requests ls", "medshard requests approve 3b1f… --until 30d", "medshard requests refuse 3b1f…"))
def requests() -> None:
    """Requests to read: those that others have made of this vault, and its own."""


@requests.command("ls", epilog=examples("medshard requests ls", "medshard requests ls --json"))
@shared
def list_requests(session: Session) -> int:
    """List requests: REQUEST, who asks, for what, the answer. With how many files of this vault meet them."""

    async def work() -> list[tuple[Request, str, int]]:
        from medshard.consent import Consents

        async with session.vault() as vault:
            consents, names, found = Consents(vault), vault.contacts.names(), []
            for each in await consents.requests():
                if vault.keys.of(each.asker) is not None:
                    found.append((each, this_vault, 0))
                else:
                    found.append((each, names.get(each.asker, ""), len(consents.meeting(each))))
            return found

    found = run(work())
    if session.json:
        told = ({**output.plain(each), "asker_name": who, "own": who == this_vault, "meeting": count} for each, who, count in found)
        output.document({"requests": list(told)})
        return Exit.OK
    for each, who, count in found:
        output.hashed(each.sha256, each.wish.message.encode(), *_columns(each, who, count))
    return Exit.OK


@requests.command(epilog=examples("medshard requests approve 3b1f…", "medshard requests approve 3b1f… --only 77a0… --until 30d"))
@click.argument("request", type=sha256, metavar="REQUEST")
@click.option("--only", "hashes", multiple=True, type=sha256, metavar="SHA256", help="Only these files; repeatable [all that meet it].")
@click.option("--until", "end", type=until, default=None, metavar="WHEN", help="30d, 2026-12-31 [as it was asked].")
@click.option("-y", "--yes", is_flag=True, help="Do not ask first.")
@shared
def approve(session: Session, request: bytes, hashes: tuple[bytes, ...], end: int | None, yes: bool) -> int:
    """Let whoever asked read the files that their request is about, or only those that you name.

    Where de-identified data was asked for, copies are made (see `medshard deidentify`) and granted, one grant on the ledger for each.
    """

    async def look() -> int:
        from medshard.consent import Consents

        async with session.vault() as vault:
            consents = Consents(vault)
            asked = [each for each in await consents.requests() if each.sha256 == request]
            return len(consents.meeting(asked[0])) if asked else 0

    async def work() -> list[Shared]:
        from medshard.consent import Consents

        async with session.vault() as vault:
            with output.meter(wanted=not (session.quiet or session.json)) as progress:
                return await Consents(vault).approve(request, hashes or None, until=end, progress=progress)

    if not yes:
        if not sys.stdin.isatty() or session.json:
            raise click.UsageError("this gives rights away: say --yes")
        count = len(hashes) or run(look())
        click.confirm(f"Let them read {output.files(count)}?", abort=True, err=True)
    return tell_granted(session, run(work()))


@requests.command(epilog=examples("medshard requests refuse 3b1f… --reason 'not without the patient'"))
@click.argument("request", type=sha256, metavar="REQUEST")
@click.option("--reason", default="", metavar="TEXT", help="What they read.")
@shared
def refuse(session: Session, request: bytes, reason: str) -> int:
    """Say no to a request."""

    async def work() -> Request:
        from medshard.consent import Consents

        async with session.vault() as vault:
            return await Consents(vault).refuse(request, reason)

    refused = run(work())
    if session.json:
        output.document({"refused": refused.sha256.hex()})
    return Exit.OK


@click.group(epilog=examples("medshard consents ls --patient 'doe jane'", "medshard consents usage --purpose research --csv use.csv"))
def consents() -> None:
    """Who may read this vault's files now, and how often they did. `medshard revoke` takes a consent back."""


@consents.command("ls", epilog=examples("medshard consents ls", "medshard consents ls --patient 'doe jane' --json"))
@click.option("--patient", metavar="TEXT", help="Only of this patient: words of the name, or the patient id.")
@shared
def list_consents(session: Session, patient: str | None) -> int:
    """List consents that are in force: file, who may read it, for what, until when."""

    async def work() -> list[tuple[Shared, dict[str, str]]]:
        from medshard.consent import Consents

        async with session.vault() as vault:
            rows = [(each, vault.row(each.sha256)) for each in await Consents(vault).of(patient)]
            return [(each, dict(row.attributes) if row else {}) for each, row in rows]

    found = run(work())
    if session.json:
        output.document({"consents": [{**output.plain(each), "attributes": attributes} for each, attributes in found]})
        return Exit.OK
    for each, attributes in found:
        end = time.strftime("until %Y-%m-%d", time.localtime(each.until)) if each.until else "for good"
        who = each.peer_name or f"{each.peer.hex()[:16]}…"
        about = [attributes[name] for name in ("patient-name", "modality", "study-date") if name in attributes]
        output.hashed(each.sha256, each.name, f"to {who}", each.purpose, end, f"grant {each.grant_index}", *about)
    return Exit.OK


@consents.command(
    "revoke",
    epilog=examples(
        "medshard consents revoke --patient 'doe jane'                # from everybody",
        "medshard consents revoke --from Insurer --patient 'doe jane' --yes",
    ),
)
@click.option("--patient", metavar="TEXT", help="All that is of this patient: words of the name, or the patient id.")
@click.option("--from", "reader", metavar="KEY|NAME", help="From whom: a key or a contact [everybody].")
@click.option("-y", "--yes", is_flag=True, help="Do not ask first.")
@shared
def revoke_consents(session: Session, patient: str | None, reader: str | None, yes: bool) -> int:
    """Take back every consent about one patient, or to one reader, or both. For single files: `medshard revoke`.

    From the entries in the ledger on, nodes refuse the readers. What was read before stays read.
    """
    if not (patient or "").strip() and (patient is not None or reader is None):
        raise click.UsageError("say whose consents end with --patient, or from whom with --from")

    async def work() -> list[Shared]:
        from medshard.consent import Consents

        async with session.vault() as vault:
            consents, key = Consents(vault), vault.contacts.key(reader) if reader else None
            meant = [each for each in await consents.of(patient) if key in (None, each.peer)]
            if meant and not yes:
                readers = ", ".join(sorted({each.peer_name or short(each.peer) for each in meant}))
                files = output.files(len({each.sha256 for each in meant}))
                click.confirm(f"Take {files} back from {readers}?", abort=True, err=True)
            return await consents.end(meant)

    if not yes and (not sys.stdin.isatty() or session.json):
        raise click.UsageError("this takes rights away: say --yes")
    ended = run(work())
    if session.json:
        output.document({"revoked": output.plain(ended)})
        return Exit.OK
    for each in ended:
        who = each.peer_name or short(each.peer)
        output.hashed(each.sha256, each.name, f"from {who}", f"grant {each.grant_index} ended by entry {each.ended}")
    return Exit.OK


@consents.command("usage", epilog=examples("medshard consents usage", "medshard consents usage --purpose research --csv settlement.csv"))
@click.option("--csv", "table", type=click.Path(dir_okay=False, path_type=Path), help="Write a table too.")
@click.option("--entries", is_flag=True, help="List each read, with its entry and its grant, instead of counts by month.")
@purpose("Only reads for this purpose.")
@shared
def usage(session: Session, table: Path | None, entries: bool, purpose: int) -> int:
    """Count reads of this vault's files by others: by month, reader and purpose, from the whole ledger.

    For settlement: whoever is sent the table can check each row against the ledger, by the entries that it names.
    """

    async def work() -> list[Read]:
        from medshard.consent import Consents

        async with session.vault() as vault:
            return await Consents(vault).reads(purpose or None)

    from medshard.consent import counted

    reads = run(work())
    found: Sequence[Read | Used] = reads if entries else counted(reads)
    columns = _read_columns if entries else _used_columns
    rows: list[list[Any]] = [[_cell(getattr(each, name)) for name in columns] for each in found]
    if table is not None:
        with open(table, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)
    if session.json:
        output.document({"usage": [dict(zip(columns, row, strict=True)) for row in rows]})
        return Exit.OK
    for each, row in zip(found, rows, strict=True):
        who = each.reader_name or f"{each.reader.hex()[:16]}…"
        when, what = (
            (row[0], f"{output.counted(row[5], 'read')} of {output.files(row[6])}")
            if not entries
            else (f"entry {row[0]}", f"grant {row[6]}")
        )
        output.line(f"{when}  {who}  {each.institution}  {each.purpose}  {what}")
    return Exit.OK


_used_columns = ("month", "reader", "reader_name", "institution", "purpose", "reads", "files", "first", "last")
_read_columns = ("entry", "time", "reader", "reader_name", "institution", "purpose", "grant", "file_ids")


def _cell(value: Any) -> Any:
    """A value as a table holds it."""
    if isinstance(value, tuple):
        return " ".join(each.hex() for each in value)
    return value.hex() if isinstance(value, bytes) else value


def _columns(each: Request, who: str, count: int) -> list[str]:
    from medshard.grants import purpose_name

    wish = each.wish
    about = " ".join(filter(None, (wish.patient, wish.modality, wish.study_date, wish.policy_number))) or "everything"
    about += ", de-identified" if wish.deidentified else ""
    answer = (
        each.answer + (f" ({each.why})" if each.why else "")
        if each.answer
        else ("no answer yet" if who == this_vault else f"{output.files(count)} meet it")
    )
    return [f"from {who or short(each.asker)}", about, purpose_name(wish.purpose), answer]
