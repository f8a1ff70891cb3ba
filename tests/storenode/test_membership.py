from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.conftest import Consortium, consortium_of, key_named

from medshard_protocol.entries import Approve
from medshard_protocol.errors import Absent, Conflict, Damaged, Malformed, Refused
from medshard_protocol.identity import public_key
from medshard_protocol.ids import Sha256
from medshard_protocol.messages import pack_error
from medshard_protocol.roster import Roster
from medshard_protocol.rosters import Link
from storenode import membership as membership_module
from storenode.approving import Seal, check_no_split
from storenode.config import write_config
from storenode.drafting import (
    add_emergency,
    add_node,
    draft,
    drop_former,
    remove_emergency,
    remove_institution,
    remove_node,
    rotate_ca,
    rotate_keys,
    set_capacity,
    set_code,
    set_sequencer,
    set_url,
)
from storenode.genesis import Card, adopt, check_membership, found
from storenode.identity import Institution as Ca
from storenode.identity import NodeKeys, create_institution, create_node, key_pem
from storenode.membership import Membership, pack_chain, read_chain
from storenode.office import Office
from storenode.rotation import create_next, promote, waits

four = consortium_of(4)


def next_of(roster: Roster, capacity: int | None = None) -> Roster:
    return draft(roster, [set_capacity("node0", 100 + roster.number if capacity is None else capacity)])


def link(old: Roster, new: Roster, by: tuple[int, ...] = (0, 1, 2)) -> Link:
    entries = (Consortium(old).entry(f"ca {i}", Approve(new.sha256, bytes(16))).to_bytes() for i in by)
    return Link(new.to_bytes(), tuple(entries))


# -- the chain and the documents


def test_a_chain_survives_a_restart(tmp_path):
    one = next_of(four.roster)
    two = next_of(one, 6)
    told: list[int] = []
    members = Membership(tmp_path, four.roster)
    members.on_change(lambda roster: told.append(roster.number))
    assert members.follow([link(four.roster, one), link(one, two)])
    assert not members.follow([link(four.roster, one), link(one, two)])  # known
    again = Membership(tmp_path, four.roster)
    assert (again.roster, again.genesis, again.links(1)) == (two, four.roster, [link(one, two)])
    assert again.document(one.sha256) == one
    assert told == [1, 2]


def test_a_change_is_on_disk_before_anybody_hears_of_it(tmp_path):
    members = Membership(tmp_path, four.roster)
    seen: list[Roster] = []
    members.on_change(lambda roster: seen.append(Membership(tmp_path, four.roster).roster))
    one = next_of(four.roster)
    members.follow([link(four.roster, one)])
    assert seen == [one]


def test_a_change_without_its_quorum_is_not_taken_and_what_came_before_stays(tmp_path):
    one = next_of(four.roster)
    two = next_of(one, 6)
    members = Membership(tmp_path, four.roster)
    with pytest.raises(Refused, match="approved by 2 institutions, and 3 are needed"):
        members.follow([link(four.roster, one), link(one, two, (0, 1))])
    assert members.roster == one == Membership(tmp_path, four.roster).roster


def test_another_history_of_rosters_is_refused(tmp_path):
    members = Membership(tmp_path, four.roster)
    members.follow([link(four.roster, next_of(four.roster, 5))])
    with pytest.raises(Refused, match="its number is not 2"):
        members.follow([link(four.roster, next_of(four.roster, 7))])


def test_a_damaged_chain_stops_the_node_with_what_to_do(tmp_path):
    members = Membership(tmp_path, four.roster)
    one = next_of(four.roster)
    members.follow([link(four.roster, one), link(one, next_of(one, 6))])
    path = tmp_path / "rosters" / "00000001.link"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Damaged, match=r"00000001\.link") as caught:
        Membership(tmp_path, four.roster)
    assert "move" in caught.value.hint
    path.unlink()
    with pytest.raises(Damaged, match="is missing"):
        Membership(tmp_path, four.roster)


def test_a_proposed_document_is_kept_once_and_survives_a_restart(tmp_path):
    members = Membership(tmp_path, four.roster)
    one = next_of(four.roster)
    assert members.keep(one.to_bytes()) == (one, True)
    assert members.keep(one.to_bytes()) == (one, False)
    assert Membership(tmp_path, four.roster).documents() == [one]


def test_a_document_that_could_never_follow_is_not_kept(tmp_path):
    members = Membership(tmp_path, four.roster)
    with pytest.raises(Malformed):
        members.keep(b"\x90")
    with pytest.raises(Refused, match="names another roster as the one before"):
        members.keep(replace(next_of(four.roster), previous=bytes(31) + b"\1").to_bytes())
    with pytest.raises(Conflict, match="would be number 2"):
        members.keep(next_of(next_of(four.roster)).to_bytes())
    assert not (tmp_path / "rosters").exists()


