"""How fast the gateway receives a CT series, beside Orthanc on the same machine and disk, and what memory it takes for large objects.

    python -m bench.gateway [--data DIR] [--rounds 3] [--no-large]

storescu of dcmtk sends 300 slices of 512 x 512 on one association, to each side in turn, with new UIDs each time; TCP_NODELAY is set for
everybody. Given are instances a second until storescu has ended (its reading of the files included), and how long after that the gateway
has everything on w nodes and in the ledger. Orthanc is Debian's, with its defaults: it syncs each file, and keeps one copy.
"""

from __future__ import annotations

import argparse
import contextlib
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
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

from bench.machine import cpu_s
from medshard.consortium import LocalConsortium

slices = 300
frames = 400  # of the large object: 200 MB
tools = os.pathsep.join(("/usr/bin", "/usr/local/bin", "/usr/sbin"))
environment = {**os.environ, "TCP_NODELAY": "1"}
uid_tags = (b"\x08\x00\x18\x00UI", b"\x20\x00\x0d\x00UI", b"\x20\x00\x0e\x00UI", b"\x02\x00\x03\x00UI")


def make_series(folder: Path) -> None:
    """A CT series with the noise of a real one."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    study, series = fixed_uid(), fixed_uid()
    for number in range(slices):
        pixels = random.normal(40, 18, (512, 512)).astype(np.int16)
        save(folder / f"{number:03}.dcm", CTImageStorage, study, series, number, pixels.tobytes(), 1)


def make_large(path: Path) -> None:
    """One multi-frame object of 200 MB."""
    pixels = np.random.default_rng(2).normal(40, 18, (512, 512)).astype(np.int16).tobytes()
    save(path, EnhancedCTImageStorage, fixed_uid(), fixed_uid(), 1, pixels * frames, frames)


def save(path: Path, sop_class: str, study: str, series: str, number: int, pixels: bytes, count: int) -> None:
    meta, dataset = FileMetaDataset(), Dataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = sop_class, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = fixed_uid()
    dataset.file_meta, dataset.SOPClassUID = meta, sop_class
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.InstanceNumber = study, series, str(number)
    dataset.PatientName, dataset.PatientID, dataset.StudyDate, dataset.Modality = "Bench^Gateway", "B1", "20260315", "CT"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.Rows, dataset.Columns = 1, "MONOCHROME2", 512, 512
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    if count > 1:
        dataset.NumberOfFrames = str(count)
    dataset.PixelData = pixels
    dataset.save_as(path, enforce_file_format=True)


def fixed_uid() -> str:
    """A UID of 44 characters, so that another one fits into its place."""
    return generate_uid()[:44].rstrip(".").ljust(44, "1")


def renewed(source: Sequence[Path], folder: Path) -> Path:
    """The same files with new UIDs of the same lengths."""
    folder.mkdir()
    fresh: dict[bytes, bytes] = {}
    for path in source:
        data = bytearray(path.read_bytes())
        for tag in uid_tags:
            at = data.find(tag, 132) + len(tag)
            size = int.from_bytes(data[at : at + 2], "little")
            old = bytes(data[at + 2 : at + 2 + size])
            uid = generate_uid().encode()[: len(old.rstrip(b"\0"))]
            uid = re.sub(rb"\.$", b"1", uid).ljust(len(old.rstrip(b"\0")), b"1").ljust(size, b"\0")
            data[at + 2 : at + 2 + size] = fresh.setdefault(old, uid)
        (folder / path.name).write_bytes(data)
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def ask(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


@contextlib.contextmanager
def running(command: Sequence[str], ready: str, log: Path) -> Iterator[int]:
    """A server until the block ends, from the moment that it answers ``ready``; its process id."""
    with open(log, "wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    ask(ready)
                    break
                time.sleep(0.1)
            yield process.pid
        finally:
            process.terminate()


def orthanc(work: Path) -> tuple[list[str], str, int]:
    """Its command, the URL of its status, and its DICOM port."""
    dicom, http = free_port(), free_port()
    settings = {
        "Name": "bench", "StorageDirectory": str(work / "orthanc"), "IndexDirectory": str(work / "orthanc"), "DicomPort": dicom,
        "HttpPort": http, "DicomCheckCalledAet": False, "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "Plugins": [],
    }  # fmt: skip
    (work / "orthanc.json").write_text(json.dumps(settings))
    return [shutil.which("Orthanc", path=tools) or "Orthanc", str(work / "orthanc.json")], f"http://127.0.0.1:{http}/system", dicom


def send(folder: Path, title: str, port: int) -> float:
    """Seconds that storescu takes."""
    command = [shutil.which("storescu", path=tools) or "storescu", "-aec", title, "127.0.0.1", str(port), "+sd", str(folder)]
    began = time.monotonic()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def stored(status: str) -> float:
    """Seconds until nothing waits in the spool."""
    began = time.monotonic()
    while ask(status)["spool"]["instances"]:
        time.sleep(0.02)
    return time.monotonic() - began


def peak_mib(pid: int) -> int:
    """The most memory that a process has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) // 1024 if found else 0


