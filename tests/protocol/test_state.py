from __future__ import annotations

from dataclasses import replace
from functools import cache
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from medshard_protocol.entries import (
    Access,
    Approve,
    Enrol,
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
from medshard_protocol.facts import Ended, Identity, Registration
from medshard_protocol.identity import public_key
from medshard_protocol.rights import Reason, Refusal, Right, phrases, reason_in
from medshard_protocol.state import State
from medshard_protocol.tables import MemoryTables, Table

nonce = bytes(16)
one, two, three, gone, old, held, kept, free, guarded, abandoned, sent = (bytes([n]) * 32 for n in range(11))
manifest, other_manifest = b"m" * 32, b"o" * 32


@cache
def public(name):
    """The public key of somebody whom the consortium of these tests knows by name."""
    return public_key(Ed25519PrivateKey.from_private_bytes(sha256(name.encode()).digest()))


class Log:
    """A log that is folded as it is written."""

    def __init__(self, c, tables=None, documents=None):
        self.c = c
        self.state = State(c.roster, tables, documents)
        self.entries = []

    def say(self, author, body):
        """Append; give the entry's id, whether it had an effect or not."""
        entry = self.c.entry(author, body)
        self.entries.append(entry)
        self.effective = self.state.apply(entry)
        return entry.id

    def must(self, author, body):
        entry = self.say(author, body)
        assert self.effective, self.c.entry(author, body)
        return entry


def begun(c, **keywords):
    """Vaults of institution 1 (owner, reader, former) and 2 (other); files of ``owner`` in every condition."""
    log = Log(c, **keywords)
    log.must("log", Genesis(c.roster.sha256, nonce))
    for who, by in (("owner", "ca 1"), ("reader", "ca 1"), ("former", "ca 1"), ("other", "ca 2"), ("second", "ca 2")):
        log.must(by, Enrol(public(who), 0, nonce))
    for file_id in (one, two, gone, old, held, kept):
        log.must("owner", Register(file_id, manifest, nonce))
    log.must("other", Register(three, manifest, nonce))
    log.must("former", Register(b"former file".ljust(32), manifest, nonce))
    log.grant = log.must("owner", Grant((one, two), public("reader"), 0, 1, nonce))
    log.must("owner", Erase(gone, 0, nonce))
    log.must("owner", Retire(old, 0, nonce))
    log.hold = log.must("owner", Hold(held, nonce))
    log.ca_hold = log.must("ca 1", Hold(held, nonce))
    log.must("owner", Retain(kept, 1000, nonce))
    log.must("tls 2", Move(one, 3, c.roster.nodes[2].id, nonce))
    log.must("ca 1", Withdraw(public("former"), nonce))
    log.must("ca 1", Sender(public("scanner"), public("owner"), nonce))
    log.must("scanner", Register(sent, manifest, nonce))
    log.sent = log.must("scanner", Grant((sent,), public("owner"), 0, 0, nonce))
    return log


def rotate(old, new):
    return Rotate(public(old), public(new), bytes(64), bytes(64), nonce)


# Who may say what: author, body (or how to make it of the consortium and the log), the class of the error or None.
rules = {
    "a second genesis": ("log", lambda c, _: Genesis(c.roster.sha256, nonce), Refused),
    "an institution enrols": ("ca 2", Enrol(free, 0, nonce), None),
    "an institution changes the roles of its own": ("ca 1", lambda *_: Enrol(public("owner"), 7, nonce), None),
    "an institution does not enrol another's": ("ca 2", lambda *_: Enrol(public("owner"), 7, nonce), Conflict),
    "a withdrawn key is not enrolled again": ("ca 1", lambda *_: Enrol(public("former"), 0, nonce), Refused),
    "a vault does not enrol": ("owner", Enrol(free, 0, nonce), Refused),
    "the log key does not enrol": ("log", Enrol(free, 0, nonce), Refused),
    "a node does not enrol": ("tls 1", Enrol(free, 0, nonce), Refused),
    "an institution withdraws its own": ("ca 1", lambda *_: Withdraw(public("owner"), nonce), None),
    "no other institution withdraws": ("ca 2", lambda *_: Withdraw(public("owner"), nonce), Refused),
    "nobody withdraws a stranger": ("ca 1", lambda *_: Withdraw(public("stranger"), nonce), Refused),
    "a vault does not withdraw itself": ("owner", lambda *_: Withdraw(public("owner"), nonce), Refused),
    "what is withdrawn is not withdrawn again": ("ca 1", lambda *_: Withdraw(public("former"), nonce), Conflict),
    "an institution enrols a successor": ("ca 1", lambda *_: rotate("owner", "new"), None),
    "a withdrawn key has a successor": ("ca 1", lambda *_: rotate("former", "new"), None),
    "no other institution enrols a successor": ("ca 2", lambda *_: rotate("owner", "new"), Refused),
    "a vault does not enrol its own successor": ("owner", lambda *_: rotate("owner", "new"), Refused),
    "a stranger has no successor": ("ca 1", lambda *_: rotate("stranger", "new"), Refused),
    "nobody's successor is known already": ("ca 1", lambda *_: rotate("owner", "other"), Conflict),
    "a key does not succeed itself": ("ca 1", lambda *_: rotate("owner", "owner"), Conflict),
    "a sender has no successor": ("ca 1", lambda *_: rotate("scanner", "new"), Refused),
    "an institution enrols a sender": ("ca 1", lambda *_: Sender(free, public("reader"), nonce), None),
    "no other institution enrols a sender": ("ca 2", lambda *_: Sender(free, public("reader"), nonce), Refused),
    "a vault does not enrol a sender": ("owner", lambda *_: Sender(free, public("owner"), nonce), Refused),
    "a vault does not become a sender": ("ca 1", lambda *_: Sender(public("reader"), public("owner"), nonce), Conflict),
    "nobody sends for a sender": ("ca 1", lambda *_: Sender(free, public("scanner"), nonce), Refused),
    "nobody sends for a withdrawn key": ("ca 1", lambda *_: Sender(free, public("former"), nonce), Refused),
    "a sender does not become a vault": ("ca 1", lambda *_: Enrol(public("scanner"), 0, nonce), Conflict),
    "a sender is withdrawn": ("ca 1", lambda *_: Withdraw(public("scanner"), nonce), None),
    "a sender registers": ("scanner", Register(free, manifest, nonce), None),
    "a sender grants to its vault": ("scanner", lambda *_: Grant((sent,), public("owner"), 0, 0, nonce), None),
    "a sender grants to nobody else": ("scanner", lambda *_: Grant((sent,), public("other"), 0, 0, nonce), Refused),
    "a sender grants nothing that it did not register": ("scanner", lambda *_: Grant((one,), public("owner"), 0, 0, nonce), Refused),
    "a sender grants nothing that is not there": ("scanner", lambda *_: Grant((free,), public("owner"), 0, 0, nonce), Absent),
    "nothing is granted to a sender": ("owner", lambda *_: Grant((one,), public("scanner"), 0, 0, nonce), Refused),
    "a sender takes nothing back": ("scanner", lambda c, log: Revoke(log.sent, nonce), Refused),
    "a sender does not even say that it reads": ("scanner", Access((sent,), 1, b"", nonce), Refused),
    "a sender does not retain": ("scanner", Retain(sent, 5, nonce), Refused),
    "a sender does not hold": ("scanner", Hold(sent, nonce), Refused),
    "a sender does not erase": ("scanner", Erase(sent, 5, nonce), Refused),
    "a vault grants what was sent for it": ("owner", lambda *_: Grant((one, sent), public("other"), 0, 0, nonce), None),
    "a vault retains what was sent for it": ("owner", Retain(sent, 5, nonce), None),
    "a vault holds what was sent for it": ("owner", Hold(sent, nonce), None),
    "a vault erases what was sent for it": ("owner", Erase(sent, 5, nonce), None),
    "no other vault erases it": ("reader", Erase(sent, 5, nonce), Refused),
    "an enrolled key registers": ("owner", Register(free, manifest, nonce), None),
    "a stranger does not register": ("stranger", Register(free, manifest, nonce), Refused),
    "a withdrawn key does not register": ("former", Register(free, manifest, nonce), Refused),
    "an institution does not register by itself": ("ca 1", Register(free, manifest, nonce), Refused),
    "the same registration again": ("owner", Register(one, manifest, nonce), None),
    "a file does not get another manifest": ("owner", Register(one, other_manifest, nonce), Conflict),
    "a file does not get another owner": ("other", Register(one, manifest, nonce), Conflict),
    "an erased file is not registered again": ("owner", Register(gone, manifest, nonce), Refused),
    "a retired file is not registered again": ("owner", Register(old, manifest, nonce), Refused),
    "an owner grants": ("owner", lambda *_: Grant((one, old), public("other"), 5, 1, nonce), None),
    "nobody grants another's file": ("other", lambda *_: Grant((three, one), public("second"), 0, 1, nonce), Refused),
    "nobody grants a file that is not there": ("owner", lambda *_: Grant((one, free), public("other"), 0, 1, nonce), Absent),
    "nobody grants an erased file": ("owner", lambda *_: Grant((one, gone), public("other"), 0, 1, nonce), Refused),
    "nothing is granted to a stranger": ("owner", lambda *_: Grant((one,), public("stranger"), 0, 1, nonce), Refused),
    "nothing is granted to a withdrawn key": ("owner", lambda *_: Grant((one,), public("former"), 0, 1, nonce), Refused),
    "a withdrawn owner grants nothing": ("former", lambda *_: Grant((b"former file".ljust(32),), public("other"), 0, 1, nonce), Refused),
    "the reader does not grant on": ("reader", lambda *_: Grant((one,), public("other"), 0, 1, nonce), Refused),
    "an owner revokes": ("owner", lambda c, log: Revoke(log.grant, nonce), None),
    "a reader gives up": ("reader", lambda c, log: Revoke(log.grant, nonce), None),
    "the owner's institution revokes": ("ca 1", lambda c, log: Revoke(log.grant, nonce), None),
    "nobody else revokes": ("other", lambda c, log: Revoke(log.grant, nonce), Refused),
    "no other institution revokes": ("ca 2", lambda c, log: Revoke(log.grant, nonce), Refused),
    "nobody revokes what is no grant": ("owner", lambda c, log: Revoke(log.hold, nonce), Absent),
    "an enrolled key says that it reads": ("other", Access((one, free), 1, b"", nonce), None),
    "a stranger does not": ("stranger", Access((one,), 1, b"", nonce), Refused),
    "a withdrawn key does not": ("former", Access((one,), 1, b"", nonce), Refused),
    "a reason is for emergency identities": ("owner", Access((one,), 7, b"sealed", nonce), Refused),
    "a node takes a shard over": ("tls 1", lambda c, _: Move(one, 2, c.roster.nodes[1].id, nonce), None),
    "the same shard moves again": ("tls 1", lambda c, _: Move(one, 3, c.roster.nodes[1].id, nonce), None),
    "a node repeats its move": ("tls 2", lambda c, _: Move(one, 3, c.roster.nodes[2].id, nonce), None),
    "no node gets a second shard": ("tls 2", lambda c, _: Move(one, 2, c.roster.nodes[2].id, nonce), Conflict),
    "a node does not move to another": ("tls 1", lambda c, _: Move(one, 2, c.roster.nodes[0].id, nonce), Refused),
    "an owner does not move": ("owner", lambda c, _: Move(one, 2, c.roster.nodes[1].id, nonce), Refused),
    "nothing moves to a stranger": ("stranger", Move(one, 2, bytes(16), nonce), Refused),
    "a file that is not there does not move": ("tls 1", lambda c, _: Move(free, 2, c.roster.nodes[1].id, nonce), Absent),
    "a retired file does not move": ("tls 1", lambda c, _: Move(old, 2, c.roster.nodes[1].id, nonce), Refused),
    "an owner retains": ("owner", Retain(one, 5, nonce), None),
    "an owner retains for longer": ("owner", Retain(kept, 1001, nonce), None),
    "a retention is never shortened": ("owner", Retain(kept, 999, nonce), Conflict),
    "nobody else retains": ("other", Retain(one, 5, nonce), Refused),
    "the institution does not retain": ("ca 1", Retain(one, 5, nonce), Refused),
    "a retired file is not retained": ("owner", Retain(old, 5, nonce), Refused),
    "an owner holds": ("owner", Hold(one, nonce), None),
    "the owner's institution holds": ("ca 1", Hold(one, nonce), None),
    "the institution of a withdrawn owner holds": ("ca 1", Hold(b"former file".ljust(32), nonce), None),
    "no other institution holds": ("ca 2", Hold(one, nonce), Refused),
    "nobody else holds": ("reader", Hold(one, nonce), Refused),
    "an erased file is not held": ("owner", Hold(gone, nonce), Refused),
    "an owner releases": ("owner", lambda c, log: Release(log.hold, nonce), None),
    "the institution releases the owner's hold": ("ca 1", lambda c, log: Release(log.hold, nonce), None),
    "the institution releases its own": ("ca 1", lambda c, log: Release(log.ca_hold, nonce), None),
    "an owner does not release the institution's": ("owner", lambda c, log: Release(log.ca_hold, nonce), Refused),
    "nobody else releases": ("reader", lambda c, log: Release(log.hold, nonce), Refused),
    "no other institution releases": ("ca 2", lambda c, log: Release(log.hold, nonce), Refused),
    "nobody releases what is no hold": ("owner", lambda c, log: Release(log.grant, nonce), Absent),
    "an owner retires": ("owner", Retire(one, 5, nonce), None),
    "an owner erases": ("owner", Erase(one, 5, nonce), None),
    "an owner erases what is retired": ("owner", Erase(old, 5, nonce), None),
    "nobody else retires": ("reader", Retire(one, 5, nonce), Refused),
    "nobody else erases": ("ca 1", Erase(one, 5, nonce), Refused),
    "what is on hold is not retired": ("owner", Retire(held, 5, nonce), Refused),
    "what is on hold is not erased": ("owner", Erase(held, 5, nonce), Refused),
    "what is retained is not retired": ("owner", Retire(kept, 999, nonce), Refused),
    "what is retained is not erased": ("owner", Erase(kept, 999, nonce), Refused),
    "what was retained is erased": ("owner", Erase(kept, 1000, nonce), None),
    "what is erased is not retired": ("owner", Retire(gone, 5, nonce), Conflict),
    "what is erased is not erased again": ("owner", Erase(gone, 5, nonce), Conflict),
    "what is retired is not retired again": ("owner", Retire(old, 5, nonce), Conflict),
    "a node brings a timestamp": ("tls 3", Timestamp(5, manifest, b"token", nonce), None),
    "nobody else brings a timestamp": ("owner", Timestamp(5, manifest, b"token", nonce), Refused),
    "a timestamp is of a head that was": ("tls 3", Timestamp(5000, manifest, b"token", nonce), Refused),
    "an institution approves": ("ca 3", Approve(manifest, nonce), None),
    "a vault does not approve": ("owner", Approve(manifest, nonce), Refused),
    "an institution wants the end": ("ca 3", Freeze(manifest, nonce), None),
    "a vault does not end a log": ("owner", Freeze(manifest, nonce), Refused),
    "a keeper proposes a hold": ("second", Propose(Type.HOLD, three, True, nonce), None),
    "a keeper proposes a release": ("keeper", Propose(Type.RELEASE, guarded, True, nonce), None),
    "nobody proposes what a keeper has proposed": ("keeper", Propose(Type.HOLD, guarded, True, nonce), Conflict),
    "a keeper takes a proposal back": ("keeper", Propose(Type.HOLD, guarded, False, nonce), None),
    "another keeper does": ("second", Propose(Type.HOLD, guarded, False, nonce), None),
    "what nobody proposed is not taken back": ("second", Propose(Type.HOLD, three, False, nonce), Conflict),
    "an owner that is no keeper proposes nothing": ("other", Propose(Type.HOLD, three, True, nonce), Refused),
    "nor does the institution's own key": ("ca 2", Propose(Type.HOLD, three, True, nonce), Refused),
    "nor a keeper whose key was withdrawn": ("lost", Propose(Type.HOLD, three, True, nonce), Refused),
    "nor a keeper of another institution": ("reader", Propose(Type.HOLD, three, True, nonce), Refused),
    "where nobody needs a second nothing is proposed": ("second", Propose(Type.HOLD, one, True, nonce), Refused),
    "what is not on hold is not proposed for release": ("second", Propose(Type.RELEASE, three, True, nonce), Conflict),
    "a file that is not there is not proposed for a hold": ("second", Propose(Type.HOLD, free, True, nonce), Absent),
    "a second keeper holds": ("second", Hold(guarded, nonce), None),
    "the first keeper alone does not hold": ("keeper", Hold(guarded, nonce), Refused),
    "without a proposal nobody holds": ("second", Hold(three, nonce), Refused),
    "the owner does not hold": ("other", Hold(guarded, nonce), Refused),
    "nor the institution": ("ca 2", Hold(guarded, nonce), Refused),
    "one keeper alone releases nothing": ("second", lambda c, log: Release(log.kept_hold, nonce), Refused),
    "not even the owner's own hold": ("other", lambda c, log: Release(log.kept_hold, nonce), Refused),
    "nor does the institution, where it has keepers": ("ca 2", lambda c, log: Release(log.kept_hold, nonce), Refused),
    "nor two of whom one was withdrawn since": ("second", Hold(abandoned, nonce), Refused),
}


def guarding(c):
    """As ``begun``; institution 2, which vouches for ``other``, has keepers since roster 1. One of them was withdrawn after he proposed."""
    institution = replace(c.roster.institutions[2], keepers=tuple(sorted(map(public, ("keeper", "second", "lost")))))
    new = successor(c, institutions=(*c.roster.institutions[:2], institution, c.roster.institutions[3]))
    log = begun(c, documents={new.sha256: new}.get)
    for who in ("keeper", "lost"):
        log.must("ca 2", Enrol(public(who), 0, nonce))
    for file_id in (guarded, abandoned):
        log.must("other", Register(file_id, manifest, nonce))
    log.kept_hold = log.must("other", Hold(guarded, bytes([7]) * 16))
    for number in (0, 1, 3):
        log.must(f"ca {number}", Approve(new.sha256, nonce))
    log.must("keeper", Propose(Type.HOLD, guarded, True, nonce))
    log.must("lost", Propose(Type.HOLD, abandoned, True, nonce))
    log.must("ca 2", Withdraw(public("lost"), nonce))
    return log


@pytest.mark.parametrize("rule", rules)
def test_who_may_say_what(consortium, rule):
    author, body, error = rules[rule]
    c = consortium(4)
    log, before = guarding(c), guarding(c)
    entry = c.entry(author, body(c, log) if callable(body) else body)
    objection = log.state.objection(entry)
    assert objection is None if error is None else type(objection) is error
    assert log.state.apply(entry) is (error is None)
    assert log.state.entry_effective(log.state.size - 1) is (error is None)
    if error is not None:
        told = {Table.VOID, Table.COUNTS, Table.META, Table.HISTORY}
        changed = {table for table, rows in log.state.rows().items() if rows != before.state.rows()[table]}
        assert changed <= told


def test_every_type_of_entry_stands_in_the_table_with_and_without_the_right(consortium):
    c = consortium(4)
    log, seen = guarding(c), {}
    for author, body, error in rules.values():
        made = body(c, log) if callable(body) else body
        seen.setdefault(type(made), set()).add(error is None)
        people = ("log", "owner", "reader", "former", "other", "stranger", "scanner", "keeper", "second", "lost", "new", "newer")
        assert author in people or author[:3] in ("ca ", "tls")
    assert seen.pop(Genesis) == {False}  # with the right: below
    assert len(seen) == 18
    assert all(found == {True, False} for found in seen.values())


@pytest.mark.parametrize(("author", "sha256"), [("log", bytes(32)), ("vault", None), ("ca 0", None), ("log 1", None)])
def test_the_genesis_entry_is_the_log_keys_and_names_this_roster(consortium, author, sha256):
    c = consortium(4)
    assert not State(c.roster).apply(c.entry(author, Genesis(sha256 or c.roster.sha256, nonce)))
    assert State(c.roster).apply(c.entry("log", Genesis(c.roster.sha256, nonce)))


def test_what_cannot_be_parsed_or_was_not_signed_still_takes_its_place(consortium):
    log = begun(consortium(4))
    size = log.state.size
    assert not log.state.apply(None)
    log.must("owner", Register(free, manifest, nonce))
    assert log.state.registration(free).index == size + 1
    log.say("stranger", Register(b"x" * 32, manifest, nonce))
    assert log.state.counts["void"] == 2
    assert log.state.unsigned(0) == [size]
    assert [log.state.entry_effective(size + n) for n in range(4)] == [False, True, False, False]


def test_the_first_registration_of_a_file_wins(consortium):
    log = begun(consortium(4))
    first = log.state.registration(one)
    log.must("owner", Register(one, manifest, b"\x01" * 16))
    log.say("other", Register(one, manifest, nonce))
    assert log.state.registration(one) == first == Registration(6, manifest, public("owner"))
    assert log.state.owner(one) == public("owner")


def test_an_enrolment_counts_from_its_entry_on_and_its_latest_roles_count(consortium):
    log = begun(consortium(4))
    log.must("ca 1", Enrol(public("owner"), 5, nonce))
    assert log.state.identity(public("owner")) == Identity("Institution 1", 5, 1, log.state.size - 1)
    assert log.state.vouched_at(public("owner"), 1) is None
    assert log.state.vouched_at(public("owner"), 2) is not None


def reason(log, file_id, reader, index=None):
    right = log.state.right_at(file_id, public(reader), log.state.size if index is None else index)
    return right.reason if isinstance(right, Refusal) else right


def test_a_right_is_judged_by_the_state_at_the_index_of_the_access_entry(consortium):
    c = consortium(4)
    log = begun(c)
    granted = log.state.grant(log.grant).index
    assert reason(log, one, "owner", 6) is Reason.UNREGISTERED
    assert reason(log, one, "owner", 7) == Right(6, None, 0)
    assert reason(log, one, "reader", granted) is Reason.NEVER_GRANTED
    assert reason(log, one, "reader", granted + 1) == Right(granted, log.grant, 0)
    assert reason(log, held, "reader") is Reason.NEVER_GRANTED
    assert reason(log, one, "other") is Reason.NEVER_GRANTED
    assert reason(log, free, "owner") is Reason.UNREGISTERED
    erased = log.state.registration(gone).erased
    assert reason(log, gone, "owner", erased) == Right(log.state.registration(gone).index, None, 0)
    assert reason(log, gone, "owner") is Reason.ERASED
    assert reason(log, old, "owner") == Right(log.state.registration(old).index, None, 0)
    log.must("owner", Revoke(log.grant, nonce))
    revoked = log.state.size - 1
    assert reason(log, one, "reader", revoked) == Right(granted, log.grant, 0)
    assert reason(log, one, "reader") is Reason.REVOKED
    again = log.must("owner", Grant((one,), public("reader"), 77, 1, nonce))
    assert reason(log, one, "reader") == Right(log.state.size - 1, again, 77)
    assert reason(log, two, "reader") is Reason.REVOKED
    withdrawn = log.state.size
    log.must("ca 1", Withdraw(public("reader"), nonce))
    assert reason(log, one, "reader", withdrawn) == Right(withdrawn - 1, again, 77)
    assert reason(log, one, "reader") is Reason.WITHDRAWN


def test_a_successor_has_what_its_key_had_and_the_old_key_nothing_more(consortium):
    log = begun(consortium(4))
    other = log.must("other", Grant((three,), public("owner"), 0, 1, nonce))
    size = log.state.size
    log.must("ca 1", rotate("owner", "heir"))
    assert log.state.identity(public("owner")).withdrawn == size
    assert log.state.heir(public("owner")) == log.state.heir(public("scanner")) == log.state.owner(sent) == public("heir")
    assert log.state.heir(public("owner"), size) == public("owner")
    assert log.state.passings(public("scanner")) == [log.state.identity(public("scanner")).first, size]
    assert log.state.line(public("heir")) == [public("heir"), public("owner")]
    assert [id_ for id_, _ in log.state.grants_to(public("heir"))] == [log.sent, other]
    for file_id in (one, sent, three):
        assert isinstance(reason(log, file_id, "owner", size), Right)  # as it was then
        assert reason(log, file_id, "owner") is Reason.WITHDRAWN
        assert reason(log, file_id, "heir", size) is Reason.WITHDRAWN
        assert isinstance(reason(log, file_id, "heir"), Right)
    assert isinstance(reason(log, one, "reader"), Right)  # what was granted before goes on
    for body in (Register(free, manifest, nonce), Grant((one,), public("other"), 0, 1, nonce), Access((one,), 1, b"", nonce)):
        log.say("owner", body)
        assert not log.effective
    log.must("heir", Grant((one, sent), public("other"), 0, 1, nonce))
    log.must("heir", Revoke(log.grant, nonce))
    log.must("heir", Revoke(other, nonce))
    log.must("heir", Release(log.hold, nonce))
    log.must("heir", Retain(one, 5, nonce))
    log.must("heir", Erase(sent, 5, nonce))
    log.must("ca 1", rotate("heir", "grandchild"))
    assert log.state.owner(one) == public("grandchild")
    log.must("grandchild", Erase(one, 5, nonce))
    log.say("ca 1", rotate("owner", "thief"))
    assert not log.effective


def test_a_stolen_key_that_was_withdrawn_passes_its_files_on_with_its_institutions_consent_alone(consortium):
    log = begun(consortium(4))
    withdrawn = log.state.identity(public("former")).withdrawn
    log.say("other", rotate("former", "heir"))
    assert not log.effective
    log.must("ca 1", rotate("former", "heir"))
    assert log.state.identity(public("former")).withdrawn == withdrawn
    assert isinstance(reason(log, b"former file".ljust(32), "heir"), Right)


def test_a_sender_reads_nothing_back_and_its_vault_reads_all(consortium):
    log = begun(consortium(4))
    assert reason(log, sent, "scanner") is Reason.SENDS
    assert isinstance(reason(log, sent, "owner"), Right)
    assert reason(log, sent, "reader") is Reason.NEVER_GRANTED


def test_of_several_grants_the_one_that_lasts_longest_counts(consortium):
    log = begun(consortium(4))
    for until in (50, 90, 70):
        log.must("owner", Grant((held,), public("other"), until, 1, nonce))
    assert reason(log, held, "other").until == 90
    log.must("owner", Grant((held,), public("other"), 0, 1, nonce))
    assert reason(log, held, "other").until == 0


def test_grants_and_histories_are_found(consortium):
    log = begun(consortium(4))
    assert [(id_, each.file_ids) for id_, each in log.state.grants_to(public("reader"))] == [(log.grant, (one, two))]
    assert log.state.grants_to(public("other")) == []
    assert log.state.grants_to(public("reader"), log.state.grant(log.grant).index + 1) == []
    log.say("other", Access((one, free), 1, b"", nonce))
    log.say("other", Revoke(log.grant, nonce))
    log.say("other", Grant((one,), public("second"), 0, 1, nonce))
    size = log.state.size
    grant, move = log.state.grant(log.grant).index, 20
    assert log.state.history(one) == [(6, True), (grant, True), (move, True), (size - 3, True), (size - 2, False), (size - 1, False)]
    assert log.state.history(one, size - 3, 2) == [(size - 3, True), (size - 2, False)]
    assert log.state.history(free) == [(size - 3, True)]


def test_what_must_be_destroyed_is_found_by_place(consortium):
    log = begun(consortium(4))
    erased, retired = log.state.registration(gone).erased, log.state.registration(old).retired
    log.must("owner", Revoke(log.grant, nonce))
    revoked = Ended(log.state.size - 1, Type.REVOKE, log.grant)
    assert log.state.ended(0, log.state.size) == sorted(
        [Ended(erased, Type.ERASE, gone), Ended(retired, Type.RETIRE, old), revoked], key=lambda each: each.index
    )
    assert log.state.ended(max(erased, retired) + 1, log.state.size - 1) == []


def test_moves_and_holds_are_found(consortium):
    c = consortium(4)
    log = begun(c)
    assert {shard: each.node for shard, each in log.state.moves(one).items()} == {3: c.roster.nodes[2].id}
    assert log.state.holds(held) == sorted([log.hold, log.ca_hold])
    log.must("ca 1", Release(log.ca_hold, nonce))
    assert log.state.holds(held) == [log.hold]
    log.say("owner", Erase(held, 9, nonce))
    assert not log.effective
    log.must("owner", Release(log.hold, nonce))
    log.must("owner", Erase(held, 9, nonce))


def test_with_keepers_a_hold_stands_and_ends_by_two_persons_and_never_by_one(consortium):
    log = guarding(consortium(4))
    state = log.state
    assert (state.holds(guarded), len(state.proposed())) == ([log.kept_hold], 2)
    hold = log.must("second", Hold(guarded, nonce))
    assert state.holds(guarded) == sorted([log.kept_hold, hold])
    assert len(state.proposed()) == 1  # a proposal is good for one hold
    log.say("second", Hold(guarded, bytes([2]) * 16))
    assert not log.effective
    log.must("second", Propose(Type.RELEASE, guarded, True, nonce))
    log.say("second", Release(hold, nonce))
    assert not log.effective
    assert state.holds(guarded) == sorted([log.kept_hold, hold])
    log.must("keeper", Release(hold, nonce))
    assert state.holds(guarded) == [log.kept_hold]
    log.say("other", Erase(guarded, 5, nonce))
    assert not log.effective
    log.must("keeper", Propose(Type.RELEASE, guarded, False, nonce))  # enough, says one of them
    log.say("keeper", Release(log.kept_hold, nonce))
    assert not log.effective
    assert state.history(guarded)[-1] == (state.size - 1, False)


def test_a_hold_that_comes_between_takes_a_proposed_release_off_the_table(consortium):
    log = guarding(consortium(4))
    log.must("keeper", Propose(Type.RELEASE, guarded, True, nonce))
    log.must("second", Hold(guarded, nonce))
    assert log.state.proposals(Type.RELEASE, guarded) == {}
    for hold in log.state.holds(guarded):
        log.say("second", Release(hold, nonce))
        assert not log.effective
    log.must("keeper", Propose(Type.RELEASE, guarded, True, nonce))
    for hold in log.state.holds(guarded):
        log.must("second", Release(hold, nonce))
    assert (log.state.holds(guarded), log.state.proposals(Type.RELEASE, guarded)) == ([], {})


def test_a_keeper_with_a_new_key_stays_one_and_what_the_old_key_proposed_counts_no_more(consortium):
    log = guarding(consortium(4))
    log.must("ca 2", rotate("keeper", "new"))
    log.say("keeper", Propose(Type.RELEASE, guarded, True, nonce))
    assert not log.effective
    log.say("second", Hold(guarded, nonce))  # which the old key has proposed
    assert not log.effective
    log.must("new", Propose(Type.RELEASE, guarded, True, nonce))
    log.say("new", Release(log.kept_hold, nonce))  # two keys of one person are one person
    assert not log.effective
    log.must("second", Release(log.kept_hold, nonce))


def test_who_succeeds_a_stolen_key_is_no_keeper_and_reads_in_no_emergency(consortium):
    c = consortium(4)
    log = guarding(c)
    log.must("ca 2", Withdraw(public("keeper"), nonce))
    log.must("ca 2", rotate("keeper", "new"))
    log.must("ca 2", rotate("new", "newer"))
    for who in ("new", "newer"):
        log.say(who, Propose(Type.RELEASE, guarded, True, nonce))
        assert not log.effective
        assert not log.state.is_marked({public("keeper")}, public(who))


# -- the quorum


def successor(c, **changes):
    return replace(c.roster, number=1, previous=c.roster.sha256, **changes)


def test_a_roster_is_in_effect_from_the_entry_after_the_quorum(consortium):
    c = consortium(4)
    new = successor(c, emergency=(public("owner"),))
    log = begun(c, documents={new.sha256: new}.get)
    access = Access((one,), 7, b"sealed", nonce)
    for number in (0, 1):
        log.must(f"ca {number}", Approve(new.sha256, nonce))
        log.say(f"ca {number}", Approve(new.sha256, nonce))
        assert not log.effective  # a voice counts once
    log.say("owner", access)
    assert not log.effective
    assert log.state.roster == c.roster
    log.must("ca 3", Approve(new.sha256, nonce))
    decided = log.state.size - 1
    assert log.state.roster == new
    assert (log.state.roster_at(decided), log.state.roster_at(decided + 1)) == (c.roster, new)
    for late in (new, c.roster):  # else it would look like a voice for a rival of the next one
        log.say("ca 2", Approve(late.sha256, nonce))
        assert not log.effective
    assert log.state.ballots(Type.ROSTER, new.number) == {}
    log.must("owner", access)
    log.must("ca 1", rotate("owner", "new"))
    log.say("owner", access)
    assert not log.effective
    log.must("new", access)  # the mark goes on with the key
    log.must("ca 1", Withdraw(public("new"), nonce))
    log.must("ca 1", rotate("new", "newer"))
    log.say("newer", access)
    assert not log.effective
    assert log.state.decided == [(decided, new)]
    voices = {f"Institution {number}": place for number, place in ((0, decided - 5), (1, decided - 3), (3, decided))}
    assert log.state.ballots(Type.ROSTER, 0) == {new.sha256: voices}
    for number in range(4):  # a document that was decided is decided
        log.say(f"ca {number}", Approve(new.sha256, nonce))
    assert log.state.roster == new


def test_a_document_that_may_not_follow_never_takes_effect(consortium):
    c = consortium(4)
    wrong = replace(successor(c), number=2)
    log = begun(c, documents={wrong.sha256: wrong}.get)
    effects = []
    for number in range(4):
        log.say(f"ca {number}", Approve(wrong.sha256, nonce))
        effects.append(log.effective)
    assert effects == [True, True, False, False]
    assert log.state.roster == c.roster


def test_without_the_document_the_fold_waits_at_the_deciding_entry_and_goes_on_with_it(consortium):
    c = consortium(4)
    new, documents = successor(c), {}
    log = begun(c, documents=documents.get)
    for number in (0, 1):
        log.must(f"ca {number}", Approve(new.sha256, nonce))
    size, before = log.state.size, log.state.rows()
    deciding = c.entry("ca 2", Approve(new.sha256, nonce))
    for ask in (log.state.objection, log.state.apply):
        with pytest.raises(Absent):
            ask(deciding)
    assert (log.state.size, log.state.rows()) == (size, before)
    documents[new.sha256] = new
    assert log.state.apply(deciding)
    assert log.state.roster == new


def test_voices_for_one_roster_do_not_count_under_the_next(consortium):
    c = consortium(4)
    new = successor(c)
    after = replace(c.roster, number=2, previous=new.sha256)
    log = begun(c, documents={each.sha256: each for each in (new, after)}.get)
    for number in (0, 1):
        log.must(f"ca {number}", Approve(after.sha256, nonce))
    for number in (0, 1, 2):
        log.must(f"ca {number}", Approve(new.sha256, nonce))
    log.must("ca 2", Approve(after.sha256, nonce))
    assert log.state.roster == new
    for number in (0, 1):
        log.must(f"ca {number}", Approve(after.sha256, b"\x01" * 16))
    assert log.state.roster == after


def test_an_institution_that_left_takes_its_identities_with_it(consortium):
    c = consortium(4)
    staying = tuple(each for number, each in enumerate(c.roster.institutions) if number != 1)
    places = {0: 0, 2: 1, 3: 2}
    nodes = tuple(replace(each, institution=places[n]) for n, each in enumerate(c.roster.nodes) if n != 1)
    new = successor(c, institutions=staying, nodes=nodes, code=(2, 3, 3))
    log = begun(c, documents={new.sha256: new}.get)
    for number in (0, 2, 3):
        log.must(f"ca {number}", Approve(new.sha256, nonce))
    decided = log.state.size - 1
    log.say("owner", Register(free, manifest, nonce))
    assert not log.effective
    log.say("ca 1", Enrol(free, 0, nonce))
    assert not log.effective
    assert reason(log, one, "owner") is Reason.WITHDRAWN
    assert reason(log, one, "owner", decided) == Right(6, None, 0)
    log.must("other", Register(free, manifest, nonce))  # by name: its institution stands elsewhere in the list now


def test_after_a_quorum_of_freezes_no_entry_has_an_effect(consortium):
    log = begun(consortium(4))
    for number in (0, 1):
        log.must(f"ca {number}", Freeze(manifest, nonce))
        log.say(f"ca {number}", Freeze(manifest, nonce))
        assert not log.effective
    log.must("ca 2", Freeze(other_manifest, nonce))
    assert log.state.frozen is None
    log.must("ca 3", Freeze(manifest, nonce))
    assert log.state.frozen == (log.state.size - 1, manifest)
    for author, body in (("owner", Register(free, manifest, nonce)), ("ca 2", Freeze(manifest, nonce)), ("ca 1", Enrol(free, 0, nonce))):
        log.say(author, body)
        assert not log.effective


# -- the fold as a whole

authors = ["owner", "reader", "other", "stranger", "ca 1", "ca 2", "tls 1", "tls 2", "log"]
bodies = [
    lambda ids: Enrol(public("reader"), 1, nonce),
    lambda ids: Enrol(public("stranger"), 0, nonce),
    lambda ids: Withdraw(public("reader"), nonce),
    lambda ids: rotate("reader", "stranger"),
    lambda ids: rotate("owner", "heir"),
    lambda ids: Sender(public("stranger"), public("owner"), nonce),
    lambda ids: Register(one, manifest, nonce),
    lambda ids: Register(free, manifest, nonce),
    lambda ids: Grant((one, two), public("reader"), 0, 0, nonce),
    lambda ids: Grant((two, three), public("other"), 9, 0, nonce),
    lambda ids: Revoke(ids[0], nonce),
    lambda ids: Revoke(ids[-1], nonce),
    lambda ids: Access((one, free), 0, b"", nonce),
    lambda ids: Move(one, 1, b"n" * 16, nonce),
    lambda ids: Retain(one, 10, nonce),
    lambda ids: Hold(one, nonce),
    lambda ids: Release(ids[-1], nonce),
    lambda ids: Release(ids[0], nonce),
    lambda ids: Retire(one, 10, nonce),
    lambda ids: Erase(two, 10, nonce),
    lambda ids: Timestamp(1, manifest, b"", nonce),
    lambda ids: Approve(manifest, nonce),
    lambda ids: Freeze(manifest, nonce),
    lambda ids: None,
]
choices = st.lists(st.tuples(st.sampled_from(authors), st.integers(0, len(bodies) - 1)), max_size=40)


def written(c, chosen):
    """A log of these choices, with entries that speak of earlier ones."""
    log = begun(c)
    entries, ids = list(log.entries), [log.grant, log.hold]
    for number, (author, choice) in enumerate(chosen):
        body = bodies[choice](ids)
        entry = None if body is None else c.entry(author, replace(body, nonce=number.to_bytes(16, "big")))
        entries.append(entry)
        if entry is not None and isinstance(body, Grant | Hold):
            ids.append(entry.id)
    return entries


@settings(max_examples=40, deadline=None)
@given(chosen=choices, cuts=st.lists(st.integers(0, 60), max_size=4))
def test_folding_in_parts_and_from_zero_gives_the_same_state(consortium, chosen, cuts):
    c = consortium(4)
    entries = written(c, chosen)
    whole, tables = State(c.roster), MemoryTables()
    for entry in entries:
        whole.apply(entry)
    for end in (*sorted(cuts), len(entries)):
        part = State(c.roster, tables)  # what a restart finds
        for entry in entries[part.size : end]:
            part.apply(entry)
    assert State(c.roster, tables) == whole
    assert whole.size == len(entries)


@settings(max_examples=40, deadline=None)
@given(chosen=choices, settled=st.integers(0, 60), back=st.integers(0, 60))
def test_going_back_gives_the_state_of_then_or_an_earlier_one(consortium, chosen, settled, back):
    c = consortium(4)
    entries = written(c, chosen)
    state = State(c.roster)
    state.settle(settled)
    for entry in entries:
        state.apply(entry)
    state.rewind(back)
    assert state.size == (min(back, len(entries)) if back >= min(settled, len(entries)) else 0)
    then = State(c.roster)
    for entry in entries[: state.size]:
        then.apply(entry)
    assert state == then
    for entry in entries[state.size :]:
        state.apply(entry)
        then.apply(entry)
    assert state == then


def test_tables_of_another_log_or_of_other_rules_are_made_anew(consortium, monkeypatch):
    tables = MemoryTables()
    begun(consortium(4), tables=tables)
    assert State(consortium(4).roster, tables).size > 0
    assert State(consortium(7).roster, tables).size == 0
    begun(consortium(4), tables=tables)
    monkeypatch.setattr("medshard_protocol.state.meaning_version", 999)
    assert State(consortium(4).roster, tables).size == 0


def test_a_refusal_is_recognised_by_its_words():
    for each in Reason:
        error = Refusal(each, "entry 17").error()
        assert isinstance(error, MedshardError)
        assert reason_in(f"node7: {error}") is each
    assert reason_in("something else") is None
    assert len(set(phrases.values())) == len(Reason)
