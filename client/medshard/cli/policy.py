"""policy and claim."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, purpose, run, shared
from medshard.cli.sharing import tell_granted, until
from medshard.cli.store import tell_put

if TYPE_CHECKING:
    from medshard.grants import Shared
    from medshard.model import PutReport, Row
    from medshard.policies.importing import Summary
    from medshard.policies.model import Version

_Value = TypeVar("_Value")
_paths = click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
_owner = click.option("--from", "owner", metavar="KEY|NAME", help="Whose claim, where several have shared one of that number.")
_retain = "10y, 18m or 90d after the end of the policy (or from today), or a day: 2036-12-31."


@click.group(epilog=examples("medshard policy put policy.pdf --number VN-7 --holder 'Jane Doe' --retain 10y", "medshard policy show VN-7"))
def policy() -> None:
    """Insurance policies: stored with their terms, kept as long as they must be, found again.

    Number, holder, product and dates are sealed with each document; only the retention stands in the ledger, without a name.
    """


def _terms() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option("--retain", metavar="WHEN", default="", help=f"Kept until then, whatever anybody says later: {_retain}"),
            click.option("--valid-to", metavar="DAY", default="", help="Last day in force: 2034-12-31."),
            click.option("--valid-from", metavar="DAY", default="", help="First day in force."),
            click.option("--product", metavar="TEXT", default="", help="What kind of insurance."),
            click.option("--holder", metavar="NAME", default="", help="Whose policy it is."),
            click.option("--kind", type=click.Choice(("policy", "endorsement", "letter")), default="policy", help="[policy]"),
            click.option("--number", required=True, metavar="NUMBER", help="The policy's number."),
        ):
            command = option(command)
        return command

    return give


@policy.command(
    "put",
    epilog=examples(
        "medshard policy put policy.pdf --number VN-7 --holder 'Jane Doe' --product life --valid-from 2024-01-01 --retain 10y",
        "medshard policy put change.pdf --number VN-7 --kind endorsement --valid-from 2025-06-01 --retain 10y",
    ),
)
@_paths
@_terms()
@shared
def put_policy(session: Session, paths: tuple[Path, ...], number: str, kind: str, retain: str, valid_to: str, **more: str) -> int:
    """Store documents of one policy; print SHA256 PATH.

    Documents with the same number are its versions, in the order of the ledger. With --retain no honest node destroys them before, not
    even for you.
    """
    from medshard.policies.model import Terms, retained
    from medshard_protocol.errors import Malformed

    try:
        keep = retained(retain, valid_to, datetime.now(UTC).date()) if retain else ""
        terms = Terms(number, valid_to=valid_to, retain_until=keep, kind=kind, **more).checked()
    except Malformed as error:
        raise click.UsageError(str(error).removeprefix("header: ")) from None

    async def work() -> PutReport:
        from medshard.policies.archive import Policies

        async with session.vault() as vault:
            with output.meter(wanted=not (session.quiet or session.json)) as progress:
                return await Policies(vault).put(paths, terms, progress=progress)

    return tell_put(session, run(work()))


@policy.command("show", epilog=examples("medshard policy show VN-7", "medshard policy show VN-7 --json"))
@click.argument("number")
@shared
def show(session: Session, number: str) -> int:
    """List the documents of one policy, its versions in the order of the ledger."""

    async def work() -> list[Version]:
        from medshard.policies.archive import Policies

        async with session.vault() as vault:
            return Policies(vault).history(number)

    found = run(work())
    if session.json:
        output.document({"documents": [{**_as_json(each.row), "version": each.version} for each in found]})
        return Exit.OK
    for each in found:
        version = f"version {each.version}" if each.version else each.terms.kind
        output.hashed(each.row.sha256, each.row.name, version, *_columns(each.terms), f"entry {each.row.ledger_index}")
    return Exit.OK


@policy.command(
    "find",
    epilog=examples("medshard policy find --holder 'doe jane'", "medshard policy find --product life --in-force 2024-06-30 --json"),
)
@click.option("--number", metavar="TEXT", help="The whole number, or a pattern with * and ?.")
@click.option("--holder", metavar="TEXT", help="Words of the name, in any order.")
@click.option("--product", metavar="TEXT", help="Words of the product.")
@click.option("--in-force", "on", metavar="DAY", help="In force on that day.")
@shared
def find_policy(session: Session, number: str | None, holder: str | None, product: str | None, on: str | None) -> int:
    """Find policies by number, holder, product and day. Every condition given must hold; case and accents do not matter."""
    from medshard.policies.model import Terms

    wanted = _day("--in-force", on)

    async def work() -> None:
        from medshard.policies.archive import Policies

        async with session.vault() as vault:
            rows = Policies(vault).find(number=number, holder=holder, product=product, in_force=wanted)
            if session.json:
                output.documents("documents", map(_as_json, rows))
                return
            for row in rows:
                terms = Terms.of(row.attributes)
                output.hashed(row.sha256, row.name, terms.number, terms.holder, *_columns(terms))

    run(work())
    return Exit.OK


@policy.command(
    "import",
    epilog=examples(
        "medshard policy import policies.csv --folder scans/ --retain 10y",
        "medshard policy import policies.csv --folder scans/ --report 2024.report.csv   # again after a cut: goes on",
    ),
)
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="CSV")
@click.option("--folder", required=True, type=click.Path(file_okay=False, path_type=Path), help="Where the PDFs are.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="What became of each row [CSV.report.csv].")
@click.option("--retain", default="", metavar="WHEN", help=f"For rows that say nothing: {_retain}")
@shared
def import_policies(session: Session, source: Path, folder: Path, report: Path | None, retain: str) -> int:
    """Store many policies: one row of the CSV each.

    Columns: file and number; holder, product, valid_from, valid_to, retain and kind where they are known. Separated by comma, semicolon or
    tab, in UTF-8. Broken rows stop no others; the report names them and why. A run that was cut off goes on from its report. Policies
    whose retention ends in the same quarter lie in one pack, which is kept until the last of them may go.
    """

    async def work() -> Summary:
        from medshard.policies.importing import import_csv

        async with session.vault() as vault:
            with output.meter(wanted=not (session.quiet or session.json)) as progress:
                at = report or source.with_name(source.name + ".report.csv")
                return await import_csv(vault, source, folder, at, retain=retain, progress=progress)

    done = run(work())
    if session.json:
        output.document(asdict(done))
    elif not session.quiet:
        known = f", {done.known} stored by an earlier run" if done.known else ""
        output.line(f"{done.stored} stored, {done.refused} refused{known}; {done.report} says what became of each row")
    if not done.refused:
        return Exit.OK
    return Exit.PARTIAL if done.stored or done.known else Exit.LOCAL


@click.group(epilog=examples("medshard claim put C-17 --policy VN-7 scan.dcm letter.pdf", "medshard claim share C-17 --to Insurer"))
def claim() -> None:
    """Claims: what belongs to one, stored as one object with one entry in the ledger, and handed over as a whole."""


@claim.command(
    "put",
    epilog=examples(
        "medshard claim put C-17 --policy VN-7 scan.dcm letter.pdf --retain 10y",
        "medshard claim put 2026-118 --policy VN-7 --policy-elsewhere --on 2026-10-02 scan.dcm invoice.pdf   # a hospital that bills",
    ),
)
@click.argument("number", metavar="CLAIM")
@_paths
@click.option("--policy", "policy_number", required=True, metavar="NUMBER", help="The policy that it is about.")
@click.option("--policy-elsewhere", "elsewhere", is_flag=True, help="The policy is the insurer's, and nothing of it is here.")
@click.option("--on", metavar="DAY", help="The day that the claim is about: the record names the versions in force then [today].")
@click.option("--retain", metavar="WHEN", default="", help=f"Kept until then: {_retain}")
@shared
def put_claim(
    session: Session, number: str, paths: tuple[Path, ...], policy_number: str, elsewhere: bool, on: str | None, retain: str
) -> int:
    """Store what belongs to a claim, with a record that lists it and the versions of the policy that were in force."""
    from medshard.policies.model import retained

    keep = _checked("--retain", lambda: retained(retain, "", datetime.now(UTC).date()) if retain else "")
    about = _day("--on", on)

    async def work() -> PutReport:
        from medshard.policies.archive import Policies

        async with session.vault() as vault:
            with output.meter(wanted=not (session.quiet or session.json)) as progress:
                return await Policies(vault).put_claim(
                    number, policy_number, paths, retain_until=keep, on=about, elsewhere=elsewhere, progress=progress
                )

    return tell_put(session, run(work()))


@claim.command("show", epilog=examples("medshard claim show C-17", "medshard claim show C-17 --from Hospital"))
@click.argument("number", metavar="CLAIM")
@_owner
@shared
def show_claim(session: Session, number: str, owner: str | None) -> int:
    """List the documents of a claim, own or shared with this vault."""

    async def work() -> list[Row]:
        from medshard.policies.archive import Policies

        async with session.vault() as vault:
            policies = Policies(vault)
            await policies.learn(number)
            return policies.claim(number, vault.contacts.key(owner) if owner else None)

    return _list(session, run(work()))


@claim.command("share", epilog=examples("medshard claim share C-17 --to Insurer --until 90d"))
@click.argument("number", metavar="CLAIM")
@click.option("--to", "reader", required=True, metavar="KEY|NAME", help="Who may read: a key, or a contact.")
@click.option("--until", "end", type=until, default=None, metavar="WHEN", help="30d, 2026-12-31 [for good].")
@purpose("What for, as the ledger will say [insurance].")
@shared
def share_claim(session: Session, number: str, reader: str, end: int | None, purpose: int) -> int:
    """Let an insurer read exactly the documents of one claim.

    It checks them against the ledger without asking anybody: `medshard claim check`. That it did stands in the ledger: `medshard log`.
    """

    async def work() -> list[Shared]:
        from medshard.policies.archive import Policies

        async with session.vault() as vault:
            terms = {"until": end or 0} | ({"purpose": purpose} if purpose else {})
            return await Policies(vault).share_claim(number, vault.contacts.key(reader), **terms)

    return tell_granted(session, run(work()))


@claim.command("check", epilog=examples("medshard claim check C-17", "medshard claim check C-17 --from Hospital --json"))
@click.argument("number", metavar="CLAIM")
@_owner
@shared
def check_claim(session: Session, number: str, owner: str | None) -> int:
    """Read every document of a claim and compare it with the claim's record and the ledger."""

    async def work() -> dict[str, Any]:
        from medshard.policies.archive import Policies

        async with session.vault() as vault:
            return await Policies(vault).check_claim(number, vault.contacts.key(owner) if owner else None)

    record = run(work())
    if session.json:
        output.document({"holds": True, **record})
        return Exit.OK
    output.line(
        f"claim {record['claim']} of policy {record['policy']} on {record['day']}: {record['checked']} documents are whole, as recorded"
    )
    output.line(f"ledger entry {record['ledger_index']}, cosigned by {', '.join(each.rpartition('/')[2] for each in record['cosigners'])}")
    if not record["in_force"]:
        output.line("  it names no version of the policy")
    for each in record["in_force"]:
        output.line(f"  policy version {each['version']} ({each['kind']}) was in force: {each['sha256']}")
    return Exit.OK


def _checked(option: str, parse: Callable[[], _Value]) -> _Value:
    """The value of an option, or a word to whoever gave it."""
    from medshard_protocol.errors import Malformed

    try:
        return parse()
    except Malformed as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def _day(option: str, text: str | None) -> date | None:
    from medshard.policies.model import day

    return _checked(option, lambda: None if text is None else day(text))


def _list(session: Session, rows: Iterable[Row]) -> int:
    if session.json:
        output.document({"documents": [_as_json(row) for row in rows]})
        return Exit.OK
    for row in rows:
        output.row(row)
    sys.stdout.flush()
    return Exit.OK


def _columns(terms: Any) -> list[str]:
    force = f"{terms.valid_from or '…'} to {terms.valid_to or '…'}" if terms.valid_from or terms.valid_to else ""
    return [text for text in (terms.product, force, f"kept until {terms.retain_until}" if terms.retain_until else "") if text]


def _as_json(row: Row) -> dict[str, Any]:
    from medshard.policies.model import Terms

    return {
        **asdict(Terms.of(row.attributes)),
        "sha256": row.sha256.hex(),
        "name": output.plain(row)["name"],
        "ledger_index": row.ledger_index,
    }
