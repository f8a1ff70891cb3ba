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
from medshard.cli.sharing import short, until

if TYPE_CHECKING:
    from medshard.consent import Request, Used
    from medshard.grants import Shared


@click.command(
    epilog=examples(
        "medshard request --from Clinic --patient 'doe jane' --modality CT --purpose treatment --message 'second opinion'",
        "medshard request --from 5c1e… --study-date 2024 --purpose research --until 90d",
    )
)
@click.option("--from", "owner", required=True, metavar="KEY|NAME", help="Whom to ask: a key, or a contact.")
@click.option("--patient", default="", metavar="TEXT", help="Words of the name, or the patient id.")
@click.option("--study-date", default="", metavar="DATE", help="2024-01-31, 2024-01, 2024, or a range.")
@click.option("--modality", default="", metavar="TEXT", help="CT, MR, …")
@click.option("--policy-number", default="", metavar="TEXT", help="The number, or a pattern.")
@click.option("--message", default="", metavar="TEXT", help="Why, in your words.")
@click.option("--until", "end", type=until, default=None, metavar="WHEN", help="How long you want to read: 90d, 2026-12-31 [for good].")
@purpose("What for.")
@shared
def request(session: Session, owner: str, end: int | None, purpose: int, **parts: str) -> int:
    """Ask another vault to let this one read files. It sees your wish, approves or refuses; nothing is granted by asking."""
    from medshard_protocol.errors import Malformed

    async def work() -> bytes:
        from medshard.consent import Consents, Wish

        async with session.vault() as vault:
            return await Consents(vault).ask(vault.contacts.key(owner), Wish(**parts, purpose=purpose, until=end or 0))

    try:
        made = run(work())
    except Malformed as error:
        raise click.UsageError(str(error)) from None
    if session.json:
        output.document({"request": made.hex()})
    else:
        output.line(made.hex())
    return Exit.OK


@click.group(epilog=examples("medshard requests ls", "medshard requests approve 3b1f… --until 30d", "medshard requests refuse 3b1f…"))
def requests() -> None:
    """Requests to read: those that others have made of this vault, and its own."""


@requests.command("ls", epilog=examples("medshard requests ls", "medshard requests ls --json"))
@shared
def list_requests(session: Session) -> int:
    """List requests: REQUEST, who asks, for what, the answer. With how many files of this vault meet them."""

    async def work() -> list[tuple[Request, bool, int]]:
        from medshard.consent import Consents

        async with session.vault() as vault:
            consents = Consents(vault)
            found = []
            for each in await consents.requests():
                own = each.asker == vault.keys.public
                found.append((each, own, 0 if own else len(consents.meeting(each))))
            return found

    found = run(work())
    if session.json:
        output.document({"requests": [{**output.plain(each), "own": own, "meeting": count} for each, own, count in found]})
        return Exit.OK
    for each, own, count in found:
        output.hashed(each.sha256, each.wish.message.encode(), *_columns(each, own, count))
    return Exit.OK


@requests.command(epilog=examples("medshard requests approve 3b1f…", "medshard requests approve 3b1f… --only 77a0… --until 30d"))
@click.argument("request", type=sha256, metavar="REQUEST")
@click.option("--only", "hashes", multiple=True, type=sha256, metavar="SHA256", help="Only these files; repeatable [all that meet it].")
@click.option("--until", "end", type=until, default=None, metavar="WHEN", help="30d, 2026-12-31 [as it was asked].")
@click.option("-y", "--yes", is_flag=True, help="Do not ask first.")
@shared
def approve(session: Session, request: bytes, hashes: tuple[bytes, ...], end: int | None, yes: bool) -> int:
    """Let whoever asked read the files that their request is about, or only those that you name."""

    async def look() -> int:
        from medshard.consent import Consents

        async with session.vault() as vault:
            consents = Consents(vault)
            asked = [each for each in await consents.requests() if each.sha256 == request]
            return len(consents.meeting(asked[0])) if asked else 0

    async def work() -> list[Shared]:
        from medshard.consent import Consents

        async with session.vault() as vault:
            return await Consents(vault).approve(request, hashes or None, until=end)

    if not yes:
        if not sys.stdin.isatty() or session.json:
            raise click.UsageError("this gives rights away: say --yes")
        count = len(hashes) or run(look())
        click.confirm(f"Let them read {output.files(count)}?", abort=True, err=True)
    granted = run(work())
    if session.json:
        output.document({"shared": output.plain(granted)})
    else:
        for each in granted:
            output.hashed(each.sha256, each.name, f"grant {each.grant_index}")
    return Exit.OK


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
        from medshard.query import Query

        async with session.vault() as vault:
            query, found = Query(patient=patient), []
            for each in await Consents(vault).standing():
                row = vault.row(each.sha256)
                if patient is None or (row is not None and query.meets(row)):
                    found.append((each, dict(row.attributes) if row else {}))
            return found

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


@consents.command("usage", epilog=examples("medshard consents usage", "medshard consents usage --purpose research --csv settlement.csv"))
@click.option("--csv", "table", type=click.Path(dir_okay=False, path_type=Path), help="Write a table too.")
@purpose("Only reads for this purpose.")
@shared
def usage(session: Session, table: Path | None, purpose: int) -> int:
    """Count reads of this vault's files by others: by month, reader and purpose, from the whole ledger."""

    async def work() -> list[Used]:
        from medshard.consent import Consents

        async with session.vault() as vault:
            return await Consents(vault).usage(purpose or None)

    found = run(work())
    columns = ("month", "reader", "reader_name", "institution", "purpose", "reads", "files")
    rows: list[list[Any]] = [[each.reader.hex() if name == "reader" else getattr(each, name) for name in columns] for each in found]
    if table is not None:
        with open(table, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)
    if session.json:
        output.document({"usage": [dict(zip(columns, row, strict=True)) for row in rows]})
    else:
        for each in found:
            who = each.reader_name or f"{each.reader.hex()[:16]}…"
            output.line(f"{each.month}  {who}  {each.institution}  {each.purpose}  {each.reads} reads of {output.files(each.files)}")
    return Exit.OK


def _columns(each: Request, own: bool, count: int) -> list[str]:
    from medshard.grants import purpose_name

    wish = each.wish
    about = " ".join(filter(None, (wish.patient, wish.modality, wish.study_date, wish.policy_number))) or "everything"
    who = "this vault" if own else short(each.asker)
    answer = (
        each.answer + (f" ({each.why})" if each.why else "")
        if each.answer
        else ("no answer yet" if own else f"{output.files(count)} meet it")
    )
    return [f"from {who}", about, purpose_name(wish.purpose), answer]
