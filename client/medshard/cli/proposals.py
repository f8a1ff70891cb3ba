"""proposals: holds and releases that need two persons."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from medshard.cli import output
from medshard.cli.exits import Exit
from medshard.cli.options import Session, examples, run, shared

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from medshard.keepers import Keepers, Proposal
    from medshard_protocol.entries import Type
    from medshard_protocol.ids import FileId


def file_id(text: str) -> bytes:
    """Parse a file's id, as `kept --json` shows it."""
    digits = text.strip().lower()
    if len(digits) != 64 or digits.strip("0123456789abcdef"):
        raise click.BadParameter(f"{text!a} is no file's id: expected 64 hexadecimal digits, as `medshard kept --json` shows them")
    return bytes.fromhex(digits)


_files = click.argument("files", nargs=-1, required=True, type=file_id, metavar="FILE...")
_entries = click.argument("entries", nargs=-1, required=True, type=click.IntRange(min=0), metavar="ENTRY...")


@click.group(epilog=examples("medshard proposals ls", "medshard proposals approve 4711", "medshard proposals refuse 4712"))
def proposals() -> None:
    """Holds and releases that need two persons: one keeper proposes, another approves.

    For institutions that the roster lists keepers for (`storenode roster propose --keepers`). Until a second keeper has approved it, a
    proposal changes nothing, and after a fortnight it can be approved no more. `medshard hold` and `release` in the vault that owns the
    files propose and approve too.
    """


@proposals.command("ls", epilog=examples("medshard proposals ls", "medshard proposals ls --json"))
@shared
def list_proposals(session: Session) -> int:
    """List what waits for a second keeper: FILE, the proposal's entry, what is proposed, by whom, until when, the name if known here."""

    async def work() -> list[tuple[Proposal, str, bytes]]:
        async with session.vault() as vault:
            names, found = vault.contacts.names(), []
            for each in await vault.keepers.open():
                rows = vault.rows_of(each.file_id)
                found.append((each, names.get(each.by, ""), rows[0].name if rows else b""))
            return found

    found = run(work())
    if session.json:
        output.document({"proposals": [{**_as_json(each), "by_name": who, "name": output.plain(name)} for each, who, name in found]})
        return Exit.OK
    for each, who, name in found:
        by = "this vault" if each.own else who or f"{each.by.hex()[:16]}…"
        output.hashed(each.file_id, name, f"entry {each.index}", each.what.name.lower(), f"by {by}", _until(each))
    return Exit.OK


def _until(each: Proposal) -> str:
    day = time.strftime("%Y-%m-%d", time.localtime(each.until))
    return f"expired on {day}" if each.expired else f"until {day}" if each.until else "until a fortnight after it was made"


@proposals.command(epilog=examples("medshard proposals hold 9f31…"))
@_files
@shared
def hold(session: Session, files: tuple[FileId, ...]) -> int:
    """Propose that files are kept until they are released. FILE is a file's id; who keeps it need not be able to read it."""
    from medshard_protocol.entries import Type

    return _propose(session, Type.HOLD, files)


@proposals.command(epilog=examples("medshard proposals release 9f31…"))
@_files
@shared
def release(session: Session, files: tuple[FileId, ...]) -> int:
    """Propose that all holds of files end."""
    from medshard_protocol.entries import Type

    return _propose(session, Type.RELEASE, files)


@proposals.command(epilog=examples("medshard proposals approve 4711"))
@_entries
@shared
def approve(session: Session, entries: tuple[int, ...]) -> int:
    """Be the second person: what another keeper has proposed takes effect. ENTRY is as `proposals ls` shows it."""
    return _decide(session, "approved", lambda keepers: keepers.approve(entries))


@proposals.command(epilog=examples("medshard proposals refuse 4711"))
@_entries
@shared
def refuse(session: Session, entries: tuple[int, ...]) -> int:
    """Take proposals off the table: another keeper's, or your own."""
    return _decide(session, "refused", lambda keepers: keepers.refuse(entries))


def _propose(session: Session, what: Type, files: tuple[FileId, ...]) -> int:
    code = _decide(session, "proposed", lambda keepers: keepers.propose(what, files))
    if not (session.json or session.quiet):
        output.note("medshard: nothing changes until another keeper approves it: `medshard proposals approve ENTRY`")
    return code


def _decide(session: Session, word: str, act: Callable[[Keepers], Coroutine[None, None, list[Proposal]]]) -> int:
    async def work() -> list[Proposal]:
        async with session.vault() as vault:
            return await act(vault.keepers)

    found = run(work())
    if session.json:
        output.document({word: [_as_json(each) for each in found]})
        return Exit.OK
    for each in found:
        output.hashed(each.file_id, b"", f"entry {each.index}", f"{each.what.name.lower()} {word}")
    return Exit.OK


def _as_json(each: Proposal) -> dict[str, object]:
    about = {"entry": each.index, "what": each.what.name.lower(), "file": each.file_id.hex(), "by": each.by.hex(), "own": each.own}
    return {**about, "until": each.until or None, "expired": each.expired}
