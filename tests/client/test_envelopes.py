"""Sealed file keys and reasons: the bytes of an independent implementation open, and open nowhere else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medshard import hpke
from medshard.envelopes import open_grant, open_reason, seal_grant, seal_reason, sealing_key
from medshard.keys import VaultKeys
from medshard.sealing import FileSeal
from medshard_protocol.entries import Entry, Grant
from medshard_protocol.errors import Damaged, Malformed
from medshard_protocol.ids import FileId, Sha256
from medshard_protocol.manifest import Manifest
from medshard_protocol.sharing import SealedGrant, SealingKey

vectors = json.loads((Path(__file__).parents[1] / "vectors" / "sharing.json").read_text())
manifests = json.loads((Path(__file__).parents[1] / "vectors" / "manifest.json").read_text())["manifests"]
readers = {key["what"]: VaultKeys.from_root(bytes.fromhex(key["root"])) for key in vectors["keys"]}
(auditors,) = vectors["reasons"]


def manifest_of(file_id: FileId, file_key: bytes) -> Manifest:
    """Some manifest that commits to this key."""
    some = Manifest.from_bytes(bytes.fromhex(manifests[0]["manifest"]))
    return replace(some, file_id=file_id, commitment=FileSeal(file_key, file_id).commitment)


@pytest.mark.parametrize("vector", vectors["keys"], ids=lambda vector: vector["what"])
def test_the_key_to_seal_to_comes_from_the_root_with_the_bytes_of_its_vector(vector: dict[str, Any]) -> None:
    keys = VaultKeys.from_root(bytes.fromhex(vector["root"]))
    assert (keys.public.hex(), keys.hpke_seed.hex(), keys.hpke.public.hex()) == (
        vector["owner"],
        vector["hpke_seed"],
        vector["hpke_public"],
    )
    card = sealing_key(keys)
    card.verify()
    assert card.to_bytes().hex() == vector["bytes"]
    assert SealingKey.from_bytes(bytes.fromhex(vector["bytes"])) == card


@pytest.mark.parametrize("vector", vectors["grants"], ids=lambda vector: vector["what"])
def test_a_grant_sealed_by_other_libraries_opens(vector: dict[str, Any]) -> None:
    entry = Entry.from_bytes(bytes.fromhex(vector["entry"]))
    entry.verify(vector["origin"])
    reader = readers[vector["reader"]]
    assert isinstance(entry.body, Grant)
    assert entry.body.reader == reader.public
    assert entry.id.hex() == vector["grant"]
    for file_id, file in zip(entry.body.file_ids, vector["files"], strict=True):
        assert file_id.hex() == file["file_id"]
        sealed = SealedGrant.from_bytes(bytes.fromhex(file["bytes"]))
        manifest = manifest_of(file_id, bytes.fromhex(file["file_key"]))
        assert open_grant([reader.hpke], manifest, sealed.grant, sealed.sealed).file_key.hex() == file["file_key"]


def test_a_sealed_grant_opens_for_its_reader_its_file_and_its_grant_alone() -> None:
    reader, other = readers.values()
    seal, grant = FileSeal.fresh(), Sha256(b"g" * 32)
    manifest = manifest_of(seal.file_id, seal.file_key)
    sealed = seal_grant(reader.hpke.public, seal, grant).sealed
    assert open_grant([reader.hpke], manifest, grant, sealed).file_key == seal.file_key
    with pytest.raises(Damaged):
        open_grant([other.hpke], manifest, grant, sealed)
    with pytest.raises(Damaged):
        open_grant([reader.hpke], manifest, Sha256(b"h" * 32), sealed)
    with pytest.raises(Damaged):
        open_grant([reader.hpke], manifest_of(FileId(b"f" * 32), seal.file_key), grant, sealed)


def test_a_grant_with_another_files_key_is_noticed() -> None:
    reader = readers["a reader"]
    seal, other, grant = FileSeal.fresh(), FileSeal.fresh(), Sha256(b"g" * 32)
    sealed = seal_grant(reader.hpke.public, FileSeal(other.file_key, seal.file_id), grant).sealed
    with pytest.raises(Damaged, match="commits to another key"):
        open_grant([reader.hpke], manifest_of(seal.file_id, seal.file_key), grant, sealed)


@pytest.mark.parametrize("vector", auditors["sealed"], ids=lambda vector: f"{len(vector['text'])} characters")
def test_a_reason_sealed_by_other_libraries_opens(vector: dict[str, str]) -> None:
    key = hpke.PrivateKey(bytes.fromhex(auditors["auditors_seed"]))
    assert key.public.hex() == auditors["auditors_public"]
    assert open_reason(key, vector["origin"], bytes.fromhex(vector["sealed"])) == vector["text"]


def test_a_reason_opens_in_its_own_log_alone() -> None:
    key = hpke.PrivateKey(bytes(32))
    sealed = seal_reason(key.public, "consortium.example/log", "  the patient is unconscious ")
    assert open_reason(key, "consortium.example/log", sealed) == "the patient is unconscious"
    with pytest.raises(Damaged):
        open_reason(key, "consortium.example/other", sealed)


@pytest.mark.parametrize("text", ["", "  \n", "x" * 401, "€" * 134])
def test_a_reason_that_is_empty_or_too_long_is_a_callers_mistake(text: str) -> None:
    with pytest.raises(ValueError, match="400 bytes"):
        seal_reason(hpke.PrivateKey(bytes(32)).public, "consortium.example/log", text)


@pytest.mark.parametrize("public", [b"", bytes(1215), bytes(1216), b"\xff" * 1216], ids=["empty", "short", "zeros", "ones"])
def test_bytes_that_are_no_public_key_are_malformed(public: bytes) -> None:
    with pytest.raises(Malformed):
        hpke.seal(public, b"", b"")


@given(st.binary(max_size=1300))
def test_any_bytes_open_or_are_damaged(data: bytes) -> None:
    with pytest.raises(Damaged):
        hpke.PrivateKey(bytes(32)).open(data, b"")


def test_every_flipped_bit_of_a_sealed_message_is_noticed() -> None:
    key = hpke.PrivateKey(bytes(32))
    sealed = hpke.seal(key.public, b"plain", b"info")
    for at in range(0, len(sealed), 7):
        changed = bytearray(sealed)
        changed[at] ^= 1 << at % 8
        with pytest.raises(Damaged):
            key.open(bytes(changed), b"info")
