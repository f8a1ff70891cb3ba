"""Commands for going on after a log has ended: successor found, sign, show, adopt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medshard_protocol.errors import Absent, Refused, Unavailable
from storenode.cli.options import Session, shared
from storenode.cli.roster import ca_key_option, confirm, settle_s, yes_option

if TYPE_CHECKING:
    from medshard_protocol.checkpoint import Checkpoint
    from medshard_protocol.succession import Change, Successor
    from storenode.office import Office

_file = click.Path(dir_okay=False, path_type=Path)


@click.group()
def successor() -> None:
    """Go on in a new log after the old one has ended. Files, rights, holds and history stay as they are.

    \b
    When a quorum has signed `storenode freeze propose --no-successor`:
      storenode successor found --remove-institution "Hospital 01" --sequencer hospital-02 --code 2/3/3
      storenode successor sign successor.medshard     # a quorum of the old log's institutions, one after the other
      storenode successor adopt successor.medshard    # each node, while it stands still; then storenode run
    Vaults follow by themselves.
    """


@successor.command()
@click.option("-o", "--output", default="successor.medshard", show_default=True, type=_file)
@click.option("--add-node", "cards", multiple=True, type=_file, metavar="CARD", help="A node, and its institution if that is new.")
@click.option("--remove-node", multiple=True, metavar="NODE", help="A node that does not go on.")
@click.option("--remove-institution", multiple=True, metavar="NAME", help="An institution that does not go on, with its nodes and vaults.")
@click.option("--sequencer", help="Name of the node that orders the new ledger's entries, if that is to be another.")
@click.option("--code", metavar="K/N[/W]", help="Default code of the new log, if it is to be another.")
@click.option("--origin", default="", help="Name of the new ledger, as a URL without scheme [that of the first, with a number].")
@ca_key_option
@yes_option
@shared
def found(
    session: Session,
    output: Path,
    cards: tuple[Path, ...],
    remove_node: tuple[str, ...],
    remove_institution: tuple[str, ...],
    sequencer: str | None,
    code: str | None,
    origin: str,
    ca_key: Path | None,
    yes: bool,
) -> None:
    """Make the successor of this home's log, which must have ended, and sign it as the first.

    It begins with the members of the old log, but for those that are named here.

    \b
    Examples:
      storenode successor found --remove-institution "Hospital 01" --sequencer hospital-02 --code 2/3/3
    """
    from medshard_protocol.succession import Successor
    from storenode import drafting, durable
    from storenode.cli.founding import read_card
    from storenode.genesis import parse_code
    from storenode.office import Office

    session.check_owner()
    office = Office.open(session.home)
    checkpoint, note = _end(office)
    old, last = office.rosters[0], office.roster
    changes = [drafting.add_node(read_card(path)) for path in cards]
    if sequencer:
        changes.append(drafting.set_sequencer(sequencer))
    if code:
        changes.append(drafting.set_code(parse_code(code)))
    changes += [drafting.remove_node(name) for name in remove_node]
    changes += [drafting.remove_institution(name) for name in remove_institution]
    name = origin or f"{(old.before[0].origin if old.before else old.origin)}-{len(old.before) + 2}"
    genesis = drafting.draft_successor(old, last, checkpoint, name, changes)
    document = Successor(old.to_bytes(), tuple(office.links), note, genesis.to_bytes())
    document = _signed(session, office, document, document.look(), ca_key, yes=yes)
    durable.create(output, document.to_bytes(), mode=0o644)
    session.note("", f"Next: {output} goes to the others, who sign it: storenode successor sign {output.name}")


@successor.command()
@click.argument("file", type=_file)
@ca_key_option
@yes_option
@shared
def sign(session: Session, file: Path, ca_key: Path | None, yes: bool) -> None:
    """Sign, for this institution, that this log goes on in that one. Adds the signature to FILE.

    Read who is in it first. An institution signs one successor and never another.

    \b
    Examples:
      storenode successor sign successor.medshard
    """
    from storenode import durable
    from storenode.office import Office
    from storenode.succession import read_successor

    session.check_owner()
    document, office = read_successor(file), Office.open(session.home)
    change = document.look()
    checkpoint, _ = _end(office)
    if change.rosters != tuple(office.rosters):
        raise Refused("this is about another log than this home's, or another chain of rosters")
    if (checkpoint.size, checkpoint.root) != (change.checkpoint.size, change.checkpoint.root):
        raise Refused(f"this log has ended with {checkpoint.size} entries, root {checkpoint.root.hex()[:16]}; the successor says otherwise")
    durable.replace(file, _signed(session, office, document, change, ca_key, yes=yes).to_bytes(), mode=0o644)


@successor.command()
@click.argument("file", required=False, type=_file)
@click.option("-o", "--output", type=_file, help="Write the document by which this home's log came from the one before.")
@shared
def show(session: Session, file: Path | None, output: Path | None) -> None:
    """Show a successor's file, and who has signed it; or that of this home's own log.

    \b
    Examples:
      storenode successor show successor.medshard
      storenode successor show -o successor.medshard    # for a node that comes later
    """
    from storenode import durable
    from storenode.config import Config
    from storenode.genesis import load_genesis
    from storenode.membership import read_successions
    from storenode.succession import read_successor

    if file is not None:
        document = read_successor(file)
    else:
        found = read_successions(Config.load(session.home).data, load_genesis(session.home))
        if not found:
            raise Absent("this home's log goes on from no other")
        document = found[-1][1]
    _tell(session, document, document.look())
    if output is not None:
        durable.replace(output, document.to_bytes(), mode=0o644)


@successor.command()
@click.argument("file", type=_file)
@click.option("--sha256", "expected", help="Refuse the new genesis file unless it has this SHA-256; needed where this node is in no log.")
@shared
def adopt(session: Session, file: Path, expected: str | None) -> None:
    """Let this node go on in the successor of its log. The node must not run; start it afterwards.

    Checks that a quorum of the old log's institutions signed, and that its end is the one that this node has.

    \b
    Examples:
      storenode successor adopt successor.medshard
    """
    from medshard_protocol.ids import sha256_from_hex
    from storenode.cli.founding import document_of, table_of
    from storenode.identity import NodeKeys
    from storenode.running import hold
    from storenode.succession import adopt as take
    from storenode.succession import read_successor

    session.check_owner()
    document, keys = read_successor(file), NodeKeys.load(session.home)
    with hold(session.home):
        wanted = sha256_from_hex(expected.strip().lower()) if expected else None
        roster = take(session.home, document, keys, expected=wanted)
    session.tell(document_of(roster), *table_of(roster))
    session.note("", f"Next: storenode --home {session.home} run")


def _end(office: Office) -> tuple[Checkpoint, bytes]:
    """The last checkpoint of this home's log, waiting for its node where others know more. Raises Refused while the log goes on."""
    from medshard_protocol.checkpoint import open_published
    from storenode.asking import ask_any

    until, frozen = time.monotonic() + settle_s, office.votes()["frozen"]
    while frozen is None and time.monotonic() < until and any(votes["frozen"] for votes in office.all_votes()):
        time.sleep(0.1)
        frozen = office.votes()["frozen"]
    if frozen is None:
        raise Refused("this log has not ended", hint="a quorum signs for its end first: storenode freeze propose --no-successor")
    if frozen["successor"]:
        raise Refused(f"this log has ended for the genesis file {frozen['successor']}, which goes on from nothing")
    while True:
        note = ask_any(office.roster, office.keys, "GET", "/log/checkpoint")[1]
        checkpoint = open_published(note, office.roster)
        if checkpoint.size == frozen["index"] + 1:
            return checkpoint, note
        if time.monotonic() > until:
            raise Unavailable("the end of the log is not published yet", hint="try again in a moment")
        time.sleep(0.1)


