"""The key file: opens with its passphrase alone, and every changed byte of it is noticed."""

from __future__ import annotations

import contextlib
import hmac
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from medshard import keys as module
from medshard.keys import VaultKeys, create_key_file, key_file_bytes_max, open_key_file, open_root, seal_root
from medshard_protocol import canonical
from medshard_protocol.errors import Absent, Malformed, MedshardError, Refused

vectors = json.loads((Path(__file__).parents[1] / "vectors" / "keyfile.json").read_text())["files"]
fast = next(vector for vector in vectors if vector["log2_n"] == 12)
good = bytes.fromhex(fast["bytes"])
fields = ["magic", "kdf", "salt", "log2_n", "r", "p", "public", "nonce", "sealed"]


@pytest.mark.parametrize("vector", vectors, ids=lambda vector: vector["what"])
def test_a_key_file_has_the_bytes_of_its_vector(vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    keys = open_root(bytes.fromhex(vector["bytes"]), vector["passphrase"])
    assert keys.root.hex() == vector["root"]
    assert keys.public.hex() == vector["public"]
    derived = {name: getattr(keys, name).hex() for name in ("vault", "lookup", "index")}
    derived |= {"signing": keys.signing.private_bytes_raw().hex(), "hpke": keys.hpke_seed.hex()}
    assert derived == vector["keys"]
    assert keys.hpke.public.hex() == vector["hpke_public"]
    assert keys.tag(bytes.fromhex(vector["plain_sha256"])).hex() == vector["tag"]
    drawn = {16: vector["salt"], 12: vector["nonce"]}
    monkeypatch.setattr(module.os, "urandom", lambda size: bytes.fromhex(drawn[size]))
    assert seal_root(keys, vector["passphrase"], fast=vector["log2_n"] == 12).hex() == vector["bytes"]


def test_the_same_root_gives_the_same_keys_and_another_root_others() -> None:
    first, again, other = (VaultKeys.from_root(root) for root in (b"a" * 32, b"a" * 32, b"b" * 32))
    secret = ("vault", "lookup", "index", "hpke_seed")
    assert [getattr(first, name) for name in secret] == [getattr(again, name) for name in secret]
    assert len({getattr(keys, name) for keys in (first, other) for name in secret}) == 8
    assert first.public == again.public != other.public


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_root_of_another_length_is_a_callers_mistake(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        VaultKeys.from_root(bytes(size))


def test_a_lookup_tag_is_an_hmac_that_another_vault_does_not_share() -> None:
    first, other = VaultKeys.from_root(b"a" * 32), VaultKeys.from_root(b"b" * 32)
    assert first.tag(bytes(32)) == hmac.digest(first.lookup, bytes(32), "sha256") != other.tag(bytes(32))


def test_a_created_key_file_opens_is_private_and_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "vault.key"
    made = create_key_file(path, "pass", fast=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert open_key_file(path, "pass").root == made.root
    before = path.read_bytes()
    with pytest.raises(Refused, match="exists"):
        create_key_file(path, "other", fast=True)
    assert path.read_bytes() == before
    assert made.root not in before
    assert list(tmp_path.iterdir()) == [path]


def test_two_key_files_of_one_root_differ() -> None:
    keys = VaultKeys.from_root(b"a" * 32)
    assert seal_root(keys, "pass", fast=True) != seal_root(keys, "pass", fast=True)


@pytest.mark.parametrize("passphrase", ["", "x7", "X7!", "x7! ", "x7!\n", "ｘ7!"])
def test_a_wrong_passphrase_is_refused(passphrase: str) -> None:
    with pytest.raises(Refused, match="passphrase") as caught:
        open_root(good, passphrase)
    assert caught.value.hint


def test_a_passphrase_that_is_not_unicode_is_taken_by_its_bytes() -> None:
    keys = VaultKeys.from_root(b"a" * 32)
    passphrase = b"caf\xe9".decode("utf-8", "surrogateescape")  # what Python makes of such an argument or variable
    assert open_root(seal_root(keys, passphrase, fast=True), passphrase).root == keys.root


def test_a_missing_key_file_is_absent_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Absent) as caught:
        open_key_file(tmp_path / "vault.key", "x")
    assert "join" in caught.value.hint


@pytest.mark.parametrize("field", range(9), ids=fields)
def test_a_change_in_any_field_is_noticed(field: int) -> None:
    items = canonical.decode(good, bytes_max=key_file_bytes_max, what="key file")
    old = items[field]
    if isinstance(old, bytes):
        changes: list[canonical.Value] = [bytes([old[0] ^ 1]) + old[1:], old[:-1] + bytes([old[-1] ^ 128]), old[:-1], old + b"\0", b"", "x"]
    elif isinstance(old, str):
        changes = [old + "2", old.upper(), "", "x" * 40, b"x"]
    else:
        changes = [old + 1, old - 1, 0, 21, 2**64 - 1, -1, True, b"\x0c"]
    for change in changes:
        with pytest.raises((Malformed, Refused)):
            open_root(canonical.encode([*items[:field], change, *items[field + 1 :]]), fast["passphrase"])


@given(st.integers(0, len(good) - 1), st.integers(1, 255))
def test_a_change_in_any_byte_is_noticed(at: int, by: int) -> None:
    changed = good[:at] + bytes([good[at] ^ by]) + good[at + 1 :]
    if at == good.index(b"\x0c\x08\x03") or at in (good.index(b"\x0c\x08\x03") + 1, good.index(b"\x0c\x08\x03") + 2):
        return  # scrypt's costs, up to a gigabyte: the test of each field changes them
    with pytest.raises((Malformed, Refused)):
        open_root(changed, fast["passphrase"])


@pytest.mark.parametrize("data", [b"", b"\x90", good[:-1], good + b"\0", good[:1] * 5000, b"\x99" + bytes(9), b"passphrase"])
def test_what_is_no_key_file_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        open_root(data, "x")


@pytest.mark.parametrize(("log2_n", "r", "p"), [(16, 1, 1), (20, 1, 16), (21, 8, 1), (9, 8, 1), (12, 9, 1), (12, 0, 1), (12, 8, 17)])
def test_costs_that_cannot_or_should_not_be_paid_are_malformed(log2_n: int, r: int, p: int) -> None:
    items = canonical.decode(good, bytes_max=key_file_bytes_max, what="key file")
    with pytest.raises(Malformed):
        open_root(canonical.encode([*items[:3], log2_n, r, p, *items[6:]]), "x")


def test_a_root_that_does_not_give_the_public_key_is_malformed() -> None:
    """GCM commits to no key, so a file could be crafted that opens with two passphrases, to two roots; one of them has another key."""
    items = canonical.decode(good, bytes_max=key_file_bytes_max, what="key file")
    head, nonce = items[:7], items[7]
    stretched = module._stretch(fast["passphrase"], *head[2:6])
    sealed = AESGCM(stretched).encrypt(nonce, b"r" * 32, canonical.encode(head))
    with pytest.raises(Malformed, match="public key"):
        open_root(canonical.encode([*head, nonce, sealed]), fast["passphrase"])


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_of_their_own(data: bytes) -> None:
    with contextlib.suppress(MedshardError):
        open_root(data, "x")
