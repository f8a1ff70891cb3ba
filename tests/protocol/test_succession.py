"""A log that has ended, and the one that goes on from it: who must have signed, and what everything means afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.conftest import Consortium, consortium_of, key_named

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Note, cosigner_verifier, log_verifier
from medshard_protocol.entries import Access, Approve, Enrol, Entry, Erase, Freeze, Genesis, Grant, Hold, Register, Revoke, Type, Withdraw
from medshard_protocol.errors import Malformed, MedshardError, Refused
from medshard_protocol.identity import public_key
from medshard_protocol.proofs import Inclusion
from medshard_protocol.rights import Reason, Refusal, Right
from medshard_protocol.roster import Predecessor, Roster
from medshard_protocol.rosters import Link, successor_complaint
from medshard_protocol.state import State
from medshard_protocol.succession import Successor, line_after
from medshard_protocol.tables import MemoryTables, Table

old = consortium_of(4)
nonce, one, two, manifest = bytes(16), b"1" * 32, b"2" * 32, b"m" * 32
zeros = bytes(32)


def public(name: str) -> bytes:
    return public_key(key_named(name))


changed = replace(old.roster, number=1, previous=old.roster.sha256, nodes=(replace(old.roster.nodes[0], capacity=7), *old.roster.nodes[1:]))
grant = old.entry("owner", Grant((one,), public("reader"), 0, 1, nonce))
hold = old.entry("ca 1", Hold(one, nonce))
before = [
    old.entry("log", Genesis(old.roster.sha256, nonce)),
    *(old.entry("ca 1", Enrol(public(who), 0, nonce)) for who in ("owner", "reader", "former")),
    old.entry("owner", Register(one, manifest, nonce)),
    old.entry("owner", Register(two, manifest, nonce)),
    grant,
    hold,
    old.entry("ca 1", Withdraw(public("former"), nonce)),
    *(old.entry(f"ca {number}", Approve(changed.sha256, nonce)) for number in (0, 1, 2)),
    *(old.entry(f"ca {number}", Freeze(zeros, nonce)) for number in (1, 2, 3)),
]
data = [entry.to_bytes() for entry in before]
end = old.checkpoint(data)
link = Link(changed.to_bytes(), tuple(entry.to_bytes() for entry in before if isinstance(entry.body, Approve)))
note = Consortium(changed).note(end, (1, 2, 3)).to_bytes()


def remaining(**changes: object) -> Roster:
    """The successor of institutions 1, 2 and 3."""
    nodes = tuple(replace(node, institution=number) for number, node in enumerate(old.roster.nodes[1:]))
    made = replace(
        old.roster,
        origin="consortium.example/log-2",
        sequencer=nodes[0].id,
        institutions=old.roster.institutions[1:],
        nodes=nodes,
        code=(2, 3, 3),
        before=line_after(old.roster, end),
    )
    return replace(made, **changes)


def document(genesis: Roster, by: tuple[int, ...] = (1, 2, 3), **changes: object) -> Successor:
    made = replace(Successor(old.roster.to_bytes(), (link,), note, genesis.to_bytes()), **changes)
    for number in by:
        made = made.signed(public(f"ca {number}"), key_named(f"ca {number}").sign)
    return made


new = Consortium(remaining())


def begun(tables: MemoryTables | None = None) -> State:
    """The successor's state after its first entry."""
    state = State(new.roster, tables, {changed.sha256: changed}.get, [old.roster])
    for entry in (*before, new.entry("log 1", Genesis(new.roster.sha256, nonce))):
        assert state.apply(entry), entry
    return state


def test_a_quorum_of_the_last_roster_signs_for_what_goes_on() -> None:
    made = document(remaining())
    assert Successor.from_bytes(made.to_bytes()) == made
    change = made.check()
    assert (change.rosters, change.genesis, change.checkpoint) == ((old.roster, changed), new.roster, end)


@pytest.mark.parametrize("by", [(), (1, 2)])
def test_fewer_signatures_than_a_quorum_are_refused(by: tuple[int, ...]) -> None:
    with pytest.raises(Refused, match=f"signed by {len(by)} institutions, and 3 are needed"):
        document(remaining(), by).check()


def other_end(**changes: object) -> tuple[Predecessor, ...]:
    return (replace(new.roster.before[0], **changes),)


refused = {
    "another root": remaining(before=other_end(root=zeros)),
    "another size": remaining(before=other_end(size=end.size - 1)),
    "another log": remaining(before=other_end(genesis=zeros)),
    "no log before": remaining(before=()),
    "a later roster": remaining(number=1, previous=zeros[1:] + b"1"),
    "a key of another owner": remaining(nodes=(replace(remaining().nodes[0], cosigner_key=public("cosigner 0")), *remaining().nodes[1:])),
}


