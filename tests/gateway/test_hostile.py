"""Bytes that no decent peer sends: every parser says Malformed and nothing else, and a node that got them serves the next one."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from tests.gateway.conftest import make_instance
from tests.gateway.test_catalog import instance
from tests.gateway.test_commitment import asked

from medshard.gateway.archive import Archive
from medshard.gateway.describing import describe
from medshard.gateway.dimse import commands, finding, identifiers, pdus
from medshard.gateway.dimse.association import Association
from medshard.gateway.dimse.commitment import read_request
from medshard.gateway.dimse.pdus import Associate, Context, Role
from medshard.gateway.dimse.server import DimseServer, Listening
from medshard.gateway.elements import explicit_be, explicit_le, implicit_le
from medshard.gateway.part10 import read_head
from medshard_protocol.errors import MedshardError, Unavailable

contexts = tuple(Context(2 * number + 1, CTImageStorage, (explicit_le, implicit_le)) for number in range(4))
association = Associate("MEDSHARD", "CT01", contexts, 16384, (Role("1.2", scu=True, scp=False),))
command = {commands.FIELD: commands.C_STORE, commands.AFFECTED_UID: "1.2.3", commands.MESSAGE: 7, commands.COMMENT: "x"}
real = ("rtplan.dcm", "nested_priv_SQ.dcm", "image_dfl.dcm", "ExplVR_BigEnd.dcm")
keys = {identifiers.LEVEL: "STUDY", 0x00100010: "Müller*", 0x00080020: "20260101-", 0x0020000D: "", 0x00081110: "", 0x00280010: "512"}


def written(dataset: object) -> bytes:
    out = DicomBytesIO()
    out.is_little_endian, out.is_implicit_VR = True, True
    write_dataset(out, dataset)  # type: ignore[arg-type]
    return bytes(out.getvalue())


def described(data: bytes) -> None:
    describe(lambda start, stop: data[start:stop], len(data))


def file_named(name: str) -> bytes:
    return Path(str(get_testdata_file(name))).read_bytes()[:6000]


parsers: dict[str, tuple[Callable[[bytes], object], Callable[[], list[bytes]]]] = {
    "instance": (described, lambda: [make_instance(size=4), *map(file_named, real)]),
    "association": (lambda data: Associate.from_bytes(data, accepted=False), lambda: [association.to_bytes()[6:]]),
    "answer": (lambda data: Associate.from_bytes(data, accepted=True), lambda: [replace(association, accepted=True).to_bytes()[6:]]),
    "command": (commands.decode, lambda: [commands.encode(command)]),
    "implicit keys": (lambda data: finding.query_of(identifiers.read(data, implicit_le)), lambda: [identifiers.write(keys, implicit_le)]),
    "explicit keys": (lambda data: finding.query_of(identifiers.read(data, explicit_le)), lambda: [identifiers.write(keys, explicit_le)]),
    "big keys": (lambda data: finding.query_of(identifiers.read(data, explicit_be)), lambda: [identifiers.write(keys, explicit_be)]),
    "commitment": (lambda data: read_request(data, implicit_le), lambda: [written(asked("1.2.3", ["1.2", "1.3"]))]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(parsers))
def test_a_parser_lets_nothing_through_but_malformed(name: str) -> None:
    parse, seeds = parsers[name]
    rng = random.Random(name)
    for seed in seeds():
        for _ in range(400):
            data = bytearray(seed)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(data) + 1)
                match rng.randrange(4):
                    case 0:
                        del data[at:]
                    case 1:
                        data[at : at + rng.randint(1, 4)] = rng.randbytes(rng.randint(1, 4))
                    case 2:
                        data[at : at + 4] = struct.pack("<L", rng.choice((0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFFE)))
                    case _:
                        data[at:at] = data[: rng.randint(1, 60)]
                if not data:
                    break
            try:
                parse(bytes(data))
            except MedshardError:
                continue


async def test_a_node_outlives_whatever_is_thrown_at_it(archive: Archive) -> None:
    node = DimseServer(archive, replace(Listening(timeout_s=5), port=0))
    node.start()
    head = association.to_bytes()
    rng = random.Random(7)
    try:
        bad = [b"", b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(2000), head[:40]]
        bad += [struct.pack(">BxL", kind, size) for kind, size in ((1, 0xFFFFFFFF), (4, 70000), (9, 4))]
        bad += [head + more for more in (struct.pack(">BxL", 4, 0xFFFFFFF0), rng.randbytes(500))]
        for context, size, is_command in ((99, 4, True), (1, 4, False), (1, 2, True)):
            bad.append(head + pdus.data_head(context, size, command=is_command, last=True) + bytes(size))
        for data in bad:
            with socket.create_connection(("127.0.0.1", node.port)) as peer:
                peer.settimeout(10)
                peer.sendall(data)
                peer.shutdown(socket.SHUT_WR)
                while await asyncio.to_thread(peer.recv, 65536):
                    pass
        assert await asyncio.to_thread(sent, node.port, make_instance()) == commands.SUCCESS
        deadline = time.monotonic() + 30
        while node.associations and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        assert node.associations == 0
        assert archive.spool.used_bytes < 1 << 20
    finally:
        await asyncio.to_thread(node.stop, 10.0)


def sent(port: int, file: bytes) -> int:
    """The status that an instance is answered with."""
    peer = Association(socket.create_connection(("127.0.0.1", port)), 30)
    try:
        peer.request("MEDSHARD", "CT01", [Context(1, CTImageStorage, (ExplicitVRLittleEndian,))])
        uid = str(dcmread(BytesIO(file), stop_before_pixels=True).SOPInstanceUID)
        message: commands.Command = {commands.FIELD: commands.C_STORE, commands.MESSAGE: 1, commands.DATA_SET: 1}
        peer.send(1, message | {commands.AFFECTED_CLASS: CTImageStorage, commands.AFFECTED_UID: uid}, [file[read_head(file).start :]])
        status = int(peer.receive()[1][commands.STATUS])
        peer.release()
        return status
    finally:
        peer.close()


async def test_an_instance_whose_sender_breaks_off_is_not_kept(archive: Archive) -> None:
    node = DimseServer(archive, replace(Listening(), port=0))
    node.start()
    try:

        def break_off() -> None:
            peer = Association(socket.create_connection(("127.0.0.1", node.port)), 30)
            peer.request("MEDSHARD", "CT01", [Context(1, CTImageStorage, (ExplicitVRLittleEndian,))])
            message: commands.Command = {commands.FIELD: commands.C_STORE, commands.MESSAGE: 1, commands.DATA_SET: 1}

            def half() -> object:
                yield make_instance(size=512)[:300_000]
                raise Unavailable("the plug was pulled")

            with pytest.raises(Unavailable):
                peer.send(1, message | {commands.AFFECTED_CLASS: CTImageStorage, commands.AFFECTED_UID: generate_uid()}, half())  # type: ignore[arg-type]
            peer.close()

        await asyncio.to_thread(break_off)
        async with asyncio.timeout(60):
            while node.associations:
                await asyncio.sleep(0.02)
        assert archive.waiting() == (0, 0)
        assert archive.spool.used_bytes == 0
    finally:
        await asyncio.to_thread(node.stop, 10.0)


async def test_no_log_line_names_a_patient(archive: Archive, caplog: pytest.LogCaptureFixture) -> None:
    node = DimseServer(archive, replace(Listening(), port=0))
    node.start()
    study, uid = generate_uid(), generate_uid()
    try:
        with caplog.at_level(logging.DEBUG, "medshard"):
            assert await asyncio.to_thread(sent, node.port, make_instance(study, uid=uid, PatientID="PID-77")) == 0
            assert await asyncio.to_thread(sent, node.port, make_instance("", uid=uid, StudyInstanceUID="", PatientID="PID-77")) == 0xC000
            assert await asyncio.to_thread(sent, node.port, make_instance(study, uid=uid, PatientID="PID-77")) == 0
            await archive.settle()
    finally:
        await asyncio.to_thread(node.stop, 10.0)
    assert "stored" in caplog.text
    assert "refused" in caplog.text
    for word in ("Müller", "山田", "PID-77", study, uid):
        assert word not in caplog.text


async def test_a_query_ends_when_it_is_cancelled(archive: Archive) -> None:
    archive.catalog.put(instance(number) for number in range(1000))
    node = DimseServer(archive, replace(Listening(), port=0))
    node.start()

    def statuses() -> list[int]:
        peer = Association(socket.create_connection(("127.0.0.1", node.port)), 30)
        root = "1.2.840.10008.5.1.4.1.2.2.1"
        peer.request("MEDSHARD", "CT01", [Context(1, root, (explicit_le,))])
        asking: commands.Command = {
            commands.FIELD: commands.C_FIND,
            commands.MESSAGE: 5,
            commands.DATA_SET: 1,
            commands.AFFECTED_CLASS: root,
        }
        peer.send(1, asking, [identifiers.write({identifiers.LEVEL: "STUDY", 0x0020000D: ""}, explicit_le)])
        found: list[int] = []
        while not found or found[-1] == commands.PENDING:
            _, answer = peer.receive()
            found.append(int(answer[commands.STATUS]))
            if answer[commands.DATA_SET] != commands.NO_DATA_SET:
                peer.identifier()
            if len(found) == 3:
                cancel: commands.Command = {
                    commands.FIELD: commands.C_CANCEL,
                    commands.RESPONDING_TO: 5,
                    commands.DATA_SET: commands.NO_DATA_SET,
                }
                peer.send(1, cancel)
        peer.release()
        peer.close()
        return found

    try:
        found = await asyncio.to_thread(statuses)
        assert found[-1] == commands.CANCELLED
        assert 3 <= len(found) < 1001
    finally:
        await asyncio.to_thread(node.stop, 10.0)
