"""A scanner that speaks DICOM alone, behind a gateway that only sends: real processes, dcmtk and curl.

It stores for its vault, reads nothing back, and keeps nothing that opens what it has stored; kill -9 loses nothing that was answered yes.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from pydicom.uid import CTImageStorage, generate_uid
from tests.gateway.conftest import make_instance
from tests.gateway.test_kills import Sender as Scanner
from tests.gateway.test_kills import free_port, start

from medshard import Vault
from medshard import sender as senders
from medshard.consortium import LocalConsortium
from medshard.gateway import book, segments, service
from medshard.gateway.book import Book
from medshard.gateway.intake import Intake, Placed, Rules
from medshard.gateway.model import Incoming, Instance, Outcome, Place
from medshard.gateway.part10 import read_head
from medshard.gateway.service import Settings, archive_of
from medshard.gateway.spool import Spool
from medshard.home import Home
from medshard.packs import Plan

places = os.pathsep.join(path for path in os.environ.get("PATH", "").split(os.pathsep) if ".venv" not in path)  # pynetdicom has one, too


@pytest.fixture(scope="module")
def home(trial: LocalConsortium) -> Path:
    made = trial.folder / "scanner"

    async def make() -> None:
        async with Vault.open(trial.vault_home, trial.passphrase) as vault:
            await vault.shares.publish_key()
            own = vault.keys.public
        await senders.new(Home(made), trial.invite(trial.names[0]), own)

    asyncio.run(make())
    return made


@contextmanager
def gateway(home: Path, folder: Path, *more: str) -> Iterator[int]:
    """Its DICOM port, once it answers."""
    port = free_port()
    process = start(home, folder, port, *more)
    try:
        deadline = time.monotonic() + 60
        while tool("echoscu", "-aec", "MEDSHARD", "127.0.0.1", port)[0] and time.monotonic() < deadline:
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(90)


def tool(name: str, *words: object) -> tuple[int, str]:
    path = shutil.which(name, path=places)
    if path is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run([path, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False)
    return done.returncode, done.stdout.decode("utf-8", "replace")


async def found_by_owner(trial: LocalConsortium, folder: Path, files: dict[str, bytes]) -> None:
    """The vault's own gateway finds every one of these instances while it runs, with its very data set."""
    settings = Settings(folder, 1 << 30, Rules(), None, None)
    async with Vault.open(trial.vault_home, trial.passphrase) as vault, archive_of(vault, settings) as archive:
        following = asyncio.create_task(service._follow(archive))
        async with asyncio.timeout(60):
            while not all(archive.catalog.instances(uid) for uid in files):
                await asyncio.sleep(0.1)
        following.cancel()
        for uid, file in files.items():
            stored = await (await archive.open(archive.catalog.instances(uid)[0])).read()
            assert stored[read_head(stored).start :] == file[read_head(file).start :]


def test_a_scanner_stores_through_a_gateway_that_only_sends_and_reads_nothing_back(
    trial: LocalConsortium, home: Path, tmp_path: Path
) -> None:
    study, series = generate_uid(), generate_uid()
    files = {uid: make_instance(study, series, uid, number=number) for number, uid in enumerate(generate_uid() for _ in range(3))}
    (tmp_path / "in").mkdir()
    for uid, file in files.items():
        (tmp_path / "in" / f"{uid}.dcm").write_bytes(file)
    web, status = free_port(), free_port()
    folder = tmp_path / "gateway"
    with gateway(home, folder, "--http", f"127.0.0.1:{web}", "--status", f"127.0.0.1:{status}") as port:
        node = ("-aec", "MEDSHARD", "127.0.0.1", port)
        assert tool("storescu", *node, "+sd", tmp_path / "in")[0] == 0
        query = ("-k", "0008,0052=STUDY", "-k", f"0020,000D={study}")
        for code, said in (tool("findscu", "-v", "-S", *query, *node), tool("movescu", "-v", "-aem", "PACS", "-S", *query, *node)):
            assert code
            assert "No Acceptable Presentation Contexts" in said
        (tmp_path / "got").mkdir()
        assert tool("getscu", "-v", "-S", "-od", tmp_path / "got", *query, *node)[0]
        assert not list((tmp_path / "got").iterdir())
        base = f"http://127.0.0.1:{web}"
        wado = f"/wado?requestType=WADO&studyUID={study}&seriesUID={series}&objectUID={next(iter(files))}"
        for path in ("/dicom-web/studies", f"/dicom-web/studies/{study}", f"/dicom-web/studies/{study}/metadata", wado):
            code, said = tool("curl", "-s", "-w", "%{http_code}", base + path)
            assert said.endswith("403"), said
            assert "only sends" in said
        late = make_instance(study, generate_uid(), uid := generate_uid())
        files[uid] = late
        (tmp_path / "late").write_bytes(b"\r\n--x\r\nContent-Type: application/dicom\r\n\r\n" + late + b"\r\n--x--")
        kind = 'Content-Type: multipart/related; type="application/dicom"; boundary=x'
        body = ("-H", kind, "--data-binary", f"@{tmp_path / 'late'}")
        said = tool("curl", "-s", "-w", "%{http_code}", *body, base + "/dicom-web/studies")[1]
        assert said.endswith("200"), said
        told = json.loads(tool("curl", "-s", f"http://127.0.0.1:{status}/status")[1])
        assert "archive" not in told
        assert told["dimse"]["reads-refused"] >= 3
    asyncio.run(found_by_owner(trial, tmp_path / "owner", files))
    assert_nothing_readable(home, folder, files)


