"""Contacts: names for keys, sealed, and never mixed up."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from medshard.contacts import Contacts
from medshard_protocol.errors import Absent, Conflict, Damaged, Malformed
from medshard_protocol.ids import Key

insurer, doctor = Key(b"i" * 32), Key(b"d" * 32)


@pytest.fixture
def contacts(tmp_path: Path) -> Contacts:
    return Contacts(tmp_path / "contacts.sealed", bytes(32))


def test_a_contact_is_found_by_its_name_in_any_case_and_by_its_key(contacts: Contacts) -> None:
    contacts.add("Dr. Weber", doctor)
    contacts.add("Versicherung Süd", insurer)
    assert contacts.key("dr. weber") == contacts.key(doctor.hex()) == contacts.key(doctor.hex().upper()) == doctor
    assert contacts.names() == {doctor: "Dr. Weber", insurer: "Versicherung Süd"}


def test_a_key_needs_no_name(contacts: Contacts) -> None:
    assert contacts.key(insurer.hex()) == insurer


def test_a_name_keeps_its_key_until_it_is_removed(contacts: Contacts) -> None:
    contacts.add("Insurer", insurer)
    contacts.add("insurer", insurer)
    with pytest.raises(Conflict):
        contacts.add("INSURER", doctor)
    assert contacts.remove("insurer") == insurer
    contacts.add("Insurer", doctor)
    assert contacts.all() == {"Insurer": doctor}


def test_an_unknown_name_is_absent(contacts: Contacts) -> None:
    with pytest.raises(Absent, match="nobody"):
        contacts.key("nobody")
    with pytest.raises(Absent):
        contacts.remove("nobody")
    with pytest.raises(Absent, match="'Müller \\\\x1b\\[2J 김'"):  # in their own letters, and nothing that a terminal could obey
        contacts.key("Müller \x1b[2J 김")


@pytest.mark.parametrize("name", ["", " x", "a\nb", "x" * 65, "ab" * 32], ids=["empty", "blank first", "two lines", "long", "a key"])
def test_what_is_no_name_is_refused(contacts: Contacts, name: str) -> None:
    with pytest.raises(Malformed):
        contacts.add(name, insurer)


def test_the_file_says_nothing_and_opens_for_its_vault_alone(contacts: Contacts, tmp_path: Path) -> None:
    contacts.add("Dr. Weber", doctor)
    path = tmp_path / "contacts.sealed"
    data = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"Weber" not in data
    assert doctor not in data
    with pytest.raises(Damaged):
        Contacts(path, b"k" * 32).all()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(Damaged):
            contacts.all()