def test_documents_that_nobody_approves_are_bounded_and_approved_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(membership_module, "open_documents_max", 3)
    members = Membership(tmp_path, four.roster)
    members.settle()
    first = next_of(four.roster, 1)
    members.keep(first.to_bytes())
    members.approved(first.sha256)
    others = [next_of(four.roster, number) for number in range(2, 8)]
    for each in others:
        members.keep(each.to_bytes())
    assert members.documents() == [first, *others[-3:]]
    assert len(list((tmp_path / "rosters").glob("*.roster"))) == 4
    members.follow([link(four.roster, others[-1])])
    assert members.document(first.sha256) == first  # whoever folds the ledger may ask for it
    assert members.document(others[-2].sha256) is None


def test_a_document_that_the_ledger_names_is_kept_whatever_it_is_but_no_other(tmp_path):
    members = Membership(tmp_path, four.roster)
    later = next_of(next_of(four.roster))
    assert members.keep_wanted(later.sha256, later.to_bytes()) == later
    with pytest.raises(Malformed, match="another document"):
        members.keep_wanted(later.sha256, four.roster.to_bytes())


def test_the_roster_before_counts_for_a_minute(tmp_path, monkeypatch):
    members = Membership(tmp_path, four.roster)
    assert members.just_before is None
    members.follow([link(four.roster, next_of(four.roster))])
    assert members.just_before == four.roster
    now = membership_module.time.monotonic()
    monkeypatch.setattr(membership_module.time, "monotonic", lambda: now + 61)
    assert members.just_before is None
    assert Membership(tmp_path, four.roster).just_before is None  # after a restart everybody has heard


