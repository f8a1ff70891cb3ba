from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medshard_protocol.entries import Access, Enrol, Genesis, Register
from medshard_protocol.errors import Conflict, Refused
from medshard_protocol.identity import public_key
from medshard_protocol.state import Identity, Registration, State

nonce = bytes(16)
file_a, file_b, hash_a, hash_b = (bytes([n]) * 32 for n in range(4))


def genesis(c):
    return c.entry("log", Genesis(c.roster.sha256, nonce))


def enrol(c, who, by="ca 1", roles=0):
    return c.entry(by, Enrol(public_key(c.key(who)), roles, nonce))


def folded(c, *entries):
    state = State(c.roster)
    for entry in (genesis(c), enrol(c, "vault"), *entries):
        state.apply(entry)
    return state


# Who may say what: (author, body, error or None), after genesis and the enrolment of "vault" by institution 1.
rules = {
    "an enrolled key registers": ("vault", Register(file_a, hash_a, nonce), None),
    "an enrolled key reads": ("vault", Access((file_a,), 1, b"", nonce), None),
    "a stranger does not register": ("stranger", Register(file_a, hash_a, nonce), Refused),
    "a stranger does not read": ("stranger", Access((file_a,), 1, b"", nonce), Refused),
    "an institution does not register by itself": ("ca 1", Register(file_a, hash_a, nonce), Refused),
    "an institution enrols": ("ca 2", Enrol(file_a, 0, nonce), None),
    "an institution changes the roles of its own": ("ca 1", lambda c: Enrol(public_key(c.key("vault")), 7, nonce), None),
    "an institution does not take another's": ("ca 2", lambda c: Enrol(public_key(c.key("vault")), 7, nonce), Conflict),
    "a vault does not enrol": ("vault", Enrol(file_a, 0, nonce), Refused),
    "the log key does not enrol": ("log", Enrol(file_a, 0, nonce), Refused),
    "a node does not enrol": ("tls 1", Enrol(file_a, 0, nonce), Refused),
    "no second genesis": ("log", lambda c: Genesis(c.roster.sha256, nonce), Refused),
}


@pytest.mark.parametrize("rule", rules)
def test_who_may_say_what(consortium, rule):
    author, body, error = rules[rule]
    c = consortium(4)
    entry = c.entry(author, body(c) if callable(body) else body)
    state, before = folded(c), folded(c)
    objection = state.objection(entry)
    assert (objection is None) if error is None else isinstance(objection, error)
    assert state.apply(entry) is (error is None)
    if error is not None:
        assert (state.registrations, state.identities) == (before.registrations, before.identities)
        assert state.counts["void"] == 1


@pytest.mark.parametrize(("author", "sha256"), [("log", bytes(32)), ("vault", None), ("ca 0", None)])
def test_the_genesis_entry_is_the_log_keys_and_names_this_roster(consortium, author, sha256):
    c = consortium(4)
    assert not State(c.roster).apply(c.entry(author, Genesis(sha256 or c.roster.sha256, nonce)))
    assert State(c.roster).apply(genesis(c))


def test_the_first_registration_of_a_file_wins(consortium):
    c = consortium(4)
    first = c.entry("vault", Register(file_a, hash_a, nonce))
    again = c.entry("vault", Register(file_a, hash_a, b"\x01" * 16))
    other = c.entry("vault", Register(file_a, hash_b, nonce))
    stolen = c.entry("other", Register(file_a, hash_a, nonce))
    state = folded(c, enrol(c, "other", "ca 3"), first)
    assert state.apply(again)
    assert not state.apply(other)
    assert not state.apply(stolen)
    assert state.registrations == {file_a: Registration(3, hash_a, public_key(c.key("vault")))}
    assert isinstance(state.objection(other), Conflict)


def test_an_enrolment_counts_from_its_entry_on(consortium):
    c = consortium(4)
    state = State(c.roster)
    register = c.entry("vault", Register(file_a, hash_a, nonce))
    assert [state.apply(entry) for entry in (genesis(c), register, enrol(c, "vault", roles=5), register)] == [True, False, True, True]
    assert state.identities == {public_key(c.key("vault")): Identity(1, 5)}
    assert state.registrations[file_a].index == 3


def test_what_cannot_be_parsed_or_was_not_signed_still_takes_its_place(consortium):
    c = consortium(4)
    state = folded(c)
    assert not state.apply(None)
    state.apply(c.entry("vault", Register(file_b, hash_b, nonce)))
    assert state.registrations[file_b].index == 3
    assert dict(state.counts) == {"ROSTER": 2, "void": 1, "REGISTER": 1}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["vault", "other", "ca 1", "ca 2", "log"]), st.integers(0, 9)), max_size=25), st.integers(0, 25))
def test_folding_in_two_parts_gives_the_same_state(consortium, choices, cut):
    c = consortium(4)
    bodies = [Genesis(c.roster.sha256, nonce), Enrol(public_key(c.key("vault")), 0, nonce), Enrol(public_key(c.key("other")), 1, nonce)]
    bodies += [Register(file, manifest, nonce) for file in (file_a, file_b) for manifest in (hash_a, hash_b)] + [
        Access((file_a,), 0, b"", nonce)
    ] * 3
    entries = [c.entry(author, bodies[number]) for author, number in choices]
    one, two = State(c.roster), State(c.roster)
    for entry in entries:
        one.apply(entry)
    for part in (entries[:cut], entries[cut:]):
        for entry in part:
            before = (dict(two.registrations), dict(two.identities))
            if not two.apply(entry):
                assert before == (two.registrations, two.identities)
    assert one == two
