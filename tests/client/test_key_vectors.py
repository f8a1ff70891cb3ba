"""The vectors of escrow, former keys, rotations and senders: these bytes, and what is in them."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medshard.escrow import Escrow, Share, combine
from medshard.keys import VaultKeys, open_former, roots_of, seal_former
from medshard.sender import SenderKeys
from medshard_protocol import canonical
from medshard_protocol.entries import rotation_signed
from medshard_protocol.errors import Damaged, Malformed
from medshard_protocol.ids import Key
from medshard_protocol.invite import Rotation, pack_sender, unpack_sender

folder = Path(__file__).parents[1] / "vectors"
escrow = json.loads((folder / "escrow.json").read_text())
rotation = json.loads((folder / "rotation.json").read_text())


def of(item: dict[str, Any], name: str) -> bytes:
    return bytes.fromhex(item[name])


@pytest.mark.parametrize("item", escrow["escrows"], ids=lambda item: str(item["threshold"]))
def test_shares_have_these_bytes_and_any_threshold_of_them_gives_the_root(item: dict[str, Any]) -> None:
    shares = [Share.from_bytes(bytes.fromhex(share)) for share in item["shares"]]
    assert [share.to_bytes().hex() for share in shares] == item["shares"]
    assert all(share.commitment == share.commitments[share.number - 1] for share in shares)
    for chosen in combinations(shares, item["threshold"]):
        assert combine(chosen, Key(of(item, "vault"))) == (of(item, "root"), list(chosen))
    few = shares[: item["threshold"] - 1]
    assert combine(few, Key(of(item, "vault"))) == (None, few)
    request = Escrow._parse_request(b"", of(item, "request"))
    assert (request.lost, request.asker, request.at) == (of(item, "vault"), of(item, "asker"), 1_700_000_000)


def test_former_keys_open_with_the_present_root_and_no_other() -> None:
    item = rotation["former"]
    keys = open_former(VaultKeys.from_root(of(item, "root")), of(item, "file"))
    assert [each.root.hex() for each in keys.former] == item["before"]
    assert keys.at_home.root.hex() == item["home"]
    assert canonical.encode([1, [each.root for each in keys.former]]).hex() == item["stored"]
    assert open_former(VaultKeys.from_root(of(item, "root")), seal_former(keys)).former[1].root == keys.former[1].root
    with pytest.raises(Damaged):
        open_former(VaultKeys.from_root(bytes(32)), of(item, "file"))
    for data in (b"", of(item, "file")[:-1], canonical.encode(["medshard/formerkeys/v2", bytes(32), bytes(12), b""])):
        with pytest.raises(Malformed):
            open_former(VaultKeys.from_root(of(item, "root")), data)
    with pytest.raises(Malformed):
        roots_of([bytes(31)])


def test_what_a_vault_goes_by_on_its_own_disk_stays_through_rotations() -> None:
    first, second, third = (VaultKeys.from_root(bytes([n]) * 32) for n in range(3))
    rotated = third.remember([second.root, first.root], first.root)
    digest = bytes(32)
    assert rotated.row_tag(digest) == first.tag(digest)
    assert rotated.tags(digest) == [each.tag(digest) for each in (third, second, first)]
    found = [rotated.of(each.public) for each in (third, second, first)]
    assert [each and each.root for each in found] == [each.root for each in (third, second, first)]
    assert rotated.of(VaultKeys.from_root(b"s" * 32).public) is None
    assert third.remember([second.root]).at_home.root == third.root


def test_a_rotation_is_asked_for_and_signed_with_these_bytes() -> None:
    item = rotation["rotation"]
    asked = Rotation.from_bytes(of(item, "body"))
    assert asked.to_bytes() == of(item, "body")
    signed = rotation_signed(item["origin"], asked.old, Key(of(item, "new")))
    assert (signed, asked.old) == (of(item, "signed"), of(item, "old"))
    Ed25519PublicKey.from_public_bytes(asked.old).verify(asked.old_signature, signed)
    Ed25519PublicKey.from_public_bytes(of(item, "new")).verify(asked.key_signature, signed)


def test_a_sender_has_these_bytes() -> None:
    item = rotation["sender"]
    keys = SenderKeys.from_bytes(of(item, "file"))
    assert keys == SenderKeys(of(item, "seed"), Key(of(item, "vault")), of(item, "hpke_public"))
    assert (keys.to_bytes(), keys.public) == (of(item, "file"), of(item, "public"))
    assert keys.passing().root != keys.passing().root  # forgotten each time
    assert keys.passing().public == keys.public
    assert pack_sender(*unpack_sender(of(item, "body"))) == of(item, "body")
