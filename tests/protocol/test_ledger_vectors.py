"""The vectors of the ledger, and the formats page that lets others check them without us."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from medshard_protocol import merkle
from medshard_protocol.canonical import decode
from medshard_protocol.checkpoint import Note, cosigner_verifier, log_verifier, open_published, pq_verifier
from medshard_protocol.documentproof import DocumentProof
from medshard_protocol.entries import Body, Entry, sign_entry, signed_bytes
from medshard_protocol.errors import Refused
from medshard_protocol.merkle import sha256
from medshard_protocol.proofs import Inclusion, Places, pack_append, pack_appended, pack_registration, unpack_append, unpack_appended
from medshard_protocol.roster import Roster
from medshard_protocol.succession import Successor
from medshard_protocol.succession import signed_bytes as signed_for
from medshard_protocol.tiles import Tree, pack_bundle
from storenode.ledger import wire
from storenode.ledger.fullhead import Lines

root_folder = Path(__file__).parents[2]
vectors = json.loads((root_folder / "tests/vectors/ledger.json").read_text())
roster = Roster.from_bytes(bytes.fromhex(vectors["roster"]["bytes"]))
entries = [bytes.fromhex(item["entry"]) for item in vectors["entries"]]
leaves = [bytes.fromhex(item["leaf"]) for item in vectors["entries"]]
inclusion = Inclusion.from_value(decode(bytes.fromhex(vectors["inclusion_of_2"]), bytes_max=10_000, what="vector"))


def private(name):
    return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(vectors["keys"][name]["seed"]))


def test_keys_follow_from_their_names():
    for name, key in vectors["keys"].items():
        assert key["seed"] == hashlib.sha256(name.encode()).hexdigest()
        assert private(name).public_key().public_bytes_raw().hex() == key["public"]


def test_the_roster_has_these_bytes():
    assert roster.to_bytes().hex() == vectors["roster"]["bytes"]
    assert roster.sha256.hex() == vectors["roster"]["sha256"] == hashlib.sha256(roster.to_bytes()).hexdigest()


def test_the_roster_with_keepers_has_these_bytes():
    data = bytes.fromhex(vectors["roster_with_keepers"])
    new = Roster.from_bytes(data)
    keepers = tuple(sorted(private(name).public_key().public_bytes_raw() for name in ("vault", "reader")))
    assert new.to_bytes() == data
    assert [each.keepers for each in new.institutions] == [(), keepers, (), ()]
    assert replace(new, number=0, previous=bytes(32), institutions=roster.institutions) == roster


def test_ml_dsa_keys_follow_from_their_names():
    for name, key in vectors["pq_keys"].items():
        assert key["seed"] == hashlib.sha256(name.encode()).hexdigest()
        assert MLDSA44PrivateKey.from_seed_bytes(bytes.fromhex(key["seed"])).public_key().public_bytes_raw().hex() == key["public"]


def test_the_successor_has_these_bytes():
    given = {name: bytes.fromhex(value) for name, value in vectors["successor"].items()}
    document = Successor.from_bytes(given["document"])
    change = document.check()
    assert (change.rosters, change.genesis.to_bytes(), document.genesis) == ((roster,), given["roster"], given["roster"])
    assert signed_for(change) == given["signed"]
    unsigned = replace(document, signatures=())
    for name in ("ca 2", "ca 0", "ca 1"):
        unsigned = unsigned.signed(private(name).public_key().public_bytes_raw(), private(name).sign)
    assert unsigned.to_bytes() == given["document"]


every_form = [*vectors["entries"], *vectors["forms"]]


def test_there_is_an_entry_of_every_form():
    bodies = {type(Entry.from_bytes(bytes.fromhex(item["entry"])).body) for item in every_form}
    assert bodies == set(get_args(Body))


@pytest.mark.parametrize("item", every_form, ids=[f"{n} {item['type']}" for n, item in enumerate(every_form)])
def test_an_entry_and_what_its_author_signs_have_these_bytes(item):
    entry = Entry.from_bytes(bytes.fromhex(item["entry"]))
    assert signed_bytes(roster.origin, entry.body).hex() == item["signed"]
    assert sign_entry(roster.origin, entry.body, entry.author, private(item["author"]).sign) == entry
    assert (entry.body.type.name, entry.author.hex()) == (item["type"], vectors["keys"][item["author"]]["public"])
    assert merkle.leaf_hash(entry.to_bytes(), sha256).hex() == item["leaf"]


def test_the_tree_has_these_roots_proofs_and_tiles():
    for size, root in enumerate(vectors["roots"]):
        assert merkle.root(leaves[:size], sha256).hex() == root
    assert [item.hex() for item in merkle.consistency_path(leaves, 3, sha256)] == vectors["consistency_3_to_5"]
    assert b"".join(leaves).hex() == vectors["tile_0_000.p_5"]
    assert pack_bundle(entries).hex() == vectors["bundle_000.p_5"]
    tree = Tree.load(5, leaves, lambda level, number: b"")
    assert tuple(tree.inclusion_path(2, 5)) == inclusion.path


def test_verifier_keys_are_these():
    assert log_verifier(roster).vkey() == vectors["vkeys"]["log"]
    for number, node in enumerate(roster.nodes):
        assert cosigner_verifier(roster, node.id).vkey() == vectors["vkeys"][f"cosigner {number}"]
        assert pq_verifier(roster, node.id).vkey() == vectors["vkeys"][f"pq {number}"]


def test_the_full_checkpoint_has_a_quorum_of_each_kind():
    assert open_published(vectors["full_checkpoint"].encode(), roster, pq=True).size == 5
    with pytest.raises(Refused, match="ML-DSA"):
        open_published(vectors["checkpoint"].encode(), roster, pq=True)


def test_the_proof_proves_its_document():
    text = vectors["proof"]["text"].encode()
    proof = DocumentProof.from_bytes(text)
    assert proof.to_bytes() == text
    proven = proof.verify(roster)
    assert proven.sha256 == hashlib.sha256(bytes.fromhex(vectors["proof"]["document"])).digest()
    assert (proven.institution, proven.index, proven.known_by) == ("Institution 0", 2, 1_700_000_000)


def test_the_inclusion_verifies_and_the_checkpoint_has_this_text():
    checkpoint, entry = inclusion.verify(roster)
    assert (checkpoint.size, entry.to_bytes()) == (5, entries[2])
    assert Note.from_bytes(vectors["checkpoint"].encode()).to_bytes() == inclusion.checkpoint


def test_messages_have_these_bytes():
    message = {name: bytes.fromhex(text) for name, text in vectors["messages"].items()}
    sent = unpack_append(message["append"])
    assert sent == [entries[2], entries[4]]
    assert pack_append(sent) == message["append"]
    assert pack_appended(unpack_appended(message["appended"], sent)) == message["appended"]
    assert pack_registration(inclusion) == message["registration"]
    assert Places.from_bytes(message["places"]).to_bytes() == message["places"]
    assert Places.from_bytes(message["places"]) == Places(1, (4,), ((5, 6, 7),))
    push = wire.Push.from_bytes(message["push"])
    assert (push.old_size, list(push.entries), push.to_bytes()) == (3, entries[3:], message["push"])
    assert wire.pack_cosignature(wire.unpack_cosignature(message["cosignature"])) == message["cosignature"]
    assert wire.unpack_size(message["size"]) == (3, 2)
    assert wire.unpack_fence(message["fence"]) == (7, roster.nodes[1].id)
    report = wire.Report.from_bytes(message["report"])
    assert (report.leader, report.leads, report.size, report.to_bytes()) == (roster.nodes[1].id, True, 5, message["report"])
    assert wire.promise_text(roster.origin, 7, roster.nodes[1].id) == message["promise_signed"]
    assert wire.pack_promise(*wire.unpack_promise(message["promise"])) == message["promise"]
    both = Lines.from_bytes(message["cosignatures"])
    assert both.to_bytes() == message["cosignatures"]
    for verifier, line in (
        (cosigner_verifier(roster, roster.nodes[0].id), both.ed25519),
        (pq_verifier(roster, roster.nodes[0].id), both.ml_dsa),
    ):
        assert verifier.verify(Note.from_bytes(inclusion.checkpoint).text, line) == 1_700_000_000


def test_the_script_of_the_formats_page_checks_a_proof_without_us(consortium):
    page = (root_folder / "docs/formats/ledger.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "medshard" not in script
    names: dict = {}
    exec(compile(script, "ledger.md", "exec"), names)
    check, genesis = names["check"], roster.to_bytes()
    assert check(genesis, bytes.fromhex(vectors["inclusion_of_2"]))
    c = consortium(4)
    log = [bytes([n]) * 40 for n in range(21)]
    for size in range(1, 22):
        for index in range(size):
            value = c.inclusion(log[:size], index, [0, 1, 2]).to_value()
            assert check(genesis, msgpack.packb(value))
            assert not check(genesis, msgpack.packb([index, log[index] + b"x", *value[2:]]))
            if size > 1:
                assert not check(genesis, msgpack.packb([index, value[1], value[2][:-1], value[3]]))
    assert not check(genesis, msgpack.packb(c.inclusion(log, 3, [0, 1]).to_value()))


def test_the_checkpoint_of_the_formats_page_is_that_of_the_vectors():
    page = (root_folder / "docs/formats/checkpoint.md").read_text()
    assert "".join(f"    {line}\n" if line else "\n" for line in vectors["checkpoint"].splitlines()) in page
