from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import Consortium, key_named

from medshard_protocol.entries import Approve, Freeze, Withdraw
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.identity import institution_certificate, public_key
from medshard_protocol.ids import node_id_of
from medshard_protocol.roster import Institution, Node, Roster
from medshard_protocol.rosters import (
    Link,
    check_successor,
    differences,
    follow,
    institution_signing,
    links_max,
    pack_links,
    page_bytes,
    unpack_links,
)

nonce = bytes(16)


def after(roster: Roster, **changes: object) -> Roster:
    """The next roster, with these fields changed."""
    return replace(roster, **{"number": roster.number + 1, "previous": roster.sha256} | changes)


def link(consortium: Consortium, new: Roster, by: tuple[int, ...]) -> Link:
    """A change approved by these institutions, of which number i signs with ``ca i``."""
    return Link(new.to_bytes(), tuple(consortium.entry(f"ca {i}", Approve(new.sha256, nonce)).to_bytes() for i in by))


def with_node(roster: Roster, number: int, **changes: object) -> tuple[Node, ...]:
    return (*roster.nodes[:number], replace(roster.nodes[number], **changes), *roster.nodes[number + 1 :])


def with_institution(roster: Roster, number: int, **changes: object) -> tuple[Institution, ...]:
    return (*roster.institutions[:number], replace(roster.institutions[number], **changes), *roster.institutions[number + 1 :])


def certified(name: str, institution: str) -> Institution:
    key = key_named(name)
    return Institution(institution, institution_certificate(key, institution, datetime(2025, 1, 1, tzinfo=UTC)), public_key(key))


def a_node(number: int, institution: int) -> Node:
    tls, cosigner = public_key(key_named(f"tls {number}")), public_key(key_named(f"cosigner {number}"))
    return Node(node_id_of(tls), f"node{number}", institution, f"https://127.0.0.1:{9700 + number}", 10**12, tls, cosigner)


def with_a_fifth(roster: Roster) -> Roster:
    return after(roster, institutions=(*roster.institutions, certified("ca 4", "Institution 4")), nodes=(*roster.nodes, a_node(4, 4)))


def without_the_last(roster: Roster) -> Roster:
    last = len(roster.institutions) - 1
    nodes = tuple(node for node in roster.nodes if node.institution != last)
    return after(roster, institutions=roster.institutions[:last], nodes=nodes, code=(2, last, last))


def test_a_change_that_a_quorum_approved_is_followed(consortium):
    four = consortium(4)
    new = with_a_fifth(four.roster)
    assert follow(four.roster, [link(four, new, (0, 1, 2))]) == new


def test_a_client_that_was_away_for_years_follows_the_whole_chain(consortium):
    four = consortium(4)
    roster, links = four.roster, []
    for number in range(20):
        new = after(roster, nodes=with_node(roster, number % 4, capacity=number))
        links.append(link(four, new, (0, 1, 2) if number % 2 else (3, 2, 1)))
        roster = new
    assert follow(four.roster, unpack_links(pack_links(links))) == roster
    assert follow(four.roster, links).number == 20


def test_each_step_is_approved_by_the_institutions_of_the_step_before(consortium):
    four = consortium(4)
    five = with_a_fifth(four.roster)
    six = after(five, nodes=with_node(five, 0, capacity=7))
    first = link(four, five, (0, 1, 2))
    assert follow(four.roster, [first, link(four, six, (1, 2, 3, 4))]) == six  # five institutions need four
    with pytest.raises(Refused, match="approved by 3 institutions, and 4 are needed"):
        follow(four.roster, [first, link(four, six, (1, 2, 3))])
    with pytest.raises(Refused, match="by nobody that roster 0 lists"):
        follow(four.roster, [link(four, five, (1, 2, 4))])


@pytest.mark.parametrize("by", [(), (0,), (0, 1)])
def test_too_few_approvals_change_nothing(consortium, by):
    four = consortium(4)
    with pytest.raises(Refused, match=f"approved by {len(by)} institutions, and 3 are needed"):
        follow(four.roster, [link(four, with_a_fifth(four.roster), by)])


