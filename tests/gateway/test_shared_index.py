"""Several gateways, one vault, one index in PostgreSQL: what one receives the other serves, and a database that is away loses nothing."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from hashlib import sha256
from pathlib import Path

import aiohttp
import pytest
from pydicom.uid import generate_uid
from tests.gateway.conftest import make_instance
from tests.gateway.test_dicomweb import stored as as_stored
from tests.gateway.test_hostile import sent
from tests.postgres import Server, running_server

from medshard import Vault, rotation
from medshard.cli.exits import Exit
from medshard.cli.main import main
from medshard.consortium import LocalConsortium
from medshard.gateway import tags
from medshard.gateway.archive import Archive
from medshard.gateway.cache import BlockCache
from medshard.gateway.dicomweb import multipart
from medshard.gateway.dimse import commands, finding, identifiers, retrieving
from medshard.gateway.dimse.association import Association
from medshard.gateway.dimse.pdus import Context
from medshard.gateway.dimse.server import DimseServer, Listening
from medshard.gateway.indexing import gateway_id, rebuild
from medshard.gateway.intake import Rules
from medshard.gateway.model import OUT_OF_RESOURCES, Incoming, Outcome, Query
from medshard.gateway.service import Settings, archive_of
from medshard.gateway.tags import Level
from medshard.gateway.web import WebRules, serving
from medshard.home import Home
from medshard.recovery import code_of, restore_home
from medshard_protocol.errors import MedshardError, Unavailable

Gateways = Callable[[str], AbstractAsyncContextManager[Archive]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as made:
        made.sql("CREATE DATABASE dicom")
        yield made


@pytest.fixture
def gateways(trial: LocalConsortium, server: Server, tmp_path: Path) -> Gateways:
    """Gateways by name, each with a vault's home, a spool and an index of files of its own."""

    @asynccontextmanager
    async def gateway(name: str) -> AsyncIterator[Archive]:
        home = tmp_path / name
        if not home.exists():
            shutil.copytree(trial.vault_home, home, ignore=shutil.ignore_patterns("*.sqlite*", "gateway"))
        settings = Settings(home / "gateway", 1 << 30, Rules(quiet_s=60.0), None, None, index=server.dsn("dicom"))
        async with Vault.open(home, trial.passphrase) as vault, archive_of(vault, settings) as archive:
            yield archive

    return gateway


async def test_what_one_gateway_receives_the_other_serves(gateways: Gateways) -> None:
    study, series = generate_uid(), generate_uid()
    files = [make_instance(study, series, number=number) for number in range(1, 4)]
    async with gateways("here") as here, gateways("there") as there:
        for file in files:
            assert (await here.receive(Incoming(file))).outcome is Outcome.STORED
        here.catalog.flush()
        assert [row.study for row in there.find(Query(Level.STUDY, {tags.STUDY_UID: study}))] == [study]
        found = there.instances(study)
        with pytest.raises(Unavailable, match="another gateway"):
            await there.open(found[0])  # it is promised on the other one's disk alone
        asked = asyncio.create_task(there.committed([each.uid for each in found], 60.0))
        assert (await there.receive(Incoming(files[0]))).outcome is Outcome.STORED  # so a yes of this one has to be its own
        await here.settle()
        assert set((await asked).receipts) == {each.uid for each in found}
        again = there.instances(study)
        assert [await (await there.open(each)).read() for each in again] == files
        await there.settle()
        assert [await (await here.open(each)).read() for each in here.instances(study)] == files
        for file in files:
            assert (await there.receive(Incoming(file))).outcome is Outcome.ALREADY
        async with gateways("late") as late:  # whose vault knows nothing of the other ones' files, which is no reason to forget them
            assert [await (await late.open(each)).read() for each in late.instances(study)] == files
        assert len(here.instances(study)) == 3


async def test_what_is_erased_at_one_gateway_is_gone_at_all(gateways: Gateways, trial: LocalConsortium) -> None:
    file = make_instance(study := generate_uid())
    async with gateways("here") as here, gateways("there") as there:
        await here.receive(Incoming(file))
        await here.settle()
        async with Vault.open(there.vault.home.folder, trial.passphrase) as beside:
            await beside.reindex()
        await there.catch_up()
        assert there.instances(study)
        async with Vault.open(here.vault.home.folder, trial.passphrase) as beside:
            await beside.custody.end([sha256(file).digest()])
        await here.catch_up()
        await there.catch_up()
        assert not there.instances(study)
        assert not list(there.find(Query(Level.STUDY, {tags.STUDY_UID: study})))


