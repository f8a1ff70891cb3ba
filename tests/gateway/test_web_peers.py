"""DICOMweb with others' programs: Orthanc sends to the gateway and fetches from it; OHIF's viewer opens a study in a browser.

Orthanc with its DICOMweb plugin and Chromium come from the distribution; OHIF from npm (@ohif/app), its folder ``dist`` named by
MEDSHARD_OHIF. Where one is absent its test is skipped and says so.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from PIL import Image
from pydicom.uid import generate_uid
from tests.gateway.conftest import make_instance

from medshard.gateway.archive import Archive
from medshard.gateway.blocks import CachedBlocks
from medshard.gateway.cache import BlockCache
from medshard.gateway.model import Incoming
from medshard.gateway.web import WebRules, serving

orthanc = shutil.which("Orthanc")
plugin = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
chromium = shutil.which("chromium")
ohif = os.environ.get("MEDSHARD_OHIF", "")


@pytest.fixture
async def cache(archive: Archive, tmp_path: Path) -> AsyncIterator[BlockCache]:
    made = BlockCache(tmp_path / "cache", b"c" * 32, bytes_max=256 << 20)
    archive.vault.ranges.blocks = CachedBlocks(made)
    yield made
    made.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def orthanc_beside(folder: Path, peer: str) -> AsyncIterator[str]:
    """Orthanc with the gateway as its DICOMweb server ``medshard``."""
    assert orthanc is not None
    port = free_port()
    config = {
        "StorageDirectory": str(folder), "IndexDirectory": str(folder), "HttpPort": port, "DicomServerEnabled": False,
        "Plugins": [str(plugin)], "RemoteAccessAllowed": False,
        "DicomWeb": {"Enable": True, "Servers": {"medshard": [f"{peer}/dicom-web/"]}},
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(config))
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(orthanc, str(folder / "orthanc.json"), stdout=log, stderr=log)
    try:
        async with aiohttp.ClientSession() as http, asyncio.timeout(60):
            while True:
                try:
                    async with http.get(f"http://127.0.0.1:{port}/system"):
                        break
                except aiohttp.ClientError:
                    assert process.returncode is None, (folder / "log").read_text()
                    await asyncio.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.mark.skipif(orthanc is None or not plugin.exists(), reason="Orthanc with its DICOMweb plugin is not installed")
async def test_orthanc_sends_to_the_gateway_and_fetches_from_it_without_changing_a_byte(
    archive: Archive, cache: BlockCache, tmp_path: Path
) -> None:
    study, series = generate_uid(), generate_uid()
    files = {make_instance(study, series, number=number) for number in (1, 2, 3)}
    folder = tmp_path / "orthanc"
    folder.mkdir()
    rules = WebRules("127.0.0.1", 0, tmp_path / "tokens.json")
    async with serving(archive, cache, rules) as url, orthanc_beside(folder, url) as peer, aiohttp.ClientSession(peer) as http:

        async def ask(method: str, path: str, body: Any = None) -> Any:
            data = body if isinstance(body, bytes) else json.dumps(body)
            async with http.request(method, path, data=data if body is not None else None) as response:
                assert response.status == 200, await response.text()
                return await response.json(content_type=None)

        for file in files:
            await ask("POST", "/instances", file)
        (parent,) = await ask("GET", "/studies")
        await ask("POST", "/dicom-web/servers/medshard/stow", {"Resources": [parent], "Synchronous": True})
        await archive.settle()
        stored = archive.instances(study)
        assert {await (await archive.open(each)).read() for each in stored} == files
        found = await ask("POST", "/dicom-web/servers/medshard/qido", {"Uri": "/studies", "Arguments": {"0020000d": study}})
        assert [study in json.dumps(each) for each in found] == [True]
        await ask("DELETE", f"/studies/{parent}")
        assert await ask("GET", "/instances") == []
        await ask("POST", "/dicom-web/servers/medshard/retrieve", {"Resources": [{"Study": study}], "Synchronous": True})
        back = set()
        for instance in await ask("GET", "/instances"):
            async with http.get(f"/instances/{instance}/file") as response:
                back.add(await response.read())
        assert back == files


@pytest.mark.skipif(chromium is None, reason="Chromium is not installed")
@pytest.mark.skipif(not Path(ohif, "index.html").is_file(), reason="MEDSHARD_OHIF does not name the dist folder of @ohif/app")
@pytest.mark.soak
async def test_ohif_shows_a_study_in_a_browser(archive: Archive, cache: BlockCache, tmp_path: Path) -> None:
    assert chromium is not None
    study, series = generate_uid(), generate_uid()
    ramp = np.tile(np.linspace(0, 2_000, 256, dtype=np.uint16), (256, 1))
    for number in range(1, 6):
        geometry: dict[str, Any] = {
            "ImagePositionPatient": [0, 0, number], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1],
            "RescaleSlope": 1, "RescaleIntercept": 0, "WindowCenter": 1_000, "WindowWidth": 2_000, "FrameOfReferenceUID": generate_uid(),
        }  # fmt: skip
        await archive.receive(Incoming(_painted(make_instance(study, series, number=number, size=256, **geometry), ramp)))
    rules = WebRules("127.0.0.1", 0, tmp_path / "tokens.json", viewer=Path(ohif))
    shot = tmp_path / "shot.png"
    async with serving(archive, cache, rules) as url:
        process = await asyncio.create_subprocess_exec(
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader",
            "--enable-unsafe-swiftshader",
            f"--user-data-dir={tmp_path / 'browser'}", "--window-size=1280,800", "--timeout=60000", "--virtual-time-budget=60000",
            f"--screenshot={shot}", f"{url}/viewer?StudyInstanceUIDs={study}",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        async with asyncio.timeout(110):
            assert await process.wait() == 0
    if kept := os.environ.get("MEDSHARD_SCREENSHOT"):
        shutil.copy(shot, kept)
    pixels = np.asarray(Image.open(shot).convert("L"), dtype=float)
    middle = pixels[300:500, 400:900]
    assert middle.max() - middle.min() > 100, "the ramp of the image is not on the screen"


def _painted(file: bytes, pixels: Any) -> bytes:
    import pydicom

    dataset = pydicom.dcmread(io.BytesIO(file))
    dataset.PixelData = pixels.tobytes()
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()
