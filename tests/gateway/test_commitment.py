"""A yes to a storage commitment means: on w nodes and in the ledger. pynetdicom asks; it is told on the same association, on a new one, and
by a gateway that was killed before it had said anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, evt
from tests.gateway.conftest import make_instance
from tests.gateway.test_kills import free_port, start

from medshard.consortium import LocalConsortium
from medshard.gateway.archive import Archive, commitment_key
from medshard.gateway.dimse import commands
from medshard.gateway.dimse.association import Association
from medshard.gateway.dimse.commands import Command
from medshard.gateway.dimse.commitment import COMMITMENT
from medshard.gateway.dimse.owed import Kept
from medshard.gateway.dimse.pdus import Context
from medshard.gateway.dimse.peers import Peer
from medshard.gateway.dimse.server import DimseServer, Listening
from medshard.gateway.part10 import read_head
from medshard.keys import VaultKeys
from medshard.nursery import Process

instance = "1.2.840.10008.1.20.1.1"


def asked(transaction: str, uids: list[str], sop_class: str = CTImageStorage) -> Dataset:
    dataset = Dataset()
    dataset.TransactionUID = transaction
    items = []
    for uid in uids:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
        items.append(item)
    dataset.ReferencedSOPSequence = Sequence(items)
    return dataset


class Reports:
    """What a peer is told, from pynetdicom's threads."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.told: asyncio.Queue[tuple[int, Dataset]] = asyncio.Queue()

    def handle(self, event: Any) -> tuple[int, None]:
        told = event.event_type, event.event_information
        self.loop.call_soon_threadsafe(self.told.put_nowait, told)
        return 0x0000, None


def talk(port: int, reports: Reports, files: list[bytes], request: Dataset, wait: Callable[[], None]) -> None:
    """Send files, ask for a commitment, and ``wait`` before releasing. Blocking."""
    ae = AE("CT01")
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    ae.add_requested_context(COMMITMENT)
    handlers = [(evt.EVT_N_EVENT_REPORT, reports.handle)]
    association = ae.associate("127.0.0.1", port, ae_title="MEDSHARD", evt_handlers=handlers)
    assert association.is_established
    try:
        for file in files:
            assert association.send_c_store(dcmread(BytesIO(file))).Status == 0x0000
        status, _ = association.send_n_action(request, 1, COMMITMENT, instance)
        assert status.Status == 0x0000
        wait()
        time.sleep(0.5)  # the answer goes out after the report was told; pynetdicom fails where it asks for the release before that
    finally:
        association.release()


@contextmanager
def listening(reports: Reports, port: int = 0) -> Iterator[int]:
    """A peer that takes reports on associations to it; its port."""
    listener = AE("CT01")
    listener.add_supported_context(COMMITMENT, scu_role=False, scp_role=True)
    handlers = [(evt.EVT_N_EVENT_REPORT, reports.handle)]
    server = listener.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)
    try:
        yield server.socket.getsockname()[1]
    finally:
        server.shutdown()


