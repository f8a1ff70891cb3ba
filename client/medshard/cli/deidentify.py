"""deidentify."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, purpose, run, shared
from medshard.cli.sharing import until

if TYPE_CHECKING:
    from medshard.dicom.copies import Copied


@click.command(
    epilog=examples(
        "medshard deidentify 1.2.826.0.1.… --to 'Research group'",
        "medshard deidentify 1.2.826.0.1.… --profile keep-dates --to 5c1e… --until 1y --purpose research",
    )
)
@click.argument("study", metavar="STUDY")
@click.option(
    "--profile",
    type=click.Choice(["basic", "keep-dates", "keep-uids"]),
    default="basic",
    show_default=True,
    help="PS3.15 annex E: the Basic Profile, or with its option to keep dates and times, or UIDs.",
)
@click.option(
    "--to", "reader", required=True, metavar="KEY|NAME", help="Who may read the copy: a key, as `medshard key` prints it, or a contact."
)
@click.option("--until", "end", type=until, default=None, metavar="WHEN", help="30d, 12h, 2026-12-31 [for good].")
@purpose("What for, as the ledger will say.")
@shared
def deidentify(session: Session, study: str, profile: str, reader: str, end: int | None, purpose: int) -> int:
    """Share a de-identified copy of a STUDY, named by its Study Instance UID.

    Names, identifiers, dates, institutions, private attributes and comments are taken out of every instance, and UIDs become others.
    The copy is stored under its own key and shared with one reader. A link from copy to original is stored in this vault, and nobody
    else can open it. Pixels are left as they are: text that is burned into them, or a face, has to be looked for by somebody.
    """
    from medshard.dicom.copies import Copier
    from medshard.dicom.deidentify import Profile

    async def work() -> Copied:
        async with session.vault() as vault:
            key = vault.contacts.key(reader)
            with output.meter(wanted=not (session.quiet or session.json)) as progress:
                return await Copier(vault, key, Profile(profile)).copy(study, until=end or 0, purpose=purpose, progress=progress)

    copied = run(work())
    if session.json:
        output.document(output.plain(copied))
    else:
        for each in copied.shared:
            output.hashed(each.sha256, each.name, f"grant {each.grant_index}")
        for left in copied.left_out:
            output.problem(f"no copy of {left.sop_uid or 'an instance without UID'}: {left.why}")
        if not session.quiet:
            for warning, count in copied.warnings:
                output.note(f"medshard: {count} instances: {warning}")
            output.note(f"medshard: the copy is study {copied.study}; the link to the original is {copied.link.hex()}")
    return Exit.PARTIAL if copied.left_out else Exit.OK