async def test_the_index_is_made_again_and_what_waits_in_spools_is_in_it(gateways: Gateways, server: Server) -> None:
    stored, waiting = make_instance(first := generate_uid()), make_instance(second := generate_uid())
    async with gateways("here") as here, gateways("there") as there:
        await here.receive(Incoming(stored))
        await here.settle()
        await here.receive(Incoming(waiting))
        here.catalog.flush()
        server.sql("UPDATE medshard_dicom_2.studies SET sealed = 'altered'", "dicom")
        await there.vault.reindex()
        await asyncio.to_thread(rebuild, there.vault, server.dsn("dicom"))
        await here.catch_up()
        await there.catch_up()
        for each in (here, there):
            assert {row.study for row in each.find(Query(Level.STUDY))} >= {first, second}
        (instance,) = there.instances(first)
        assert await (await there.open(instance)).read() == stored
        await here.settle()


def asked_over_dimse(port: int, abstract: str, command: int, keys: dict[int, str]) -> int:
    """The status of the last answer to a query or retrieval."""
    association = Association(socket.create_connection(("127.0.0.1", port), 20), 20)
    try:
        association.request("MEDSHARD", "CT01", [Context(1, abstract, ("1.2.840.10008.1.2.1",))])
        said: commands.Command = {
            commands.AFFECTED_CLASS: abstract, commands.FIELD: command, commands.MESSAGE: 1, commands.PRIORITY: 0,
            commands.DATA_SET: commands.WITH_DATA_SET,
        }  # fmt: skip
        association.send(1, said, [identifiers.write(keys, "1.2.840.10008.1.2.1")])
        while True:
            _, answer = association.receive()
            if answer[commands.STATUS] != commands.PENDING:
                association.release()
                return int(answer[commands.STATUS])
            association.identifier()
    finally:
        association.close()


async def test_while_the_database_is_away_everybody_hears_so_and_nothing_is_lost(
    gateways: Gateways, server: Server, tmp_path: Path
) -> None:
    kept, waiting, late = (make_instance(generate_uid()) for _ in range(3))
    body = multipart.head("b", "application/dicom", first=True) + late + multipart.tail("b")
    headers = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=b'}
    level = {identifiers.LEVEL: "STUDY", tags.STUDY_UID: "1.2.3"}
    async with gateways("here") as archive:
        await archive.receive(Incoming(kept))
        await archive.settle()
        await archive.receive(Incoming(waiting))
        cache = BlockCache(tmp_path / "cache", b"c" * 32, bytes_max=64 << 20)
        node = DimseServer(archive, Listening(port=0))
        node.start()
        try:
            async with serving(archive, cache, WebRules("127.0.0.1", 0, tmp_path / "tokens")) as url, aiohttp.ClientSession() as http:
                server.kill()
                stored_files = len(archive.vault.file_ids())
                assert (await archive.receive(Incoming(late))).status == OUT_OF_RESOURCES
                assert await asyncio.to_thread(sent, node.port, late) == OUT_OF_RESOURCES
                find, get = next(iter(finding.FIND)), next(iter(retrieving.GET))
                assert await asyncio.to_thread(asked_over_dimse, node.port, find, commands.C_FIND, level) == OUT_OF_RESOURCES
                assert await asyncio.to_thread(asked_over_dimse, node.port, get, commands.C_GET, level) == retrieving.NO_MATCHES_KNOWN
                for path in ("/studies", "/studies/1.2.3", "/studies/1.2.3/metadata"):
                    async with http.get(f"{url}/dicom-web{path}", headers={"Accept": "*/*"}) as response:
                        assert (response.status, "cannot be reached" in (await response.json())["message"]) == (503, True), path
                        assert response.headers["Retry-After"]
                async with http.post(f"{url}/dicom-web/studies", data=body, headers=headers) as response:
                    assert response.status == 503
                for _ in range(2):  # it is stored, and cannot be written down: it stays in the spool
                    with pytest.raises(MedshardError):
                        await archive.settle()
                assert archive.waiting() == (1, 1)
                await asyncio.to_thread(server.start)
                archive.catalog._tables._not_before = 0.0  # type: ignore[attr-defined]
                await archive.settle()
                assert archive.waiting() == (0, 0)
                assert len(archive.vault.file_ids()) == stored_files + 1  # however often it was tried
                async with http.post(f"{url}/dicom-web/studies", data=body, headers=headers) as response:
                    assert response.status == 200
                for file in (kept, waiting, late):
                    (uid,) = {each.study for each in archive.catalog.served(study_of(file))}
                    async with http.get(f"{url}/dicom-web/studies/{uid}", headers={"Accept": as_stored}) as response:
                        assert file in await response.read()
        finally:
            await asyncio.to_thread(node.stop, 5)
            cache.close()


