"""The index of the archive: what is found is what matches, and nothing of a patient is in clear on the disk."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest

from medshard.gateway import tags
from medshard.gateway.catalog import Catalog
from medshard.gateway.matching import test_for as matcher
from medshard.gateway.model import Instance, Place, Query
from medshard.gateway.tags import Level, by_name
from medshard_protocol.errors import Damaged

NAME, DATE, TIME, ACCESSION, DESCRIPTION = 0x00100010, 0x00080020, 0x00080030, 0x00080050, 0x00081030


def instance(number: int, **said: str) -> Instance:
    attributes = {name.replace("_", "-"): text for name, text in said.items()}
    uid = f"1.2.{number}"
    about = {"study-uid": uid, "series-uid": f"{uid}.1", "sop-uid": f"{uid}.1.1", "sop-class": "1.2.840.10008.5.1.4.1.1.2"}
    about |= {"patient-name": "Example^Anna", "patient-id": "P1", "study-date": "20260315", "modality": "CT"}
    about |= attributes
    place = Place(bytes([number % 256]) * 32, 0, number)
    return Instance(about["study-uid"], about["series-uid"], about["sop-uid"], 100, os.urandom(32), number, about, place)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "dicom.sqlite", b"k" * 32)


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
    catalog.close()


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
    catalog.close()


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
    catalog.close()


def test_nothing_of_a_patient_is_in_clear_on_the_disk_and_a_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "dicom.sqlite"
    catalog = Catalog(path, b"k" * 32)
    catalog.put([instance(1, patient_name="Zimmermann^Käthe", patient_id="SECRET-4711", study_description="Lungenembolie")])
    catalog.flush()
    on_disk = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    for word in ("Zimmermann", "Käthe", "SECRET-4711", "Lungenembolie", "1.2.1.1", "20260315"):
        assert word.encode() not in on_disk, word
    catalog.close()
    with pytest.raises(Damaged):
        Catalog(path, b"x" * 32)


def test_what_another_process_writes_is_seen_after_a_refresh(tmp_path: Path) -> None:
    here, there = (Catalog(tmp_path / "dicom.sqlite", b"k" * 32) for _ in range(2))
    there.put([instance(1)])
    there.flush()
    assert here.refresh()
    assert not here.refresh()
    assert [row.study for row in here.find(Query(Level.STUDY))] == ["1.2.1"]
    here.forget([instance(1).place.file_id])  # type: ignore[union-attr]
    assert there.refresh()
    assert not list(there.find(Query(Level.STUDY)))
    here.close()
    there.close()