async def listens(port: int) -> None:
    """Wait until somebody listens there."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            await asyncio.sleep(0.02)


@asynccontextmanager
async def serving(archive: Archive, settings: Listening) -> AsyncIterator[DimseServer]:
    node = DimseServer(archive, replace(settings, port=0))
    node.start()
    try:
        yield node
    finally:
        await asyncio.to_thread(node.stop, 10.0)


def owed(folder: Path) -> list[Path]:
    return list((folder / "commitments").glob("*.owed"))


async def forgotten(folder: Path) -> None:
    async with asyncio.timeout(60):
        while owed(folder):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("same_association", [True, False])
async def test_a_commitment_is_reported_once_everything_is_in_the_store(archive: Archive, same_association: bool) -> None:
    reports, study, series = Reports(), generate_uid(), generate_uid()
    uids = [generate_uid(), generate_uid()]
    files = [make_instance(study, series, uid) for uid in uids]
    transaction, done = generate_uid(), asyncio.Event()

    def wait() -> None:
        if same_association:
            asyncio.run_coroutine_threadsafe(done.wait(), reports.loop).result(60)

    with listening(reports) as port:
        async with serving(archive, Listening(peers=(Peer("CT01", "127.0.0.1", port),))) as node:
            talking = asyncio.create_task(asyncio.to_thread(talk, node.port, reports, files, asked(transaction, [*uids, "1.2.3.4"]), wait))
            async with asyncio.timeout(60):
                event, told = await reports.told.get()
            assert {item.ReferencedSOPInstanceUID for item in told.ReferencedSOPSequence} == set(uids)
            (failed,) = told.FailedSOPSequence
            assert (event, failed.ReferencedSOPInstanceUID, failed.FailureReason) == (2, "1.2.3.4", 0x0112)
            assert told.TransactionUID == transaction
            assert {archive.receipt(uid).sop_class for uid in uids} == {CTImageStorage}
            assert archive.waiting() == (0, 0)
            await forgotten(archive.folder)
            done.set()
            await talking


async def test_an_instance_of_another_class_is_not_committed_to(archive: Archive) -> None:
    reports, uid, done = Reports(), generate_uid(), asyncio.Event()

    def wait() -> None:
        asyncio.run_coroutine_threadsafe(done.wait(), reports.loop).result(60)

    async with serving(archive, Listening()) as node:
        request = asked(generate_uid(), [uid], "1.2.840.10008.5.1.4.1.1.4")
        talking = asyncio.create_task(asyncio.to_thread(talk, node.port, reports, [make_instance(uid=uid)], request, wait))
        async with asyncio.timeout(60):
            event, told = await reports.told.get()
        assert (event, told.FailedSOPSequence[0].FailureReason) == (2, 0x0119)
        done.set()
        await talking


def test_the_vector_of_a_request_is_read_as_its_document_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vector = json.loads((Path(__file__).parent.parent / "vectors" / "spool.json").read_text())
    said = vector["owed"]
    kept = Kept(tmp_path, commitment_key(VaultKeys.from_root(bytes.fromhex(vector["root"]))))
    data = bytes.fromhex(said["data"])
    (tmp_path / "0.owed").write_bytes(data)
    (tmp_path / "1.owed").write_bytes(data[:-1] + b"x")  # altered: told in the log, and left where it is
    (found,) = kept.all()
    assert (found.peer, found.asked.transaction, found.since) == (said["peer"], said["transaction"], said["since"])
    assert list(found.asked.references.items()) == [tuple(each) for each in said["references"]]
    assert "commitment-unreadable" in caplog.text
    again = kept.add(found.peer, found.asked)
    kept.remove(found)
    assert kept.all() == [again]


async def test_a_report_crosses_with_what_the_peer_sends_meanwhile(archive: Archive) -> None:
    """Each side may have one request of its own under way: PS3.7 section D.3.3.3."""
    first, second = generate_uid(), generate_uid()
    async with serving(archive, Listening()) as node:
        told, status = await asyncio.to_thread(crossing, node.port, first, second)
        assert (told[commands.EVENT], status) == (1, 0x0000)
        await forgotten(archive.folder)
    assert archive.catalog.instances(second)


def crossing(port: int, first: str, second: str) -> tuple[Command, int | str]:
    """Ask for a commitment, and send another instance when its report is there, before answering the report. Blocking."""
    association = Association(socket.create_connection(("127.0.0.1", port)), 60)
    contexts = [Context(1, CTImageStorage, (ExplicitVRLittleEndian,)), Context(3, COMMITMENT, (ExplicitVRLittleEndian,))]
    association.request("MEDSHARD", "CT01", contexts)

    def store(uid: str) -> None:
        file = make_instance(uid=uid)
        about: Command = {commands.AFFECTED_CLASS: CTImageStorage, commands.AFFECTED_UID: uid, commands.DATA_SET: commands.WITH_DATA_SET}
        association.send(1, {commands.FIELD: commands.C_STORE, commands.MESSAGE: 7} | about, [file[read_head(file).start :]])

    try:
        store(first)
        assert association.receive()[1][commands.STATUS] == 0x0000
        out = DicomBytesIO()
        out.is_little_endian, out.is_implicit_VR = True, False
        write_dataset(out, asked(generate_uid(), [first]))
        about: Command = {commands.REQUESTED_CLASS: COMMITMENT, commands.REQUESTED_UID: instance, commands.ACTION: 1}
        request: Command = {commands.FIELD: commands.N_ACTION, commands.MESSAGE: 8, commands.DATA_SET: commands.WITH_DATA_SET} | about
        association.send(3, request, [out.getvalue()])
        assert association.receive()[1][commands.STATUS] == 0x0000
        _, told = association.receive()
        association.identifier()
        store(second)
        status = association.receive()[1][commands.STATUS]
        association.send(3, commands.response(told, 0x0000))
        association.release()
        return told, status
    finally:
        association.close()


async def test_a_killed_gateway_reports_after_its_next_start_as_soon_as_the_peer_listens(trial: LocalConsortium, tmp_path: Path) -> None:
    reports, uid, transaction = Reports(), generate_uid(), generate_uid()
    port, at_peer = free_port(), free_port()

    def gateway() -> Process:
        return start(trial.vault_home, tmp_path, port, "--peer", f"CT01=127.0.0.1:{at_peer}")

    process = gateway()
    try:
        await listens(port)
        for name in trial.names[:2]:  # so that it cannot report before it dies
            trial.freeze(name)
        await asyncio.to_thread(talk, port, reports, [make_instance(uid=uid)], asked(transaction, [uid]), lambda: None)
    finally:
        process.kill()
        process.wait()
        for name in trial.names[:2]:
            trial.thaw(name)
    assert len(owed(tmp_path)) == 1
    assert reports.told.empty()
    assert uid.encode() not in owed(tmp_path)[0].read_bytes()
    process = gateway()
    try:
        await listens(port)
        with listening(reports, at_peer):
            async with asyncio.timeout(60):
                event, told = await reports.told.get()
            await forgotten(tmp_path)
        assert (event, told.TransactionUID, told.ReferencedSOPSequence[0].ReferencedSOPInstanceUID) == (1, transaction, uid)
    finally:
        process.kill()
        process.wait()