def _signed(session: Session, office: Office, document: Successor, change: Change, ca_key: Path | None, *, yes: bool) -> Successor:
    from medshard_protocol.rosters import differences

    seal, old = office.seal(ca_key), change.genesis.before[-1]
    lines = [f"{old.origin} has ended with {old.size} entries. It goes on as {change.genesis.origin}:"]
    lines += [f"  {each.what}: {each.text}" for each in differences(change.last, change.genesis)]
    lines += [f"  SHA-256: {change.genesis.sha256.hex()}", ""]
    confirm(session, lines, f"Sign for this as {seal.institution(office.roster).name}?", yes=yes)
    document = seal.succeed(document)
    _tell(session, document, change, brief=True)
    return document


def _tell(session: Session, document: Successor, change: Change, *, brief: bool = False) -> None:
    from storenode.cli.founding import document_of, table_of

    named = [change.last.institution_of(key) for key, _ in document.signatures]
    signed = [each.name for each in named if each is not None]
    needed, old = change.last.quorum.q, change.genesis.before[-1]
    about = {"after": {"origin": old.origin, "size": old.size, "root": old.root.hex()}, "signed": signed, "needed": needed}
    lines = [] if brief else [*table_of(change.genesis), f"after    {old.origin}, {old.size} entries, root {old.root.hex()}"]
    missing = max(needed - len(signed), 0)
    session.tell(
        document_of(change.genesis) | about,
        *lines,
        f"signed by {', '.join(signed) or 'nobody'}; " + (f"{missing} more must sign" if missing else "that is a quorum"),
    )