def large_at_once(work: Path, port: int, status: str, pid: int) -> None:
    make_large(work / "large.dcm")
    folders = [renewed([work / "large.dcm"], work / f"large{number}") for number in range(4)]
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak counts from here
    began = time.monotonic()
    command = [shutil.which("storescu", path=tools) or "storescu", "-aec", "MEDSHARD", "127.0.0.1", str(port), "+sd"]
    senders = [subprocess.Popen([*command, str(folder)], env=environment) for folder in folders]
    codes = [sender.wait() for sender in senders]
    took, received = time.monotonic() - began, peak_mib(pid)
    wait = stored(status)
    print(f"four objects of 200 MB at once: {took:.1f} s ({codes}), {received} MiB while receiving, in the store {wait:.1f} s later")
    print(f"  {peak_mib(pid)} MiB at the most until all of it was stored")


def measure(work: Path, source: Sequence[Path], rounds: int, *, large: bool) -> None:
    with LocalConsortium(work / "trial", institutions=6, code=(3, 6)) as consortium, contextlib.ExitStack() as stack:
        dimse, page = free_port(), free_port()
        status = f"http://127.0.0.1:{page}/status"
        gateway = [
            sys.executable, "-m", "medshard", "--home", str(consortium.vault_home), "gateway", "--any-calling", "--http", "off",
            "--dimse", f"127.0.0.1:{dimse}", "--status", f"127.0.0.1:{page}",
        ]  # fmt: skip
        pid = stack.enter_context(running(gateway, status, work / "gateway.log"))
        rates: dict[str, list[float]] = {"medshard": [], "orthanc": []}
        peer: tuple[int, int] | None = None
        if shutil.which("Orthanc", path=tools):
            command, ready, port = orthanc(work)
            peer = stack.enter_context(running(command, ready, work / "orthanc.log")), port
        for number in range(rounds):
            folder = renewed(source, work / f"round{number}")
            before = cpu_s(pid)
            took = send(folder, "MEDSHARD", dimse)
            receiving = cpu_s(pid) - before
            wait = stored(status)
            rates["medshard"].append(len(source) / took)
            print(f"medshard {len(source) / took:6.0f} instances/s ({receiving:.2f} s of CPU), in the store {wait:.2f} s later")
            if peer is not None:
                before = cpu_s(peer[0])
                took = send(folder, "ORTHANC", peer[1])
                rates["orthanc"].append(len(source) / took)
                print(f"orthanc  {len(source) / took:6.0f} instances/s ({cpu_s(peer[0]) - before:.2f} s of CPU)")
            shutil.rmtree(folder)
        for name, found in rates.items():
            if found:
                print(f"{name}: median of {len(found)}: {statistics.median(found):.0f} instances/s")
        if large:
            large_at_once(work, dimse, status, pid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of DICOM files to send instead of made ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-large", action="store_true", help="leave out the four objects of 200 MB")
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-gateway-", dir="bench/work" if Path("bench/work").is_dir() else None)).absolute()
    try:
        if given.data is None:
            make_series(work / "ct")
        measure(work, sorted((given.data or work / "ct").glob("*.dcm")), given.rounds, large=not given.no_large)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