def test_an_institution_counts_once(consortium):
    four = consortium(4)
    new = with_a_fifth(four.roster)
    again = four.entry("ca 1", Approve(new.sha256, bytes(15) + b"\1")).to_bytes()
    twice = Link(new.to_bytes(), (*link(four, new, (0, 1)).approvals, again))
    with pytest.raises(Refused, match="Institution 1 is counted twice"):
        follow(four.roster, [twice])


@pytest.mark.parametrize("author", ["log", "cosigner 2", "tls 2", "a vault"])
def test_only_a_ca_key_speaks_for_an_institution(consortium, author):
    four = consortium(4)
    new = with_a_fifth(four.roster)
    good = link(four, new, (0, 1))
    with pytest.raises(Refused, match="by nobody"):
        follow(four.roster, [replace(good, approvals=(*good.approvals, four.entry(author, Approve(new.sha256, nonce)).to_bytes()))])


def test_an_approval_of_something_else_does_not_count(consortium):
    four = consortium(4)
    new = with_a_fifth(four.roster)
    for body in (Approve(four.roster.sha256, nonce), Freeze(new.sha256, nonce), Withdraw(new.sha256, nonce)):
        good = link(four, new, (0, 1))
        with pytest.raises(Refused, match="an approval is of something else"):
            follow(four.roster, [replace(good, approvals=(*good.approvals, four.entry("ca 2", body).to_bytes()))])


def test_an_approval_signed_for_another_log_or_by_another_hand_does_not_count(consortium):
    four = consortium(4)
    new = with_a_fifth(four.roster)
    good = link(four, new, (0, 1))
    elsewhere = replace(four, roster=replace(four.roster, origin="elsewhere.example/log")).entry("ca 2", Approve(new.sha256, nonce))
    forged = replace(four.entry("ca 3", Approve(new.sha256, nonce)), author=public_key(key_named("ca 2")))
    for entry in (elsewhere, forged):
        with pytest.raises(Refused, match="signature does not hold"):
            follow(four.roster, [replace(good, approvals=(*good.approvals, entry.to_bytes()))])


def test_a_link_left_out_or_from_elsewhere_is_refused(consortium):
    four = consortium(4)
    one = after(four.roster, nodes=with_node(four.roster, 0, capacity=1))
    two = after(one, nodes=with_node(one, 0, capacity=2))
    other = after(four.roster, nodes=with_node(four.roster, 0, capacity=9))
    links = {new.sha256: link(four, new, (0, 1, 2)) for new in (one, two, other)}
    with pytest.raises(Refused, match="its number is not 1"):
        follow(four.roster, [links[two.sha256]])
    with pytest.raises(Refused, match="names another roster as the one before"):
        follow(four.roster, [links[other.sha256], links[two.sha256]])
    with pytest.raises(Refused, match="its number is not 2"):
        follow(four.roster, [links[one.sha256], links[one.sha256]])


