"""Commands that are typed once in a node's life: init, genesis, adopt, renew."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medshard_protocol.errors import Absent, Conflict, Malformed, Refused
from storenode.cli.options import Session, shared, shown_size, size

if TYPE_CHECKING:
    from medshard_protocol.roster import Roster
    from storenode.genesis import Card


@click.command()
@click.option("--institution", required=True, help='Name of the institution, such as "Hospital 01". The same for all its nodes.')
@click.option("--url", required=True, help="How the others reach this node: https://HOST:PORT.")
@click.option("--name", help="Name of the node: lowercase letters, digits, dashes [made from the institution's].")
@click.option("--listen", default=None, help="IP:PORT to listen on [every interface, port of the url].")
@click.option("--capacity", default="1TB", show_default=True, callback=size, help="Most to store, such as 500GB or 2TiB.")
@click.option("--metrics", default="", help="IP:PORT for Prometheus, such as 127.0.0.1:9701 [none].")
@click.option(
    "--ca", type=click.Path(file_okay=False, path_type=Path), help="For a further node: folder with the institution's ca.key and ca.crt."
)
@shared
def init(
    session: Session, institution: str, url: str, name: str | None, listen: str | None, capacity: int, metrics: str, ca: Path | None
) -> None:
    """Make a node: its keys, a commented config.toml, and the card to hand to the founder of the consortium.

    Makes the institution's own key too (keys/ca.key), unless --ca names the folder where it is. Nothing is ever overwritten.

    \b
    Examples:
      storenode init --institution "Hospital 01" --url https://node.hospital-01.example:9700 --capacity 8TB
      storenode --home /srv/second init --institution "Hospital 01" --name hospital-01-b \\
          --url https://node-b.hospital-01.example:9700 --ca /var/lib/storenode/keys
    """
    from storenode import durable
    from storenode.config import config_name, write_config
    from storenode.genesis import Card, card_suffix, found
    from storenode.identity import Institution, create_institution, create_node, keys_name

    home = session.home
    session.check_owner()
    plain = unicodedata.normalize("NFKD", institution).encode("ascii", "ignore").decode().lower()
    name = name or re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "node"
    listen = listen or f"0.0.0.0:{url.rpartition(':')[2]}"
    for existing in (home / config_name, home / keys_name):
        if existing.exists():
            raise Conflict(f"{existing} exists: there is a node in {home} already", hint="choose another --home")
    owner = Institution.load(ca) if ca else create_institution(institution)
    home.mkdir(mode=0o750, parents=True, exist_ok=True)
    write_config(home, url=url, listen=listen, capacity_bytes=capacity, metrics=metrics)
    try:
        keys = create_node(home, owner, keep_ca_key=ca is None)
        card = Card.of(institution, name, url, capacity, keys)
        found([card], sequencer=name)  # what no roster can hold is better said now than to the founder
        path = home / f"{name}{card_suffix}"
        durable.create(path, card.to_bytes(owner), mode=0o644)
    except BaseException:
        _undo(home)
        raise
    session.tell(
        {
            "home": str(home),
            "name": name,
            "node": keys.node_id.hex(),
            "card": str(path),
            "fingerprint": card.fingerprint,
            "config": str(home / config_name),
        },
        f"node      {name} of {institution}, {shown_size(capacity)}",
        f"id        {keys.node_id.hex()}",
        f"card      {path}",
        f"          fingerprint {card.fingerprint}",
        f"config    {home / config_name}",
    )
    session.note(
        "",
        "Next:",
        f"  1. Back up {home / keys_name} now, to two places that are not this machine. Nobody can make these keys again.",
        f"  2. Hand {path.name} to the founder of the consortium, and read the fingerprint out over the telephone.",
        f"  3. With the genesis file that comes back:  storenode --home {home} adopt genesis.medshard",
    )


@click.command()
@click.argument("cards", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="CARD...")
@click.option("-o", "--output", default="genesis.medshard", show_default=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--sequencer", required=True, help="Name of the node that orders the ledger's entries.")
@click.option("--code", metavar="K/N[/W]", help="Default code: any K of N shards rebuild a file, W are durable before a put counts.")
@click.option("--origin", default="", help="Name of the ledger, as a URL without scheme [made from the keys].")
@shared
def genesis(session: Session, cards: tuple[Path, ...], output: Path, sequencer: str, code: str | None, origin: str) -> None:
    """Make the genesis file of a new consortium out of its members' cards.

    Compare every fingerprint with the member over another channel before you send the file: it decides whom everybody trusts.
    Without --code: 2/4/4 for 4 institutions, 3/6/5 for 6, 4/9/7 for 9, 8/16/12 for 16, 15/30/22 for 30, and in between half of the
    shards to rebuild and three quarters to acknowledge.

    \b
    Examples:
      storenode genesis *.card --sequencer hospital-01
      storenode genesis *.card --sequencer hospital-01 --code 10/16/13 -o genesis.medshard
    """
    from storenode import durable
    from storenode.genesis import found, parse_code

    read = [read_card(path) for path in cards]
    roster = found(read, sequencer=sequencer, code=parse_code(code) if code else None, origin=origin)
    durable.create(output, roster.to_bytes(), mode=0o644)
    fingerprints = {card.node: card.fingerprint for card in read}
    session.tell(
        document_of(roster) | {"genesis": str(output.absolute()), "fingerprints": fingerprints},
        *table_of(roster),
        "",
        *(f"fingerprint  {fingerprint}  {node}" for node, fingerprint in fingerprints.items()),
        "",
        f"wrote {output}",
    )
    session.note(
        "",
        "Next: compare each fingerprint with its institution over the telephone. If all agree, send the file to all of them; each runs",
        f"  storenode adopt {output.name}",
    )
    if len(roster.institutions) < 4:
        session.note("", "Note: with fewer than 4 institutions no faulty one is tolerated. Enough for a trial, not for patients' data.")


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), metavar="GENESIS")
@click.argument("chain", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--sha256", "expected", help="Refuse the genesis file unless it has this SHA-256, read to you over another channel.")
@shared
def adopt(session: Session, file: Path, chain: Path | None, expected: str | None) -> None:
    """Take a genesis file for this node, after checking that it lists this node under its keys.

    A node that came later is listed in a later roster: give the CHAIN of changes too, which any member writes with
    `storenode roster show -o chain.medshard`. Every change in it is checked, from the genesis file on.

    \b
    Examples:
      storenode adopt genesis.medshard
      storenode adopt genesis.medshard --sha256 3f0a…   # refuse any other
      storenode adopt genesis.medshard chain.medshard   # into a consortium that runs already
    """
    from medshard_protocol.ids import sha256_from_hex
    from storenode.genesis import adopt as place
    from storenode.genesis import read_genesis
    from storenode.identity import NodeKeys
    from storenode.membership import read_chain

    session.check_owner()
    genesis = read_genesis(file)
    if expected is not None and sha256_from_hex(expected.strip().lower()) != genesis.sha256:
        raise Refused(f"{file} has the SHA-256 {genesis.sha256.hex()}", hint="do not use it; ask the founder which one is right")
    links = read_chain(chain) if chain else ()
    roster = place(session.home, genesis.to_bytes(), NodeKeys.load(session.home), links)
    session.tell(document_of(roster) | {"genesis_sha256": genesis.sha256.hex(), "number": roster.number}, *table_of(roster))
    session.note(
        "",
        "Next: make sure that every member has the same genesis file, SHA-256 " + genesis.sha256.hex() + ", then",
        f"  storenode --home {session.home} run",
    )


@click.command()
@click.option(
    "--ca", type=click.Path(file_okay=False, path_type=Path), help="Folder with ca.key and ca.crt, where the node does not keep them."
)
@shared
def renew(session: Session, ca: Path | None) -> None:
    """Issue this node a new certificate for its key. Nothing else changes; restart the node to use it.

    \b
    Examples:
      storenode renew
      storenode renew --ca /media/usb/institution
    """
    from medshard_protocol.identity import certificate_expiry
    from storenode.identity import Institution, NodeKeys, renew_node

    session.check_owner()
    keys = NodeKeys.load(session.home)
    if ca is None and keys.ca is None:
        raise Absent("the institution's ca.key is not kept here", hint="name the folder where it is: --ca FOLDER")
    expires = certificate_expiry(renew_node(keys, Institution.load(ca or keys.folder)))
    session.tell({"expires": expires.isoformat()}, f"the certificate is good until {expires:%Y-%m-%d}; restart the node to use it")


def _read(path: Path, bytes_max: int) -> bytes:
    """Read a file that somebody sent, and no more of it than it may have. Raises Absent or Malformed."""
    try:
        with path.open("rb") as file:
            data = file.read(bytes_max + 1)
    except FileNotFoundError:
        raise Absent(f"{path} does not exist") from None
    if len(data) > bytes_max:
        raise Malformed(f"{path}: more than {bytes_max} bytes")
    return data


def read_card(path: Path) -> Card:
    """Read a card. Raises Absent or Malformed."""
    from storenode.genesis import Card, card_bytes_max

    try:
        return Card.from_bytes(_read(path, card_bytes_max))
    except Malformed as error:
        raise Malformed(
            f"{path} is not a card: {error}", hint=error.hint or "a card is the .card file that `storenode init` wrote"
        ) from None


def _undo(home: Path) -> None:
    import shutil

    from storenode.config import config_name
    from storenode.identity import keys_name

    (home / config_name).unlink(missing_ok=True)
    shutil.rmtree(home / keys_name, ignore_errors=True)  # made a moment ago, and in no roster yet


def document_of(roster: Roster) -> dict[str, object]:
    """A roster as JSON."""
    k, n, w = roster.code
    return {
        "genesis_sha256": roster.sha256.hex(),
        "origin": roster.origin,
        "code": {"k": k, "n": n, "w": w},
        "quorum": {"institutions": len(roster.institutions), "faulty": roster.quorum.f, "needed": roster.quorum.q},
        "sequencer": roster.node(roster.sequencer).name,
        "keepers": {each.name: [key.hex() for key in each.keepers] for each in roster.institutions if each.keepers},
        "nodes": [
            {
                "name": node.name,
                "id": node.id.hex(),
                "institution": roster.institutions[node.institution].name,
                "url": node.url,
                "capacity_bytes": node.capacity,
            }
            for node in roster.nodes
        ],
    }


def table_of(roster: Roster) -> list[str]:
    """A roster for people."""
    k, n, w = roster.code
    width = max(len(node.name) for node in roster.nodes)
    lines = [
        f"{node.name:{width}}  {roster.institutions[node.institution].name}, {node.url}, {shown_size(node.capacity)}"
        + ("  (sequencer)" if node.id == roster.sequencer else "")
        for node in roster.nodes
    ]
    quorum = f"{roster.quorum.q} of {len(roster.institutions)} institutions, so {roster.quorum.f} may be faulty"
    return [
        *lines,
        "",
        f"code     any {k} of {n} shards rebuild a file; {w} are durable before a put is acknowledged",
        f"quorum   {quorum}",
        f"ledger   {roster.origin}",
        f"SHA-256  {roster.sha256.hex()}",
    ]
