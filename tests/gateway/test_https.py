"""DICOMweb over TLS as the options say: with a client's certificate, with a token, and not without."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from tests.gateway.conftest import make_instance
from tests.gateway.test_kills import free_port

from medshard.cli.main import main
from medshard.gateway.archive import Archive
from medshard.gateway.cache import BlockCache
from medshard.gateway.tokens import Tokens
from medshard.gateway.web import WebRules, serving
from medshard_protocol.errors import Absent, Malformed

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlockCache]:
    made = BlockCache(tmp_path / "cache", b"c" * 32, bytes_max=64 << 20)
    yield made
    made.close()


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate that signs itself, and its key."""
    pem, key = folder / f"{name}.pem", folder / f"{name}.key"
    about = ("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-keyout", str(key), "-out", str(pem))
    words = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *about)
    subprocess.run(words, check=True, capture_output=True)
    return pem, key


def caller(ca: Path, own: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    if own is not None:
        context.load_cert_chain(*own)
    return context


async def test_a_client_with_a_certificate_of_the_ca_is_let_in_and_others_are_not(
    archive: Archive, cache: BlockCache, tmp_path: Path
) -> None:
    (pem, key), ours, other = certificate(tmp_path, "gateway"), certificate(tmp_path, "viewer"), certificate(tmp_path, "stranger")
    rules = WebRules("127.0.0.1", 0, tmp_path / "tokens.json", certificate=pem, key=key, client_ca=ours[0])
    async with serving(archive, cache, rules) as url, aiohttp.ClientSession() as http:
        assert url.startswith("https://")
        body = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + make_instance() + b"\r\n--b--"
        headers = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=b'}
        sent = await http.post(f"{url}/dicom-web/studies", data=body, headers=headers, ssl=caller(pem, ours))
        assert sent.status == 200
        for stranger in (caller(pem), caller(pem, other)):
            with pytest.raises(aiohttp.ClientError):
                await http.get(f"{url}/dicom-web/studies", ssl=stranger)
        with pytest.raises(aiohttp.ClientError):
            await http.get(f"http://{url.removeprefix('https://')}/dicom-web/studies")


async def test_over_tls_without_client_certificates_a_token_lets_in(archive: Archive, cache: BlockCache, tmp_path: Path) -> None:
    pem, key = certificate(tmp_path, "gateway")
    token = Tokens(tmp_path / "tokens.json").add("viewer")
    rules = WebRules("127.0.0.1", 0, tmp_path / "tokens.json", certificate=pem, key=key)
    async with serving(archive, cache, rules) as url, aiohttp.ClientSession() as http:
        here = f"{url}/dicom-web/studies"
        assert (await http.get(here, ssl=caller(pem))).status == 401
        assert (await http.get(here, ssl=caller(pem), headers={"Authorization": f"Bearer {token}"})).status in (200, 204)


async def test_tls_files_that_do_not_fit_or_are_not_there_are_told(archive: Archive, cache: BlockCache, tmp_path: Path) -> None:
    (pem, _), (_, key) = certificate(tmp_path, "one"), certificate(tmp_path, "two")
    for files, error in (((pem, key), Malformed), ((pem, tmp_path / "none.key"), Absent)):
        rules = WebRules("127.0.0.1", 0, tmp_path / "tokens.json", certificate=files[0], key=files[1])
        with pytest.raises(error):
            async with serving(archive, cache, rules):
                pass
    words = ["--home", str(tmp_path), "gateway", "--http", f"127.0.0.1:{free_port()}", "--http-client-ca", str(pem), "--status", "off"]
    assert await asyncio.to_thread(main, words) != 0
