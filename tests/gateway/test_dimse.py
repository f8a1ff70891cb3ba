"""The DICOM node as others see it: dcmtk's tools send, ask and fetch, and bytes are compared, not exit codes alone."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid
from tests.gateway.conftest import make_instance

from medshard.gateway.archive import Archive
from medshard.gateway.dimse.pdus import Context
from medshard.gateway.dimse.peers import Peer, Peers
from medshard.gateway.dimse.server import DimseServer, Listening
from medshard.gateway.part10 import head_of, read_head

places = os.pathsep.join(("/usr/bin", "/usr/local/bin", "/opt/homebrew/bin"))  # pynetdicom has tools of the same names in the environment
pytestmark = pytest.mark.skipif(shutil.which("storescu", path=places) is None, reason="dcmtk is not installed")
Serving = Callable[..., AbstractContextManager[DimseServer]]


@contextmanager
def serving(archive: Archive, settings: Listening | None = None) -> Iterator[DimseServer]:
    server = DimseServer(archive, replace(settings or Listening(), port=0))
    server.start()
    try:
        yield server
    finally:
        server.stop(10)


@pytest.fixture
async def node(archive: Archive) -> AsyncIterator[DimseServer]:
    with serving(archive) as server:
        yield server
        await asyncio.sleep(0)


async def tool(name: str, *arguments: object, ok: Sequence[int] = (0,)) -> str:
    """Run one of dcmtk's tools; what it wrote."""
    words = [str(each) for each in arguments]
    path = shutil.which(name, path=places)
    assert path is not None
    process = await asyncio.create_subprocess_exec(path, *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    text = output.decode("utf-8", "replace")
    assert process.returncode in ok, text
    return text


async def settled(archive: Archive, instances: int) -> None:
    """Wait until so many instances are known and none of them waits in the spool."""
    async with asyncio.timeout(60):
        while archive.waiting()[0] or archive.catalog.counts()[2] < instances:
            await asyncio.sleep(0.02)


def written(folder: Path, files: Sequence[bytes]) -> Path:
    folder.mkdir()
    for number, file in enumerate(files):
        (folder / f"{number}.dcm").write_bytes(file)
    return folder


def data_sets(folder: Path) -> set[str]:
    return {data_set(path.read_bytes()) for path in folder.iterdir()}


def data_set(file: bytes) -> str:
    return sha256(file[read_head(file).start :]).hexdigest()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


async def test_a_series_goes_in_by_storescu_and_comes_out_by_getscu_with_the_same_data_sets(
    archive: Archive, node: DimseServer, tmp_path: Path
) -> None:
    study, series = generate_uid(), generate_uid()
    files = [make_instance(study, series, number=number) for number in range(1, 8)]
    folder = written(tmp_path / "in", files)
    await tool("echoscu", "-aec", "MEDSHARD", "127.0.0.1", node.port)
    await tool("storescu", "-aec", "MEDSHARD", "127.0.0.1", node.port, "+sd", folder)
    await settled(archive, 7)
    assert len({each.place.file_id for each in archive.instances(study) if each.place}) == 1
    (tmp_path / "out").mkdir()
    query = ("-S", "-k", "0008,0052=STUDY", "-k", f"0020,000D={study}")
    await tool("getscu", "-aec", "MEDSHARD", *query, "-od", tmp_path / "out", "127.0.0.1", node.port)
    assert data_sets(tmp_path / "out") == data_sets(folder)
    first = archive.instances(study)[0]
    whole = next(file for file in files if first.uid.encode() in file)
    head = head_of(first.sop_class, first.uid, first.transfer_syntax)
    assert archive.receipt(first.uid).sha256 == sha256(head + whole[read_head(whole).start :]).digest()


async def test_movescu_sends_a_series_to_a_node_of_the_table(archive: Archive, tmp_path: Path) -> None:
    study, series, other = generate_uid(), generate_uid(), generate_uid()
    files = [make_instance(study, series, number=number) for number in range(1, 5)]
    folder = written(tmp_path / "in", [*files, make_instance(study, other)])
    port = free_port()
    (tmp_path / "out").mkdir()
    words = ["-aet", "THERE", "-od", str(tmp_path / "out"), "--bit-preserving", str(port)]
    receiver = await asyncio.create_subprocess_exec(shutil.which("storescp", path=places) or "", *words)
    try:
        with serving(archive, Listening(peers=(Peer("THERE", "127.0.0.1", port),))) as node:
            await tool("dcmsend", "-aec", "MEDSHARD", "127.0.0.1", node.port, "+sd", folder)
            await settled(archive, 5)
            query = ("-k", "0008,0052=SERIES", "-k", f"0020,000D={study}", "-k", f"0020,000E={series}")
            said = await tool("movescu", "-d", "-aec", "MEDSHARD", "-aem", "THERE", "-S", *query, "127.0.0.1", node.port)
            assert "Completed Suboperations       : 4" in said
            said = await tool("movescu", "-d", "-aec", "MEDSHARD", "-aem", "ELSEWHERE", "-S", *query, "127.0.0.1", node.port, ok=range(256))
            assert "A801" in said.upper()
    finally:
        receiver.terminate()
        await receiver.wait()
    assert data_sets(tmp_path / "out") == {data_set(file) for file in files}


async def test_findscu_finds_at_every_level_and_names_come_back_whole(archive: Archive, node: DimseServer, tmp_path: Path) -> None:
    study, series = generate_uid(), generate_uid()
    files = [make_instance(study, series, number=number, PatientID="PID-find") for number in (1, 2)]
    files.append(make_instance(study, Modality="SR", PatientID="PID-find", StudyDate="20260315"))
    await tool("storescu", "-aec", "MEDSHARD", "127.0.0.1", node.port, "+sd", written(tmp_path / "in", files))
    await settled(archive, 3)

    async def found(level: str, *keys: str, model: str = "-S") -> list[str]:
        words = [word for key in (f"0008,0052={level}", "0010,0020=PID-find", *keys) for word in ("-k", key)]
        said = await tool("findscu", "-aec", "MEDSHARD", model, *words, "127.0.0.1", node.port)
        return said.split("Find Response: ")[1:]

    (patient,) = await found("PATIENT", "0010,0010", "0020,1204", model="-P")
    assert "Müller^Änne=山田^太郎" in patient
    assert "ISO_IR 192" in patient
    assert "[3 ]" in patient
    (of_study,) = await found("STUDY", "0010,0010=müll*", "0020,000D", "0020,1206", "0020,1208", "0008,0061", "0008,0020=20260301-20260401")
    for part in (study, "[2 ]", "[3 ]", "CT\\SR"):
        assert part in of_study
    assert len(await found("SERIES", f"0020,000D={study}", "0020,000E", "0020,1209")) == 2
    (of_series,) = await found("SERIES", f"0020,000D={study}", "0020,000E", "0020,1209", "0008,0060=CT")
    assert series in of_series
    assert len(await found("IMAGE", f"0020,000D={study}", f"0020,000E={series}", "0008,0018")) == 2
    assert len(await found("IMAGE", f"0008,0018={archive.instances(study)[0].uid}\\1.2.3")) == 1
    for wrong in ("0008,0020=20260316-", "0008,0020=-20260314", "0008,0061=MR", "0010,0010=Mueller*", "0008,0030=101501-"):
        assert await found("STUDY", wrong, "0020,000D") == [], wrong


async def test_what_is_no_dicom_is_refused_with_a_status_and_the_rest_goes_on(archive: Archive, node: DimseServer, tmp_path: Path) -> None:
    good, bad = make_instance(), make_instance(StudyInstanceUID="")
    folder = written(tmp_path / "in", [bad, good])
    said = await tool("storescu", "-v", "--no-halt", "-aec", "MEDSHARD", "127.0.0.1", node.port, "+sd", folder, ok=range(256))
    assert "C000" in said.upper() or "CannotUnderstand" in said or "Cannot Understand" in said
    await settled(archive, archive.catalog.counts()[2])
    assert (archive.counts["stored"], archive.counts["refused"]) == (1, 1)


async def test_a_full_spool_says_out_of_resources_and_takes_the_rest_later(archive: Archive, tmp_path: Path) -> None:
    archive.spool.bytes_max = 100_000
    files = [make_instance(size=128, number=number) for number in range(6)]
    folder = written(tmp_path / "in", files)
    with serving(archive) as node:
        said = await tool("storescu", "-v", "--no-halt", "-aec", "MEDSHARD", "127.0.0.1", node.port, "+sd", folder, ok=range(256))
        assert "A700" in said.upper() or "OutOfResources" in said
        assert 0 < archive.counts["stored"] < 6
        await settled(archive, archive.counts["stored"])
        archive.spool.bytes_max = 1 << 30
        await tool("storescu", "-aec", "MEDSHARD", "127.0.0.1", node.port, "+sd", folder)
        await settled(archive, 6)


async def test_only_those_on_the_list_may_call_and_only_under_our_title(archive: Archive, tmp_path: Path) -> None:
    with serving(archive, Listening(calling=frozenset({"CT01"}))) as node:
        await tool("echoscu", "-aet", "CT01", "-aec", "MEDSHARD", "127.0.0.1", node.port)
        said = await tool("echoscu", "-aet", "CT02", "-aec", "MEDSHARD", "127.0.0.1", node.port, ok=(1,))
        assert "Calling AE Title Not Recognized" in said
        said = await tool("echoscu", "-aet", "CT01", "-aec", "OTHER", "127.0.0.1", node.port, ok=(1,))
        assert "Called AE Title Not Recognized" in said


async def test_over_tls_a_peer_without_a_certificate_of_the_ca_is_not_heard(archive: Archive, tmp_path: Path) -> None:
    if shutil.which("openssl", path=places) is None:
        pytest.skip("openssl is not installed")
    from medshard.gateway.settings import TlsFiles, listening

    ours, other = tmp_path / "ours", tmp_path / "other"
    for name in (ours, other):
        subject = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
        await tool(
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            2,
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
            *subject,
        )
    files = TlsFiles(Path(f"{ours}.pem"), Path(f"{ours}.key"), Path(f"{ours}.pem"))
    settings = listening(
        "127.0.0.1:0", "MEDSHARD", calling=(), any_calling=True, any_called=False, peers=(), private=(), associations_max=8, tls=files
    )
    assert settings.tls_in is not None
    assert settings.tls_in.minimum_version is ssl.TLSVersion.TLSv1_2
    with serving(archive, settings) as node:
        here = ("-aec", "MEDSHARD", "127.0.0.1", node.port)
        await tool("echoscu", "+tls", f"{ours}.key", f"{ours}.pem", "+cf", f"{ours}.pem", *here)
        await tool("echoscu", "+tls", f"{other}.key", f"{other}.pem", "+cf", f"{ours}.pem", *here, ok=range(1, 256))
        await tool("echoscu", *here, "-ta", 5, "-td", 5, ok=range(1, 256))

        def calls() -> None:
            peers = Peers((Peer("MEDSHARD", "127.0.0.1", node.port, tls=True),), "CT01", settings.tls_out, 10)
            with peers.associated("MEDSHARD", [Context(1, "1.2.840.10008.1.1", ("1.2.840.10008.1.2",))]) as association:
                assert association.contexts

        await asyncio.to_thread(calls)


async def test_what_a_peer_takes_only_uncompressed_is_decoded_for_it(archive: Archive, node: DimseServer, tmp_path: Path) -> None:
    study = generate_uid()
    folder = written(tmp_path / "in", [make_instance(study)])
    (tmp_path / "rle").mkdir()
    await tool("dcmcrle", folder / "0.dcm", tmp_path / "rle" / "0.dcm")
    await tool("storescu", "-xr", "-aec", "MEDSHARD", "127.0.0.1", node.port, "+sd", tmp_path / "rle")
    await settled(archive, 1)
    assert archive.instances(study)[0].transfer_syntax == "1.2.840.10008.1.2.5"
    (tmp_path / "out").mkdir()
    query = ("-S", "-k", "0008,0052=STUDY", "-k", f"0020,000D={study}")
    await tool("getscu", "-aec", "MEDSHARD", *query, "-od", tmp_path / "out", "127.0.0.1", node.port)
    (path,) = (tmp_path / "out").iterdir()
    assert (dcmread(path).pixel_array == dcmread(folder / "0.dcm").pixel_array).all()
