"""kill -9 at any moment loses nothing that was answered yes: a real gateway process, killed while it receives and while it stores."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from tests.gateway.conftest import make_instance

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard.gateway.archive import Rules
from medshard.gateway.dimse import commands
from medshard.gateway.dimse.association import Association
from medshard.gateway.dimse.pdus import Context
from medshard.gateway.part10 import read_head
from medshard.gateway.service import Settings, archive_of, spool_key
from medshard.gateway.spool import Spool
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


def start(home: Path, folder: Path, port: int, *more: str) -> subprocess.Popen[bytes]:
    words = ["--home", str(home), "gateway", "--dir", str(folder), "--dimse", f"127.0.0.1:{port}", "--any-calling", "--quiet-time", "0.3"]
    off = [word for name in ("--status", "--http") if name not in more for word in (name, "off")]
    return subprocess.Popen([sys.executable, "-m", "medshard", *words, *off, *more], stderr=subprocess.DEVNULL)


async def kills(trial: LocalConsortium, tmp_path: Path, rounds: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
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
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
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