def test_a_cut_off_proposal_is_passed_over(tmp_path, caplog):
    members = Membership(tmp_path, four.roster)
    one = next_of(four.roster)
    members.keep(one.to_bytes())
    (tmp_path / "rosters" / f"{one.sha256.hex()}.roster").write_bytes(one.to_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert Membership(tmp_path, four.roster).documents() == []
    assert "not a roster" in caplog.text


# -- signing


@pytest.fixture
def seal(tmp_path) -> Seal:
    path = tmp_path / "keys" / "ca.key"
    path.parent.mkdir()
    path.touch(0o600)
    path.write_bytes(key_pem(key_named("ca 1")))
    return Seal(path)


def test_an_institution_signs_one_successor_and_no_other(seal, tmp_path):
    one, other = next_of(four.roster, 1), next_of(four.roster, 2)
    assert seal.signed(four.roster) is None
    first = seal.approve(four.roster, one)
    assert seal.approve(four.roster, one) == first  # the same bytes, so it stands in the log once
    assert seal.signed(four.roster) == one.sha256
    with pytest.raises(Refused, match=f"signed for another document as roster 1: {one.sha256.hex()}"):
        Seal(tmp_path / "keys" / "ca.key").approve(four.roster, other)
    seal.approve(one, next_of(one))  # the next number is another matter
    assert seal.institution(four.roster).name == "Institution 1"


def test_the_note_of_what_was_signed_is_there_before_the_signature(seal, monkeypatch):
    def broken(*_args: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(seal, "_sign", broken)
    with pytest.raises(OSError, match="power cut"):
        seal.approve(four.roster, next_of(four.roster, 1))
    assert seal.signed(four.roster) == next_of(four.roster, 1).sha256


def test_a_stranger_signs_for_nobody(seal):
    with pytest.raises(Refused, match="of no institution in roster 0"):
        seal.institution(consortium_of(1).roster)


def test_the_end_of_a_log_is_signed_with_one_successor(seal):
    one = next_of(four.roster)
    entry = seal.freeze(four.roster, four.roster, one.sha256)
    assert seal.freeze(four.roster, four.roster, one.sha256) == entry
    with pytest.raises(Refused, match="signed for another document as the log's successor"):
        seal.freeze(one, four.roster, bytes(32))


# -- drafting


def card_of(institution: Ca, name: str, home: Path, owner: str, port: int = 9799) -> tuple[Card, NodeKeys]:
    keys = create_node(home, institution, sync=False)
    return Card.of(owner, name, f"https://127.0.0.1:{port}", 10**9, keys), keys


def test_a_card_brings_a_node_and_with_it_a_new_institution(tmp_path):
    ca = create_institution("Fifth")
    first, _ = card_of(ca, "fifth-a", tmp_path / "a", "Fifth")
    second, _ = card_of(ca, "fifth-b", tmp_path / "b", "Fifth", 9798)
    new = draft(four.roster, [add_node(first), add_node(second), set_code((2, 5, 4))])
    assert [node.institution for node in new.nodes] == [0, 1, 2, 3, 4, 4]
    assert new.quorum == (1, 4)
    back = draft(new, [remove_node("fifth-a")])
    assert [node.name for node in back.nodes] == ["node0", "node1", "node2", "node3", "fifth-b"]
    with pytest.raises(Conflict, match="is the only node of Fifth"):
        draft(back, [remove_node("fifth-b")])
    impostor, _ = card_of(create_institution("Fifth"), "fifth-c", tmp_path / "c", "Fifth", 9797)
    with pytest.raises(Conflict, match="another CA"):
        draft(new, [add_node(impostor)])


def test_who_leaves_takes_the_places_behind_with_it(tmp_path):
    new = draft(four.roster, [remove_institution("Institution 1"), set_code((2, 3, 3))])
    assert [each.name for each in new.institutions] == ["Institution 0", "Institution 2", "Institution 3"]
    assert [(node.name, node.institution) for node in new.nodes] == [("node0", 0), ("node2", 1), ("node3", 2)]
    with pytest.raises(Malformed, match="needs as many nodes") as caught:
        draft(four.roster, [remove_institution("Institution 1")])
    assert "--code 2/3/3" in caught.value.hint
    with pytest.raises(Malformed, match="sequencer") as caught:
        draft(four.roster, [remove_institution("Institution 0"), set_code((2, 3, 3))])
    assert "--sequencer" in caught.value.hint


def test_small_changes_touch_nothing_else():
    key = public_key(key_named("er"))
    new = draft(four.roster, [set_url("node1", "https://elsewhere.example:1"), set_sequencer("node2"), add_emergency(key)])
    assert new.nodes[1] == replace(four.roster.nodes[1], url="https://elsewhere.example:1")
    assert (new.sequencer, new.emergency) == (four.roster.nodes[2].id, (key,))
    assert draft(new, [remove_emergency(key)]).emergency == ()
    for nothing in ([], [set_capacity("node1", 10**12)]):
        with pytest.raises(Malformed, match="change nothing"):
            draft(four.roster, nothing)
    with pytest.raises(Absent, match="no node 'node9'"):
        draft(four.roster, [set_url("node9", "https://elsewhere.example:1")])
    with pytest.raises(Absent, match="marks no emergency identity"):
        draft(four.roster, [remove_emergency(key)])


# -- keys that are rotated


@pytest.fixture
def home(tmp_path) -> tuple[Path, Ca, Roster]:
    """A node of "Clinic" beside three others, and the roster that lists it."""
    ca = create_institution("Clinic")
    own, _ = card_of(ca, "clinic", tmp_path / "home", "Clinic")
    others = [card_of(create_institution(name), name.lower(), tmp_path / name, name, port)[0] for port, name in enumerate("BCD", 9700)]
    return tmp_path / "home", ca, found([own, *others], sequencer="clinic")


def test_new_node_keys_wait_until_a_roster_lists_them(home):
    folder, ca, old = home
    keys = NodeKeys.load(folder)
    drawn = create_next(folder, keys, ca, fresh_ca=False, node_keys=True)
    assert drawn.node_id == keys.node_id
    assert drawn.tls_key != keys.tls_key
    new = draft(old, [rotate_keys(Card.of("Clinic", "clinic", "https://127.0.0.1:1", 1, drawn))])
    assert new.nodes[0] == replace(
        old.nodes[0],
        tls_key=drawn.tls_key,
        cosigner_key=public_key(drawn.cosigner),
        log_key=public_key(drawn.log or Ed25519PrivateKey.generate()),
        pq_key=drawn.cosigner_pq.public_key().public_bytes_raw(),
    )
    assert promote(folder, old).tls_key == keys.tls_key
    assert (waits(folder, old), waits(folder, new)) == (False, True)
    with pytest.raises(Conflict, match="keys wait there"):
        create_next(folder, keys, ca, fresh_ca=False, node_keys=True)
    now = promote(folder, new)
    assert now.tls_key == drawn.tls_key == NodeKeys.load(folder).tls_key
    check_membership(new, now)
    assert not waits(folder, new)
    assert NodeKeys.load_from(folder / "keys-until-1").tls_key == keys.tls_key


def test_keys_that_no_roster_lists_stay_where_they_are(home):
    folder, ca, old = home
    keys = NodeKeys.load(folder)
    drawn = create_next(folder, keys, ca, fresh_ca=False, node_keys=True)
    other, _ = card_of(ca, "clinic", folder.parent / "elsewhere", "Clinic")
    new = draft(old, [rotate_keys(other)])  # lists neither those in use nor those that wait
    assert not waits(folder, new)
    assert promote(folder, new).tls_key == keys.tls_key
    assert NodeKeys.load_from(folder / "keys-next").tls_key == drawn.tls_key


def test_a_power_cut_between_the_renames_is_mended(home):
    folder, ca, old = home
    drawn = create_next(folder, NodeKeys.load(folder), ca, fresh_ca=False, node_keys=True)
    new = draft(old, [rotate_keys(Card.of("Clinic", "clinic", "https://127.0.0.1:1", 1, drawn))])
    (folder / "keys").rename(folder / "keys-until-1")
    assert promote(folder, new).tls_key == drawn.tls_key


def test_a_new_ca_takes_over_and_the_former_is_dropped_later(home):
    folder, ca, old = home
    fresh = create_institution("Clinic")
    drawn = create_next(folder, NodeKeys.load(folder), fresh, fresh_ca=True, node_keys=False)
    new = draft(old, [rotate_ca("Clinic", fresh.certificate)])
    assert new.institutions[0].former == (ca.certificate,)
    check_membership(new, NodeKeys.load(folder))  # what the former CA issued is good
    now = promote(folder, new)
    assert (now.ca_certificate, now.tls_key) == (fresh.certificate, drawn.tls_key)
    assert now.ca is not None
    check_membership(draft(new, [drop_former("Clinic")]), now)
    with pytest.raises(Refused, match="another CA certificate"):
        check_membership(draft(new, [drop_former("Clinic")]), NodeKeys.load_from(folder / "keys-until-1"))


# -- beginning


def test_a_node_that_came_later_adopts_genesis_and_chain(tmp_path):
    late, keys = card_of(create_institution("Fifth"), "fifth", tmp_path / "home", "Fifth")
    new = draft(four.roster, [add_node(late)])
    chain = tmp_path / "chain.medshard"
    chain.write_bytes(pack_chain([link(four.roster, new)]))
    write_config(tmp_path / "home", url="https://127.0.0.1:9799")
    with pytest.raises(Refused, match="the genesis file does not list this node"):
        adopt(tmp_path / "home", four.roster.to_bytes(), keys)
    for _ in range(2):  # again is no change
        assert adopt(tmp_path / "home", four.roster.to_bytes(), keys, read_chain(chain)) == new
    assert Membership(tmp_path / "home" / "data", four.roster).roster == new
    chain.write_bytes(chain.read_bytes()[:-1])
    with pytest.raises(Malformed, match="is not a chain"):
        read_chain(chain)
    with pytest.raises(Absent):
        read_chain(tmp_path / "nothing")


def test_a_forged_chain_is_adopted_by_nobody(tmp_path):
    late, keys = card_of(create_institution("Fifth"), "fifth", tmp_path / "home", "Fifth")
    new = draft(four.roster, [add_node(late)])
    write_config(tmp_path / "home", url="https://127.0.0.1:9799")
    with pytest.raises(Refused, match="approved by 2 institutions"):
        adopt(tmp_path / "home", four.roster.to_bytes(), keys, [link(four.roster, new, (0, 1))])
    assert not (tmp_path / "home" / "genesis.medshard").exists()
    assert not (tmp_path / "home" / "data").exists()


def test_nobody_splits_the_votes_without_saying_so() -> None:
    one, two = Sha256(b"1" * 32), Sha256(b"2" * 32)

    def open_ones(first: str, second: str) -> list[dict[str, object]]:
        return [{"sha256": one.hex(), "approved": list(first)}, {"sha256": two.hex(), "approved": list(second)}]

    check_no_split([], one, "D", 3)
    check_no_split(open_ones("", "D"), one, "D", 3)  # our own voice alone splits nothing
    check_no_split(open_ones("AB", "C"), one, "D", 3)
    for first, second in (("", "A"), ("A", "B"), ("A", "BC")):
        with pytest.raises(Refused, match=f"another next roster .3 are needed.: {two.hex()[:8]}… by {', '.join(second)}"):
            check_no_split(open_ones(first, second), one, "D", 3)


def test_a_proposal_that_this_node_has_not_heard_of_yet_is_found_at_another(consortium, monkeypatch):
    old = consortium(4).roster
    new = replace(old, number=1, previous=old.sha256, nodes=(replace(old.nodes[0], capacity=9), *old.nodes[1:]))

    def exchange(node, roster, keys, method, path, body=b"", *, timeout_s=5.0):
        knows = node.id == old.nodes[2].id
        if path == "/v1/rosters/votes":
            return 200, json.dumps({"proposals": [{"sha256": new.sha256.hex(), "approved": []}] if knows else []}).encode()
        return (200, new.to_bytes()) if knows else pack_error(Absent("this node has no such roster document"))

    for module in ("asking", "office"):
        monkeypatch.setattr(f"storenode.{module}.exchange", exchange)
    office = Office(Path(), SimpleNamespace(node_id=old.nodes[0].id), [old], [])
    assert office.document(new.sha256.hex()) == office.document(new.sha256.hex()[:12]) == new
