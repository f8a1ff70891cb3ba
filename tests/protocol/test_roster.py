from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medshard_protocol.canonical import decode, encode
from medshard_protocol.errors import Absent, Malformed
from medshard_protocol.roster import Roster, quorum_of


@pytest.mark.parametrize(
    ("institutions", "f", "q"),
    [(1, 0, 1), (2, 0, 2), (3, 0, 2), (4, 1, 3), (5, 1, 4), (6, 1, 4), (7, 2, 5), (9, 2, 6), (16, 5, 11), (30, 9, 20)],
)
def test_the_quorum_is_that_of_the_design(institutions, f, q):
    assert quorum_of(institutions) == (f, q)


@given(st.integers(1, 256))
def test_two_quorums_share_an_honest_institution_and_one_forms_without_the_faulty(institutions):
    f, q = quorum_of(institutions)
    assert 2 * q - institutions > f
    assert institutions - f >= q


def test_a_roster_comes_back_as_it_was(consortium):
    for roster in (consortium(1).roster, consortium(4).roster, consortium(4, nodes_each=2).roster):
        assert Roster.from_bytes(roster.to_bytes()) == roster
        assert Roster.from_bytes(roster.to_bytes()).sha256 == roster.sha256


def test_a_quorum_counts_institutions_not_nodes(consortium):
    roster = consortium(4, nodes_each=2).roster
    ids = [node.id for node in roster.nodes]
    assert not roster.has_quorum([ids[0], ids[4], ids[1], ids[5]])  # two institutions, four nodes
    assert not roster.has_quorum(ids[4:])  # the second node of each: nobody's voice
    assert roster.has_quorum([ids[0], ids[1], ids[2]])
    assert not roster.has_quorum([ids[0], ids[1], bytes(16)])


def test_a_node_is_found_by_its_id_and_names_its_cosigner(consortium):
    roster = consortium(4).roster
    node = roster.nodes[2]
    assert roster.node(node.id) is node
    assert roster.cosigner_name(node) == "consortium.example/log/node2"
    with pytest.raises(Absent):
        roster.node(bytes(16))


def change_institution(number, **changes):
    return lambda r: replace(
        r, institutions=(*r.institutions[:number], replace(r.institutions[number], **changes), *r.institutions[number + 1 :])
    )


def change_node(number, **changes):
    return lambda r: replace(r, nodes=(*r.nodes[:number], replace(r.nodes[number], **changes), *r.nodes[number + 1 :]))


def same_as(field, one, other):
    return lambda r: change_node(one, **{field: getattr(r.nodes[other], field)})(r)


