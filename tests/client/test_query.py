"""What a search means."""

from __future__ import annotations

from typing import Any

import pytest

from medshard.model import Row
from medshard.query import Query, dates
from medshard.text import clean, fold, shown

attributes = {
    "patient-name": "Mu\u0308ller^Ju\u0308rgen^^Dr.",  # decomposed, as some file systems and scanners write it
    "patient-id": "PID-0042",
    "study-date": "20240131",
    "modality": "CT",
    "policy-number": "VN 7/2024",
    "tag:ward": "\u00c9tage 3",
}
row = Row(bytes(32), 1, "studies/Scan \u00c4.dcm".encode(), "application/dicom", attributes, bytes(32), None, 0, 0)


def meets(**query: Any) -> bool:
    return Query(**query).meets(row)


@pytest.mark.parametrize("name", ["scan", "SCAN a", "*.dcm", "scan ?.DCM", "studies/*", "*/scan*", "dies/sc", "*[ab].dcm"])
def test_a_name_is_found_by_a_part_or_a_pattern(name: str) -> None:
    assert meets(name=name)


@pytest.mark.parametrize("name", ["*.pdf", "scan", "dies/x", "s"])
def test_other_names_are_not_found(name: str) -> None:
    assert meets(name=name) == (name in ("scan", "s"))


@pytest.mark.parametrize(
    "patient", ["m\u00fcller", "MULLER", "j\u00fcrgen m\u00fcller", "Muller^Jurgen", "muller, jurgen", "pid-0042", "ller"]
)
def test_a_patient_is_found_by_words_of_the_name_or_the_whole_id(patient: str) -> None:
    assert meets(patient=patient)


@pytest.mark.parametrize("patient", ["schmidt", "muller hans", "PID-004", "", " "])
def test_another_patient_is_not_found(patient: str) -> None:
    assert not meets(patient=patient)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20240131", True),
        ("2024-01-31", True),
        ("2024-01", True),
        ("202401", True),
        ("2024", True),
        ("2023", False),
        ("2024-01..2024-03", True),
        ("2024-02..", False),
        ("..2024-01-31", True),
        ("..2024-01-30", False),
        ("20240101-20240131", True),
        ("20240201-", False),
        ("-20240131", True),
    ],
)
def test_a_study_date_is_a_day_a_month_a_year_or_a_range(text: str, expected: bool) -> None:
    assert meets(study_date=text) == expected


@pytest.mark.parametrize("text", ["", "yesterday", "2024-13", "20240230", "2024-02-30", "31.01.2024", "-", "2024..2023", "20241", "-..x"])
def test_what_is_no_date_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"date|ends before"):
        dates(text)


def test_a_file_without_study_date_is_in_no_range() -> None:
    assert not Query(study_date="..2099").meets(Row(bytes(32), 1, b"x", "a/b", {"study-date": "unknown!"}, bytes(32), None, 0, 0))


def test_other_conditions_compare_whole_values() -> None:
    assert meets(modality="ct")
    assert not meets(modality="c")
    assert not meets(modality="MR")
    assert meets(policy_number="vn 7/2024")
    assert meets(policy_number="VN*")
    assert not meets(policy_number="VN")
    assert meets(tags={"ward": "etage 3"})
    assert meets(tags={"ward": "*"})
    assert not meets(tags={"room": "*"})
    assert meets(media_type="dicom")
    assert meets(media_type="application/")
    assert not meets(media_type="pdf")


def test_every_condition_must_hold() -> None:
    assert meets(modality="CT", patient="muller", study_date="2024")
    assert not meets(modality="CT", patient="muller", study_date="2025")
    assert meets()


def test_folding_drops_case_accents_and_separators() -> None:
    assert fold("S\u00d8RENSEN^\u0141ukasz=Stra\u00dfe") == "sorensen lukasz strasse"


def test_text_from_outside_steers_no_terminal() -> None:
    assert clean("a\x1b[31mb\0c\n d\u202e e\udcff ") == "a [31mb c d e?"
    assert len(clean("x" * 10_000)) == 1_024
    assert shown(b"caf\xe9\x1b[31m\n") == "caf\\xe9\\x1b[31m\\x0a"
    assert shown("Sch\u00e4del.dcm".encode()) == "Sch\u00e4del.dcm"
