"""Orthanc as a peer: it sends to the gateway, queries it, and fetches from it, and what it then has is what it had."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydicom.uid import generate_uid
from tests.gateway.conftest import make_instance

from medshard.gateway.archive import Archive
from medshard.gateway.dimse.peers import Peer
from medshard.gateway.dimse.server import DimseServer, Listening
from medshard.gateway.part10 import read_head

program = shutil.which("Orthanc", path=os.pathsep.join(("/usr/sbin", "/usr/bin", "/usr/local/bin")))
pytestmark = pytest.mark.skipif(program is None, reason="Orthanc is not installed")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Orthanc:
    """One that runs, over its REST interface."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body)
        async with self._session.request(method, self._url + path, data=None if body is None else data) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json(content_type=None) if path.count("/file") == 0 else await answer.read()


@pytest.fixture
async def peers(archive: Archive, tmp_path: Path) -> AsyncIterator[tuple[DimseServer, Orthanc]]:
    dicom, http = free_port(), free_port()
    node = DimseServer(archive, replace(Listening(peers=(Peer("ORTHANC", "127.0.0.1", dicom),)), port=0))
    node.start()
    settings = {
        "StorageDirectory": str(tmp_path / "orthanc"), "IndexDirectory": str(tmp_path / "orthanc"), "DicomPort": dicom, "HttpPort": http,
        "DicomAet": "ORTHANC", "DefaultEncoding": "Utf8", "AuthenticationEnabled": False, "RemoteAccessAllowed": False, "Plugins": [],
        "DicomModalities": {"gateway": ["MEDSHARD", "127.0.0.1", node.port]},
    }  # fmt: skip
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(program or "", str(tmp_path / "orthanc.json"), stdout=quiet, stderr=quiet)
    try:
        async with aiohttp.ClientSession() as session:
            orthanc = Orthanc(session, f"http://127.0.0.1:{http}")
            async with asyncio.timeout(60):
                while True:
                    try:
                        await orthanc.ask("GET", "/system")
                        break
                    except aiohttp.ClientError:
                        await asyncio.sleep(0.05)
            yield node, orthanc
    finally:
        process.terminate()
        await process.wait()
        await asyncio.to_thread(node.stop, 10.0)


async def test_orthanc_sends_a_study_queries_it_and_fetches_it_back_unchanged(archive: Archive, peers: tuple[DimseServer, Orthanc]) -> None:
    _, orthanc = peers
    study, series = generate_uid(), generate_uid()
    files = [make_instance(study, series, number=number, PatientID="PID-orthanc") for number in range(1, 5)]
    ids = [(await orthanc.ask("POST", "/instances", file))["ID"] for file in files]
    await orthanc.ask("POST", "/modalities/gateway/echo", {})
    sent = await orthanc.ask("POST", "/modalities/gateway/store", ids)
    assert (sent["InstancesCount"], sent["FailedInstancesCount"]) == (4, 0)
    await archive.settle()
    assert len(archive.instances(study)) == 4
    for each in ids:
        await orthanc.ask("DELETE", f"/instances/{each}")
    assert await orthanc.ask("GET", "/instances") == []

    query = await orthanc.ask(
        "POST", "/modalities/gateway/query", {"Level": "Study", "Query": {"PatientID": "PID-orthanc", "PatientName": ""}}
    )
    answers = await orthanc.ask("GET", f"/queries/{query['ID']}/answers")
    content = await orthanc.ask("GET", f"/queries/{query['ID']}/answers/{answers[0]}/content?simplify")
    assert len(answers) == 1
    assert (content["StudyInstanceUID"], content["PatientName"]) == (study, "Müller^Änne=山田^太郎")
    await orthanc.ask("POST", f"/queries/{query['ID']}/retrieve", {"TargetAet": "ORTHANC", "Synchronous": True})
    async with asyncio.timeout(60):
        while len(back := await orthanc.ask("GET", "/instances")) < 4:
            await asyncio.sleep(0.05)
    fetched = [await orthanc.ask("GET", f"/instances/{each}/file") for each in back]
    assert {data_set(file) for file in fetched} == {data_set(file) for file in files}


def data_set(file: bytes) -> str:
    return sha256(file[read_head(file).start :]).hexdigest()
