"""Commands that take something out of use: rotate (keys), withdraw (a vault's key), freeze (a whole log)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medshard_protocol.errors import Absent
from storenode.cli.options import Session, shared
from storenode.cli.roster import ca_key_option, confirm, key_of, settle_s, yes_option

if TYPE_CHECKING:
    from medshard_protocol.roster import Roster
    from storenode.office import Office


@click.command()
@click.option("--ca", "with_ca", is_flag=True, help="Draw a new CA key for the institution, instead of new keys for the node.")
@click.option("--all", "both", is_flag=True, help="Draw both.")
@ca_key_option
@shared
def rotate(session: Session, with_ca: bool, both: bool, ca_key: Path | None) -> None:
    """Draw new keys for this node, or a new CA for its institution, to be proposed to the others.

    They wait in HOME/keys-next; nothing changes yet. Propose them (`storenode roster propose --rotate-keys CARD` or `--rotate-ca CRT`);
    when the roster that lists them takes effect, the node puts them in place by itself and keeps the old ones in HOME/keys-until-N.

    \b
    Examples:
      storenode rotate                # TLS, cosigner, log and ML-DSA keys of this node
      storenode rotate --ca           # after a theft of ca.key, also: roster propose --drop-former
    """
    from storenode import durable
    from storenode.config import Config
    from storenode.genesis import Card, card_suffix
    from storenode.identity import Institution, NodeKeys, create_institution, load_key
    from storenode.office import Office
    from storenode.rotation import create_next, next_name

    session.check_owner()
    Config.load(session.home)
    office, keys = Office.open(session.home), NodeKeys.load(session.home)
    node = office.roster.node(keys.node_id)
    owner = office.roster.institutions[node.institution]
    path = ca_key or keys.folder / "ca.key"
    if not path.exists():
        raise Absent(f"{path} is not here", hint="name the institution's CA key: --ca-key FILE")
    present = Institution(load_key(path), keys.ca_certificate)
    fresh_ca = with_ca or both
    vouching = create_institution(owner.name) if fresh_ca else present
    drawn = create_next(session.home, keys, vouching, fresh_ca=fresh_ca, node_keys=both or not with_ca)
    document: dict[str, object] = {"keys": str(session.home / next_name)}
    options = []
    if both or not with_ca:
        card = session.home / f"{node.name}-{office.roster.number + 1}{card_suffix}"
        described = Card.of(owner.name, node.name, node.url, node.capacity, drawn, owner.ca)
        durable.replace(card, described.to_bytes(present), mode=0o644)
        document |= {"card": str(card), "fingerprint": described.fingerprint}
        options.append(f"--rotate-keys {card}")
    if fresh_ca:
        document["ca"] = str(session.home / next_name / "ca.crt")
        options.append(f"--rotate-ca {document['ca']}")
    session.tell(document, *(f"{name:12} {value}" for name, value in document.items()))
    session.note("", f"Next: back up {session.home / next_name}, then", f"  storenode roster propose {' '.join(options)}")


@click.command()
@click.argument("key", metavar="KEY")
@ca_key_option
@yes_option
@shared
def withdraw(session: Session, key: str, ca_key: Path | None, yes: bool) -> None:
    """Take back this institution's word for a vault's key, for good: it was stolen, or its owner has left.

    From that entry of the ledger on the key registers, grants and reads nothing more. What it stored stays.

    \b
    Examples:
      storenode withdraw 5f1e…        # 64 hex digits, as `medshard key` and `storenode invite --list` show them
    """
    from storenode.office import Office

    session.check_owner()
    stolen = key_of(key, "KEY")
    office = Office.open(session.home)
    seal = office.seal(ca_key)
    confirm(session, [f"{seal.institution(office.roster).name} vouches no longer for {stolen.hex()}, for good."], "Withdraw it?", yes=yes)
    index = office.append(seal.withdraw(office.roster, stolen))
    session.tell({"key": stolen.hex(), "index": index}, f"withdrawn with entry {index} of the ledger")


@click.group()
def freeze() -> None:
    """End a log for good, and name the consortium that goes on.

    For when a log cannot go on at all. When only the sequencer is gone, another node takes over and nothing ends. After the signature that
    makes the quorum no entry has an effect any more; what was stored stays readable until its holders are gone.
    """


@freeze.command("propose")
@click.option(
    "--successor", type=click.Path(dir_okay=False, path_type=Path), metavar="GENESIS", help="Genesis file of the one that goes on."
)
@click.option("--no-successor", is_flag=True, help="Name none: nothing goes on, or what `storenode successor` founds afterwards.")
@ca_key_option
@yes_option
@shared
def propose_freeze(session: Session, successor: Path | None, no_successor: bool, ca_key: Path | None, yes: bool) -> None:
    """Sign, as the first institution, for the end of this log.

    \b
    Examples:
      storenode freeze propose --successor next/genesis.medshard
      storenode freeze propose --no-successor
    """
    from storenode.genesis import read_genesis

    if (successor is None) == (not no_successor):
        raise click.UsageError("name the --successor, or say --no-successor")
    _freeze(session, read_genesis(successor) if successor else None, ca_key, yes=yes)


@freeze.command("sign")
@click.argument("successor", required=False, type=click.Path(dir_okay=False, path_type=Path), metavar="GENESIS")
@click.option("--no-successor", is_flag=True, help="Name none: nothing goes on, or what `storenode successor` founds afterwards.")
@ca_key_option
@yes_option
@shared
def sign_freeze(session: Session, successor: Path | None, no_successor: bool, ca_key: Path | None, yes: bool) -> None:
    """Sign for the end of this log too. The successor must be the very one that the others named.

    \b
    Examples:
      storenode roster show                       # who has signed, and for which successor
      storenode freeze sign next/genesis.medshard
    """
    from storenode.genesis import read_genesis

    if (successor is None) == (not no_successor):
        raise click.UsageError("name the successor's genesis file, or say --no-successor")
    _freeze(session, read_genesis(successor) if successor else None, ca_key, yes=yes)


def _freeze(session: Session, successor: Roster | None, ca_key: Path | None, *, yes: bool) -> None:
    from medshard_protocol.ids import Sha256
    from storenode.office import Office

    session.check_owner()
    office = Office.open(session.home)
    seal = office.seal(ca_key)
    name = Sha256(bytes(32)) if successor is None else successor.sha256
    lines = [f"The log {office.roster.origin} ends here, for good, for all {len(office.roster.institutions)} institutions."]
    if successor is None:
        lines.append("Nothing goes on, unless a quorum founds a log afterwards that takes everything over: storenode successor found.")
    else:
        lines.append(f"{successor.origin} goes on, genesis {successor.sha256.hex()}:")
        lines += [f"  {each.name}" for each in successor.institutions]
    confirm(session, [*lines, ""], f"Sign for this as {seal.institution(office.roster).name}?", yes=yes)
    index = office.append(seal.freeze(office.roster, office.rosters[0], name))
    approved, frozen = _heard(office, name.hex(), seal.institution(office.roster).name)
    document = {"index": index, "successor": name.hex(), "approved": approved, "needed": office.roster.quorum.q, "frozen": frozen}
    said = "the log has ended" if frozen else f"signed; {max(office.roster.quorum.q - len(approved), 0)} more must sign"
    session.tell(document, said)


def _heard(office: Office, successor: str, own: str) -> tuple[list[str], bool]:
    """Who has signed for this end, ``own`` institution among them, and whether the log has ended. The node that is asked need not be the
    one that took the signature, so it gets a moment."""
    until = time.monotonic() + settle_s
    while True:
        votes = office.votes()
        approved: list[str] = next((each["approved"] for each in votes["freezes"] if each["successor"] == successor), [])
        frozen = votes["frozen"] is not None
        if frozen or (own in approved and len(approved) < office.roster.quorum.q) or time.monotonic() > until:
            return approved, frozen
        time.sleep(0.1)
