"""Going on with the successor of a log that has ended: on a node's disk, and towards whoever asks for it.

Law: a node takes a successor only if a quorum of the last institutions of its own log signed for it, or, without a log of its own, if its
operator names the new genesis file by SHA-256. The old log stays where it is and is only read; its entries are copied, to be the first
of the new one, where their root is the one that the new genesis file names. The genesis file is replaced last: until then nothing
has happened, and the command may be given again.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiohttp import web

from medshard_protocol import merkle
from medshard_protocol.canonical import encode
from medshard_protocol.errors import Absent, Conflict, Damaged, Malformed, Refused
from medshard_protocol.ids import Sha256, sha256_from_hex
from medshard_protocol.merkle import sha256
from medshard_protocol.messages import body_type
from medshard_protocol.roster import Roster
from medshard_protocol.succession import Change, Successor, document_bytes_max, successor_path
from medshard_protocol.tiles import TileName, Tree, pack_bundle, tile_width
from storenode import durable
from storenode.config import Config
from storenode.genesis import check_membership, genesis_name, load_genesis
from storenode.identity import NodeKeys
from storenode.ledger.engine import Engine, Head, name_of, open_engine
from storenode.ledger.routes import fleeting, immutable
from storenode.ledger.store import Store, database_name
from storenode.membership import Membership, log_folder, successor_file

if TYPE_CHECKING:
    from storenode.ledger import Ledger

archive_prefix: Final = "/before/"
copy_entries: Final = 4096


def read_successor(path: Path) -> Successor:
    """Read a successor's file. Raises Absent or Malformed."""
    try:
        with path.open("rb") as file:
            data = file.read(document_bytes_max + 1)
    except FileNotFoundError:
        raise Absent(f"{path} does not exist") from None
    try:
        return Successor.from_bytes(data)
    except Malformed as error:
        raise Malformed(f"{path} is no successor: {error}", hint="it is what `storenode successor found` wrote") from None


# -- taking it


