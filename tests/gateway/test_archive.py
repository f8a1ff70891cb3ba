"""What comes in is safe, found and served: from the spool at first, from the store after that."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import pytest
from pydicom.uid import generate_uid
from tests.gateway.conftest import Opened, make_instance

from medshard.consortium import LocalConsortium
from medshard.gateway import intake, tags
from medshard.gateway.archive import Archive
from medshard.gateway.intake import Rules
from medshard.gateway.model import Committed, Incoming, Outcome, Query
from medshard.gateway.packing import instances_of
from medshard.gateway.tags import Level
from medshard.ledger import Answered, LedgerClient
from medshard_protocol.entries import Entry
from medshard_protocol.errors import Unavailable
from medshard_protocol.proofs import Inclusion


async def test_a_series_becomes_one_sealed_object_and_comes_back_bit_for_bit(archive: Archive) -> None:
    study, series = generate_uid(), generate_uid()
    files = [make_instance(study, series, number=number) for number in range(1, 6)]
    for file in files:
        verdict = await archive.receive(Incoming(file))
        assert (verdict.outcome, verdict.sha256) == (Outcome.STORED, sha256(file).digest())
    before = [await (await archive.open(each)).read() for each in archive.instances(study)]
    await archive.settle()
    after = archive.instances(study)
    assert before == files == [await (await archive.open(each)).read() for each in after]
    assert len({each.place.file_id for each in after if each.place}) == 1
    assert archive.waiting() == (0, 0)
    assert archive.spool.used_bytes == 0
    receipt = archive.receipt(after[0].uid)
    assert receipt.sha256 == sha256(files[0]).digest()


async def test_the_same_bytes_are_stored_once_and_other_bytes_are_kept_beside_them(archive: Archive) -> None:
    study, series, uid = generate_uid(), generate_uid(), generate_uid()
    first, second = make_instance(study, series, uid), make_instance(study, series, uid)
    assert (await archive.receive(Incoming(first))).outcome is Outcome.STORED
    assert (await archive.receive(Incoming(first))).outcome is Outcome.ALREADY
    await archive.settle()
    assert (await archive.receive(Incoming(first))).outcome is Outcome.ALREADY
    assert (await archive.receive(Incoming(second))).outcome is Outcome.KEPT_BESIDE
    await archive.settle()
    served, other = archive.catalog.instances(uid)
    assert served.flagged
    assert [await (await archive.open(each)).read() for each in (served, other)] == [second, first]
    assert [each.sha256 for each in archive.instances(study)] == [sha256(second).digest()]


async def test_other_bytes_under_a_known_uid_are_refused_where_the_department_says_so(opened: Opened) -> None:
    uid = generate_uid()
    async with opened(Rules(keep_both=False)) as archive:
        assert (await archive.receive(Incoming(make_instance(uid=uid)))).outcome is Outcome.STORED
        verdict = await archive.receive(Incoming(make_instance(uid=uid)))
        assert (verdict.outcome, verdict.status) == (Outcome.REFUSED, 0x0111)


async def test_what_was_said_yes_to_is_there_after_a_restart(opened: Opened) -> None:
    file = make_instance(study := generate_uid())
    async with opened() as archive:
        assert (await archive.receive(Incoming(file))).outcome is Outcome.STORED
    async with opened() as archive:
        assert archive.waiting() == (1, 1)
        await archive.settle()
        (instance,) = archive.instances(study)
        assert await (await archive.open(instance)).read() == file


async def test_copies_that_were_made_to_be_given_away_are_not_served(archive: Archive) -> None:
    file = make_instance(study := generate_uid())
    await archive.receive(Incoming(file))
    await archive.settle()
    (instance,) = archive.instances(study)
    assert instance.place
    (row,) = archive.vault.rows_of(instance.place.file_id)
    assert len(instances_of([row])) == 1
    for mark in ({"tag:deidentified": "keep-uids"}, {"copy": "shared"}):
        assert not instances_of([replace(row, attributes={**row.attributes, **mark})])


async def test_a_name_in_two_scripts_is_found_by_either(archive: Archive) -> None:
    file = make_instance(study := generate_uid(), PatientID="PID-names")
    await archive.receive(Incoming(file))
    for name in ("müller^änne", "MÜLLER*", "山田^太郎", "Müller^Änne=山田^太郎", "M?ller^*"):
        keys = {0x00100010: name, tags.PATIENT_ID: "PID-names"}
        assert [row.study for row in archive.find(Query(Level.STUDY, keys))] == [study], name
    assert not list(archive.find(Query(Level.STUDY, {0x00100010: "Mueller*", tags.PATIENT_ID: "PID-names"})))


async def test_reading_a_whole_study_of_two_series_is_one_entry_of_the_ledger(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    study = generate_uid()
    files = [make_instance(study, series, number=number) for series in (generate_uid(), generate_uid()) for number in range(3)]
    for file in files:
        await archive.receive(Incoming(file))
    await archive.settle()
    instances = archive.instances(study)
    assert len({each.place.file_id for each in instances if each.place}) == 2
    appended: list[Entry] = []
    append = LedgerClient.append_signed

    async def counted(self: LedgerClient, entries: Sequence[Entry], *more: Answered | None) -> list[Inclusion]:
        appended.extend(entries)
        return list(await append(self, entries, *more))

    monkeypatch.setattr(LedgerClient, "append_signed", counted)
    opened = [await archive.open(each) for each in instances]
    assert {await each.read() for each in opened} == set(files)
    assert len(appended) == 1


async def test_a_series_that_is_settled_by_many_at_once_is_stored_once(archive: Archive) -> None:
    study, series = generate_uid(), generate_uid()
    for number in range(12):
        await archive.receive(Incoming(make_instance(study, series, number=number)))
        archive.settle_soon([(study, series)])
        if number % 4 == 3:
            await asyncio.gather(*(archive.settle() for _ in range(3)))
    await archive.settle()
    assert archive.waiting() == (0, 0)
    assert archive.spool.used_bytes == 0
    rows = [row for row in archive.vault.ls() if row.attributes.get("series-uid") == series]
    assert len(rows) == len({row.sha256 for row in rows}) == 12


async def test_while_nodes_are_out_of_reach_what_comes_is_kept_and_served_and_stored_when_they_are_back(
    opened: Opened, trial: LocalConsortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, file = (uid := generate_uid()), make_instance(uid)
    async with opened(Rules(quiet_s=0.1)) as archive:
        trial.kill(trial.names[-1])
        try:
            assert (await archive.receive(Incoming(file))).outcome is Outcome.STORED
            asked_for = (await archive.receive(Incoming(make_instance()))).sop_uid
            with pytest.raises(Unavailable):
                await archive.settle()
            assert archive.last_failure
            (instance,) = archive.instances(study)
            assert await (await archive.open(instance)).read() == file
            assert await archive.committed([asked_for, "1.2.3"]) == Committed({}, frozenset([asked_for]))
            monkeypatch.setattr(intake, "retry_s", 0.1)
            patient = asyncio.create_task(archive.committed([asked_for], patience_s=60))
        finally:
            trial.restart(trial.names[-1])
        assert (await patient).receipts.keys() == {asked_for}
        archive._not_before = 0.0  # it would wait ten seconds
        watching = asyncio.create_task(archive.watch())
        try:
            async with asyncio.timeout(60):
                while archive.waiting()[0]:
                    await asyncio.sleep(0.05)
        finally:
            watching.cancel()
        assert archive.receipt(instance.uid).sha256 == sha256(file).digest()


async def test_an_instance_that_the_disk_has_spoiled_holds_up_no_others_and_can_be_sent_again(archive: Archive) -> None:
    study, series = generate_uid(), generate_uid()
    files = [make_instance(study, series, number=number) for number in range(3)]
    bad, *good = [await archive.receive(Incoming(file)) for file in files]
    (instance,) = archive.catalog.instances(bad.sop_uid)
    entry = archive.entry(instance)
    assert entry is not None
    (path,) = archive.spool.folder.glob("*.spool")
    with open(path, "r+b") as file:
        file.seek(entry.offset + 100)
        file.write(b"spoiled")
    await archive.settle()
    assert {archive.receipt(each.sop_uid).sop_uid for each in good} == {each.sop_uid for each in good}
    assert (archive.waiting(), archive.damaged) == ((1, 1), {entry})
    assert (await archive.committed([bad.sop_uid])).waiting == {bad.sop_uid}
    assert (await archive.receive(Incoming(files[0]))).outcome is Outcome.STORED
    await archive.settle()
    assert archive.receipt(bad.sop_uid).sha256 == sha256(files[0]).digest()
    assert (archive.waiting(), archive.damaged, archive.spool.used_bytes) == ((0, 0), set(), 0)