def study_of(file: bytes) -> str:
    from io import BytesIO

    from pydicom import dcmread

    return str(dcmread(BytesIO(file), stop_before_pixels=True).StudyInstanceUID)


def test_a_copied_folder_is_another_gateway(tmp_path: Path) -> None:
    (first := tmp_path / "first").mkdir()
    known = gateway_id(first)
    assert gateway_id(first) == known
    shutil.copytree(first, tmp_path / "second")
    assert gateway_id(tmp_path / "second") != known
    assert gateway_id(first) == known


def test_the_database_is_reached_by_tls_and_its_certificate_is_checked(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    from medshard.gateway.postgres import PostgresTables

    with running_server() as server:
        server.kill()
        for name in ("ours", "other"):
            about = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(tmp_path / f"{name}.key")]
            command = [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                *about,
                "-out",
                str(tmp_path / f"{name}.pem"),
            ]
            subprocess.run(command, check=True, capture_output=True)
        for name in ("ours.key", "ours.pem"):
            shutil.copy(tmp_path / name, server.data / name)
            (server.data / name).chmod(0o600)
            owner = server.data.stat()
            shutil.chown(server.data / name, owner.st_uid, owner.st_gid)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            server.port = probe.getsockname()[1]
        tls = ("-c", "ssl=on", "-c", "ssl_cert_file=ours.pem", "-c", "ssl_key_file=ours.key")
        server.start("-c", "listen_addresses=127.0.0.1", *tls)
        address = f"postgresql://medshard@127.0.0.1:{server.port}/postgres?sslmode=verify-full&sslrootcert={tmp_path}"
        tables = PostgresTables(f"{address}/ours.pem")
        assert tables.rows("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")[0][0] is True
        tables.close()
        with pytest.raises(Unavailable, match="certificate"):
            PostgresTables(f"{address}/other.pem")


async def test_after_a_rotation_every_gateway_of_the_vault_goes_on_with_the_index(
    trial: LocalConsortium, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.sql("CREATE DATABASE rotated")
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    words = "three words suffice"
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", words)
    await Vault.join(first, trial.invite(trial.names[0]), words, fast_kdf=True)
    shutil.copytree(first, second, ignore=shutil.ignore_patterns("*.sqlite*"))

    @asynccontextmanager
    async def gateway(home: Path) -> AsyncIterator[Archive]:
        settings = Settings(home / "gateway", 1 << 30, Rules(quiet_s=60.0), None, None, index=server.dsn("rotated"))
        async with Vault.open(home, words) as vault, archive_of(vault, settings) as archive:
            yield archive

    files = [make_instance(study := generate_uid()), make_instance(later := generate_uid())]
    async with gateway(first) as archive:
        await archive.receive(Incoming(files[0]))
        await archive.settle()
    async with gateway(second) as archive:  # what waits on the other machine survives it, too
        await archive.receive(Incoming(files[1]))
    keys = await rotation.rotate(Home(first), words, trial.invite(trial.names[0]), fast_kdf=True)
    async with Vault.open(first, words) as vault:
        await rotation.keep_former(vault)
        genesis, url = vault.home.genesis.read_bytes(), vault.roster.nodes[0].url
        (tmp_path / "kit").write_text(code_of(vault.home, vault.keys, vault.roster).to_code())
    assert await asyncio.to_thread(main, ["--home", str(second), "keys", "rotate", "--kit", str(tmp_path / "kit")]) == Exit.OK
    async with gateway(second) as archive:
        assert archive.vault.keys.public == keys.public
        await archive.settle()
        (instance,) = archive.instances(study)
        assert await (await archive.open(instance)).read() == files[0]
    await restore_home(third, keys.root, words, [url], genesis, fast_kdf=True)
    async with Vault.open(third, words) as vault:
        await vault.reindex()
    async with gateway(third) as archive:  # made from the new key alone
        for uid, file in ((study, files[0]), (later, files[1])):
            (instance,) = archive.instances(uid)
            assert await (await archive.open(instance)).read() == file
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        (tmp_path / "kit").write_text(code_of(vault.home, vault.keys, vault.roster).to_code())
    assert await asyncio.to_thread(main, ["--home", str(second), "keys", "rotate", "--kit", str(tmp_path / "kit")]) == Exit.REFUSED
    assert "not the keys that came right after" in capsys.readouterr().err
