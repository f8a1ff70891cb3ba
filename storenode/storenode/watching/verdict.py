"""What a piece of evidence proves, recomputed from its documents and the genesis file alone, and said in words.

Law: the file's own details are told as what its keeper says, never as fact. A fact is what signatures and hashes show: that a key signed,
that two signed heads exclude each other, that a tile does not give the root. Some kinds (a stale head, an entry left out) leave nothing
that a third party could check; then this says so, and what the documents do show.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, cosigners, log_verifiers, open_signed
from medshard_protocol.entries import Entry
from medshard_protocol.errors import Absent, Malformed, Refused
from medshard_protocol.ids import NodeId
from medshard_protocol.merkle import hash_size, sha256
from medshard_protocol.roster import Roster
from medshard_protocol.rosters import follow, unpack_links
from medshard_protocol.tiles import TileName
from storenode.evidence import Exhibit, kinds
from storenode.watching import holders
from storenode.watching.tilereader import HeadTiles, Withheld, WrongTile

apart_s: Final = 60  # cosignatures of one head are made within moments of each other
rosters_name: Final = "rosters"  # document: the answer to GET /v1/rosters, where the notes are not of the genesis roster


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome. ``proven``: the documents by themselves show what the kind says. Whom they convict, if anybody, the lines tell."""

    proven: bool
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Signed:
    """A note that was checked: who signed it."""

    checkpoint: Checkpoint
    loggers: frozenset[str]  # names of the nodes whose log keys signed
    cosigned: Mapping[NodeId, int]  # when, in Unix seconds
    roster: Roster  # under which it was checked


def read_note(data: bytes, rosters: Sequence[Roster]) -> Signed:
    """Check every signature of a note that its log signed, under the newest of these rosters (newest last) that makes it a quorum, or
    else the newest under which the signatures hold.

    Raises Malformed or Refused; says nothing about a quorum.
    """
    note = Note.from_bytes(data)
    found: list[Signed] = []
    for roster in reversed(rosters):
        with suppress(Refused):
            found.append(_signed(note, roster))
            if roster.has_quorum(found[-1].cosigned):
                return found[-1]
    return found[0] if found else _signed(note, rosters[-1])


def _signed(note: Note, roster: Roster) -> Signed:
    checkpoint = open_signed(note, roster)
    keys = {verifier.key for verifier in log_verifiers(roster) if any(map(verifier.made, note.signatures))}
    loggers = frozenset(node.name for node in roster.nodes if node.log_key in keys)
    return Signed(checkpoint, loggers, cosigners(note, roster), roster)


async def judge(exhibit: Exhibit, genesis: Roster) -> Verdict:
    """Recompute what an exhibit shows. Raises Malformed or Refused for documents that do not even say what their kind demands."""
    rosters = [genesis]
    if rosters_name in exhibit.documents:
        for link in unpack_links(exhibit.documents[rosters_name]):
            rosters.append(follow(rosters[-1], [link]))
    verdict = await _judges[exhibit.kind](exhibit, rosters)
    said = (
        [f"Its keeper says: {', '.join(f'{name} {value}' for name, value in sorted(exhibit.details.items()))}."] if exhibit.details else []
    )
    return Verdict(verdict.proven, (f"{exhibit.kind}: {kinds[exhibit.kind]}.", *said, *verdict.lines))


# -- kinds


async def _fork(exhibit: Exhibit, rosters: Sequence[Roster]) -> Verdict:
    one, two = (read_note(_document(exhibit, name), rosters) for name in ("note 1", "note 2"))
    lines = [*_words("Note 1", one), *_words("Note 2", two)]
    if one.checkpoint.size != two.checkpoint.size or one.checkpoint.root == two.checkpoint.root:
        return Verdict(False, (*lines, "These notes do not exclude each other: they are of two sizes, or of one root."))
    lines.append(f"Both describe {one.checkpoint.size} entries with different roots: one history at most is true.")
    return Verdict(True, (*lines, *_double_signers(one, two)))


