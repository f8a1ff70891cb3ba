"""The index of the archive: what is found is what matches, and nothing of a patient is in clear on the disk."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tests.postgres import Server, running_server

from medshard.gateway import tags
from medshard.gateway.catalog import Catalog
from medshard.gateway.matching import test_for as matcher
from medshard.gateway.model import Instance, Place, Query
from medshard.gateway.tags import Level, by_name
from medshard_protocol.errors import Damaged, Malformed, Refused, Unavailable

NAME, DATE, TIME, ACCESSION, DESCRIPTION = 0x00100010, 0x00080020, 0x00080030, 0x00080050, 0x00081030


def instance(number: int, **said: str) -> Instance:
    attributes = {name.replace("_", "-"): text for name, text in said.items()}
    uid = f"1.2.{number}"
    about = {"study-uid": uid, "series-uid": f"{uid}.1", "sop-uid": f"{uid}.1.1", "sop-class": "1.2.840.10008.5.1.4.1.1.2"}
    about |= {"patient-name": "Example^Anna", "patient-id": "P1", "study-date": "20260315", "modality": "CT"}
    about |= attributes
    place = Place(bytes([number % 256]) * 32, 0, number)
    return Instance(about["study-uid"], about["series-uid"], about["sop-uid"], 100, os.urandom(32), number, about, place)


Opened = Callable[..., Catalog]
databases = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as made:
        yield made


@pytest.fixture(params=["sqlite", "postgresql"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    """Open one index again and again; what is said of it here holds for both engines."""
    made: list[Catalog] = []
    dsn = ""
    if request.param == "postgresql":
        server: Server = request.getfixturevalue("server")
        name = f"index{next(databases)}"
        server.sql(f"CREATE DATABASE {name}")
        dsn = server.dsn(name)

    def open_one(key: bytes = b"k" * 32, gateway: bytes = b"") -> Catalog:
        from medshard.gateway.postgres import PostgresTables

        made.append(Catalog(PostgresTables(dsn) if dsn else tmp_path / "dicom.sqlite", key, gateway))
        return made[-1]

    yield open_one
    for each in made:
        each.close()


@pytest.fixture
def catalog(opened: Opened) -> Catalog:
    return opened()


def test_what_sqlite_sorts_out_is_only_what_does_not_match(catalog: Catalog) -> None:
    names = ["Müller^Änne=山田^太郎", "MULLER^ANNE", "O'Hara^Scarlett^^Dr.", "[a]*b^c", "", "Smith^John"]
    dates, times = ["20260315", "20251231", ""], ["101500", "10", "235959.999", ""]
    others = [("A1", "CT THORAX"), ("[x]", "ct thorax"), ("", "")]
    kept = []
    for number, (name, date, time, other) in enumerate(itertools.product(names, dates, times, others)):
        modality = ("CT", "MR", "SR")[number % 3]
        about = {"patient_name": name, "study_date": date, "study_time": time, "modality": modality}
        about |= {"accession_number": other[0], "study_description": other[1]}
        kept.append(instance(number, **about))
    catalog.put(kept)
    queries: list[dict[int, str]] = [
        {NAME: value}
        for value in ("müller*", "*太郎", "Müller^Änne", "山田^太郎", "[a]*", "smith^john^^", "?mith^*", "o'hara^scarlett*dr.", "*", "x*")
    ]
    queries += [{DATE: value} for value in ("20260315", "20260101-", "-20260101", "20251231-20260315", "20260315-20260315", "2026")]
    queries += [{TIME: value} for value in ("101500", "10", "1000-1030", "-100000", "235959-", "10-10")]
    queries += [
        {ACCESSION: "A1"},
        {ACCESSION: "[x]"},
        {ACCESSION: "?"},
        {DESCRIPTION: "CT*"},
        {DESCRIPTION: "ct thorax"},
        {DESCRIPTION: "*X"},
    ]
    queries += [{tags.MODALITIES_IN_STUDY: value} for value in ("CT", "C?", "CT\\SR", "XX")]
    queries += [{tags.STUDY_UID: "1.2.3\\1.2.4\\9"}, {NAME: "m*", DATE: "2026*", TIME: "10"}, {}]
    for keys in queries:
        tests = {tag: matcher(tag, value) for tag, value in keys.items()}
        expected = set()
        for each in kept:
            values = {by_name[name].tag: text for name, text in each.attributes.items()} | {
                tags.MODALITIES_IN_STUDY: each.attributes["modality"]
            }
            if all(test is None or test(values.get(tag, "")) for tag, test in tests.items()):
                expected.add(each.study)
        assert {row.study for row in catalog.find(Query(Level.STUDY, keys))} == expected, keys


def test_ranges_take_their_ends_and_times_are_compared_as_times(catalog: Catalog) -> None:
    catalog.put([instance(1, study_date="20260315", study_time="1015")])
    for keys in (
        {DATE: "20260315-20260315"},
        {TIME: "101500-101500"},
        {TIME: "1015"},
        {TIME: "101500.000"},
        {TIME: "10:15:00"},
        {TIME: "09-11"},
    ):
        assert len(list(catalog.find(Query(Level.STUDY, keys)))) == 1, keys
    for keys in ({DATE: "20260316-"}, {TIME: "101501-"}, {TIME: "-101459"}):
        assert not list(catalog.find(Query(Level.STUDY, keys))), keys


def test_counts_are_of_what_is_served_at_each_level(catalog: Catalog) -> None:
    first = instance(1, patient_id="P7")
    more = [replace(instance(1, patient_id="P7", sop_uid=f"1.2.1.1.{n}", instance_number=str(n)), uid=f"1.2.1.1.{n}") for n in (2, 3)]
    other = instance(2, patient_id="P7", modality="SR", sop_class="1.2.840.10008.5.1.4.1.1.88.11")
    twin = replace(first, sha256=os.urandom(32), received=99)
    catalog.put([first, *more, other, twin])
    (patient,) = catalog.find(Query(Level.PATIENT, {tags.PATIENT_ID: "P7"}))
    assert [patient.attributes[tag] for tag in (tags.PATIENT_STUDIES, tags.PATIENT_SERIES, tags.PATIENT_INSTANCES)] == ["2", "2", "4"]
    (study,) = catalog.find(Query(Level.STUDY, {tags.STUDY_UID: "1.2.1"}))
    assert (study.attributes[tags.STUDY_SERIES], study.attributes[tags.STUDY_INSTANCES]) == ("1", "3")
    assert study.attributes[tags.SOP_CLASSES_IN_STUDY] == "1.2.840.10008.5.1.4.1.1.2"
    (series,) = catalog.find(Query(Level.SERIES, {tags.STUDY_UID: "1.2.1"}))
    assert series.attributes[tags.SERIES_INSTANCES] == "3"
    assert [row.uid for row in catalog.find(Query(Level.INSTANCE, {tags.SERIES_UID: "1.2.1.1"}))] == ["1.2.1.1.1", "1.2.1.1.2", "1.2.1.1.3"]
    served, kept = catalog.instances("1.2.1.1.1")
    assert (served.sha256, kept.sha256, served.flagged) == (twin.sha256, first.sha256, True)
    assert [row.study for row in catalog.find(Query(Level.STUDY, {}, limit=1, offset=1))] == ["1.2.1"]


def test_nothing_of_a_patient_is_in_clear_in_the_tables_and_another_key_opens_nothing(
    opened: Opened, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    catalog = opened()
    catalog.put([instance(1, patient_name="Zimmermann^Käthe", patient_id="SECRET-4711", study_description="Lungenembolie")])
    catalog.keep_summary("1.2.1", "1.2.1.1", b"Zimmermann")
    catalog.flush()
    if catalog.shared:
        server: Server = request.getfixturevalue("server")
        server.sql("CHECKPOINT")
        places = [path for path in server.data.rglob("*") if path.is_file()]
    else:
        places = list(tmp_path.iterdir())
    on_disk = b"".join(file.read_bytes() for file in places)
    assert catalog._records.token("study", "1.2.1") in on_disk
    for word in ("Zimmermann", "Käthe", "SECRET-4711", "Lungenembolie", "1.2.1.1"):
        assert word.encode() not in on_disk, word
    with pytest.raises(Damaged):
        opened(b"x" * 32)


def test_what_another_process_writes_is_seen_after_a_refresh(opened: Opened) -> None:
    here, there = opened(), opened()
    there.put([instance(1)])
    there.flush()
    before = here.version("1.2.1")
    assert here.refresh()
    assert not here.refresh()
    assert here.version("1.2.1") != before
    assert [row.study for row in here.find(Query(Level.STUDY))] == ["1.2.1"]
    here.forget([instance(1).place.file_id])  # type: ignore[union-attr]
    assert there.refresh()
    assert not list(there.find(Query(Level.STUDY)))


def test_those_that_write_at_once_see_everything_of_each_other(opened: Opened) -> None:
    catalogs = [opened(gateway=bytes([number]) * 16) for number in range(3)]

    def write(number: int) -> None:
        for of in range(8):
            catalogs[number].put([instance(10 * number + of, patient_id=f"P{number}-{of}")])
            catalogs[number].flush()

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(write, range(3)))
    for each in catalogs:
        each.refresh()
        assert each.counts() == (24, 24, 24)
        found = {row.attributes[tags.PATIENT_ID] for row in each.find(Query(Level.STUDY))}
        assert found == {f"P{number}-{of}" for number in range(3) for of in range(8)}


def test_a_place_in_the_store_is_not_given_up_for_one_in_a_spool(opened: Opened) -> None:
    here, there = opened(gateway=b"a" * 16), opened(gateway=b"b" * 16)
    stored = instance(1)
    for catalog, each in ((here, replace(stored, place=None)), (there, replace(stored, place=None)), (here, stored)):
        catalog.put([each])
        catalog.flush()
    there.put([replace(stored, place=None, received=5)])
    there.flush()
    (found,) = here.instances(stored.uid)
    assert found.place == stored.place
    there.forget_waiting([])
    assert here.counts() == (1, 1, 1)


def test_what_waited_in_a_spool_that_was_lost_is_dropped_by_its_gateway_alone(opened: Opened) -> None:
    here, there = opened(gateway=b"a" * 16), opened(gateway=b"b" * 16)
    first, second, third = (replace(instance(number), place=None) for number in (1, 2, 3))
    for catalog, instances in ((here, [first, second]), (there, [third])):
        catalog.put(instances)
        catalog.flush()
    here.refresh()
    here.forget_waiting([(first.uid, first.sha256)])
    assert {row.study for row in here.find(Query(Level.STUDY))} == {first.study, third.study}


def test_a_summary_is_kept_until_something_of_its_series_is_forgotten(opened: Opened) -> None:
    catalog = opened()
    stored = instance(1)
    catalog.put([stored])
    catalog.keep_summary(stored.study, stored.series, b"small")
    catalog.keep_summary(stored.study, stored.series, b"smaller")
    catalog.keep_summary(stored.study, "1.2.3.4", b"of nothing that is here")
    assert (opened().summary(stored.study, stored.series), catalog.summary(stored.study, "1.2.3.4")) == (b"smaller", None)
    assert stored.place
    catalog.forget([stored.place.file_id])
    assert catalog.summary(stored.study, stored.series) is None


def test_a_row_that_was_moved_to_another_study_or_file_is_found(opened: Opened) -> None:
    catalog = opened()
    catalog.put([instance(1), instance(2, patient_id="P2"), instance(3, patient_id="P3")])
    catalog.flush()
    tables = catalog._tables

    def change(sql: str) -> None:
        tables.change(lambda: tables.rows(sql))

    change("UPDATE instances SET file = (SELECT file FROM instances ORDER BY file DESC LIMIT 1)")
    assert [each.place for each in catalog.served("1.2.1")] == [instance(1).place]  # what counts is sealed
    change("UPDATE instances SET series = (SELECT max(id) FROM series)")
    with pytest.raises(Damaged):
        catalog.served("1.2.3")
    with pytest.raises(Damaged):
        list(catalog.find(Query(Level.INSTANCE, {tags.STUDY_UID: "1.2.3"})))
    change("UPDATE series SET study = (SELECT max(study) FROM series)")
    with pytest.raises(Damaged):
        list(catalog.find(Query(Level.SERIES, {tags.STUDY_UID: "1.2.3"})))


def test_after_a_reset_everybody_begins_anew(opened: Opened) -> None:
    here, there = opened(), opened()
    here.put([instance(1)])
    here.flush()
    assert there.refresh()
    made = there.made
    here._tables.reset()
    again = opened()
    again.put([instance(2)])
    again.flush()
    if there.shared:  # a file of this machine is deleted, and programs that have it open keep what they have
        assert there.refresh()
        assert there.made != made
        assert [row.study for row in there.find(Query(Level.STUDY))] == ["1.2.2"]


@pytest.mark.parametrize("opened", ["postgresql"], indirect=True)
def test_while_its_server_is_away_nothing_that_waits_is_lost(opened: Opened, server: Server) -> None:
    catalog = opened()
    catalog.put([instance(1)])
    catalog.flush()
    server.kill()
    catalog.put([instance(2)])
    for _ in range(3):
        with pytest.raises(Unavailable, match="cannot be reached"):
            catalog.flush()
    with pytest.raises(Unavailable):
        list(catalog.find(Query(Level.STUDY)))
    server.start()
    catalog._tables._not_before = 0.0  # type: ignore[attr-defined]
    assert {row.study for row in catalog.find(Query(Level.STUDY))} == {"1.2.1", "1.2.2"}
    server.kill()
    server.start()
    assert len(catalog.served("1.2.2")) == 1  # a connection that was lost in between is nobody's trouble


@pytest.mark.parametrize(
    "address", ["postgresql://u@db.example/x", "postgresql://u@10.0.0.7,localhost/x?sslmode=require", "postgresql:///x?host=db.example"]
)
def test_an_index_over_a_network_without_a_checked_certificate_is_refused(address: str) -> None:
    from medshard.gateway.postgres import checked

    with pytest.raises(Refused, match="certificate"):
        checked(address)
    with pytest.raises(Malformed):
        checked(address.replace("postgresql", "mysql"))
    assert "secret" not in checked("postgresql://u:secret@db.example/x?sslmode=verify-full")
    for near in ("postgresql:///x", "postgresql://u@127.0.0.1:5433/x", "postgresql://u@[::1]/x", "postgresql://u@/x?host=/run/postgresql"):
        assert "x" in checked(near)
