"""Audits between real nodes: what is lost is found, each kind of fault is told from the others, and a lie is kept as evidence.

Seven institutions with a node each, and code 2 of 7: enough holders for one of each kind, and for a quorum that still stands.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.auditors import rules_name

from medshard import Vault, nursery
from medshard.consortium import LocalConsortium
from medshard_protocol import canonical
from medshard_protocol.audit import Report, audit_path
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.manifest import Manifest
from medshard_protocol.roster import Node
from storenode.asking import exchange
from storenode.evidence import evidence_in
from storenode.identity import NodeKeys

k, n = 2, 7
settings = {
    "per_day": 50_000,
    "answer_s": 6.0,
    "confirm_s": 0.5,
    "silence_s": 3.0,
    "scrub_every_s": 1.0,
    "on": "false",
}  # nothing is repaired: these tests look at what is lost
patience_s = 90.0


class Audited(LocalConsortium):
    """A consortium whose nodes audit each other all the time."""

    def _program(self, name: str) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name("auditors.py")), str(self.home(name))]

    def _spawn(self, name: str) -> None:
        path = self.home(name) / "config.toml"
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            key = line.removeprefix("# ").partition(" = ")[0]
            if key in settings:
                lines[number] = f"{key} = {settings[key]}"
        path.write_text("\n".join(lines) + "\n")
        super()._spawn(name)

    def node(self, name: str) -> Node:
        assert self.roster is not None
        return next(node for node in self.roster.nodes if node.name == name)

    def name(self, node: NodeId) -> str:
        assert self.roster is not None
        return self.roster.node(node).name

    def ask(self, by: str, of: str, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        assert self.roster is not None
        return exchange(self.node(of), self.roster, NodeKeys.load(self.home(by)), method, path, body, timeout_s=20.0)

    def storenode(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return nursery.run(["-m", "storenode", "--home", str(self.home(name)), *arguments])

    def audits(self, name: str, file: FileId | None = None) -> dict[str, Any]:
        """What ``storenode audit`` tells, asked for as it does."""
        method, question = ("GET", b"") if file is None else ("POST", canonical.encode([1, 1, [file]]))
        deadline = time.monotonic() + 30
        while True:
            status, body = self.ask(name, name, method, "/v1/audit", question)
            if status == 200 or b"unregistered" not in body or time.monotonic() > deadline:  # a quorum hears of a file first
                break
            time.sleep(0.1)
        assert status == 200, body
        told: dict[str, Any] = json.loads(body)
        return told

    def misbehave(self, name: str, **rule: object) -> None:
        (self.home(name) / rules_name).write_text(json.dumps(rule))

    def behave(self, name: str) -> None:
        (self.home(name) / rules_name).unlink(missing_ok=True)


class File:
    """A file that was put, and its shards on the nodes' disks."""

    def __init__(self, trial: Audited, sha256: bytes, manifest: Manifest) -> None:
        self.trial, self.sha256, self.manifest, self.id = trial, sha256, manifest, manifest.file_id.hex()
        self.holders = [trial.name(ref.node) for ref in manifest.shards]

    def on_disk(self, name: str) -> Path:
        (path,) = (self.trial.home(name) / "data" / "shards" / self.id[:2]).glob(f"{self.id}-*")
        return path

    def drop_row(self, name: str) -> None:
        with sqlite3.connect(self.trial.home(name) / "data" / "store.sqlite") as catalog:
            catalog.execute("DELETE FROM shards WHERE file_id = ?", (self.manifest.file_id,))
        catalog.close()

    def flip(self, name: str) -> None:
        """Change a bit of every cell."""
        data = bytearray(self.on_disk(name).read_bytes())
        for at in range(0, len(data), self.manifest.layout.cell_size):
            data[at] ^= 1
        self.on_disk(name).write_bytes(data)

    def verdicts(self, by: str) -> dict[str, str]:
        """What an audit of this file by a node comes to now."""
        (round_,) = self.trial.audits(by, self.manifest.file_id)["rounds"]
        return {result["node"]: result["verdict"] for result in round_["results"]}


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    with Audited(tmp_path_factory.mktemp("audit"), institutions=n, code=(k, n)) as consortium:
        yield consortium


@pytest.fixture
async def vault(trial: Audited) -> AsyncIterator[Vault]:
    async with Vault.open(trial.vault_home, trial.passphrase) as opened:
        yield opened
    for name in trial.names:
        trial.behave(name)
        process = trial.running.get(name)
        if process is None or process.poll() is not None:
            trial.restart(name)


