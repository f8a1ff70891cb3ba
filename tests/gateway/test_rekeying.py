"""A gateway and a link server that run while their vault's keys are rotated: real processes, and nobody starts them anew."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path

import aiohttp
import pytest
from tests.gateway.test_kills import Sender, free_port, start

from medshard import Vault, rotation
from medshard.consortium import LocalConsortium
from medshard.gateway.catalog import Catalog, catalog_key, catalog_path
from medshard.gateway.model import Instance
from medshard.home import Home
from medshard.keys import VaultKeys, open_key_file
from medshard.links.opening import fetch

passphrase = "three words suffice"


@contextmanager
def running(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        process.wait(90)


async def fetched(url: str) -> bytes:
    """What an address gives, once somebody listens there."""
    async with aiohttp.ClientSession() as http, asyncio.timeout(60):
        while True:
            try:
                async with http.get(url, headers={"Accept": 'multipart/related; type="application/dicom"'}) as answer:
                    assert answer.status in (200, 404), await answer.text()
                    if answer.status == 200:
                        return await answer.read()
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.1)


def keys_of(home: Path) -> VaultKeys:
    return open_key_file(Home(home).key_file, passphrase)


def known(home: Path, uid: str) -> list[Instance]:
    with closing(Catalog(catalog_path(home), catalog_key(keys_of(home)))) as catalog:
        return catalog.instances(uid)


def stored(home: Path, uids: Iterable[str]) -> bool:
    """Whether the index says of each where it lies in the store."""
    with closing(Catalog(catalog_path(home), catalog_key(keys_of(home)))) as catalog:
        return all(any(each.place for each in catalog.instances(uid)) for uid in uids)


async def test_what_runs_goes_on_under_the_new_keys(trial: LocalConsortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", passphrase)
    home, letter = tmp_path / "home", b"%PDF-1.4 a letter"
    await Vault.join(home, trial.invite(trial.names[0]), passphrase, fast_kdf=True)
    (tmp_path / "letter.pdf").write_bytes(letter)
    dicom, web, shl = free_port(), free_port(), free_port()
    base = f"http://127.0.0.1:{shl}"
    async with Vault.open(home, passphrase) as vault:
        await vault.put([tmp_path / "letter.pdf"])
        link = vault.links.make([sha256(letter).digest()]).link(base)
    words = ["--home", str(home), "links", "serve", "--url", base, "--listen", f"127.0.0.1:{shl}"]
    serving = subprocess.Popen([sys.executable, "-m", "medshard", *words], stderr=subprocess.PIPE)
    gateway = start(home, tmp_path / "gateway", dicom, "--http", f"127.0.0.1:{web}")
    scanner = Sender(dicom)
    try:
        with running(serving), running(gateway):
            assert serving.stderr is not None
            assert b"ready" in await asyncio.to_thread(serving.stderr.readline)
            async with asyncio.timeout(60):
                while len(scanner.yes) < 10:
                    await asyncio.sleep(0.02)
            keys = await rotation.rotate(Home(home), passphrase, trial.invite(trial.names[0]), fast_kdf=True)
            (found,) = await fetch(link, tmp_path / "by link")
            assert found.path.read_bytes() == letter
            since = len(scanner.yes)
            async with asyncio.timeout(60):
                while len(scanner.yes) < since + 10:
                    await asyncio.sleep(0.02)
            scanner.stop()
            async with asyncio.timeout(90):
                while not await asyncio.to_thread(stored, home, scanner.yes):
                    await asyncio.sleep(0.5)
            (uid, file) = next(iter(scanner.yes.items()))
            study = known(home, uid)[0].study
            assert file[-1000:] in await fetched(f"http://127.0.0.1:{web}/dicom-web/studies/{study}")
    finally:
        scanner.stop()
        serving.stderr.close()  # type: ignore[union-attr]
    assert keys.public == keys_of(home).public
