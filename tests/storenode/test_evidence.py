"""What is kept as evidence, and how much of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medshard_protocol.errors import Absent, Malformed
from storenode import evidence
from storenode.evidence import Evidence, Exhibit


def test_the_same_proof_is_kept_once_whoever_tells_of_it(tmp_path: Path) -> None:
    kept = Evidence(tmp_path / "evidence")
    first = kept.keep("fork", {"node": "a", "size": 5}, {"one": b"1", "two": b"2"})
    assert kept.keep("fork", {"node": "b"}, {"two": b"2", "one": b"1"}) == first
    assert kept.keep("fork", {}, {"one": b"1", "two": b"3"}) != first
    assert kept.counts() == {"fork": 2}
    exhibit = Exhibit.read(first)
    assert (exhibit.kind, exhibit.details, exhibit.documents) == ("fork", {"node": "a", "size": 5}, {"one": b"1", "two": b"2"})
    assert exhibit.file_name == first.name


def test_a_flood_of_one_kind_keeps_its_first_and_its_last_and_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "files_max", 6)
    kept = Evidence(tmp_path)
    fork = kept.keep("fork", {}, {"note": b"fork"})
    for number in range(20):
        path = kept.keep("stale", {}, {"note": b"%d" % number})
        os.utime(path, (number, number))
    assert [Exhibit.read(path).documents["note"] for path in kept.files("stale")] == [b"0", b"1", b"2", b"17", b"18", b"19"]
    assert fork.exists()
    monkeypatch.setattr(evidence, "bytes_max", 2_500)
    kept.keep("stale", {}, {"note": bytes(2_000)})
    assert sum(path.stat().st_size for path in kept.files("stale")) <= 2_500


def test_a_kind_that_nobody_knows_and_documents_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind"):
        Evidence(tmp_path).keep("gossip", {}, {})
    with pytest.raises(ValueError, match="bytes"):
        Evidence(tmp_path).keep("fork", {}, {"note": bytes(evidence.evidence_bytes_max)})
    assert list(tmp_path.iterdir()) == []


def test_details_are_cleaned_of_what_a_terminal_would_obey(tmp_path: Path) -> None:
    path = Evidence(tmp_path).keep("stale", {"reason": "a\x1b[31mred" + "x" * 400, "seconds": -1}, {})
    details = Exhibit.read(path).details
    assert details["seconds"] == 0
    assert details["reason"] == "a?[31mred" + "x" * 291


def test_a_file_that_is_no_evidence_is_malformed(tmp_path: Path) -> None:
    path = Evidence(tmp_path).keep("stale", {"seconds": 90}, {"note": b"text"})
    good = path.read_bytes()
    for bad in (b"", good[:-1], good + b"\0", good.replace(b"stale", b"stole"), good.replace(b"note", b"N\nte")):
        path.write_bytes(bad)
        with pytest.raises(Malformed):
            Exhibit.read(path)
    with pytest.raises(Absent):
        Exhibit.read(tmp_path / "none")