@pytest.mark.parametrize("name", refused)
def test_a_successor_of_something_else_is_refused_whoever_signed(name: str) -> None:
    made = Successor(old.roster.to_bytes(), (link,), note, refused[name].to_bytes())
    with pytest.raises(Refused, match="cannot go on"):
        made.look()


def test_signatures_for_another_successor_and_by_strangers_do_not_count() -> None:
    other = document(remaining(code=(1, 3, 3)))
    with pytest.raises(Refused, match="does not hold"):
        replace(document(remaining()), signatures=other.signatures).check()
    with pytest.raises(Refused, match="does not list"):
        document(remaining()).signed(public("ca 9"), key_named("ca 9").sign).check()


def test_the_end_must_be_published_by_the_last_roster() -> None:
    with pytest.raises(Refused, match="fewer than 3"):
        document(remaining(), note=Consortium(changed).note(end, (1, 2)).to_bytes())
    with pytest.raises(Refused):
        document(remaining(), note=old.note(replace(end, size=end.size - 1), (1, 2, 3)).to_bytes())


def test_a_document_that_is_not_canonical_is_malformed() -> None:
    made = document(remaining())
    for bad in (made.to_bytes()[:-1], made.to_bytes() + b"\0", b"", replace(made, signatures=(made.signatures[0],) * 2).to_bytes()):
        with pytest.raises(Malformed):
            Successor.from_bytes(bad)


def test_a_roster_that_goes_on_from_others_has_one_item_more_and_keeps_it() -> None:
    assert Roster.from_bytes(new.roster.to_bytes()) == new.roster
    assert (old.roster.to_bytes()[:2], new.roster.to_bytes()[:2]) == (b"\x9a\x02", b"\x9b\x03")
    after = replace(new.roster, number=1, previous=new.roster.sha256)
    assert successor_complaint(new.roster, after) is None
    assert "stay what they are" in str(successor_complaint(new.roster, replace(after, before=())))
    assert [new.roster.origin_at(index) for index in (0, end.size - 1, end.size)] == [old.roster.origin] * 2 + [new.roster.origin]


bad_lines = {
    "the same origin": (replace(new.roster.before[0], origin=new.roster.origin),),
    "sizes that do not grow": (new.roster.before[0], replace(new.roster.before[0], origin="a/b")),
    "too many": tuple(Predecessor(f"log/{number}", zeros, number, zeros) for number in range(1, 18)),
}


@pytest.mark.parametrize("name", bad_lines)
def test_a_line_of_logs_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="log"):
        remaining(before=bad_lines[name]).to_bytes()


def test_everything_carries_over_and_the_new_log_takes_entries() -> None:
    state = begun()
    assert (state.roster, state.frozen, state.begun) == (new.roster, None, end.size)
    assert state.registration(one).owner == public("owner")
    assert state.holds(one) == [hold.id]
    assert state.identity(public("former")).withdrawn is not None
    read = new.entry("reader", Access((one,), 1, b"", nonce))
    assert state.apply(read)
    assert state.right_at(one, public("reader"), state.size - 1) == Right(6, grant.id, 0)
    assert state.right_at(one, public("owner"), state.size - 1) == Right(4, None, 0)
    assert not state.apply(new.entry("former", Register(b"3" * 32, manifest, nonce)))
    assert state.apply(new.entry("owner", Register(b"4" * 32, manifest, nonce)))
    assert not state.apply(new.entry("owner", Erase(one, 0, nonce)))  # on hold
    assert state.apply(new.entry("owner", Erase(two, 0, nonce)))
    assert state.apply(new.entry("reader", Revoke(grant.id, nonce)))
    state.apply(new.entry("reader", Access((one,), 1, b"", nonce)))
    assert state.right_at(one, public("reader"), state.size - 1) == Refusal(Reason.REVOKED, f"by entry {state.size - 2}")


def test_an_entry_that_was_signed_for_the_old_log_is_none_of_the_new_one() -> None:
    entry = old.entry("owner", Register(b"5" * 32, manifest, nonce))
    with pytest.raises(Refused):
        entry.verify(new.roster.origin_at(end.size + 1))
    entry.verify(new.roster.origin_at(end.size - 1))


