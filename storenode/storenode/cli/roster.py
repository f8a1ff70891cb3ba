"""Commands about who takes part: roster propose, sign and show."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medshard_protocol.errors import Absent, Conflict, Malformed, Refused
from storenode.cli.options import Session, shared, size

if TYPE_CHECKING:
    from medshard_protocol.roster import Roster
    from storenode.approving import Seal
    from storenode.drafting import Change
    from storenode.office import Office

settle_s = 10.0  # how long the nodes may take to act on the deciding entry
path_type = click.Path(dir_okay=False, path_type=Path)
ca_key_option = click.option("--ca-key", type=path_type, metavar="FILE", help="The institution's ca.key, where it is not in HOME/keys.")
force_option = click.option("--force", is_flag=True, help="Sign although others have signed for another next roster.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


@click.group()
def roster() -> None:
    """Change who takes part: institutions, nodes, keys, addresses.

    A change is a whole new roster. One institution proposes it, others sign; with the signature that makes the quorum it takes effect,
    and every node and client goes on with it by itself. An institution signs one successor of a roster and no other, so talk before
    you propose.
    """


@roster.command()
@click.option("--add-node", "add", multiple=True, type=path_type, metavar="CARD", help="Take up a node; a new institution with it.")
@click.option("--remove-node", multiple=True, metavar="NODE", help="Let a node go; its institution keeps others.")
@click.option("--remove-institution", multiple=True, metavar="NAME", help="Let an institution go, with its nodes and vaults.")
@click.option("--set-url", multiple=True, metavar="NODE=URL", help="A node moves.")
@click.option("--set-capacity", multiple=True, metavar="NODE=SIZE", help="A node offers more or less room, such as 8TB.")
@click.option("--rotate-keys", multiple=True, type=path_type, metavar="CARD", help="New keys of a node: the card of `storenode rotate`.")
@click.option("--rotate-ca", type=path_type, metavar="CRT", help="New CA of this institution: the ca.crt of `storenode rotate --ca`.")
@click.option("--drop-former", multiple=True, metavar="NAME", help="Refuse what this institution's former CAs issued.")
@click.option(
    "--keepers", multiple=True, metavar="NAME=KEY,KEY…", help="Two of these must want each hold or release of its files; NAME=none: none."
)
@click.option("--emergency-add", multiple=True, metavar="KEY", help="This identity may read while the ledger is out of reach.")
@click.option("--emergency-remove", multiple=True, metavar="KEY", help="This identity may no longer.")
@click.option("--auditors", metavar="FILE|KEY", help='Key for sealed reasons: 2432 hex digits or a file with them; "none" for none.')
@click.option("--sequencer", metavar="NODE", help="Which node orders the ledger's entries.")
@click.option("--code", metavar="K/N[/W]", help="Default code for new files.")
@click.option("-o", "--output", type=path_type, metavar="FILE", help="Write the document here too.")
@click.option("--dry-run", is_flag=True, help="Show what would change, and sign nothing.")
@ca_key_option
@force_option
@yes_option
@shared
def propose(session: Session, output: Path | None, dry_run: bool, ca_key: Path | None, force: bool, yes: bool, **asked: Any) -> None:
    """Draft the next roster, sign for it as this institution, and hand it to the nodes.

    \b
    Examples:
      storenode roster propose --add-node hospital-05.card --code 2/5/4
      storenode roster propose --keepers "Insurer 02=5c1e…,77a0…,9b3d…"
      storenode roster propose --remove-institution "Insurer 02" --code 2/3/3
      storenode roster propose --set-url hospital-01=https://new.hospital-01.example:9700
      storenode rotate && storenode roster propose --rotate-keys hospital-01.card
      storenode roster propose --emergency-add $(medshard key) --dry-run
    """
    from storenode import durable
    from storenode.drafting import draft
    from storenode.office import Office

    session.check_owner()
    changes = _changes(session.home, asked)
    if not changes:
        raise click.UsageError("nothing to change; see --help")
    office = Office.open(session.home)
    if asked["rotate_ca"]:
        changes.insert(0, _rotated_ca(office, asked["rotate_ca"]))
    new = draft(office.roster, changes)
    if output:
        durable.create(output, new.to_bytes(), mode=0o644)
    if dry_run:
        session.tell(_proposal(office.roster, new), *_words(office.roster, new))
        return
    _sign_for(session, office, new, office.seal(ca_key), yes=yes, force=force, handed_in=False)


@roster.command()
@click.argument("document", metavar="SHA256|FILE")
@ca_key_option
@force_option
@yes_option
@shared
def sign(session: Session, document: str, ca_key: Path | None, force: bool, yes: bool) -> None:
    """Sign for a proposed roster as this institution, after seeing what it changes.

    Signs one successor of a roster, and never another: two could fork the chain that clients follow.

    \b
    Examples:
      storenode roster show           # what is open
      storenode roster sign 3f0a91c2
      storenode roster sign next.roster --ca-key /media/usb/ca.key
    """
    from storenode.office import Office

    session.check_owner()
    office = Office.open(session.home)
    new = office.document(document)
    if any(each.sha256 == new.sha256 for each in office.rosters):
        session.tell(
            _proposal(office.rosters[max(new.number - 1, 0)], new) | {"in_effect": True}, f"roster {new.number} is in effect already"
        )
        return
    _sign_for(session, office, new, office.seal(ca_key), yes=yes, force=force, handed_in=Path(document).is_file() is False)


@roster.command()
@click.option("-o", "--output", type=path_type, metavar="FILE", help="Write the chain of changes, for a new node's `adopt`.")
@click.option("--genesis", is_flag=True, help="Show the genesis file instead of the present roster.")
@shared
def show(session: Session, output: Path | None, genesis: bool) -> None:
    """Show the present roster, how it came about, and what is proposed.

    \b
    Examples:
      storenode roster show
      storenode roster show --json | jq .proposals
      storenode roster show -o chain.medshard    # with genesis.medshard, all that a new node needs
    """
    from storenode import durable
    from storenode.cli.founding import document_of, table_of
    from storenode.membership import pack_chain
    from storenode.office import Office

    office = Office.open(session.home)
    if output:
        durable.create(output, pack_chain(office.links), mode=0o644)
    shown = office.rosters[0] if genesis else office.roster
    votes = office.votes() if not office.silent else {"proposals": [], "freezes": [], "frozen": None}
    history = [_change(office, number) for number in range(1, len(office.rosters))]
    open_lines, proposals = _open(office, votes["proposals"])
    document = document_of(shown) | {"number": shown.number, "genesis_sha256": office.rosters[0].sha256.hex(), "sha256": shown.sha256.hex()}
    document |= {"history": history, "proposals": proposals, "freezes": votes["freezes"], "frozen": votes["frozen"]}
    lines = [f"roster   {shown.number}", *table_of(shown)]
    for each in history:
        by = f", approved by {', '.join(each['approved_by'])}"
        lines += ["", f"change {each['number']}{by}", *(f"  {text}" for text in each["changes"])]
    frozen = votes["frozen"]
    lines += ["", f"this log ended with entry {frozen['index']}; successor {frozen['successor'] or 'none'}"] if frozen else []
    session.tell(document, *lines, *open_lines)
    if office.silent:
        session.note("", f"Note: {office.silent}. Shown is what this home knew last; proposals are not.")
    if output:
        session.note("", f"wrote {output}")


# -- parts


def _changes(home: Path, asked: dict[str, Any]) -> list[Change]:
    from storenode import drafting as d
    from storenode.genesis import parse_code

    many: list[Change] = [d.add_node(_card(path)) for path in asked["add"]]
    many += [d.rotate_keys(_card(path)) for path in asked["rotate_keys"]]
    many += [d.set_url(*_pair(text, "--set-url")) for text in asked["set_url"]]
    for text in asked["set_capacity"]:
        name, amount = _pair(text, "--set-capacity")
        bytes_ = size(click.get_current_context(), click.Option(["--set-capacity"]), amount)
        assert bytes_ is not None, "only None becomes None"
        many.append(d.set_capacity(name, bytes_))
    many += [d.drop_former(name) for name in asked["drop_former"]]
    for text in asked["keepers"]:
        name, keys = _pair(text, "--keepers")
        many.append(d.set_keepers(name, [] if keys == "none" else [key_of(key, "--keepers") for key in keys.split(",")]))
    many += [d.add_emergency(key_of(text, "--emergency-add")) for text in asked["emergency_add"]]
    many += [d.remove_emergency(key_of(text, "--emergency-remove")) for text in asked["emergency_remove"]]
    if asked["auditors"]:
        many.append(d.set_auditors(_auditors(asked["auditors"])))
    if asked["sequencer"]:
        many.append(d.set_sequencer(asked["sequencer"]))
    if asked["code"]:
        many.append(d.set_code(parse_code(asked["code"])))
    many += [d.remove_node(name) for name in asked["remove_node"]]
    many += [d.remove_institution(name) for name in asked["remove_institution"]]
    return many or ([lambda roster: roster] if asked["rotate_ca"] else [])


def _card(path: Path) -> Any:
    from storenode.cli.founding import read_card

    return read_card(path)


def _rotated_ca(office: Office, path: Path) -> Change:
    from storenode.drafting import rotate_ca
    from storenode.identity import load_certificate

    return rotate_ca(office.roster.institutions[office.roster.node(office.keys.node_id).institution].name, load_certificate(path))


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise click.BadParameter(f"expected NAME=VALUE, got {text!r}", param_hint=option)
    return name, value


def key_of(text: str, option: str) -> Any:
    """Read a key as vaults print it: 64 hex digits."""
    from medshard_protocol.ids import key_from_hex

    try:
        return key_from_hex(text.strip().lower())
    except Malformed as error:
        raise click.BadParameter(f"expected a key of 64 hex digits ({error})", param_hint=option) from None


def _auditors(text: str) -> bytes:
    from medshard_protocol.roster import auditors_key_size

    if text == "none":
        return b""
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = Path(text).read_bytes()
        if len(data) != auditors_key_size:
            with contextlib.suppress(ValueError):
                data = bytes.fromhex(data.decode("ascii", errors="replace").strip())
    if len(data) != auditors_key_size:
        hint = "the auditors' public key, as the auditors' program wrote it"
        raise Malformed(f"--auditors: expected {auditors_key_size} bytes or as many pairs of hex digits", hint=hint)
    return data


def _proposal(old: Roster, new: Roster) -> dict[str, Any]:
    from medshard_protocol.rosters import differences

    def quorum(roster: Roster) -> dict[str, int]:
        return {"institutions": len(roster.institutions), "faulty": roster.quorum.f, "needed": roster.quorum.q}

    return {
        "number": new.number,
        "sha256": new.sha256.hex(),
        "previous": new.previous.hex(),
        "changes": [f"{each.what}: {each.text}" for each in differences(old, new)],
        "quorum_before": quorum(old),
        "quorum_after": quorum(new),
        "in_effect": False,
    }


def _words(old: Roster, new: Roster) -> list[str]:
    from medshard_protocol.rosters import differences

    def quorum(roster: Roster) -> str:
        return f"{roster.quorum.q} of {len(roster.institutions)} must agree, {roster.quorum.f} may be faulty"

    lines = [f"roster {new.number}, SHA-256 {new.sha256.hex()}", *(f"  {each.what}: {each.text}" for each in differences(old, new))]
    same = quorum(old) == quorum(new)
    lines.append(f"  quorum: stays {quorum(old)}" if same else f"  quorum: before, {quorum(old)}; after, {quorum(new)}")
    if new.quorum.f < old.quorum.f:
        lines.append("  WARNING: fewer faulty institutions are tolerated than now")
    return lines


def _sign_for(session: Session, office: Office, new: Roster, seal: Seal, *, yes: bool, force: bool, handed_in: bool) -> None:
    from storenode.approving import check_no_split

    old, own = office.roster, seal.institution(office.roster).name
    before = seal.signed(old)
    if before is not None and before != new.sha256:
        seal.approve(old, new)  # refuses, and says why
    if before is None and not force and not office.silent:
        check_no_split(office.votes()["proposals"], new.sha256, own, old.quorum.q)
    confirm(session, [*_words(old, new), ""], f"Sign for this as {own}?", yes=yes)
    if not handed_in:
        office.hand_in(new)
    entry = seal.approve(old, new)
    try:
        index = office.append(entry)
    except Conflict as error:
        if "before" not in str(error):
            raise
        index = -1  # said earlier, or decided since
    approved, decided = _standing(office, old, new, own)
    missing = [each.name for each in old.institutions if each.name not in approved]
    document = _proposal(old, new) | {"institution": own, "approved": approved, "missing": missing, "in_effect": decided}
    document |= {"index": index if index >= 0 else None}
    if decided:
        session.tell(document, f"roster {new.number} is in effect")
        return
    lacking = old.quorum.q - len(approved)
    session.tell(document, f"signed as {own}; {max(lacking, 0)} more of {', '.join(missing)} must sign", f"SHA-256  {new.sha256.hex()}")
    session.note(
        "", "Each of them, after comparing the SHA-256 with you over the telephone:", f"  storenode roster sign {new.sha256.hex()}"
    )


def _standing(office: Office, old: Roster, new: Roster, own: str) -> tuple[list[str], bool]:
    """Who has approved a document, ``own`` institution among them, and whether it is decided; waits for the nodes to act on what may have
    been the last signature: the one that is asked need not be the one that took it."""
    until = time.monotonic() + settle_s
    while True:
        decided = office.is_decided(new.sha256)
        if decided:
            return [each.name for each in old.institutions], True
        found = next((each for each in office.votes()["proposals"] if each["sha256"] == new.sha256.hex()), None)
        approved = list(found["approved"]) if found else []
        if (own in approved and len(approved) < old.quorum.q) or time.monotonic() > until:
            return approved, False
        time.sleep(0.1)


def confirm(session: Session, lines: list[str], question: str, *, yes: bool) -> None:
    """Show what is to be signed and ask. Raises Refused where nobody is there to answer."""
    session.note(*lines)
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refused("nobody is there to be asked", hint="read what changes, and add --yes")
    if not click.confirm(question, err=True):
        raise click.Abort


def _change(office: Office, number: int) -> dict[str, Any]:
    from medshard_protocol.entries import Entry
    from medshard_protocol.rosters import differences

    old, new = office.rosters[number - 1], office.rosters[number]
    authors = [old.institution_of(Entry.from_bytes(data).author) for data in office.links[number - 1].approvals]
    return {
        "number": number,
        "sha256": new.sha256.hex(),
        "changes": [f"{each.what}: {each.text}" for each in differences(old, new)],
        "approved_by": [each.name for each in authors if each],
    }


def _open(office: Office, proposals: list[Any]) -> tuple[list[str], list[dict[str, Any]]]:
    lines: list[str] = []
    documents = []
    for each in proposals:
        try:
            new = office.document(each["sha256"])
        except Absent:
            lines += ["", f"proposed: {each['sha256']}, which no node has; approved by {', '.join(each['approved'])}"]
            continue
        missing = [one.name for one in office.roster.institutions if one.name not in each["approved"]]
        documents.append(_proposal(office.roster, new) | {"approved": each["approved"], "missing": missing})
        who = f"  approved by {', '.join(each['approved']) or 'nobody'}; {office.roster.quorum.q} are needed; not by {', '.join(missing)}"
        lines += ["", "proposed: " + _words(office.roster, new)[0], *_words(office.roster, new)[1:], who]
    return lines, documents
