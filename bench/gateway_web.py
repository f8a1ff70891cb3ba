"""The gateway over HTTP beside Orthanc with its DICOMweb plugin, on one machine and one set of data, in turn.

    python -m bench.gateway_web DATA            # DATA/ct: a series of 300 slices; DATA/mf/mf200.dcm: one object of 200 MB, 400 frames
    python -m bench.gateway_web --studies 100000    # searches alone, over HTTP, on an index of so many studies

A consortium of six nodes, code 3/6, and the gateway are processes of their own, as is Orthanc. The client is one connection that throws
away what it reads. ``cold`` is with an empty cache, from the nodes. Figures are the median of ``--runs``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import pydicom
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.machine import cpu_s
from medshard.consortium import LocalConsortium
from medshard.gateway.archive import Archive
from medshard.gateway.catalog import Catalog
from medshard.gateway.dicomweb.http import base_key, errors
from medshard.gateway.dicomweb.qido import Qido
from medshard.gateway.model import Instance

stored = 'multipart/related; type="application/dicom"; transfer-syntax=*'
octets = 'multipart/related; type="application/octet-stream"'
wait_s = 120.0


class Server:
    """A DICOMweb server and a connection to it."""

    def __init__(self, name: str, port: int, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.port = port
        self.process = process
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=wait_s)

    def get(self, path: str, accept: str) -> tuple[float, int]:
        """Seconds and bytes of one answer."""
        self._connection.close()
        self._connection.connect()
        began = time.perf_counter()
        self._connection.request("GET", f"/dicom-web{path}", headers={"Accept": accept})
        response = self._connection.getresponse()
        buffer, size = memoryview(bytearray(1 << 20)), 0
        while got := response.readinto(buffer):
            size += got
        if response.status != 200:
            raise SystemExit(f"{self.name} answered {response.status} to {path}")
        return time.perf_counter() - began, size

    def stow(self, files: list[bytes]) -> float:
        """Seconds that one request with all files takes."""
        parts = [b"--b\r\nContent-Type: application/dicom\r\n\r\n" + file + b"\r\n" for file in files]
        body = b"".join([*parts, b"--b--\r\n"])
        headers = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=b', "Accept": "application/dicom+json"}
        self._connection.close()  # an idle one may have been hung up on
        began = time.perf_counter()
        self._connection.request("POST", "/dicom-web/studies", body, headers)
        response = self._connection.getresponse()
        response.read()
        if response.status != 200:
            raise SystemExit(f"{self.name} answered {response.status} to STOW")
        return time.perf_counter() - began

    def memory_mib(self) -> int:
        """Peak resident memory so far."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) // 1024 if found else 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until_answers(server: Server) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            server.get("/studies?limit=1", "application/dicom+json")
            return
        server._connection.close()
        if time.monotonic() > deadline or server.process.poll() is not None:
            raise SystemExit(f"{server.name} does not answer")
        time.sleep(0.2)


@contextlib.contextmanager
def started(name: str, port: int, command: list[str], log: Path, **environment: str) -> Iterator[Server]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **environment})
    server = Server(name, port, process)
    try:
        until_answers(server)
        yield server
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def gateway(folder: Path, trial: LocalConsortium) -> contextlib.AbstractContextManager[Server]:
    port = free_port()
    command = [sys.executable, "-m", "medshard", "gateway", "--home", str(trial.vault_home), "--dir", str(folder / "gateway")]
    return started("medshard", port, [*command, "--dimse", "off", "--status", "off", "--http", f"127.0.0.1:{port}"], folder / "gateway.log")


@contextlib.contextmanager
def orthanc(folder: Path) -> Iterator[Server | None]:
    program = shutil.which("Orthanc")
    plugin = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
    if program is None or not plugin.exists():
        yield None
        return
    port, data = free_port(), folder / "orthanc"
    data.mkdir()
    config = {
        "StorageDirectory": str(data), "IndexDirectory": str(data), "HttpPort": port, "DicomServerEnabled": False, "Plugins": [str(plugin)],
        "RemoteAccessAllowed": False, "TcpNoDelay": True, "KeepAlive": True, "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(config))
    with started("Orthanc", port, [program, str(folder / "orthanc.json")], folder / "orthanc.log") as server:
        yield server


def uids_of(path: Path) -> tuple[str, str, str]:
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    return str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID), str(dataset.SOPInstanceUID)


def measured(server: Server, data: Path, runs: int) -> dict[str, Any]:
    study, _, _ = uids_of(next((data / "ct").iterdir()))
    of_large, series, uid = uids_of(data / "mf" / "mf200.dcm")
    instance = f"/studies/{of_large}/series/{series}/instances/{uid}"

    def median(work: Callable[[int], tuple[float, int]]) -> tuple[float, int]:
        results = [work(number) for number in range(runs)]
        return statistics.median(seconds for seconds, _ in results), results[-1][1]

    seconds, size = median(lambda _: server.get(f"/studies/{study}", stored))
    frame, _ = median(lambda number: server.get(f"{instance}/frames/{97 + 60 * number}", octets))
    again, _ = median(lambda _: server.get(f"{instance}/frames/97", octets))
    metadata, _ = median(lambda _: server.get(f"/studies/{study}/metadata", "application/dicom+json"))
    return {
        "study_warm_mb_s": round(size / seconds / 1e6),
        "frame_elsewhere_ms": round(frame * 1000, 1),
        "frame_warm_ms": round(again * 1000, 1),
        "metadata_300_ms": round(metadata * 1000, 1),
    }