refused = {
    "another log": (lambda r: after(r, origin="elsewhere.example/log"), "of another log"),
    "a skipped number": (lambda r: after(r, number=2), "its number is not 1"),
    "another one before": (lambda r: after(r, previous=bytes(31) + b"\1"), "another roster as the one before"),
    "a key changes hands": (
        lambda r: after(r, nodes=(with_node(r, 0, cosigner_key=r.nodes[1].cosigner_key)[0], *with_node(r, 1, cosigner_key=nonce * 2)[1:])),
        "would become the cosigner key of node",
    ),
    "an institution takes another name": (
        lambda r: after(r, institutions=with_institution(r, 1, name="Klinik")),
        "a key of Institution 1 would become the CA key of Klinik",
    ),
    "a log key becomes a cosigner's": (
        lambda r: after(r, nodes=with_node(replace(r, nodes=with_node(r, 1, log_key=b"")), 1, cosigner_key=r.nodes[1].log_key)),
        "would become the cosigner key",
    ),
    "a node takes another name": (lambda r: after(r, nodes=with_node(r, 2, name="other")), "a node keeps its name"),
    "a former CA out of nowhere": (
        lambda r: after(r, institutions=with_institution(r, 1, former=(certified("mallory", "Institution 1").ca,))),
        "never was its CA",
    ),
    "a former CA of another institution": (
        lambda r: after(r, institutions=with_institution(r, 1, former=(r.institutions[0].ca,))),
        "never was its CA",
    ),
    "more acknowledgements than institutions": (
        lambda r: after(r, institutions=r.institutions[:3], nodes=(*r.nodes[:3], replace(a_node(9, 0)))),
        "a put needs 4 institutions",
    ),
    "no room for the shards": (
        lambda r: after(r, institutions=r.institutions[:3], nodes=(*r.nodes[:3], a_node(9, 0)), code=(2, 4, 3)),
        "room for 3 of a file's 4 shards",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(refused))
def test_no_quorum_can_agree_to_a_change_that_breaks_a_rule(consortium, what):
    four = consortium(4)
    make, why = refused[what]
    new = make(four.roster)
    with pytest.raises(Refused, match=why):
        check_successor(four.roster, new)
    with pytest.raises((Refused, Malformed)):
        follow(four.roster, [link(four, new, (0, 1, 2, 3))])


def test_a_node_never_passes_to_another_institution(consortium):
    eight = consortium(4, nodes_each=2).roster
    code = (4, 8, 4)
    here = after(replace(eight, code=code), nodes=with_node(eight, 5, institution=2))
    with pytest.raises(Refused, match="node node5 would pass to another institution"):
        check_successor(replace(eight, code=code), here)


def test_a_quorum_of_institutions_stays_at_each_step(consortium):
    seven = consortium(7).roster  # a quorum is five
    two_less = after(seven, institutions=seven.institutions[:5], nodes=seven.nodes[:5], code=(2, 5, 5))
    three_less = after(seven, institutions=seven.institutions[:4], nodes=seven.nodes[:4], code=(2, 4, 4))
    check_successor(seven, two_less)
    with pytest.raises(Refused, match="only 4 institutions would stay, and a quorum of 5 must"):
        check_successor(seven, three_less)


def test_every_key_can_be_rotated_in_one_change(consortium):
    four = consortium(4)
    fresh = certified("ca 0 new", "Institution 0")
    old = four.roster.institutions[0]
    keys = {f"{role}_key": public_key(key_named(f"{role} 0 new")) for role in ("tls", "cosigner", "log")}
    new = after(
        four.roster,
        institutions=with_institution(four.roster, 0, ca=fresh.ca, key=fresh.key, former=(old.ca,)),
        nodes=with_node(four.roster, 0, pq_key=b"q" * 1312, url="https://example.org:1", capacity=5, **keys),
        emergency=(public_key(key_named("er")),),
        auditors=b"a" * 1216,
        sequencer=four.roster.nodes[1].id,
    )
    assert follow(four.roster, [link(four, new, (0, 1, 2))]) == new
    texts = [f"{each.what}: {each.text}" for each in differences(four.roster, new)]
    assert texts == [
        f"institution: Institution 0: new CA key {fresh.key.hex()}",
        f"institution: Institution 0: what CA {old.key.hex()[:16]} issued stays good",
        "node: node0: https://127.0.0.1:9700 -> https://example.org:1",
        "node: node0: 1000000000000 -> 5 bytes",
        *(f"node: node0: new {role} key {key.hex()[:16]}" for role, key in zip(("TLS", "cosigner", "log"), keys.values(), strict=True)),
        "node: node0: new ML-DSA key " + "71" * 8,
        "sequencer: node0 -> node1",
        f"emergency: add {new.emergency[0].hex()}",
        "auditors: a key",
    ]
    later = after(new, institutions=with_institution(new, 0, former=()), emergency=(), auditors=b"")
    assert follow(new, [link(Consortium(new), later, (1, 2, 3))]) == later
    assert [each.text for each in differences(new, later)] == [
        f"Institution 0: what CA {old.key.hex()[:16]} issued is refused",
        f"remove {new.emergency[0].hex()}",
        "no key",
    ]


def test_the_words_name_who_comes_and_who_goes(consortium):
    four = consortium(4).roster
    five = with_a_fifth(four)
    assert [each.what for each in differences(four, five)] == ["institution", "node"]
    assert "add node4 of Institution 4, https://127.0.0.1:9704" in differences(four, five)[1].text
    gone = without_the_last(four)
    assert [each.text for each in differences(four, gone)] == [
        "remove Institution 3, its nodes and its vaults",
        "remove node3 of Institution 3",
        "2/4/4 -> 2/3/3",
    ]
    assert differences(four, after(four)) == []


def test_a_ca_key_finds_its_institution(consortium):
    four = consortium(4).roster
    assert institution_signing(four, four.institutions[2].key).name == "Institution 2"
    with pytest.raises(Refused, match="of no institution in roster 0"):
        institution_signing(four, four.nodes[2].tls_key)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(("capacity", "url", "code", "emergency", "auditors", "node", "sequencer")), st.integers(0, 3), st.integers(1, 2**40))
