"""The vectors of the ledger, and the formats page that lets others check them without us."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol import merkle
from medshard_protocol.canonical import decode
from medshard_protocol.checkpoint import Note, cosigner_verifier, log_verifier
from medshard_protocol.entries import Entry, sign_entry, signed_bytes
from medshard_protocol.merkle import sha256
from medshard_protocol.proofs import Inclusion, pack_append, pack_appended, pack_registration, unpack_append, unpack_appended
from medshard_protocol.roster import Roster
from medshard_protocol.tiles import Tree, pack_bundle
from storenode.ledger import wire

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


@pytest.mark.parametrize("item", vectors["entries"], ids=[item["type"] for item in vectors["entries"]])
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
    push = wire.Push.from_bytes(message["push"])
    assert (push.old_size, list(push.entries), push.to_bytes()) == (3, entries[3:], message["push"])
    assert wire.pack_cosignature(wire.unpack_cosignature(message["cosignature"])) == message["cosignature"]
    assert wire.unpack_size(message["size"]) == 3


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