def adopt(home: Path, document: Successor, keys: NodeKeys, *, expected: Sha256 | None = None) -> Roster:
    """Let this node go on with a successor; its genesis roster. The node must stand still. Doing it again changes nothing.

    ``expected`` is the new genesis file's SHA-256, for a node that was not in the log before. Raises Refused, Malformed, Conflict, or
    Absent where the successor of an earlier log must be taken first.
    """
    change = document.check()
    genesis, data = change.genesis, Config.load(home).data
    if expected is not None and expected != genesis.sha256:
        raise Refused(f"the successor has the SHA-256 {genesis.sha256.hex()}", hint="do not use it; ask its founder which one is right")
    own = load_genesis(home) if (home / genesis_name).exists() else None
    if own == genesis:
        return genesis
    check_membership(genesis, keys)
    if own is None:
        if expected is None:
            raise Refused("this node is in no log yet, so it cannot judge who signed", hint="name the new genesis file: --sha256")
        for ended in genesis.before[:-1]:
            if not successor_file(data, ended.genesis).exists():
                raise Absent(f"it is not here what came after {ended.origin}", hint="get it of a member: storenode successor show -o FILE")
    else:
        _check_own(Membership(data, own, sync=False), change)
        engine = Config.load(home).ledger_engine
        if engine == "sqlite":
            _copy_log(log_folder(data, own), log_folder(data, genesis), change)
        else:
            _copy_rows(engine, own, change)
    path = successor_file(data, change.rosters[0].sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(path, document.to_bytes(), mode=0o644)
    durable.sync_folder(data)
    durable.replace(home / genesis_name, document.genesis, mode=0o644)
    return genesis


def _check_own(membership: Membership, change: Change) -> None:
    """The document must be about this node's log, and its chain the one that this node has followed."""
    if membership.genesis != change.rosters[0]:
        hint = "a node goes on with the successor of its own log, one after the other"
        raise Conflict(f"this goes on from {change.rosters[0].origin}, genesis {change.rosters[0].sha256.hex()}", hint=hint)
    if list(membership.history) != list(change.rosters[: len(membership.history)]):
        raise Refused("this node has followed other rosters than those by which the successor was signed")


def _copy_log(old: Path, new: Path, change: Change) -> None:
    """Begin the new log with the entries of the old one. What this node lacks of them, or all, it gets from the others instead."""
    if not (old / database_name).exists() or (new / database_name).exists():
        return
    part = new.with_name(f".{new.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    store = Store(old, change.rosters[0].origin, sha256(b""))  # and its lock: the node must not run
    try:
        _check_end(store, change)
        if store.head().size > change.checkpoint.size:
            return  # entries that were never published: simpler to get the others anew than to drop them
        part.mkdir(parents=True)
        with closing(sqlite3.connect(old / database_name)) as source, closing(sqlite3.connect(part / database_name)) as target:
            source.backup(target)
            target.execute("UPDATE head SET origin=?, epoch=0, leader=x'', note=x'', accepted=0", (change.genesis.origin,))
            target.execute("UPDATE memory SET published=x''")
            target.commit()
    except sqlite3.Error as error:
        raise Damaged(f"the ledger in {old} cannot be copied ({error})") from None
    finally:
        store.close()
    with (part / database_name).open("rb") as file:
        os.fsync(file.fileno())
    durable.sync_folder(part)
    part.rename(new)
    durable.sync_folder(new.parent)


def _copy_rows(dsn: str, own: Roster, change: Change) -> None:
    """The same in a database that logs share. Goes on where an earlier call was cut off."""
    empty, genesis = sha256(b""), change.genesis
    with closing(open_engine(dsn, Path(), own.origin, empty, len(own.before))) as old:
        _check_end(old, change)
        with closing(open_engine(dsn, Path(), genesis.origin, empty, len(genesis.before))) as new:
            end, at = min(old.head().size, change.checkpoint.size), new.head().size
            last = new.entries(at - at % tile_width, at)
            tree = Tree.load(at, [merkle.leaf_hash(entry, sha256) for entry in last], new.tile)
            for start in range(at, end, copy_entries):
                entries = old.entries(start, min(start + copy_entries, end))
                tiles = [tile for entry in entries for tile in tree.append(merkle.leaf_hash(entry, sha256))]
                head = Head(tree.size, tree.root(tree.size), b"")
                new.extend(0, start, entries, tiles, head, [name_of(entry) for entry in entries], own=False)
            memory = old.memory()
            if lost := old.standing().lost:
                new.lose(lost)
            new.remember(min(memory.checked, end), (place for place in memory.unsigned if place < end), b"")


def _check_end(store: Engine, change: Change) -> None:
    """Raise Refused if this node's log is not that which the successor goes on from, as far as it goes."""
    size = store.head().size
    last = store.entries(size - size % tile_width, size)
    tree = Tree.load(size, [merkle.leaf_hash(entry, sha256) for entry in last], store.tile)
    if size >= change.checkpoint.size and tree.root(change.checkpoint.size) != change.checkpoint.root:
        raise Refused("this node's log is another one than the successor goes on from: keep it, it is evidence")


# -- telling of it


def successor_routes(membership: Membership, ledger: Ledger) -> list[web.RouteDef]:
    """What came after an earlier log, and that log itself as it ended, to be read and audited under its own rosters."""

    async def get_successor(request: web.Request) -> web.Response:
        before = sha256_from_hex(request.query.get("of", ""))
        for change, document in membership.successions:
            if change.rosters[0].sha256 == before:
                return web.Response(body=document.to_bytes(), content_type=body_type)
        raise Absent("this node knows nothing that came after that log")

    async def get_archived(request: web.Request) -> web.Response:
        number, path = int(request.match_info["number"]), request.match_info["path"]
        if number >= len(membership.successions):
            raise Absent("there are not so many logs before this one")
        change, document = membership.successions[number]
        data, headers = _archived(ledger, change, document, path)
        return web.Response(body=data, content_type="application/octet-stream", headers=headers)

    return [
        web.get(successor_path, get_successor, allow_head=False),
        web.get(archive_prefix + "{number:[0-9]{1,2}}/log/{path:.+}", get_archived),
    ]


def _archived(ledger: Ledger, change: Change, document: Successor, path: str) -> tuple[bytes, dict[str, str]]:
    """A file of an earlier log, under the names that an export gives. Its entries and hashes are those of the present one."""
    match path:
        case "checkpoint":
            return document.note, fleeting
        case "genesis.medshard":
            return document.before, fleeting
        case "rosters":
            return encode([1, [link.to_value() for link in document.links]]), fleeting
    if not path.startswith("tile/"):
        raise Absent("an earlier log has no such file")
    try:
        name = TileName.from_path(path.removeprefix("tile/"))
    except Malformed as error:
        raise Absent(str(error)) from None
    published = ledger.published
    if not name.within(change.checkpoint.size) or published is None or published.checkpoint.size < change.checkpoint.size:
        raise Absent("that log has no such tile")
    start = name.index * tile_width
    journal = ledger.journal
    data = journal.tree.tile(name) if name.level is not None else pack_bundle(journal.entries(start, start + name.width))
    return data, immutable
