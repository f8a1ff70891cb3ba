"""kill -9 at any moment loses nothing that was answered yes, and leaves nothing half: real processes, killed while they receive, while they
store, and while they import.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import aiohttp
import pytest
from pydicom import dcmread
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from tests.gateway.conftest import make_instance

from medshard import Vault, nursery
from medshard.consortium import LocalConsortium
from medshard.gateway.dimse import commands
from medshard.gateway.dimse.association import Association
from medshard.gateway.dimse.pdus import Context
from medshard.gateway.intake import Rules
from medshard.gateway.model import Incoming, Outcome
from medshard.gateway.part10 import read_head
from medshard.gateway.service import Settings, archive_of, spool_key
from medshard.gateway.spool import Spool
from medshard.nursery import Process
from medshard_protocol.errors import MedshardError


class Sender:
    """Sends instances on one association after another and keeps those that were answered with success."""

    def __init__(self, port: int) -> None:
        self.yes: dict[str, bytes] = {}
        self._port = port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._associate()
            except (MedshardError, OSError):
                time.sleep(0.02)  # the gateway is dead, or not up yet

    def _associate(self) -> None:
        association = Association(socket.create_connection(("127.0.0.1", self._port), 5), 5)
        try:
            association.request("MEDSHARD", "CT01", [Context(1, CTImageStorage, (ExplicitVRLittleEndian,))])
            study, series = generate_uid(), generate_uid()
            for number in range(random.randint(1, 20)):
                if self._stop.is_set():
                    break
                uid = generate_uid()
                file = make_instance(study, series, uid, number=number)
                command: commands.Command = {
                    commands.FIELD: commands.C_STORE,
                    commands.MESSAGE: association.next_number(),
                    commands.AFFECTED_CLASS: CTImageStorage,
                    commands.AFFECTED_UID: uid,
                    commands.DATA_SET: commands.WITH_DATA_SET,
                }
                association.send(1, command, [file[read_head(file).start :]])
                if association.receive()[1][commands.STATUS] == commands.SUCCESS:
                    self.yes[uid] = file
            association.release()
        finally:
            association.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def start(home: Path, folder: Path, port: int, *more: str) -> Process:
    words = ["--home", str(home), "gateway", "--dir", str(folder), "--dimse", f"127.0.0.1:{port}", "--any-calling", "--quiet-time", "0.3"]
    off = [word for name in ("--status", "--http") if name not in more for word in (name, "off")]
    loaded = nursery.loaded()
    assert loaded
    return loaded.start(["-m", "medshard", *words, *off, *more], Path(os.devnull))


async def kills(trial: LocalConsortium, tmp_path: Path, rounds: int) -> None:
    port = free_port()
    sender = Sender(port)
    try:
        for _ in range(rounds):
            process = start(trial.vault_home, tmp_path, port)
            try:
                before = len(sender.yes)
                async with asyncio.timeout(60):
                    while len(sender.yes) < before + 5:
                        await asyncio.sleep(0.01)
                await asyncio.sleep(random.random() / 2)
            finally:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
    finally:
        sender.stop()
    settings = Settings(tmp_path, 1 << 30, Rules(), None, None)
    async with Vault.open(trial.vault_home, trial.passphrase) as vault, archive_of(vault, settings) as archive:
        assert sender.yes
        await archive.settle()
        for uid, file in sender.yes.items():
            (instance,) = archive.catalog.instances(uid)
            stored = await (await archive.open(instance)).read()
            assert stored[read_head(stored).start :] == file[read_head(file).start :]
        assert archive.waiting() == (0, 0)


async def test_nothing_that_was_answered_yes_is_lost_when_the_gateway_is_killed(trial: LocalConsortium, tmp_path: Path) -> None:
    await kills(trial, tmp_path, rounds=3)


@pytest.mark.soak
async def test_nothing_is_lost_in_thirty_kills(trial: LocalConsortium, tmp_path: Path) -> None:
    await kills(trial, tmp_path, rounds=30)


async def test_on_sigterm_the_spool_is_emptied_into_the_store(trial: LocalConsortium, tmp_path: Path) -> None:
    port = free_port()
    process, sender = start(trial.vault_home, tmp_path, port), Sender(port)
    try:
        async with asyncio.timeout(60):
            while len(sender.yes) < 10:
                await asyncio.sleep(0.01)
        sender.stop()
        process.terminate()
        assert await asyncio.to_thread(process.wait, 60) == 0
    finally:
        sender.stop()
        process.kill()
        process.wait()
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        spool = Spool(tmp_path / "spool", spool_key(vault.keys), bytes_max=1 << 30)
        try:
            assert spool.recover() == []
        finally:
            spool.close()


async def restarted(trial: LocalConsortium, folder: Path, files: Sequence[bytes], yes: Sequence[bytes]) -> None:
    """What a gateway that was killed left: ``yes``, and of the other ``files`` each whole or not at all. All can be sent again."""
    async with (
        Vault.open(trial.vault_home, trial.passphrase) as vault,
        archive_of(vault, Settings(folder, 1 << 30, Rules(), None, None)) as archive,
    ):
        for file in files:
            uid = str(dcmread(BytesIO(file), stop_before_pixels=True).SOPInstanceUID)
            found = archive.catalog.instances(uid)
            assert len(found) == 1 or (not found and file not in yes)
            for instance in found:
                assert await (await archive.open(instance)).read() == file
        for file in files:
            assert (await archive.receive(Incoming(file))).outcome in (Outcome.STORED, Outcome.ALREADY)
        await archive.settle()
        assert archive.waiting() == (0, 0)
        stored = Counter(row.sha256 for row in vault.ls())
        assert [stored[sha256(file).digest()] for file in files] == [1] * len(files)


async def test_a_stow_request_that_a_kill_cuts_off_leaves_whole_instances_alone(trial: LocalConsortium, tmp_path: Path) -> None:
    ports = [free_port() for _ in range(3)]
    web, status = (f"http://127.0.0.1:{port}" for port in ports[1:])
    more = ["--http", f"127.0.0.1:{ports[1]}", "--status", f"127.0.0.1:{ports[2]}", "--quiet-time", "100"]
    process = start(trial.vault_home, tmp_path, ports[0], *more)
    study, series, line = generate_uid(), generate_uid(), b"\r\n--frontier\r\nContent-Type: application/dicom\r\n\r\n"
    files = [make_instance(study, series, number=number, size=512) for number in range(6)]
    whole = b"".join(line + file for file in files[:2]) + b"\r\n--frontier--"
    headers = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=frontier'}
    try:
        async with aiohttp.ClientSession(headers=headers) as session, asyncio.timeout(60):

            async def body() -> AsyncIterator[bytes]:
                yield b"".join(line + file for file in files[2:5]) + line + files[5][:70_000]
                while (await (await session.get(f"{status}/status")).json())["received"].get("stored", 0) < 3:
                    await asyncio.sleep(0.02)
                process.kill()
                await asyncio.sleep(60)

            while True:
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    answer = await session.post(f"{web}/dicom-web/studies", data=BytesIO(whole))
                    break
                await asyncio.sleep(0.05)
            assert answer.status == 200
            with pytest.raises(aiohttp.ClientError):
                await session.post(f"{web}/dicom-web/studies", data=body())
    finally:
        process.kill()
        process.wait()
    await restarted(trial, tmp_path, files, files[:2])


async def test_an_import_that_was_killed_is_gone_on_with_and_stores_nothing_twice(trial: LocalConsortium, tmp_path: Path) -> None:
    files = [make_instance(size=128) for _ in range(12)]  # each a series of its own
    (tmp_path / "in").mkdir()
    for number, file in enumerate(files):
        (tmp_path / "in" / f"{number}.dcm").write_bytes(file)
    words = ["--home", str(trial.vault_home), "import", str(tmp_path / "in")]
    with subprocess.Popen([sys.executable, "-m", "medshard", *words], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            out = await asyncio.to_thread(process.stdout.readline)  # the first file is safe; of the others nobody knows
        finally:
            process.kill()
        out += process.stdout.read()
    told = {line.split("  ")[0] for line in out.decode().splitlines()}
    await restarted(trial, tmp_path, files, [file for file in files if sha256(file).hexdigest() in told])