broken = {
    "no institution": lambda r: replace(r, institutions=(), nodes=()),
    "origin with a space": lambda r: replace(r, origin="a b"),
    "origin with a plus": lambda r: replace(r, origin="a+b"),
    "origin with a newline": lambda r: replace(r, origin="a\n"),
    "origin in capitals": lambda r: replace(r, origin="Hospital.example"),
    "empty origin": lambda r: replace(r, origin=""),
    "long origin": lambda r: replace(r, origin="a" * 129),
    "sequencer unknown": lambda r: replace(r, sequencer=bytes(16)),
    "log key also a cosigner's": lambda r: change_node(0, log_key=r.nodes[1].cosigner_key)(r),
    "log key short": change_node(0, log_key=bytes(31)),
    "sequencer without a log key": change_node(0, log_key=b""),
    "post-quantum key short": change_node(1, pq_key=bytes(1311)),
    "two nodes of one post-quantum key": lambda r: change_node(1, pq_key=bytes(1312))(change_node(2, pq_key=bytes(1312))(r)),
    "auditors' key short": lambda r: replace(r, auditors=bytes(32)),
    "emergency identity short": lambda r: replace(r, emergency=(bytes(31),)),
    "emergency identities out of order": lambda r: replace(r, emergency=(b"b" * 32, b"a" * 32)),
    "emergency identity twice": lambda r: replace(r, emergency=(b"a" * 32, b"a" * 32)),
    "genesis with one before it": lambda r: replace(r, previous=b"p" * 32),
    "change with none before it": lambda r: replace(r, number=1),
    "former CA that is no certificate": change_institution(1, former=(b"0",)),
    "too many former CAs": lambda r: change_institution(1, former=(r.institutions[1].ca,) * 5)(r),
    "two institutions of one name": lambda r: change_institution(1, name=r.institutions[0].name)(r),
    "institution without a name": change_institution(1, name=""),
    "institution with a control character": change_institution(1, name="a\u009fb"),
    "institution with a newline": change_institution(1, name="a\n"),
    "CA of another key": lambda r: change_institution(1, ca=r.institutions[0].ca)(r),
    "a single keeper": change_institution(1, keepers=(b"a" * 32,)),
    "too many keepers": change_institution(1, keepers=tuple(bytes([n]) * 32 for n in range(17))),
    "keepers out of order": change_institution(1, keepers=(b"b" * 32, b"a" * 32)),
    "a keeper twice": change_institution(1, keepers=(b"a" * 32, b"a" * 32)),
    "a short keeper": change_institution(1, keepers=(b"a" * 31, b"b" * 32)),
    "a keeper that is the CA": lambda r: change_institution(1, keepers=tuple(sorted([r.institutions[1].key, b"a" * 32])))(r),
    "CA that is no certificate": change_institution(1, ca=b"0"),
    "institution without a node": lambda r: replace(r, nodes=r.nodes[:-1], code=(1, 2, 1)),
    "node of no institution": change_node(1, institution=4),
    "node with a bad name": change_node(1, name="Node 1"),
    "two nodes of one name": same_as("name", 1, 2),
    "two nodes of one id": same_as("id", 1, 2),
    "two nodes of one url": same_as("url", 1, 2),
    "two nodes of one TLS key": same_as("tls_key", 1, 2),
    "two nodes of one cosigner key": same_as("cosigner_key", 1, 2),
    "plain http": change_node(1, url="http://a:1"),
    "url without a port": change_node(1, url="https://a"),
    "url with a path": change_node(1, url="https://a:1/"),
    "url with a user": change_node(1, url="https://u@a:1"),
    "url with too high a port": change_node(1, url="https://a:65536"),
    "negative capacity": change_node(1, capacity=-1),
    "k of 0": lambda r: replace(r, code=(0, 4, 4)),
    "k over w": lambda r: replace(r, code=(3, 4, 2)),
    "w over n": lambda r: replace(r, code=(2, 3, 4)),
    "more shards than nodes": lambda r: replace(r, code=(2, 5, 4)),
}


@pytest.mark.parametrize("name", broken)
def test_a_roster_that_breaks_a_rule_is_refused_both_ways(consortium, name):
    roster = broken[name](consortium(4).roster)
    with pytest.raises(ValueError, match=r".+"):
        roster.to_bytes()
    institutions = [i.to_value() for i in roster.institutions]
    nodes = [[n.id, n.name, n.institution, n.url, n.capacity, n.tls_key, n.cosigner_key, n.log_key, n.pq_key] for n in roster.nodes]
    head = [2, roster.origin, roster.number, roster.previous, roster.sequencer]
    data = encode([*head, institutions, nodes, list(roster.code), list(roster.emergency), roster.auditors])
    with pytest.raises(Malformed):
        Roster.from_bytes(data)


def test_another_version_or_shape_is_malformed(consortium):
    value = decode(consortium(4).roster.to_bytes(), bytes_max=1 << 20, what="roster")
    with_none = [*value[:5], [[*each, []] for each in value[5]], *value[6:]]
    for bad in (with_none, [1, *value[1:]], value[:-1], [*value, 0], [*value[:-3], [1, 2], *value[-2:]], [1], {}, b""):
        with pytest.raises(Malformed):
            Roster.from_bytes(encode(bad) if not isinstance(bad, dict) else b"\x80")


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # the X.509 library only warns of some certificates that are none
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_byte_gives_malformed_or_another_roster(consortium, data):
    roster = consortium(4).roster
    packed = bytearray(roster.to_bytes())
    at = data.draw(st.integers(0, len(packed) - 1))
    packed[at] ^= data.draw(st.integers(1, 255))
    with suppress(Malformed):
        assert Roster.from_bytes(bytes(packed)) != roster


def test_two_histories_cannot_both_have_a_quorum_by_showing_them_to_different_nodes_of_honest_institutions(consortium):
    roster = consortium(4, nodes_each=2).roster
    ids = [node.id for node in roster.nodes]
    shown_one, shown_other = ids[:4], ids[4:]
    assert roster.has_quorum(shown_one)
    assert not roster.has_quorum(shown_other)
    swapped = replace(roster, nodes=(*roster.nodes[4:], *roster.nodes[:4]), sequencer=ids[4])  # a later roster may choose other voices
    assert not swapped.has_quorum(shown_one)
    assert swapped.has_quorum(shown_other)