def assert_nothing_readable(home: Path, folder: Path, files: dict[str, bytes]) -> None:
    """With all that lies on the scanner's machine, no segment of the spool opens and no file tells a UID."""
    keys = senders.SenderKeys.from_bytes(Home(home).sender.read_bytes())
    spool = Spool(folder / "spool", keys.derived("spool"), bytes_max=1 << 30)
    try:
        assert spool.recover() == []
    finally:
        spool.close()
    for path in folder.rglob("*.spool"):
        segment = segments.reopened(path, keys.derived("spool"))
        assert segment is not None
        try:
            assert segments.scan(segment).entries == []
        finally:
            os.close(segment.descriptor)
    on_disk = b"".join(path.read_bytes() for root in (home, folder) for path in root.rglob("*") if path.is_file())
    for uid in files:
        assert uid.encode() not in on_disk
    known = Book(folder / "stored.sqlite", keys.derived("stored"))
    assert {uid for uid in files if known.instances(uid)} == set(files)  # it answers to who names a UID, and only to him
    known.close()


async def test_kill_9_loses_nothing_that_a_gateway_that_only_sends_has_answered(trial: LocalConsortium, home: Path, tmp_path: Path) -> None:
    port = free_port()
    scanner = Scanner(port)
    try:
        process = start(home, tmp_path / "gateway", port)
        try:
            async with asyncio.timeout(60):
                while len(scanner.yes) < 25:
                    await asyncio.sleep(0.01)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    finally:
        scanner.stop()
    process = start(home, tmp_path / "gateway", free_port())
    try:
        async with asyncio.timeout(60):
            keys = senders.SenderKeys.from_bytes(Home(home).sender.read_bytes())
            while True:  # until everything is in its book
                known = Book(tmp_path / "gateway" / "stored.sqlite", keys.derived("stored"))
                missing = [uid for uid in scanner.yes if not known.instances(uid)]
                known.close()
                if not missing:
                    break
                await asyncio.sleep(0.2)
    finally:
        process.terminate()
        process.wait(90)
    await found_by_owner(trial, tmp_path / "owner", dict(scanner.yes))


def test_what_a_shredded_segment_held_opens_under_no_key_that_is_known(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", b"k" * 32, bytes_max=1 << 28)  # too small for spares
    arrival = spool.begin()
    arrival.write(b"a scan" * 1000)
    entry = arrival.finish({"sop-uid": "1.2"})
    (path,) = (tmp_path / "spool").glob("*.spool")
    os.link(path, kept := tmp_path / "0fff.spool")  # as somebody who looks at the disk's blocks would find it
    spool.done([entry])
    spool.close()
    segment = segments.reopened(kept, b"k" * 32)
    assert segment is not None
    assert segments.scan(segment).entries == []
    os.close(segment.descriptor)


class Nodes:
    """Take every part of a plan."""

    async def store(self, planned: Plan) -> Placed:
        parts = [part for unit in planned.units for part in unit.parts]
        return Placed({part.path: (part.digest(), Place(b"f" * 32, None, 9)) for part in parts})


@asynccontextmanager
async def taking(folder: Path) -> AsyncIterator[Intake]:
    folder.mkdir(exist_ok=True)
    with closing(Spool(folder / "spool", b"k" * 32, bytes_max=1 << 30)) as spool, closing(Book(folder / "book", b"b" * 32)) as known:
        intake = Intake(spool, known, Nodes(), b"o" * 32, Rules(keep_both=False))
        await intake.start()
        yield intake


async def test_after_a_restart_what_was_stored_is_committed_to_and_not_taken_again(tmp_path: Path) -> None:
    uid = generate_uid()
    file, other = make_instance(uid=uid), make_instance(uid=uid)
    async with taking(tmp_path / "gateway") as intake:
        assert (await intake.receive(Incoming(file))).outcome is Outcome.STORED
        await intake.settle()
    async with taking(tmp_path / "gateway") as intake:
        receipt = (await intake.committed([uid])).receipts[uid]
        assert (receipt.sop_class, receipt.file_id, receipt.ledger_index) == (CTImageStorage, b"f" * 32, 9)
        assert (await intake.receive(Incoming(file))).outcome is Outcome.ALREADY
        assert (await intake.receive(Incoming(other))).outcome is Outcome.REFUSED
        assert intake.waiting() == (0, 0)


def known(uid: str, *, received: int = 1) -> Instance:
    return Instance("", "", uid, 7, sha256(uid.encode()).digest(), received, {"sop-class": CTImageStorage}, Place(b"f" * 32, None, 9))


def test_a_book_forgets_after_a_month_and_begins_anew_where_it_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, at = tmp_path / "stored.sqlite", time.time()
    first = Book(path, b"k" * 32)
    first.put([known("1.2")])
    first.flush()
    monkeypatch.setattr(book.time, "time", lambda: at + 40 * 86_400)
    first.put([known("1.3")])
    first.close()
    again = Book(path, b"k" * 32)
    assert (again.instances("1.2"), again.instances("1.3")) == ([], [known("1.3")])
    again.close()
    stranger = Book(path, b"x" * 32)
    assert stranger.instances("1.3") == []
    stranger.close()
    path.write_bytes(b"no database, but long enough to look like one " * 100)
    empty = Book(path, b"k" * 32)
    assert empty.instances("1.3") == []
    empty.close()
