"""export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, run, shared
from medshard.cli.output import plain

if TYPE_CHECKING:
    from medshard.model import Row
    from medshard.patients import Exported


@click.group(epilog=examples("medshard export patient 'doe jane' -o jane-doe/", "medshard export patient 4711 -o 4711.zip"))
def export() -> None:
    """Hand over all that concerns somebody."""


@export.command(
    epilog=examples(
        "medshard export patient 'doe jane' -o jane-doe/",
        "medshard export patient 4711 -o 4711.zip --json",
        "medshard export patient 4711 --list      # look first at what would be in it",
    )
)
@click.argument("patient", metavar="PATIENT")
@click.option("--list", "only_list", is_flag=True, help="List the documents that would be in it, and write nothing.")
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), metavar="DIR|ZIP", help="Where it goes.")
@click.option("--no-proofs", is_flag=True, help="Leave the proofs of registration out.")
@shared
def patient(session: Session, patient: str, only_list: bool, target: Path | None, no_proofs: bool) -> int:
    """Write everything of one PATIENT to a folder or a ZIP: words of the name, or the patient's id; or a policy holder's name.

    The documents with their hashes, who read them, when and for what, who may read them, what keeps them, links and requests, a proof for
    each document, as a page to read (report.html) and as JSON. Every document is read again and compared before it says that it is done.
    A run that was cut off is run again and goes on. What is written is not encrypted: keep it like the documents.

    With a document of a policy or a claim goes what belongs to the same, unless it names another patient or holder.
    """
    if only_list == (target is not None):
        raise click.UsageError("say where it goes with -o, or look first with --list")
    if target is None:
        return _list(session, patient)
    return _export(session, patient, target, no_proofs)


def _list(session: Session, patient: str) -> int:
    async def look() -> list[Row]:
        from medshard.patients import documents
        from medshard.query import Query

        async with session.vault() as vault:
            return list(documents(list(vault.find(Query(), shared=False)), patient).values())

    found = run(look())
    if session.json:
        output.document({"files": plain(found)})
        return Exit.OK
    for row in found:
        output.row(row)
    return Exit.OK


def _export(session: Session, patient: str, target: Path, no_proofs: bool) -> int:

    async def work() -> Exported:
        from medshard.patients import export as write

        async with session.vault() as vault:
            with output.meter(wanted=not (session.quiet or session.json)) as progress:
                return await write(vault, patient, target, proofs=not no_proofs, progress=progress)

    done = run(work())
    if session.json:
        output.document(plain(done))
        return Exit.OK
    output.line(str(done.target))
    if not session.quiet:
        what = f"{output.files(done.documents)}, {output.size(done.bytes)}, {done.proofs} proofs"
        output.note(f"medshard: {what}, {done.entries} entries of the ledger")
    return Exit.OK