async def _rewritten(exhibit: Exhibit, rosters: Sequence[Roster]) -> Verdict:
    old, new = (read_note(_document(exhibit, name), rosters) for name in ("note 1", "note 2"))
    lines = [*_words("Note 1", old), *_words("Note 2", new)]
    a, b = old.checkpoint, new.checkpoint
    root, path = _document(exhibit, "root"), _hashes(_document(exhibit, "path"))
    merkle.verify_consistency(a.size, root, b.size, b.root, path, sha256)  # raises Malformed
    if a.size > b.size or root == a.root:
        return Verdict(False, (*lines, "Note 2 continues note 1: nothing was rewritten."))
    lines.append(
        f"The first {a.size} entries under note 2 have the root {root.hex()[:16]}…, as the hashes show, and not the root of note 1."
    )
    lines.append("One of the two heads was signed over a rewritten history.")
    return Verdict(True, (*lines, *_double_signers(old, new)))


async def _rollback(exhibit: Exhibit, rosters: Sequence[Roster]) -> Verdict:
    before, after = (read_note(_document(exhibit, name), rosters) for name in ("note 1", "note 2"))
    lines = [*_words("Note 1, seen first", before), *_words("Note 2, seen later", after)]
    if after.checkpoint.size >= before.checkpoint.size:
        return Verdict(False, (*lines, "Note 2 is not smaller than note 1."))
    backwards = [node for node, time in after.cosigned.items() if node in before.cosigned and time > before.cosigned[node]]
    if backwards and before.roster.has_quorum(before.cosigned):  # what no quorum stands behind may be dropped again
        lines += [f"{_voice(node, after.roster)} cosigned the smaller head after it had cosigned the larger one." for node in backwards]
        return Verdict(True, tuple(lines))
    lines.append(
        "Both notes are genuine. Who served them in which order is the keeper's word: an old head can be served without a new signature."
    )
    return Verdict(False, tuple(lines))


async def _stale(exhibit: Exhibit, rosters: Sequence[Roster]) -> Verdict:
    note = read_note(_document(exhibit, "note 1"), rosters)
    return Verdict(False, (*_words("The head", note), "That nothing newer was served is the keeper's word."))


async def _damaged_tile(exhibit: Exhibit, rosters: Sequence[Roster]) -> Verdict:
    note = read_note(_document(exhibit, "note 1"), rosters)
    tiles = HeadTiles(note.checkpoint.size, note.checkpoint.root, _fetch_from(exhibit))
    lines = _words("The head", note)
    try:
        await tiles.check_edge()
        for name in (TileName.from_path(name) for name in exhibit.documents if "/" in name):
            if name.level is None:
                await tiles.bundle(name.index)
            else:
                await tiles.check_tile(name.level, name.index)
    except WrongTile as wrong:
        lines.append(f"The tiles do not belong to it: {wrong}.")
        lines.append("That they came from the node named by the keeper is the keeper's word: tiles are not signed.")
        return Verdict(True, tuple(lines))
    except Withheld as missing:
        return Verdict(False, (*lines, f"A tile that it takes to check the others is not in the file: {missing}."))
    return Verdict(False, (*lines, "The tiles fold to this head's root: nothing is damaged."))


async def _few_cosigners(exhibit: Exhibit, rosters: Sequence[Roster]) -> Verdict:
    note = read_note(_document(exhibit, "note 1"), rosters)
    lines, needed = _words("The head", note), note.roster.quorum.q
    if note.roster.has_quorum(note.cosigned):
        return Verdict(False, (*lines, "That is a quorum: nothing is missing."))
    voices = note.roster.voices.intersection(note.cosigned)
    lines.append(f"{len(voices)} institutions cosigned it, and {needed} are needed; an institution speaks through its first node alone.")
    lines.append("That it was shown as published is the keeper's word.")
    return Verdict(False, tuple(lines))


