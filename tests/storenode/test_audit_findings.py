"""What audits found is kept, and one failure is never enough to call a shard lost."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from medshard_protocol.audit import Verdict
from medshard_protocol.ids import FileId, NodeId
from storenode.auditing import findings as module
from storenode.auditing.findings import Findings, file_name

me, other, third = (NodeId(bytes([i]) * 16) for i in (1, 2, 3))
file_id = FileId(b"f" * 32)


@pytest.fixture
def findings(tmp_path: Path) -> Iterator[Findings]:
    made = Findings(tmp_path, me=me, silence_s=3600)
    yield made
    made.close()


def test_a_shard_is_missing_after_its_holder_has_said_so_twice_some_time_apart(findings: Findings) -> None:
    findings.report(file_id, 3, other, Verdict.ABSENT, 1000)
    findings.report(file_id, 3, other, Verdict.ABSENT, 1001)
    assert not list(findings.missing())
    findings.report(file_id, 3, other, Verdict.WRONG, 1060)
    (found,) = findings.missing()
    assert (found.file_id, found.shard, found.node, found.verdict, found.since, found.times) == (file_id, 3, other, Verdict.WRONG, 1000, 3)


def test_a_good_answer_ends_a_finding_and_so_does_another_holder(findings: Findings) -> None:
    for verdict in (Verdict.GOOD, Verdict.SAID, Verdict.SLOW):
        findings.report(file_id, 3, other, Verdict.ABSENT, 1000)
        findings.report(file_id, 3, other, Verdict.ABSENT, 2000)
        assert list(findings.missing())
        findings.report(file_id, 3, other, verdict, 3000)
        assert not list(findings.missing())
        assert not findings.bad()
    findings.report(file_id, 3, other, Verdict.ABSENT, 4000)
    findings.report(file_id, 3, third, Verdict.ABSENT, 5000)
    assert not list(findings.missing())


def test_what_this_node_finds_on_its_own_disk_needs_no_second_look(findings: Findings) -> None:
    findings.report(file_id, 0, me, Verdict.DAMAGED, 1000)
    assert [each.shard for each in findings.missing()] == [0]
    findings.forget(file_id, 0)
    assert not list(findings.missing())


def test_a_node_is_silent_only_when_it_answered_nothing_for_the_whole_grace(findings: Findings) -> None:
    findings.report(file_id, 1, third, Verdict.GOOD, 0)
    for at in range(0, 3600, 600):
        findings.report(FileId(os.urandom(32)), 1, other, Verdict.LATE, at)
    assert not findings.silent()
    assert not list(findings.missing())
    findings.report(file_id, 2, other, Verdict.LATE, 3600)
    assert findings.silent() == {other: 0}
    assert {each.node for each in findings.missing()} == {other}
    findings.report(file_id, 2, other, Verdict.REFUSED, 3700)  # it is there
    assert not findings.silent()


def test_time_that_this_node_was_away_is_nobodys_silence(findings: Findings) -> None:
    findings.report(file_id, 1, third, Verdict.GOOD, 0)
    findings.report(file_id, 2, other, Verdict.LATE, 0)
    findings.report(file_id, 2, other, Verdict.LATE, 1800)
    findings.report(file_id, 2, other, Verdict.LATE, 1800 + 1000)
    assert not findings.silent()
    findings.close()  # and the node stops, for a week
    again = Findings(findings._path.parent, me=me, silence_s=2 * 3600)
    again.report(file_id, 2, other, Verdict.LATE, 7 * 86_400)
    assert not again.silent()
    again.close()


def test_a_node_that_hears_nobody_takes_itself_for_cut_off(findings: Findings) -> None:
    for node in (other, third):
        for at in (0, 3000, 6000):
            findings.report(file_id, node[0], node, Verdict.LATE, at)
    assert not findings.silent()
    assert not list(findings.missing())


def test_findings_outlive_the_process(tmp_path: Path) -> None:
    first = Findings(tmp_path, me=me, silence_s=3600)
    first.report(file_id, 3, other, Verdict.ABSENT, 1000, answer=b"signed")
    first.note("scrub", b"here")
    first.close()
    second = Findings(tmp_path, me=me, silence_s=3600)
    second.report(file_id, 3, other, Verdict.ABSENT, 2000)
    assert [each.times for each in second.missing()] == [2]
    assert second.noted("scrub") == b"here"
    assert second.noted("nothing") is None
    assert second.tallies(1, 2000)[other][Verdict.ABSENT] == 2
    second.close()


def test_good_results_are_rotated_and_bad_ones_stay(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "results_max", 10)
    findings.report(file_id, 3, other, Verdict.WRONG, 1)
    for at in range(2, 52):
        findings.report(FileId(bytes([at]) * 32), 0, other, Verdict.GOOD, at)
    kept = findings.latest(100)
    assert len(kept) == 11
    assert [each.verdict for each in kept].count(Verdict.WRONG) == 1
    assert min(each.checked for each in kept if each.verdict is Verdict.GOOD) == 42
    findings.report(file_id, 4, other, Verdict.GOOD, 60 * 86_400)
    assert sum(sum(each.values()) for each in findings.tallies(1000, 60 * 86_400).values()) == 1


def test_a_notebook_that_is_closed_is_not_taken_for_a_damaged_one(findings: Findings) -> None:
    findings.report(file_id, 3, other, Verdict.ABSENT, 1000)
    findings.close()
    with pytest.raises(sqlite3.ProgrammingError):
        findings.bad()
    with pytest.raises(sqlite3.ProgrammingError):
        findings.report(file_id, 3, other, Verdict.ABSENT, 1000)
    assert not findings._path.with_suffix(".damaged").exists()


def test_a_damaged_notebook_is_put_aside_and_begun_anew(tmp_path: Path) -> None:
    first = Findings(tmp_path, me=me, silence_s=3600)
    first.report(file_id, 3, other, Verdict.ABSENT, 1000)
    first.close()
    (tmp_path / file_name).write_bytes(os.urandom(8192))
    second = Findings(tmp_path, me=me, silence_s=3600)
    assert not second.bad()
    second.report(file_id, 3, other, Verdict.ABSENT, 1000)
    assert len(second.bad()) == 1
    assert (tmp_path / "audit.damaged").exists()
    second.close()
