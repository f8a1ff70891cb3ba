"""Who may say what, and with what effect. One rule for each type of entry; an entry without the right has no effect.

    entry           who                                           if                                          then
    ROSTER 0        the log key of the genesis file's sequencer   a log's first, and it names that file; of   the log begins
                                                                  a successor, just after the FREEZE
    ROSTER 1        an institution's CA key (*)                   key new, or its own and not withdrawn       enrolled; latest roles count
    ROSTER 2        an institution's CA key (*)                   not said before (***); with the q-th,       its voice; with the q-th, the
                                                                  the document may follow                     roster from the next entry on
    ROSTER 3        the institution that enrolled the key         not withdrawn yet                           no rights any more, for good
    ROSTER 4        the institution that enrolled the old key,    new key unknown, old one without            new key enrolled, old one
                    and both keys have signed                     successor and no sender                     withdrawn; its files pass on
    ROSTER 5        the institution that enrolled the vault       key unknown, vault not withdrawn            a sender: its files are the
                                                                                                              vault's, and it reads nothing
    REGISTER        an enrolled key (**)                          file id free; or the same again,            the first registers the file
                                                                  and neither retired nor erased
    GRANT           the owner of every file; a sender of what     none erased, reader enrolled (**)           the reader may, until then
                    it registered, to its vault alone             and no sender
    REVOKE          the grant's author, its reader, or the        not revoked yet                             the grant ends here
                    institution that vouches for its author
    ACCESS          an enrolled key (**); with a reason only                                                  a trace; the right to read is
                    an emergency identity of the roster                                                       another question: ``right_at``
    MOVE            the TLS key of the node named                 registered, not retired or erased, no       that node holds the shard;
                                                                  other shard of it moved there               the latest counts
    RETAIN          the owner                                     later than before, not retired or erased    kept until then
    HOLD            the owner, or the institution that            not retired or erased                       kept until this is released
                    vouches for the owner
    RELEASE         the hold's author, or that institution        not released yet                            the hold ends
    PROPOSE         a keeper (****)                               a hold: not retired or erased; a release:   another keeper may hold
                                                                  on hold; not proposed by them before        or release the file
    RETIRE, ERASE   the owner                                     no hold, `at` not before the retention      shards may go; with ERASE
                                                                  ends, not done before                       nobody reads it any more
    TIMESTAMP       the TLS key of a node                         size <= index                               kept; readers check it
    FREEZE          an institution's CA key (*)                   not said before (***)                       its voice; with the q-th,
                                                                                                              the log ends

(*) the present CA key, in the roster that the entry is judged under. (**) by an institution that is in that roster, and not withdrawn; an
owner or a reader acts only while enrolled so. (***) by this institution, under this roster: the voices of a quorum are distinct
institutions of one roster, and a new roster starts the count anew.

(****) Where the roster lists keepers for the institution that vouches for the owner, HOLD and RELEASE are theirs alone, and each needs two
of them: one proposes, another says it. Both must be listed, and vouched for by that institution, when the second speaks. A proposal is good
for one hold, or for the release of all holds that stand; a hold that comes between takes it off the table.

Wherever an owner, an author or a reader is named, the key that has succeeded it is meant, and for a sender's files the vault that it sends
for. A keeper or an emergency identity whose key was rotated stays one, but not one whose key was withdrawn before that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from medshard_protocol.entries import (
    Access,
    Approve,
    Body,
    Enrol,
    Entry,
    Erase,
    Freeze,
    Genesis,
    Grant,
    Hold,
    Move,
    Propose,
    Register,
    Release,
    Retain,
    Retire,
    Revoke,
    Rotate,
    Sender,
    Timestamp,
    Type,
    Withdraw,
)
from medshard_protocol.errors import Absent, Conflict, MedshardError, Refused
from medshard_protocol.facts import Facts, Registration
from medshard_protocol.ids import FileId, Key
from medshard_protocol.rosters import check_successor


def objection(facts: Facts, entry: Entry) -> MedshardError | None:
    """Say why this entry, were it the next, would have no effect.

    Raises Absent when that hangs on a proposed roster which is not at hand.
    """
    frozen = facts.frozen
    if frozen is not None:
        successor = f"; its successor is {frozen[1].hex()}" if any(frozen[1]) else ""
        return Refused(f"this log has ended with entry {frozen[0]}{successor}")
    return _rules[type(entry.body)](facts, entry.body, entry.author)


def _genesis(facts: Facts, body: Genesis, author: Key) -> MedshardError | None:
    genesis = facts.beginning
    if genesis is None:
        return Refused("the genesis entry is a log's first and no other")
    if author != genesis.log_key or body.genesis_sha256 != genesis.sha256:
        return Refused("this log follows another genesis file")
    if genesis.before and facts.last_end != facts.size - 1:
        return Refused("the log before has not ended there")
    return None


def _enrol(facts: Facts, body: Enrol, author: Key) -> MedshardError | None:
    institution, known = facts.institution(author), facts.identity(body.key)
    if institution is None:
        return Refused("only an institution enrols keys")
    if known is not None and known.institution != institution.name:
        return Conflict("another institution has enrolled this key")
    if known is not None and known.withdrawn is not None:
        return Refused("this key was withdrawn, which is for good", hint="make a new key and enrol that")
    if known is not None and known.heir is not None:
        return Conflict("this key only sends, for another vault")
    return None


def _rotate(facts: Facts, body: Rotate, author: Key) -> MedshardError | None:
    if not facts.vouches(author, body.old):
        return Refused("only the institution that enrolled a key enrols its successor")
    if facts.sends(body.old):
        return Refused("a key that only sends has no successor", hint="make a new sender")
    if facts.heir(body.old) != body.old:
        return Conflict("this key has a successor already")
    return Conflict("the new key is known already: a successor is a fresh key") if facts.identity(body.key) is not None else None


def _sender(facts: Facts, body: Sender, author: Key) -> MedshardError | None:
    if not facts.vouches(author, body.vault):
        return Refused("only the institution that enrolled a vault enrols what sends for it")
    if facts.sends(body.vault):
        return Refused("that key only sends itself")
    if facts.identity(body.key) is not None:
        return Conflict("this key is known already: a sender has a key of its own")
    return _stranger(facts, body.vault)


def _withdraw(facts: Facts, body: Withdraw, author: Key) -> MedshardError | None:
    if not facts.vouches(author, body.key):
        return Refused("only the institution that enrolled a key withdraws it")
    known = facts.identity(body.key)
    return Conflict("this key was withdrawn before") if known and known.withdrawn is not None else None


def _approve(facts: Facts, body: Approve, author: Key) -> MedshardError | None:
    institution, votes = facts.institution(author), facts.votes(Type.ROSTER, body.roster_sha256)
    if institution is None:
        return Refused("only an institution approves a roster")
    if facts.has_been_roster(body.roster_sha256):
        return Conflict("this roster has been decided before")  # else a late voice would stand among those for the next one
    if institution.name in votes:
        return Conflict(f"{institution.name} has approved this roster before")
    if len(votes) + 1 >= facts.roster.quorum.q:
        try:
            check_successor(facts.roster, facts.document(body.roster_sha256))
        except Refused as error:
            return error
    return None


def _register(facts: Facts, body: Register, author: Key) -> MedshardError | None:
    if objection := _stranger(facts, author, sends=True):
        return objection
    known = facts.registration(body.file_id)
    if known is None:
        return None
    if (known.manifest_sha256, known.owner) != (body.manifest_sha256, author):
        return Conflict("this file id is registered already, by another key or with another manifest")
    return _gone(known)


def _grant(facts: Facts, body: Grant, author: Key) -> MedshardError | None:
    sends = facts.sends(author)
    if sends and facts.heir(author) != body.reader:
        return Refused("a sender grants to the vault that it sends for, and to nobody else")
    for file_id in body.file_ids:
        known = _sent(facts, file_id, author) if sends else _owned(facts, file_id, author)
        if isinstance(known, MedshardError):
            return known
        if known.erased is not None:
            return Refused("an erased file is granted to nobody")
    return _stranger(facts, body.reader, "no institution vouches for the reader's key")


def _revoke(facts: Facts, body: Revoke, author: Key) -> MedshardError | None:
    known = facts.grant(body.grant)
    if known is None:
        return Absent("there is no such grant")
    if author in (facts.heir(known.author), facts.heir(known.reader)):
        if objection := _stranger(facts, author):
            return objection
    elif not facts.vouches(author, known.author):
        return Refused("a grant is revoked by its author, its reader, or the institution that vouches for its author")
    return Conflict("this grant was revoked before") if known.revoked is not None else None


def _access(facts: Facts, body: Access, author: Key) -> MedshardError | None:
    if body.reason and not facts.is_marked(facts.roster.emergency, author):
        return Refused("only an identity that the roster marks for emergencies gives a reason")
    return _stranger(facts, author)


def _move(facts: Facts, body: Move, author: Key) -> MedshardError | None:
    node = next((each for each in facts.roster.nodes if each.id == body.node), None)
    if node is None or node.tls_key != author:
        return Refused("a shard is moved by the node that takes it over")
    known = facts.registration(body.file_id)
    if known is None:
        return Absent("this file is not registered")
    if objection := _gone(known):
        return objection
    moved = facts.moves(body.file_id)
    if any(each.node == body.node for shard, each in moved.items() if shard != body.shard):
        return Conflict("another shard of this file was moved to this node")
    return None


def _retain(facts: Facts, body: Retain, author: Key) -> MedshardError | None:
    known = _owned(facts, body.file_id, author)
    if isinstance(known, MedshardError):
        return known
    if body.until <= known.retained_until:
        return Conflict("this file is retained as long already, and a retention is never shortened")
    return _gone(known)


def _hold(facts: Facts, body: Hold, author: Key) -> MedshardError | None:
    known = facts.registration(body.file_id)
    if known is None:
        return Absent("this file is not registered")
    owner = facts.heir(known.owner)
    if facts.keepers(owner):
        return _not_second(facts, owner, author, Type.HOLD, body.file_id) or _gone(known)
    return _not_holder(facts, owner, author) or _gone(known)


def _release(facts: Facts, body: Release, author: Key) -> MedshardError | None:
    known = facts.hold(body.hold)
    if known is None:
        return Absent("there is no such hold")
    owner = facts.owner(known.file_id)
    assert owner is not None, "checked when the hold was made"
    if facts.keepers(owner):
        if objection := _not_second(facts, owner, author, Type.RELEASE, known.file_id):
            return objection
    elif author == owner:
        if facts.heir(known.author) != owner:
            return Refused("this hold is not the owner's to release")
        if objection := _stranger(facts, author):
            return objection
    elif not facts.vouches(author, owner):
        return Refused("a hold is released by whoever made it, or by the institution that vouches for the owner")
    return Conflict("this hold was released before") if known.released is not None else None


def _propose(facts: Facts, body: Propose, author: Key) -> MedshardError | None:
    known = facts.registration(body.file_id)
    if known is None:
        return Absent("this file is not registered")
    if objection := _not_keeper(facts, known.owner, author):
        return objection
    before = facts.proposals(body.what, body.file_id)
    if not body.stands:
        return None if before else Conflict("nobody proposes this")
    if author in before:
        return Conflict("this keeper proposes this already", hint="another keeper approves it: medshard proposals approve")
    if body.what is Type.HOLD:
        return _gone(known)
    return None if facts.holds(body.file_id) else Conflict("this file is not on hold")


def _end(facts: Facts, body: Retire | Erase, author: Key) -> MedshardError | None:
    known = _owned(facts, body.file_id, author)
    if isinstance(known, MedshardError):
        return known
    if known.erased is not None or (isinstance(body, Retire) and known.retired is not None):
        return Conflict("this was done before")
    if facts.holds(body.file_id):
        return Refused("this file is on hold", hint="whoever made the hold must release it")
    if body.at < known.retained_until:
        return Refused(f"this file is retained until {known.retained_until} (seconds since 1970)")
    return None


def _timestamp(facts: Facts, body: Timestamp, author: Key) -> MedshardError | None:
    if not any(node.tls_key == author for node in facts.roster.nodes):
        return Refused("only a node of the roster brings timestamps")
    return None if body.size <= facts.size else Refused("a timestamp is of a head that the log has had")


def _freeze(facts: Facts, body: Freeze, author: Key) -> MedshardError | None:
    institution = facts.institution(author)
    if institution is None:
        return Refused("only institutions end a log")
    if institution.name in facts.votes(Type.FREEZE, body.successor):
        return Conflict(f"{institution.name} has said so before")
    return None


# -- parts


def _stranger(facts: Facts, key: Key, text: str = "no institution has enrolled this key", *, sends: bool = False) -> MedshardError | None:
    """Why this key takes no part; with ``sends``, one that only sends does."""
    known = facts.identity(key)
    if known is None:
        return Refused(text, hint="join an institution first")
    if known.withdrawn is not None:
        hint = "ask it for an invitation, and run `medshard keys rotate CODE`; if that was done in another home: `keys rotate --kit FILE`"
        return Refused(f"{known.institution} has withdrawn this key", hint=hint)
    if facts.roster.institution_named(known.institution) is None:
        return Refused(f"{known.institution}, which enrolled this key, is no longer in the roster")
    if known.heir is not None and not sends:  # and not withdrawn, so no successor
        return Refused("this key only sends: it reads and ends nothing", hint="do it with the vault that it sends for")
    return None


def _owned(facts: Facts, file_id: FileId, author: Key) -> Registration | MedshardError:
    known = facts.registration(file_id)
    if known is None:
        return Absent("this file is not registered")
    if known.owner != author and facts.heir(known.owner) != author:
        return Refused("this file is another's")
    return _stranger(facts, author) or known


def _sent(facts: Facts, file_id: FileId, sender: Key) -> Registration | MedshardError:
    known = facts.registration(file_id)
    if known is None:
        return Absent("this file is not registered")
    return _stranger(facts, sender, sends=True) or (known if known.owner == sender else Refused("this file is another's"))


def _not_keeper(facts: Facts, owner: Key, author: Key) -> MedshardError | None:
    keepers, known = facts.keepers(owner), facts.identity(owner)
    if not keepers:
        return Refused("the institution that vouches for the owner has no keepers: nobody needs to propose anything")
    assert known is not None, "or there were no keepers"
    if not facts.is_marked(keepers, author):
        return Refused(f"two keepers of {known.institution} hold and release its files", hint="storenode roster show lists them")
    own = facts.identity(author)
    if own is None or own.withdrawn is not None or own.institution != known.institution:
        return Refused(f"{known.institution} does not vouch for this keeper's key")
    return None


def _not_second(facts: Facts, owner: Key, author: Key, what: Type, file_id: FileId) -> MedshardError | None:
    """Why this author is not the second of two persons who want something."""
    if objection := _not_keeper(facts, owner, author):
        return objection
    if any(each != author and _not_keeper(facts, owner, each) is None for each in facts.proposals(what, file_id)):
        return None
    return Refused("this needs two keepers, and no other has proposed it", hint="propose it, and let another approve: medshard proposals")


def _not_holder(facts: Facts, owner: Key, author: Key) -> MedshardError | None:
    if author == owner:
        return _stranger(facts, author)
    return (
        None if facts.vouches(author, owner) else Refused("a file is held by its owner, or by the institution that vouches for the owner")
    )


def _gone(known: Registration) -> MedshardError | None:
    if known.erased is not None:
        return Refused("this file is erased")
    return Refused("this file is retired") if known.retired is not None else None


_rules: dict[type[Body], Callable[[Facts, Any, Key], MedshardError | None]] = {
    Genesis: _genesis,
    Enrol: _enrol,
    Approve: _approve,
    Withdraw: _withdraw,
    Rotate: _rotate,
    Sender: _sender,
    Register: _register,
    Grant: _grant,
    Revoke: _revoke,
    Access: _access,
    Move: _move,
    Retain: _retain,
    Hold: _hold,
    Release: _release,
    Retire: _end,
    Erase: _end,
    Timestamp: _timestamp,
    Freeze: _freeze,
    Propose: _propose,
}