async def _bad_signature(exhibit: Exhibit, rosters: Sequence[Roster]) -> Verdict:
    data = _document(exhibit, "note 1")
    try:
        note = read_note(data, rosters)
    except (Malformed, Refused) as error:
        return Verdict(
            True, (f"The document is no checkpoint of {rosters[0].origin}: {error}.", "That a node served it is the keeper's word.")
        )
    return Verdict(False, (*_words("The head", note), "All signatures hold."))


async def _not_cosigned(exhibit: Exhibit, rosters: Sequence[Roster]) -> Verdict:
    note = read_note(_document(exhibit, "note 1"), rosters)
    return Verdict(False, (*_words("The head", note), "Which mirror served it is the keeper's word."))


async def _left_out(exhibit: Exhibit, rosters: Sequence[Roster]) -> Verdict:
    entry = Entry.from_bytes(_document(exhibit, "entry"))
    entry.verify(rosters[0].origin)
    lines = [f"The entry is of type {entry.body.type.name}, signed by {entry.author.hex()[:16]}… for this log."]
    lines += _words("The head when it was handed in", read_note(_document(exhibit, "before"), rosters))
    lines += _words("The head later", read_note(_document(exhibit, "after"), rosters))
    lines.append("When it was handed in is the keeper's word. Whoever denies leaving it out can show where it stands: an inclusion proof.")
    return Verdict(False, tuple(lines))


async def _abandoned(exhibit: Exhibit, rosters: Sequence[Roster]) -> Verdict:
    published = read_note(_document(exhibit, "published"), rosters)
    lines = _words("The head that a quorum published", published)
    entries = sorted(name for name in exhibit.documents if name.startswith("entry "))
    lines.append(f"{len(entries)} entries were dropped for it, or more; they are in the file.")
    if "signed" not in exhibit.documents:
        return Verdict(False, (*lines, "No head over them was signed, or none was kept."))
    dropped = read_note(exhibit.documents["signed"], rosters)
    lines += _words("The head that was dropped", dropped)
    lines.append(
        "A head without a quorum binds nobody: a sequencer that is lost in the middle leaves one, and so does one that tries a fork."
    )
    if (dropped.checkpoint.size == published.checkpoint.size) and dropped.checkpoint.root != published.checkpoint.root:
        lines += ["Both are of one size and exclude each other.", *_double_signers(dropped, published)]
        return Verdict(True, tuple(lines))
    return Verdict(False, (*lines, "That the two exclude each other is the keeper's word, as they are of different sizes."))


async def _forged_proof(exhibit: Exhibit, rosters: Sequence[Roster]) -> Verdict:
    note = read_note(_document(exhibit, "note 1"), rosters)
    entry, path, index = _document(exhibit, "entry"), _hashes(_document(exhibit, "path")), exhibit.details.get("index", 0)
    if not isinstance(index, int):
        raise Malformed("evidence: the index of an entry is a number")
    lines, checkpoint = _words("The head", note), note.checkpoint
    try:
        found = merkle.root_from_path(merkle.leaf_hash(entry, sha256), index, checkpoint.size, path, sha256)
    except Malformed as error:
        return Verdict(True, (*lines, f"The proof is none: {error}.", "Who gave it is the keeper's word."))
    if found == checkpoint.root:
        return Verdict(False, (*lines, f"The proof holds: the entry stands at {index}."))
    return Verdict(
        True, (*lines, f"The proof does not lead from the entry, at {index}, to that root.", "Who gave it is the keeper's word.")
    )


async def _clock(exhibit: Exhibit, rosters: Sequence[Roster]) -> Verdict:
    note = read_note(_document(exhibit, "note 1"), rosters)
    lines, times = _words("The head", note), sorted(note.cosigned.values())
    if not times or times[-1] - times[0] <= apart_s:
        return Verdict(False, (*lines, "The cosignatures were made at about the same time."))
    lines.append(
        f"The cosignatures state times up to {times[-1] - times[0]} s apart: somebody's clock is wrong, or one signed again later."
    )
    return Verdict(True, tuple(lines))


