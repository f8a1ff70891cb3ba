"""Shares of a root key: any threshold of them give it, fewer say nothing, wrong ones are found. And recovery codes."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from medshard.cli.sharing import short
from medshard.escrow import Share, combine, split
from medshard.home import Home
from medshard.keys import VaultKeys, create_key_file, open_key_file
from medshard.recovery import RecoveryCode, change_passphrase
from medshard_protocol import canonical
from medshard_protocol.errors import Malformed, Refused, Unavailable
from medshard_protocol.ids import Key, Sha256

keys = VaultKeys.from_root(bytes(range(32)))


def test_any_threshold_of_the_shares_gives_the_key() -> None:
    shares = split(keys, 3, 5)
    for chosen in combinations(shares, 3):
        root, right = combine(chosen, keys.public)
        assert root == keys.root
        assert right == list(chosen)
    assert combine(shares, keys.public)[0] == keys.root


def multiplied(a: int, b: int) -> int:
    """In GF(2^128) with 1 + x + x^2 + x^7 + x^128, as pycryptodome's Shamir computes."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a <<= 1
        if a >> 128:
            a ^= (1 << 128) | 0x87
        b >>= 1
    return product


def inverted(a: int) -> int:
    result, exponent = 1, (1 << 128) - 2
    while exponent:
        if exponent & 1:
            result = multiplied(result, a)
        a, exponent = multiplied(a, a), exponent >> 1
    return result


def test_fewer_than_the_threshold_fit_every_key_equally_well() -> None:
    """With two shares of three needed, each other key has a third share that completes them to it: they rule nothing out."""
    shares = split(keys, 3, 5)
    assert combine(shares[:2], keys.public) == (None, shares[:2])
    for other in (bytes(16), os.urandom(16), keys.root[16:]):
        points = [(share.number, int.from_bytes(share.data[:16], "big")) for share in shares[:2]]
        points.append((0, int.from_bytes(other, "big")))
        third = 0
        for x, y in points:  # Lagrange at 3, through the two shares and the other key at 0
            term = y
            for z, _ in points:
                if z != x:
                    term = multiplied(multiplied(term, 3 ^ z), inverted(x ^ z))
            third ^= term
        from Crypto.Protocol.SecretSharing import Shamir

        assert Shamir.combine([*((x, y.to_bytes(16, "big")) for x, y in points[:2]), (3, third.to_bytes(16, "big"))]) == other


def test_a_wrong_share_is_found_and_the_rest_still_give_the_key() -> None:
    shares = split(keys, 3, 5)
    wrong = replace(shares[1], data=os.urandom(32))
    root, right = combine([shares[0], wrong, shares[2], shares[4]], keys.public)
    assert root == keys.root
    assert wrong not in right
    assert combine([shares[0], wrong, shares[2]], keys.public) == (None, [shares[0], shares[2]])
    assert combine([wrong], keys.public) == (None, [])
    forged = split(VaultKeys.from_root(os.urandom(32)), 2, 5)
    liars = [replace(each, vault=keys.public) for each in forged[:2]]
    assert combine([*liars, *shares[:3]], keys.public) == (keys.root, shares[:3])
    assert combine([liars[0], *shares[:2]], keys.public) == (None, shares[:2])
    changed = replace(shares[0], commitments=tuple(os.urandom(32) for _ in range(5)))
    assert combine([changed, shares[1], shares[2]], keys.public) == (keys.root, [changed, shares[1], shares[2]])
    liars = [replace(shares[3], number=number, data=os.urandom(32)) for number in (4, 5)]
    scattered = [replace(each, commitments=tuple(os.urandom(32) for _ in range(5))) for each in (*liars, *shares[:4])]
    assert combine(scattered, keys.public) == (keys.root, scattered[2:]), "they lie on one polynomial, whatever they say of each other"


@pytest.mark.parametrize(("threshold", "count"), [(1, 5), (0, 0), (6, 5), (3, 33)])
def test_a_threshold_that_protects_nothing_is_refused(threshold: int, count: int) -> None:
    with pytest.raises(Refused):
        split(keys, threshold, count)


def test_a_share_is_read_as_it_was_written_and_nothing_else_is_one() -> None:
    share = split(keys, 2, 3)[1]
    data = share.to_bytes()
    assert Share.from_bytes(data) == share
    items = canonical.decode(data, bytes_max=10_000, what="share")
    for at, value in (
        (0, 2),
        (1, bytes(31)),
        (2, bytes(15)),
        (3, 1),
        (3, 9),
        (4, 0),
        (4, 9),
        (5, bytes(31)),
        (6, []),
        (6, [bytes(31)] * 3),
    ):
        with pytest.raises(Malformed):
            Share.from_bytes(canonical.encode([*items[:at], value, *items[at + 1 :]]))


def test_a_recovery_code_survives_being_typed_and_notices_a_wrong_letter() -> None:
    code = RecoveryCode(keys.root, Sha256(bytes(32)), ("https://a.example:8443", "https://b.example:443"))
    text = code.to_code()
    typed = "\n".join(text[at : at + 11].lower() + " -" for at in range(0, len(text), 11))
    assert RecoveryCode.from_code(typed) == code
    for at in range(12, len(text)):
        with pytest.raises(Malformed):
            RecoveryCode.from_code(text[:at] + ("B" if text[at] == "A" else "A") + text[at + 1 :])
    for wrong in ("", "MEDSHARD1AAAA", text[:-1], text + "A" * 8, "MEDSHARDKEY1" + "A" * 5000):
        with pytest.raises(Malformed):
            RecoveryCode.from_code(wrong)


def test_a_passphrase_is_changed_and_the_key_is_not(tmp_path: Path) -> None:
    home = Home(tmp_path)
    made = create_key_file(home.key_file, "old words", fast=True)
    with pytest.raises(Refused):
        change_passphrase(home, "wrong words", "new words", fast=True)
    assert change_passphrase(home, "old words", "new words", fast=True).public == made.public
    assert open_key_file(home.key_file, "new words").root == made.root
    with pytest.raises(Refused):
        open_key_file(home.key_file, "old words")
    assert home.key_file.stat().st_mode & 0o777 == 0o600


def test_too_few_shares_and_wrong_ones_end_in_an_error_that_names_who_sent_them() -> None:
    from medshard.cli.keys import _whole
    from medshard.escrow import Collected

    good, wrong, known = Key(b"g" * 32), Key(b"w" * 32), {Key(b"w" * 32): "Ben"}
    for names, said in (({}, short(wrong)), (known, f"Ben ({short(wrong)})")):
        with pytest.raises(Unavailable) as caught:
            _whole(Collected(None, (good,), (wrong,), 3, 0), names)
        assert str(caught.value) == f"1 of 3 shares are here; a wrong share came from {said}"
        assert "approve once more" in caught.value.hint
    assert _whole(Collected(bytes(32), (good,), (wrong,), 3, 0), known) == bytes(32)
