"""Writing a log out as static files, which any web server can serve and ``audit`` can check.

Law: files of a log never change, so an export goes on where the last one stopped. The checkpoint is replaced last: at any moment the
folder holds what its checkpoint speaks of. Partial tiles of earlier checkpoints go when the full tile is there. Beside the C2SP files
stand the genesis file, the rosters that followed it, and a C2SP policy from which other tools learn whom to believe.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from medshard_protocol.canonical import encode
from medshard_protocol.checkpoint import Checkpoint, Note, cosigner_verifier, log_verifiers, open_published, pq_verifier
from medshard_protocol.errors import Absent, Damaged, Malformed, MedshardError, Refused
from medshard_protocol.ids import Sha256
from medshard_protocol.roster import Roster
from medshard_protocol.rosters import Link, follow, unpack_links
from medshard_protocol.succession import Successor
from medshard_protocol.tiles import TileName, tile_names, tile_width, unpack_bundle
from storenode import durable
from storenode.logtool.source import Folder, Source, size_of

threads: Final = 8
genesis_name: Final = "genesis.medshard"
rosters_name: Final = "rosters"
policy_name: Final = "policy"
before_name: Final = "before-{}"


@dataclass(frozen=True)
class Exported:
    """What an export did."""

    size: int
    files_new: int
    full: bool  # the checkpoint carries both kinds of cosignature


def export(
    source: Source,
    folder: Path,
    genesis: Roster,
    links: Sequence[Link],
    progress: Callable[[int, int], None] = lambda done, of: None,
    *,
    before: Sequence[Successor] = (),
) -> Exported:
    """Bring ``folder`` up to the source's checkpoint; ``before`` tells how it came to this log.

    Raises Refused for one without a quorum, Damaged where the source has forked."""
    note = source.read("checkpoint")
    roster = follow(genesis, links)
    checkpoint = _published(note, genesis, links)
    folder.mkdir(parents=True, exist_ok=True)
    had = _size_before(folder)
    if had > checkpoint.size:
        raise Damaged(f"{folder} has {had} entries and the source {checkpoint.size}: a log never shrinks")
    missing = [name for name in tile_names(checkpoint.size) if not (folder / "tile" / name.path()).exists()]
    with ThreadPoolExecutor(threads) as pool:
        for done, _ in enumerate(pool.map(lambda name: _copy(source, folder, name), missing), 1):
            progress(done, len(missing))
    _prune(folder, checkpoint.size)
    for name, data in ((genesis_name, genesis.to_bytes()), (rosters_name, encode([1, [link.to_value() for link in links]]))):
        durable.replace(folder / name, data, mode=0o644)
    for number, document in enumerate(before):
        durable.replace(folder / before_name.format(number), document.to_bytes(), mode=0o644)
    durable.replace(folder / policy_name, policy(roster).encode(), mode=0o644)
    durable.replace(folder / "checkpoint", note, mode=0o644)
    return Exported(checkpoint.size, len(missing), _is_full(note, roster))


def read_rosters(folder: Path) -> tuple[Roster, tuple[Link, ...]]:
    """The genesis file and the later rosters that lie beside an exported log. Raises Absent or Malformed."""
    source = Folder(folder)
    genesis = Roster.from_bytes(source.read(genesis_name))
    try:
        return genesis, unpack_links(source.read(rosters_name))
    except Absent:
        return genesis, ()


def read_before(source: Source, genesis: Roster) -> list[Successor]:
    """How it came to this log from those before it, as it lies beside an exported log. Raises Absent, Malformed or Refused."""
    found = [Successor.from_bytes(source.read(before_name.format(number))) for number, _ in enumerate(genesis.before)]
    if [document.check().rosters[0].sha256 for document in found] != [each.genesis for each in genesis.before]:
        raise Refused("what lies beside the log does not say how it came from the logs before it")
    return found


def documents(links: Iterable[Link], before: Iterable[Successor] = ()) -> dict[Sha256, Roster]:
    """The rosters of a chain, and of the logs before, by their SHA-256."""
    rosters = [Roster.from_bytes(link.roster) for link in (*links, *(link for each in before for link in each.links))]
    return {roster.sha256: roster for roster in rosters}


def policy(roster: Roster) -> str:
    """A C2SP tlog-policy: any log key, and a quorum of institutions, each by the node that speaks for it, with each kind of key."""
    lines = [f"# {roster.origin}, roster {roster.number}", *(f"log {each.vkey()}" for each in log_verifiers(roster)), ""]
    kinds = {"ed25519": cosigner_verifier, "ml-dsa": pq_verifier}
    groups = []
    for kind, verifier in kinds.items():
        members = []
        for number, _ in enumerate(roster.institutions):
            node = next(node for node in roster.nodes if node.institution == number)
            if kind == "ed25519" or node.pq_key:
                members.append(f"{node.name}-{kind}")
                lines.append(f"witness {members[-1]} {verifier(roster, node.id).vkey()}")
        if len(members) >= roster.quorum.q:
            groups.append(f"quorum-{kind}")
            lines += [f"group {groups[-1]} {roster.quorum.q} {' '.join(members)}", ""]
    lines += [f"group both all {' '.join(groups)}", "quorum both"]
    return "\n".join(lines) + "\n"


def _published(note: bytes, genesis: Roster, links: Sequence[Link]) -> Checkpoint:
    """The checkpoint, cosigned by a quorum of one of the rosters. Which one it must be, only an audit can tell."""
    refusal: MedshardError | None = None
    for upto in range(len(links), -1, -1):
        try:
            return open_published(note, follow(genesis, links[:upto]))
        except MedshardError as error:
            refusal = refusal or error
    assert refusal is not None, "there is a genesis roster at least"
    raise refusal


def _is_full(note: bytes, roster: Roster) -> bool:
    try:
        open_published(note, roster, pq=True)
    except MedshardError:
        return False
    return True


def _size_before(folder: Path) -> int:
    try:
        return Checkpoint.from_text(Note.from_bytes(Folder(folder).read("checkpoint")).text).size
    except (Absent, Malformed):
        return 0


def _copy(source: Source, folder: Path, name: TileName) -> None:
    path = f"tile/{name.path()}"
    data = source.read(path)
    if name.level is None:
        unpack_bundle(data, name.width)
    elif len(data) != size_of(name):
        raise Damaged(f"{path}: the source gives {len(data)} bytes instead of {size_of(name)}")
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    part.write_bytes(data)
    part.replace(target)  # no fsync: a file that a power cut took is copied again, or found missing by an audit


def _prune(folder: Path, size: int) -> None:
    """Remove partial tiles whose full tile has come."""
    for name in tile_names(size):
        if name.width == tile_width:
            partial = folder / "tile" / (name.path() + ".p")
            if partial.is_dir():
                shutil.rmtree(partial)
