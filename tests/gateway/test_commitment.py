"""A yes to a storage commitment means: on w nodes and in the ledger. pynetdicom asks, on the same association and on a new one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, evt
from tests.gateway.conftest import make_instance

from medshard.gateway.archive import Archive
from medshard.gateway.dimse.commitment import COMMITMENT
from medshard.gateway.dimse.peers import Peer
from medshard.gateway.dimse.server import DimseServer, Listening

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
    finally:
        association.release()


@pytest.mark.parametrize("same_association", [True, False])
async def test_a_commitment_is_reported_once_everything_is_in_the_store(archive: Archive, same_association: bool) -> None:
    reports, study, series = Reports(), generate_uid(), generate_uid()
    uids = [generate_uid(), generate_uid()]
    files = [make_instance(study, series, uid) for uid in uids]
    listener = AE("CT01")
    listener.add_supported_context(COMMITMENT, scu_role=False, scp_role=True)
    handlers = [(evt.EVT_N_EVENT_REPORT, reports.handle)]
    waiting = listener.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    peer = Peer("CT01", "127.0.0.1", waiting.socket.getsockname()[1])
    node = DimseServer(archive, replace(Listening(peers=(peer,)), port=0))
    node.start()
    try:
        transaction = generate_uid()
        done = asyncio.Event()

        def wait() -> None:
            if same_association:
                asyncio.run_coroutine_threadsafe(done.wait(), reports.loop).result(60)

        talking = asyncio.create_task(asyncio.to_thread(talk, node.port, reports, files, asked(transaction, [*uids, "1.2.3.4"]), wait))
        async with asyncio.timeout(60):
            event, told = await reports.told.get()
        assert {item.ReferencedSOPInstanceUID for item in told.ReferencedSOPSequence} == set(uids)
        (failed,) = told.FailedSOPSequence
        assert (event, failed.ReferencedSOPInstanceUID, failed.FailureReason) == (2, "1.2.3.4", 0x0112)
        assert told.TransactionUID == transaction
        assert {archive.receipt(uid).sop_class for uid in uids} == {CTImageStorage}
        assert archive.waiting() == (0, 0)
        done.set()
        await talking
    finally:
        await asyncio.to_thread(node.stop, 10.0)
        waiting.shutdown()


async def test_an_instance_of_another_class_is_not_committed_to(archive: Archive) -> None:
    reports, uid = Reports(), generate_uid()
    node = DimseServer(archive, replace(Listening(), port=0))
    node.start()
    try:
        done = asyncio.Event()

        def wait() -> None:
            asyncio.run_coroutine_threadsafe(done.wait(), reports.loop).result(60)

        request = asked(generate_uid(), [uid], "1.2.840.10008.5.1.4.1.1.4")
        talking = asyncio.create_task(asyncio.to_thread(talk, node.port, reports, [make_instance(uid=uid)], request, wait))
        async with asyncio.timeout(60):
            event, told = await reports.told.get()
        assert (event, told.FailedSOPSequence[0].FailureReason) == (2, 0x0119)
        done.set()
        await talking
    finally:
        await asyncio.to_thread(node.stop, 10.0)
