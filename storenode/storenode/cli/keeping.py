"""Commands of an institution about its vaults' files: hold and release.

Law: an institution keeps files, and can destroy none. Where the roster lists keepers for it, these commands are refused by every node:
then two persons hold and release, with vaults of their own (`medshard proposals`), and the CA key is neither of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medshard_protocol.errors import Absent, Malformed, Refused
from storenode.cli.options import Session, shared
from storenode.cli.roster import ca_key_option, confirm, yes_option

if TYPE_CHECKING:
    from medshard_protocol.entries import Entry
    from medshard_protocol.ids import FileId, Sha256
    from storenode.approving import Seal
    from storenode.office import Office

_files = click.argument("files", nargs=-1, required=True, metavar="FILE...")


@click.command()
@_files
@ca_key_option
@yes_option
@shared
def hold(session: Session, files: tuple[str, ...], ca_key: Path | None, yes: bool) -> None:
    """Keep files of this institution's vaults until it releases them: a legal hold against their owners' will.

    FILE is a file's id, as `medshard ls --json` and `medshard kept --json` show it. It stands in the ledger, without a reason or a name.
    The owner cannot release it; only this institution can.

    \b
    Examples:
      storenode hold 9f31…
      storenode hold 9f31… 02ce… --yes --json
    """
    office, seal, wanted = _begin(session, files, ca_key)
    confirm(session, [f"Nobody destroys these {len(wanted)} files until {_name(office, seal)} releases them."], "Hold them?", yes=yes)
    entries = [seal.hold(office.roster, file_id) for file_id in wanted]
    told = [{"file": file_id.hex(), "hold": office.append(entry)} for file_id, entry in zip(wanted, entries, strict=True)]
    session.tell({"held": told}, *(f"{each['file']}  hold {each['hold']}" for each in told))


@click.command()
@_files
@ca_key_option
@yes_option
@shared
def release(session: Session, files: tuple[str, ...], ca_key: Path | None, yes: bool) -> None:
    """End the holds of files of this institution's vaults: its own, and those that the owners made.

    What is retained stays retained.

    \b
    Examples:
      storenode release 9f31…
    """
    office, seal, wanted = _begin(session, files, ca_key)
    found: list[tuple[FileId, int, Sha256]] = []
    for file_id in wanted:
        holds = standing(office, file_id)
        if not holds:
            raise Absent(f"{file_id.hex()} is not on hold")
        found += [(file_id, index, entry.id) for index, entry in sorted(holds.items())]
    lines = [f"{file_id.hex()}  hold {index}" for file_id, index, _ in found]
    confirm(session, [*lines, f"{_name(office, seal)} keeps these files no longer."], "Release them?", yes=yes)
    told: list[dict[str, Any]] = []
    for file_id, index, id_ in found:
        told.append({"file": file_id.hex(), "hold": index, "released": office.append(seal.release(office.roster, id_))})
    session.tell({"released": told}, *(f"{each['file']}  hold {each['hold']} released with entry {each['released']}" for each in told))


def standing(office: Office, file_id: FileId) -> dict[int, Entry]:
    """The holds of a file, by the places of their entries, as one node tells them; the ledger has the last word. Raises Malformed."""
    from medshard_protocol.entries import Entry, Hold, Release
    from medshard_protocol.sharing import History, history_path
    from storenode.asking import ask_any

    holds: dict[int, Entry] = {}
    after: int | None = None
    while True:
        page = History.from_bytes(ask_any(office.roster, office.keys, "GET", history_path(file_id, after))[1])
        for told in page.entries:
            entry = Entry.from_bytes(told.entry) if told.effective else None
            match entry and entry.body:
                case Hold() if entry:
                    holds[told.index] = entry
                case Release(hold=ended):
                    holds = {index: each for index, each in holds.items() if each.id != ended}
        if not page.more or not page.entries:
            return holds
        after = page.entries[-1].index


def _begin(session: Session, files: tuple[str, ...], ca_key: Path | None) -> tuple[Office, Seal, list[FileId]]:
    from medshard_protocol.ids import file_id_from_hex
    from storenode.office import Office

    session.check_owner()
    try:
        wanted = [file_id_from_hex(text.strip().lower()) for text in dict.fromkeys(files)]
    except Malformed as error:
        raise click.BadParameter(f"a file's id has 64 hex digits ({error})", param_hint="FILE") from None
    office = Office.open(session.home)
    seal = office.seal(ca_key)
    own = seal.institution(office.roster)
    if own.keepers:
        hint = "two of them do it, each with a vault: `medshard proposals hold`, then `medshard proposals approve`"
        raise Refused(f"{own.name} has {len(own.keepers)} keepers, and what it keeps needs two of them", hint=hint)
    return office, seal, wanted


def _name(office: Office, seal: Seal) -> str:
    return seal.institution(office.roster).name
