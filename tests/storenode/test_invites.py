"""Invitations: the code that people copy, and the node's memory of what it gave out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.ids import Key, Sha256
from medshard_protocol.invite import Invite, pack_join, pack_joined, unpack_join, unpack_joined
from storenode.invites import Invites, Issued

anna, bert = Key(b"a" * 32), Key(b"b" * 32)
example = Invite("https://node.hospital-01.example:9700", Sha256(bytes(range(32))), bytes(range(16)), 2)


# -- the code


def test_the_vector_reads_and_writes() -> None:
    vector = json.loads((Path(__file__).parents[1] / "vectors/invite.json").read_text())
    invite = Invite(vector["url"], Sha256(bytes.fromhex(vector["genesis_sha256"])), bytes.fromhex(vector["secret"]), vector["institution"])
    assert invite.to_code() == vector["code"]
    assert Invite.from_code(vector["code"]) == invite == example


def test_a_code_comes_back_whatever_people_do_to_its_looks() -> None:
    code = example.to_code()
    assert code.isalnum()
    assert Invite.from_code(code) == example
    spaced = " ".join(code[i : i + 5] for i in range(0, len(code), 5))
    for written in (code.lower(), f"  {code}\n", spaced, spaced.replace(" ", "-"), spaced.replace(" ", "\n")):
        assert Invite.from_code(written) == example


def test_every_single_wrong_letter_is_found() -> None:
    code = example.to_code()
    for place in range(len(code)):
        wrong = code[:place] + ("B" if code[place] == "A" else "A") + code[place + 1 :]
        with pytest.raises(Malformed):
            Invite.from_code(wrong)


def test_every_cut_code_is_found() -> None:
    code = example.to_code()
    for end in range(len(code)):
        with pytest.raises(Malformed):
            Invite.from_code(code[:end])
    for more in ("A", "AAAAAAAA"):
        with pytest.raises(Malformed):
            Invite.from_code(code + more)


def test_what_is_no_code_is_explained() -> None:
    for text in ("", "hello", "https://node.example", "MEDSHARD1", "MEDSHARD1!!!", "MEDSHARD2" + "A" * 50, "MEDSHARD1" + "A" * 5000):
        with pytest.raises(Malformed) as raised:
            Invite.from_code(text)
        assert raised.value.hint


def test_a_code_does_not_show_its_secret_when_printed() -> None:
    assert repr(example.secret) not in repr(example)


def test_join_messages_come_back_and_junk_is_malformed() -> None:
    assert unpack_join(pack_join(bytes(16), b"csr")) == (bytes(16), b"csr")
    assert unpack_joined(pack_joined(b"certificate")) == b"certificate"
    for junk in (b"", b"\x93", pack_join(bytes(15), b"csr"), pack_join(bytes(16), bytes(1025)), bytes(10_000)):
        with pytest.raises(Malformed):
            unpack_join(junk)


# -- the node's memory


def test_a_secret_is_never_stored(tmp_path: Path) -> None:
    invites = Invites(tmp_path)
    secret = invites.issue("radiology", now=1000, lifetime_s=60)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert secret not in path.read_bytes()
            assert secret.hex() not in path.name
            assert path.stat().st_mode & 0o777 == 0o600


def test_a_claimed_invitation_is_for_that_key_alone(tmp_path: Path) -> None:
    invites = Invites(tmp_path)
    secret = invites.issue("", now=1000, lifetime_s=60)
    assert invites.claim(secret, anna, now=1001).key == anna
    assert Invites(tmp_path).claim(secret, anna, now=1002).key == anna  # after a restart
    with pytest.raises(Refused, match="another vault"):
        invites.claim(secret, bert, now=1003)


def test_an_expired_invitation_is_refused_to_everybody(tmp_path: Path) -> None:
    invites = Invites(tmp_path)
    secret = invites.issue("", now=1000, lifetime_s=60)
    with pytest.raises(Refused, match="expired"):
        invites.claim(secret, anna, now=1060)
    assert invites.claim(secret, anna, now=1059.9).key == anna
    with pytest.raises(Refused, match="expired"):
        invites.claim(secret, anna, now=1060)


def test_an_unknown_secret_is_refused_with_or_without_a_folder(tmp_path: Path) -> None:
    invites = Invites(tmp_path)
    with pytest.raises(Refused, match="not known"):
        invites.claim(bytes(16), anna, now=1000)
    invites.issue("", now=1000, lifetime_s=60)
    with pytest.raises(Refused, match="not known"):
        invites.claim(bytes(16), anna, now=1000)


def test_the_list_tells_open_begun_used_and_expired_apart(tmp_path: Path) -> None:
    invites = Invites(tmp_path)
    secrets = [
        invites.issue(label, now=1000 + i, lifetime_s=60 - 40 * (label == "late")) for i, label in enumerate(("a", "b", "c", "late"))
    ]
    invites.claim(secrets[1], anna, now=1004)
    invites.finish(secrets[2], invites.claim(secrets[2], bert, now=1004))
    assert [(each.label, each.state(1030)) for each in invites.all()] == [("a", "open"), ("b", "begun"), ("c", "used"), ("late", "expired")]


def test_long_expired_invitations_are_forgotten(tmp_path: Path) -> None:
    invites = Invites(tmp_path)
    invites.issue("old", now=1000, lifetime_s=60)
    invites.issue("new", now=1000 + 3 * 366 * 86_400, lifetime_s=60)
    assert [each.label for each in invites.all()] == ["new"]


def test_a_damaged_file_is_no_invitation_and_hides_no_other(tmp_path: Path) -> None:
    invites = Invites(tmp_path)
    secret = invites.issue("a", now=1000, lifetime_s=60)
    next((tmp_path / "invites").iterdir()).write_bytes(b"junk")
    with pytest.raises(Refused, match="not known"):
        invites.claim(secret, anna, now=1001)
    invites.issue("b", now=1000, lifetime_s=60)
    assert [each.label for each in invites.all()] == ["b"]
    with pytest.raises(Malformed):
        Issued.from_bytes(b"junk")


def test_a_label_or_lifetime_out_of_range_is_a_callers_mistake(tmp_path: Path) -> None:
    for label, lifetime in (("x" * 101, 60.0), ("", 0.0), ("", 1e9)):
        with pytest.raises(ValueError, match="at most"):
            Invites(tmp_path).issue(label, now=1000, lifetime_s=lifetime)
