"""What client and node say about rights: what headers take, and what a signature and an inclusion are worth."""

from __future__ import annotations

import pytest

from medshard_protocol.entries import Access
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.identity import public_key
from medshard_protocol.sharing import (
    History,
    SealingKey,
    Told,
    pack_emergency,
    pack_tickets,
    sealing_key_signed,
    unpack_emergency,
    unpack_tickets,
)


def test_places_are_written_in_order_and_once():
    assert pack_tickets([9, 7, 9]) == "7,9"
    assert unpack_tickets("7,9") == (7, 9)
    assert unpack_tickets(pack_tickets(range(64))) == tuple(range(64))
    for wrong in ([], range(65), [-1], [2**63]):
        with pytest.raises(ValueError, match="1 to 64"):
            pack_tickets(wrong)


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "01", "1,1", "2,1", "+1", "1, 2", "1\n", "٣", str(2**63), "1" * 4000, ",".join(map(str, range(65)))]
)
def test_anything_else_is_malformed(text):
    with pytest.raises(Malformed):
        unpack_tickets(text)


def test_an_emergency_entry_travels_in_a_header(consortium):
    entry = consortium(4).entry("doctor", Access((b"f" * 32,), 7, b"sealed", bytes(16)))
    text = pack_emergency(entry)
    assert text.isascii()
    assert unpack_emergency(text) == entry
    for wrong in ("", text + "=", text[:-1], text + "A", "AAAA", "ä", text.replace("_", "/")[:-4] + "////"):
        with pytest.raises(Malformed):
            unpack_emergency(wrong)


def test_a_key_to_seal_to_is_its_owners_word(consortium):
    owner = consortium(4).key("vault")
    public = b"h" * 1216
    good = SealingKey(public_key(owner), public, owner.sign(sealing_key_signed(public)))
    good.verify()
    other = consortium(4).key("other")
    for wrong in (
        SealingKey(public_key(other), public, good.signature),
        SealingKey(good.owner, b"x" * 1216, good.signature),
        SealingKey(good.owner, public, owner.sign(public)),
        SealingKey(b"\xff" * 32, public, good.signature),
    ):
        with pytest.raises(Refused):
            wrong.verify()


def test_a_history_gives_the_proof_of_each_entry_under_its_checkpoint(consortium):
    c = consortium(4)
    entries = [c.entry("vault", Access((b"f" * 32,), number, b"", bytes(16))).to_bytes() for number in range(5)]
    proofs = [c.inclusion(entries, index, (0, 1, 2)) for index in (1, 3)]
    history = History(proofs[0].checkpoint, tuple(Told(each.index, each.entry, each.path, True) for each in proofs), more=False)
    read = History.from_bytes(history.to_bytes())
    assert [each.verify(c.roster)[1].body.purpose for each in read.inclusions()] == [1, 3]
    with pytest.raises(Malformed):
        History.from_bytes(History(history.checkpoint, history.entries[::-1], more=False).to_bytes())