@pytest.fixture
async def file(trial: Audited, vault: Vault, tmp_path: Path) -> File:
    plain = tmp_path / "plain"
    while True:  # until every holder has its shard: a slow one is left behind
        plain.write_bytes(os.urandom(900_000))
        (stored,) = (await vault.put([plain])).stored
        made = File(trial, stored.sha256, (await vault.evidence(stored.sha256))[0])
        if all(list((trial.home(name) / "data" / "shards" / made.id[:2]).glob(f"{made.id}-*")) for name in made.holders):
            return made


def test_every_kind_of_fault_is_told_from_the_others(trial: Audited, file: File) -> None:
    auditor, good, slow, frozen, absent, rotten, liar = file.holders
    until(lambda: set(file.verdicts(auditor).values()) == {"good"})
    trial.misbehave(slow, do="slow", seconds=2.5)
    trial.misbehave(frozen, do="silent", seconds=9.0)
    file.drop_row(absent)
    file.flip(rotten)
    trial.misbehave(liar, do="tag")
    wanted = {good: "good", slow: "slow", frozen: "late", absent: "absent", rotten: "damaged", liar: "wrong"}
    until(lambda: file.verdicts(auditor) == wanted)
    (kept,) = evidence_in(trial.home(auditor) / "data").files("false-tag")[:1]
    judged = trial.storenode(auditor, "evidence", "verify", str(kept))
    assert f"The tag of {liar} does not belong to them" in judged.stdout
    told = trial.audits(auditor)
    assert told["bad"] == {"late": 1, "absent": 1, "damaged": 1, "wrong": 1}
    until(lambda: trial.audits(auditor)["missing"] >= 3)  # a liar's at once, the others' when they have said so twice or for long nothing
    shown = trial.storenode(auditor, "audit", file.id)
    assert shown.returncode == 6
    assert "MISSING: " in shown.stdout
    assert [line for line in shown.stdout.splitlines() if liar in line and " wrong " in line]
    assert "MISSING: " in trial.storenode(auditor, "status").stdout
    for name in (slow, frozen, liar):
        trial.behave(name)
    until(lambda: trial.audits(auditor, file.manifest.file_id)["bad"] == {"absent": 1, "damaged": 1})


async def test_what_is_lost_is_found_without_anybodys_asking_and_told_to_the_owner(trial: Audited, vault: Vault, file: File) -> None:
    absent, rotten, dead, *others = file.holders
    file.drop_row(absent)
    file.flip(rotten)
    trial.kill(dead)

    def found() -> bool:
        for name in others:
            told = trial.audits(name)
            worst = {each["node"]: each["verdict"] for each in told["worst"] if each["file"] == file.id}
            if (told["silent"], worst.get(absent), worst.get(rotten)) != ([dead], "absent", "damaged"):
                return False
        return all(trial.audits(name)["scrub"]["bad"] for name in (rotten, absent))

    until(found)
    report = await vault.verify(file.sha256)
    told = {(each.node, each.verdict) for each in report.audits if each.auditor in others and each.is_bad}
    assert {(absent, "absent"), (rotten, "damaged"), (dead, "late")} <= told


def test_a_frozen_node_is_late_and_good_again_when_it_goes_on(trial: Audited, file: File) -> None:
    auditor, frozen = file.holders[:2]
    trial.freeze(frozen)
    try:
        assert file.verdicts(auditor)[frozen] == "late"
    finally:
        trial.thaw(frozen)
    until(lambda: file.verdicts(auditor)[frozen] == "good")


def test_a_report_is_signed_and_outlives_its_node_and_nobody_else_may_begin_an_audit(trial: Audited, file: File) -> None:
    auditor, other = file.holders[:2]
    until(lambda: set(file.verdicts(auditor).values()) == {"good"})
    trial.kill(auditor)
    trial.restart(auditor)
    status, body = trial.ask(other, auditor, "GET", audit_path(file.manifest.file_id))
    assert status == 200
    report = Report.from_bytes(body)
    assert trial.roster is not None
    report.verify(trial.roster.origin, trial.node(auditor).tls_key)
    assert len(report.results) == n - 1
    assert trial.ask(other, auditor, "POST", "/v1/audit", b"\x93\x01\x01\x90")[0] == 403
    assert trial.ask(other, auditor, "GET", "/v1/audit")[0] == 403