def test_a_change_has_words_and_a_change_without_words_is_none(what, number, value):
    from tests.conftest import consortium_of

    old = consortium_of(4).roster
    changes: dict[str, object] = {
        "capacity": {"nodes": with_node(old, number, capacity=value)},
        "url": {"nodes": with_node(old, number, url=f"https://h{value}.example:1")},
        "code": {"code": (1, 4, 1 + value % 4)},
        "emergency": {"emergency": (value.to_bytes(32, "big"),)},
        "auditors": {"auditors": value.to_bytes(1216, "big")},
        "node": {"nodes": (*old.nodes, replace(a_node(9, number), log_key=value.to_bytes(32, "big")))},
        "sequencer": {"sequencer": old.nodes[number].id},
    }[what]
    new = after(old, **changes)
    check_successor(old, new)
    assert bool(differences(old, new)) == (replace(new, number=0, previous=bytes(32)) != old)


def test_links_come_back_as_they_were_and_pages_are_bounded(consortium):
    four = consortium(4)
    one = link(four, with_a_fifth(four.roster), (0, 1, 2))
    assert unpack_links(pack_links([one, one])) == (one, one)
    assert unpack_links(pack_links([])) == ()
    assert len(unpack_links(pack_links([replace(one, approvals=())] * (links_max + 5)))) <= links_max
    large = Link(bytes(page_bytes), ())
    assert len(unpack_links(pack_links([large] * 4))) == 2  # the one that passes the mark is the last
    assert len(unpack_links(pack_links([Link(bytes(4 << 20), ())] * 2))) == 1


def test_the_vector_is_read_by_msgpack_and_ed25519_alone():
    """As docs/formats/roster.md says it, without our code but for the last line."""
    vector = json.loads((Path(__file__).parents[1] / "vectors" / "rosters.json").read_text())
    before, version_and_links = bytes.fromhex(vector["genesis"]), msgpack.unpackb(bytes.fromhex(vector["answer"]))
    assert version_and_links[0] == 1
    for (data, approvals), said in zip(version_and_links[1], vector["rosters"], strict=True):
        old, new = msgpack.unpackb(before), msgpack.unpackb(data)
        assert new[2:4] == [said["number"], hashlib.sha256(before).digest()]
        cas = [institution[2] for institution in old[5]]
        voices = set()
        for entry in approvals:
            _, kind, body, author, signature = msgpack.unpackb(entry)
            assert (kind, body[0], body[1]) == (1, 2, hashlib.sha256(data).digest())
            origin = old[1].encode()
            signed = b"medshard/entry/v1" + len(origin).to_bytes(2, "big") + origin + bytes([kind]) + msgpack.packb(body)
            Ed25519PublicKey.from_public_bytes(author).verify(signature, signed)
            voices.add(cas.index(author))
        assert sorted(voices) == said["approved_by"]
        assert len(voices) >= said["needed"]
        before = data
    assert follow(Roster.from_bytes(bytes.fromhex(vector["genesis"])), unpack_links(bytes.fromhex(vector["answer"]))).to_bytes() == before