def test_a_registration_of_the_old_log_is_proved_under_a_checkpoint_of_the_new_one() -> None:
    log = [*data, new.entry("log 1", Genesis(new.roster.sha256, nonce)).to_bytes()]
    leaves = [Entry.from_bytes(entry).id for entry in log]
    text = new.checkpoint(log).text()
    lines = [log_verifier(new.roster).sign(text, key_named("log 1").sign)]
    lines += [
        cosigner_verifier(new.roster, node.id).sign(text, key_named(f"cosigner {number}").sign, 1)
        for number, node in enumerate(new.roster.nodes, 1)
    ]
    path = tuple(merkle.inclusion_path(leaves, 4, merkle.sha256))
    inclusion = Inclusion(4, log[4], path, Note(text, tuple(lines)).to_bytes())
    assert inclusion.verify(new.roster)[1] == before[4]
    with pytest.raises(MedshardError):
        inclusion.verify(old.roster)


def test_the_first_entry_must_name_the_successor_and_come_just_after_the_end() -> None:
    state = State(new.roster, None, {changed.sha256: changed}.get, [old.roster])
    early = State(new.roster, None, {changed.sha256: changed}.get, [old.roster])
    for entry in before:
        assert state.apply(entry)
        assert early.apply(entry) if not isinstance(entry.body, Freeze) else not early.apply(None)
    assert isinstance(state.objection(new.entry("log 1", Genesis(old.roster.sha256, nonce))), Refused)
    assert isinstance(state.objection(new.entry("log", Genesis(new.roster.sha256, nonce))), Refused)
    assert state.objection(new.entry("log 1", Genesis(new.roster.sha256, nonce))) is None
    assert "has not ended" in str(early.objection(new.entry("log 1", Genesis(new.roster.sha256, nonce))))


def test_voices_under_a_roster_of_the_old_log_do_not_count_in_the_new_one() -> None:
    state = begun()
    assert state.ballots(Type.FREEZE, 0) == {}
    assert state.decided == []
    for number in (1, 2):
        assert state.apply(new.entry(f"ca {number}", Freeze(zeros, nonce)))
        assert (state.frozen is None) == (number == 1)  # two of three
    assert state.frozen == (state.size - 1, zeros)


def test_a_change_of_the_new_logs_roster_is_its_own() -> None:
    state = begun()
    after = replace(new.roster, number=1, previous=new.roster.sha256)
    state._documents = {after.sha256: after}.get
    for number in (1, 2):
        assert state.apply(new.entry(f"ca {number}", Approve(after.sha256, nonce)))
    assert state.decided == [(state.size - 1, after)]
    assert [state.roster_at(index) for index in (0, end.size - 1, end.size, state.size - 1, state.size)] == [
        old.roster, changed, new.roster, new.roster, after,
    ]  # fmt: skip


def test_tables_are_gone_on_from_and_taken_back_across_the_end() -> None:
    tables = MemoryTables()
    state = begun(tables)
    again = State(new.roster, tables, {changed.sha256: changed}.get, [old.roster])
    assert again == state
    assert again.roster == new.roster
    part = State(new.roster, None, {changed.sha256: changed}.get, [old.roster])
    part.settle(5)
    for entry in before:
        part.apply(entry)
    copy = part.rows()
    part.apply(new.entry("log 1", Genesis(new.roster.sha256, nonce)))
    part.rewind(end.size)
    assert part.rows() == copy
    assert part.roster == new.roster
    part.rewind(end.size - 1)
    assert part.roster == changed
    assert part.tables.get(Table.META, b"frozen") is None


def test_a_successor_has_a_successor() -> None:
    entries = [*before, new.entry("log 1", Genesis(new.roster.sha256, nonce)), new.entry("owner", Register(b"4" * 32, manifest, nonce))]
    entries += [new.entry(f"ca {number}", Freeze(zeros, nonce)) for number in (1, 2)]
    last = Consortium(new.roster).checkpoint([entry.to_bytes() for entry in entries])
    third = Consortium(replace(new.roster, origin="consortium.example/log-3", before=line_after(new.roster, last)))
    state = State(third.roster, None, {changed.sha256: changed}.get, [old.roster, new.roster])
    entries += [third.entry("log 1", Genesis(third.roster.sha256, nonce)), third.entry("owner", Register(b"5" * 32, manifest, nonce))]
    assert all(state.apply(entry) for entry in entries)
    assert (state.begun, state.frozen, state.roster) == (last.size, None, third.roster)
    for index, entry in enumerate(entries):
        entry.verify(third.roster.origin_at(index))
    text = third.roster.to_bytes()
    assert Roster.from_bytes(text).before == (*new.roster.before, Predecessor(new.roster.origin, new.roster.sha256, last.size, last.root))


def test_a_state_needs_the_genesis_files_of_the_logs_before() -> None:
    with pytest.raises(ValueError, match="first one's genesis file"):
        State(new.roster)