async def _false_cell(exhibit: Exhibit, rosters: Sequence[Roster]) -> Verdict:
    proven, lines = holders.false_cell(exhibit, rosters)
    return Verdict(proven, tuple(lines))


async def _false_tag(exhibit: Exhibit, rosters: Sequence[Roster]) -> Verdict:
    proven, lines = holders.false_tag(exhibit, rosters)
    return Verdict(proven, tuple(lines))


_judges: Final[dict[str, Callable[[Exhibit, Sequence[Roster]], Awaitable[Verdict]]]] = {
    "fork": _fork,
    "rewritten": _rewritten,
    "rollback": _rollback,
    "stale": _stale,
    "damaged-tile": _damaged_tile,
    "withheld": _stale,
    "few-cosigners": _few_cosigners,
    "bad-signature": _bad_signature,
    "not-cosigned": _not_cosigned,
    "left-out": _left_out,
    "abandoned": _abandoned,
    "forged-proof": _forged_proof,
    "false-cell": _false_cell,
    "false-tag": _false_tag,
    "clock": _clock,
}


# -- words


def _words(what: str, note: Signed) -> list[str]:
    head, roster = note.checkpoint, note.roster
    voices = roster.voices.intersection(note.cosigned)
    quorum = f"{len(voices)} of {len(roster.institutions)} institutions, {'a' if roster.has_quorum(note.cosigned) else 'no'} quorum"
    by = ", ".join(f"{_voice(node, roster)} at {_moment(time)}" for node, time in sorted(note.cosigned.items(), key=lambda item: item[1]))
    return [
        f"{what}: {head.size} entries of {head.origin}, root {head.root.hex()[:16]}…, signed with the log key of {_listed(note.loggers)}.",
        f"  Cosigned by {by} ({quorum})." if by else "  Cosigned by nobody.",
    ]


def _double_signers(one: Signed, two: Signed) -> list[str]:
    lines = [f"The log key of {name} signed both." for name in sorted(one.loggers & two.loggers)]
    if not lines:
        lines.append(
            f"The log keys are of different nodes, {_listed(one.loggers)} and {_listed(two.loggers)}: where one took over from the other"
            " before a quorum had seen its last head, this happens to honest nodes."
        )
    both = {_voice(node, one.roster) for node in one.cosigned if node in two.cosigned}
    lines += [f"{voice} cosigned both." for voice in sorted(both)]
    if one.roster.has_quorum(one.cosigned) and two.roster.has_quorum(two.cosigned):
        names = _institutions(one) & _institutions(two)
        lines.append(f"Both have a quorum, so at least one of these broke its word: {_listed(names)}.")
    else:
        lines.append(
            "A head without a quorum binds nobody, and a mirror may drop it when a quorum publishes another; its signers signed it."
        )
    return lines


def _institutions(note: Signed) -> frozenset[str]:
    roster = note.roster
    return frozenset(roster.institutions[roster.node(node).institution].name for node in note.cosigned)


def _voice(node: NodeId, roster: Roster) -> str:
    member = roster.node(node)
    return f"{member.name} of {roster.institutions[member.institution].name}"


def _moment(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return f"second {seconds}"


def _listed(names: frozenset[str]) -> str:
    return " and ".join(sorted(names)) or "nobody"


def _document(exhibit: Exhibit, name: str) -> bytes:
    try:
        return exhibit.documents[name]
    except KeyError:
        raise Malformed(f"evidence: of kind {exhibit.kind}, and without a document {name!r}") from None


def _hashes(data: bytes) -> list[bytes]:
    if len(data) % hash_size:
        raise Malformed(f"evidence: expected hashes of {hash_size} bytes")
    return [data[at : at + hash_size] for at in range(0, len(data), hash_size)]


def _fetch_from(exhibit: Exhibit) -> Callable[[TileName], Awaitable[bytes]]:
    async def fetch(name: TileName) -> bytes:
        try:
            return exhibit.documents[name.path()]
        except KeyError:
            raise Absent("not there") from None

    return fetch
