"""What entries of the ledger mean to people: who read what, under whose grant, and who had no right to."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from medshard import hpke
from medshard.auditing import Audited
from medshard.envelopes import seal_reason
from medshard.export import as_csv, as_fhir, columns
from medshard.grants import Happened
from medshard.history import Names, Teller
from medshard_protocol.entries import Access, Body, Enrol, Entry, Erase, Grant, Purpose, Register, Revoke
from medshard_protocol.identity import public_key
from medshard_protocol.ids import FileId, Key, Sha256

scan, other = FileId(b"s" * 32), FileId(b"o" * 32)
auditors = hpke.PrivateKey(b"a" * 32)


class Log:
    """Entries in order, and what a teller makes of them."""

    def __init__(self, consortium: Any) -> None:
        self.consortium = consortium
        self.entries: list[Entry] = []

    def key(self, name: str) -> Key:
        return public_key(self.consortium.key(name))

    def add(self, author: str, body: Body) -> Entry:
        self.entries.append(self.consortium.entry(author, body))
        return self.entries[-1]

    def told(self, *, key: hpke.PrivateKey | None = None, contacts: dict[Key, str] | None = None) -> list[Happened]:
        teller = Teller(self.consortium.roster, Names(contacts or {}, {}, [self.key("owner")]), key)
        told = [teller.tell(index, entry, time=1_700_000_000) for index, entry in enumerate(self.entries)]
        return [each for each in told if each is not None]


@pytest.fixture
def log(consortium: Callable[..., Any]) -> Log:
    log = Log(consortium(4))
    for name, number in (("owner", 0), ("reader", 1), ("stranger", 2)):
        log.add(f"ca {number}", Enrol(log.key(name), 0, bytes(16)))
    log.add("owner", Register(scan, Sha256(bytes(32)), bytes(16)))
    return log


def granted(log: Log, author: str = "owner", reader: str = "reader", files: Sequence[FileId] = (scan,), until: int = 0) -> Entry:
    return log.add(author, Grant(tuple(files), log.key(reader), until, Purpose.INSURANCE, bytes(16)))


def read(log: Log, reader: str, reason: bytes = b"", nonce: int = 0) -> Entry:
    return log.add(reader, Access((scan,), Purpose.EMERGENCY if reason else Purpose.TREATMENT, reason, bytes([nonce] * 16)))


def whats(told: Sequence[Happened]) -> list[str]:
    return [each.what for each in told]


def test_a_read_is_told_with_reader_institution_purpose_and_grant(log: Log) -> None:
    given = granted(log, until=1_900_000_000)
    read(log, "reader")
    registered, grant, access = log.told(contacts={log.key("reader"): "Insurer"})
    assert (registered.what, registered.author_name, registered.institution) == ("registered", "this vault", "Institution 0")
    assert (grant.what, grant.reader_name, grant.until, grant.purpose) == ("granted", "Insurer", 1_900_000_000, "insurance")
    assert (access.what, access.author_name, access.institution, access.purpose) == ("read", "Insurer", "Institution 1", "treatment")
    assert (access.grant, access.grant_index) == (given.id, 4)


def test_the_owner_reads_without_a_grant(log: Log) -> None:
    read(log, "owner")
    assert (log.told()[-1].what, log.told()[-1].grant_index) == ("read", -1)


def test_a_read_without_a_right_is_told_as_an_attempt(log: Log) -> None:
    read(log, "stranger")
    assert whats(log.told())[-1] == "tried to read without a right"


def test_a_right_lasts_from_its_grant_to_its_revocation_by_places_in_the_log(log: Log) -> None:
    read(log, "reader", nonce=1)
    given = granted(log)
    read(log, "reader", nonce=2)
    log.add("owner", Revoke(given.id, bytes(16)))
    read(log, "reader", nonce=3)
    attempt = "tried to read without a right"
    assert whats(log.told()) == ["registered", attempt, "granted", "read", "revoked", attempt]


def test_a_grant_by_somebody_else_gives_no_right(log: Log) -> None:
    granted(log, author="stranger")
    read(log, "reader")
    assert whats(log.told())[-2:] == ["void grant", "tried to read without a right"]


def test_a_revocation_by_a_stranger_ends_nothing(log: Log) -> None:
    given = granted(log)
    log.add("stranger", Revoke(given.id, bytes(16)))
    read(log, "reader")
    assert whats(log.told())[-2:] == ["void revocation", "read"]


def test_the_second_of_two_grants_still_counts_when_the_first_is_revoked(log: Log) -> None:
    first, second = granted(log), granted(log, until=2_000_000_000)
    log.add("owner", Revoke(first.id, bytes(16)))
    read(log, "reader")
    assert log.told()[-1].grant == second.id


def test_an_emergency_is_flagged_and_its_reason_is_for_the_auditors(log: Log) -> None:
    origin = log.consortium.roster.origin
    read(log, "owner", reason=seal_reason(auditors.public, origin, "patient unconscious"))
    ours, theirs = log.told()[-1], log.told(key=auditors)[-1]
    assert (ours.what, ours.reason, ours.sealed_reason) == ("read in an emergency", "", True)
    assert (theirs.what, theirs.reason, theirs.sealed_reason) == ("read in an emergency", "patient unconscious", False)
    assert log.told(key=hpke.PrivateKey(b"b" * 32))[-1].sealed_reason


def test_a_table_has_a_line_for_each_entry_and_no_formula(log: Log) -> None:
    granted(log)
    read(log, "owner", reason=seal_reason(auditors.public, log.consortium.roster.origin, "=cmd|'/c calc'!A1"))
    lines = list(csv.DictReader(io.StringIO("".join(as_csv(log.told(key=auditors))))))
    assert tuple(lines[0]) == columns
    assert [line["what"] for line in lines] == ["registered", "granted", "read in an emergency"]
    assert lines[2]["reason"] == "'=cmd|'/c calc'!A1"
    assert {line["time_is"] for line in lines} == {"before"}


def test_an_audit_event_has_what_fhir_requires(log: Log) -> None:
    given = granted(log, files=(scan,))
    read(log, "reader")
    read(log, "stranger")
    read(log, "owner", reason=seal_reason(auditors.public, log.consortium.roster.origin, "fire"))
    log.add("owner", Revoke(given.id, bytes(16)))
    log.add("owner", Erase(scan, 0, bytes(16)))
    bundle = json.loads("".join(as_fhir(log.told(key=auditors), log.consortium.roster.origin, 1_700_000_001)))
    assert (bundle["resourceType"], bundle["type"]) == ("Bundle", "collection")
    events = [entry["resource"] for entry in bundle["entry"]]
    for event in events:
        assert event["resourceType"] == "AuditEvent"
        assert re.fullmatch(r"[A-Za-z0-9.-]{1,64}", event["id"])
        assert {"system", "code"} <= event["type"].keys()
        assert datetime.fromisoformat(event["recorded"]).tzinfo is not None
        assert event["action"] in "CRUDE"
        assert event["outcome"] in ("0", "4", "8", "12")
        assert event["agent"][0]["requestor"] is True
        assert event["source"]["observer"]["identifier"]["value"] == log.consortium.roster.origin
        assert all(entity["what"]["identifier"]["value"] == scan.hex() for entity in event["entity"])
        assert all(detail["type"] and detail["valueString"] for entity in event["entity"] for detail in entity["detail"])
    assert len({entry["fullUrl"] for entry in bundle["entry"]}) == len(events)
    assert [event["outcome"] for event in events] == ["0", "0", "0", "8", "0", "0", "0"]
    assert events[4]["purposeOfEvent"][0]["coding"][0]["code"] == "BTG"
    assert {"type": "reason", "valueString": "fire"} in events[4]["entity"][0]["detail"]


def test_nothing_happened_is_still_a_bundle() -> None:
    assert "entry" not in json.loads("".join(as_fhir([], "consortium.example/log", 1_700_000_000)))


def test_what_an_audit_found_is_read_again_and_again_and_lies_on_disk_without_names_and_reasons(log: Log) -> None:
    granted(log)
    read(log, "reader", reason=seal_reason(auditors.public, log.consortium.roster.origin, "no time to ask"))
    read(log, "owner")
    contacts = {log.key("owner"): "Dr. Name", log.key("reader"): "Insurer"}
    told = [replace(each, time=7, exact=True) for each in log.told(key=auditors, contacts=contacts)]
    audited = Audited(Names(contacts, {}, [log.key("owner")]))
    audited.add(told[:2])
    audited.add(told[2:])
    assert (list(audited), list(audited), len(audited)) == (told, told, 4)
    assert [each.reason for each in told] == ["", "", "no time to ask", ""]
    audited._file.seek(0)
    on_disk = audited._file.read()
    assert [text in on_disk for text in (b"Dr. Name", b"Insurer", b"no time to ask", b"read in an emergency")] == [
        False,
        False,
        False,
        True,
    ]
    audited.close()