def measure(data: Path, runs: int) -> dict[str, Any]:
    files = [path.read_bytes() for path in sorted((data / "ct").iterdir())]
    large = (data / "mf" / "mf200.dcm").read_bytes()
    study, _, _ = uids_of(next((data / "ct").iterdir()))
    of_large, series, uid = uids_of(data / "mf" / "mf200.dcm")
    found: dict[str, Any] = {"medshard": {}, "orthanc": {}}
    with tempfile.TemporaryDirectory(prefix="bench-web-") as place, LocalConsortium(Path(place, "trial")) as trial:
        folder = Path(place)
        with orthanc(folder) as beside:
            with gateway(folder, trial) as server:
                for each in filter(None, (server, beside)):
                    kept = found[each.name.lower()]
                    before = cpu_s(each.process.pid)
                    kept["stow_300_per_s"] = round(300 / each.stow(files))
                    kept["stow_300_cpu_s"] = round(cpu_s(each.process.pid) - before, 2)
                    each.stow([large])
            # The gateway has ended in good order: all of it is in the store. Without its cache every read goes to the nodes.
            cold: list[dict[str, float]] = []
            for _ in range(runs):
                shutil.rmtree(folder / "gateway" / "cache", ignore_errors=True)
                with gateway(folder, trial) as server:
                    frame, _ = server.get(f"/studies/{of_large}/series/{series}/instances/{uid}/frames/200", octets)
                    seconds, size = server.get(f"/studies/{study}", stored)
                shutil.rmtree(folder / "gateway" / "cache", ignore_errors=True)
                with gateway(folder, trial) as server:  # another one, whose first question this is
                    metadata, _ = server.get(f"/studies/{study}/metadata", "application/dicom+json")
                    cold.append(
                        {"frame_cold_ms": frame * 1000, "study_cold_mb_s": size / seconds / 1e6, "metadata_cold_ms": metadata * 1000}
                    )
            found["medshard"] |= {name: round(statistics.median(each[name] for each in cold)) for name in cold[0]}
            with gateway(folder, trial) as server:
                for _ in range(2):
                    for each in filter(None, (server, beside)):  # in turn, and the second time counts
                        found[each.name.lower()] |= measured(each, data, runs)
                found["medshard"]["memory_peak_mib"] = server.memory_mib()
    return found


async def searches(count: int, runs: int) -> dict[str, float]:
    """Milliseconds of searches in an index of ``count`` studies."""
    with tempfile.TemporaryDirectory(prefix="bench-web-") as place, contextlib.closing(Catalog(Path(place, "index"), b"k" * 32)) as catalog:
        for number in range(count):
            uid = f"1.2.{number}"
            said = {
                "study-uid": uid, "series-uid": f"{uid}.1", "sop-uid": f"{uid}.1.1", "modality": ("CT", "MR")[number % 2],
                "patient-id": f"P{number // 3:06}", "patient-name": f"Name{number // 3:06}^Given", "accession-number": f"A{number:07}",
                "study-date": f"20{number % 26:02}0{number % 9 + 1}15", "study-description": "CT THORAX",
            }  # fmt: skip
            catalog.put([Instance(said["study-uid"], said["series-uid"], said["sop-uid"], 1, number.to_bytes(32), number, said)])
        catalog.flush()
        app = web.Application(middlewares=[errors])
        app[base_key] = ""
        app.router.add_routes(Qido(cast(Archive, catalog)).routes("/dicom-web"))
        found: dict[str, float] = {}
        async with TestServer(app) as server, aiohttp.ClientSession(server.make_url("/")) as http:
            for name, query in {
                "patient_id": f"PatientID=P{count // 7:06}", "name_wildcard": f"PatientName=name{count // 7:06}*",
                "newest_100": "limit=100",
                "date_range": "StudyDate=20100101-20101231&limit=100", "study_uid": f"StudyInstanceUID=1.2.{count // 2}",
                "modality": "ModalitiesInStudy=MR&limit=100", "accession": f"AccessionNumber=A{count // 3:07}",
                "name_in_the_middle": f"PatientName=*{count // 7}*&limit=100",
            }.items():  # fmt: skip
                times = []
                for _ in range(runs + 1):
                    began = time.perf_counter()
                    async with http.get(f"/dicom-web/studies?{query}") as response:
                        assert response.status == 200
                        assert await response.json(content_type=None), name
                    times.append(time.perf_counter() - began)
                found[name] = round(statistics.median(times[1:]) * 1000, 1)
        return found


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--studies", type=int)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.studies:
        print(json.dumps({f"search_{arguments.studies}_ms": asyncio.run(searches(arguments.studies, arguments.runs))}, indent=1))
    if arguments.data:
        print(json.dumps(measure(arguments.data, arguments.runs), indent=1))


if __name__ == "__main__":
    main()
