"""What was erased is gone from every disk: of the nodes, of the vault and of a gateway that had received, cached and served it.

By looking for it: pieces of all that was stored of the object are noted before, and no file of anybody holds one of them after.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import msgpack
import pytest
from pydicom.uid import generate_uid
from tests.gateway.conftest import make_instance

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard.gateway import service, tags
from medshard.gateway.archive import Archive
from medshard.gateway.intake import Rules
from medshard.gateway.model import Incoming, Outcome, Query
from medshard.gateway.segments import SALT, magic, salt_size
from medshard.gateway.service import Settings, archive_of
from medshard.gateway.tags import Level
from medshard_protocol.errors import Absent, MedshardError

piece = 40  # bytes: no two files have that many in common by chance


@asynccontextmanager
async def gateway(home: Path, passphrase: str) -> AsyncIterator[Archive]:
    """One with its caches, as `medshard gateway run` opens it."""
    settings = Settings(home / "gateway", 1 << 30, Rules(quiet_s=60.0), None, None, cache_bytes_max=64 << 20)
    async with contextlib.AsyncExitStack() as stack:
        vault = await stack.enter_async_context(Vault.open(home, passphrase))
        archive = await stack.enter_async_context(archive_of(vault, settings))
        await service._cached(stack, archive, settings)
        yield archive


def copied_home(trial: LocalConsortium, folder: Path) -> Path:
    """The trial's vault, which has nothing yet, on another machine."""
    return Path(shutil.copytree(trial.vault_home, folder / "home", ignore=shutil.ignore_patterns("*.sqlite*", "gateway")))


def pieces(data: bytes) -> set[bytes]:
    """Some of it, from the beginning, the middle and the end."""
    return {data[at : at + piece] for at in (0, len(data) // 2, len(data) - piece) if len(data) >= 2 * piece}


def blobs(database: Path) -> set[bytes]:
    """Every value about a file in a database that is long enough to tell. The ledger's heads are not: nodes have them."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT IN ('meta', 'clock')")]
        rows = {name: db.execute(f'SELECT * FROM "{name}"').fetchall() for name in names}
    kept = [(file, msgpack.unpackb(both)[0]) for file, both in rows.pop("manifests", ())]  # beside it stands its proof, with a head
    values = (value for table in (*rows.values(), kept) for row in table for value in row)
    return {value for value in values if isinstance(value, bytes) and len(value) >= 2 * piece}


async def kept_of(home: Path) -> set[bytes]:
    """Pieces of what its gateway's cache has, which is kept after the answer was given."""
    async with asyncio.timeout(30):
        while not (cached := {each for path in (home / "gateway" / "cache").rglob("*.cache") for each in pieces(path.read_bytes())}):
            await asyncio.sleep(0.01)
    return cached


def left(traces: Iterable[bytes], *folders: Path) -> list[str]:
    """The files in which one of them is."""
    found = []
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with contextlib.suppress(FileNotFoundError):
            data = path.read_bytes()
            found += [path.name for trace in traces if trace in data][:1]
    return found


async def test_nothing_of_an_erased_study_is_on_any_disk(trial: LocalConsortium, tmp_path: Path) -> None:
    home, nodes = copied_home(trial, tmp_path), trial.folder / "nodes"
    study, other = generate_uid(), generate_uid()
    series = generate_uid()
    files = [make_instance(study, series, number=number, size=200) for number in (1, 2)]
    kept = make_instance(other)
    async with gateway(home, trial.passphrase) as archive:
        for file in (*files, kept):
            assert (await archive.receive(Incoming(file))).outcome is Outcome.STORED
        # Each file of the spool has a salt, and each instance in it: what is sealed with one opens no more without it.
        spooled = [path.read_bytes()[: len(magic) + salt_size] for path in (home / "gateway" / "spool").glob("*.spool")]
        traces = {head[len(magic) :] for head in spooled}
        assert traces
        await archive.settle()
        assert [await (await archive.open(each)).read() for each in archive.instances(study)] == files
        cached = await kept_of(home)
        row = archive.vault.row(sha256(files[0]).digest())
        assert row is not None
        manifest, _ = await archive.vault.evidence(row.sha256)
        shards = {each for path in nodes.rglob(f"{row.file_id.hex()}-*") for each in pieces(path.read_bytes())}
        before = blobs(home / "index.sqlite") | blobs(home / "dicom.sqlite")
        traces = traces | cached | shards | pieces(manifest.header) | pieces(manifest.to_bytes())
        assert left(traces, home, nodes), "else nothing is found because nothing is looked for"
        async with Vault.open(home, trial.passphrase) as beside:  # `medshard erase`, while the gateway runs
            (ended,) = await beside.custody.end([sha256(file).digest() for file in files])
        assert not ended.missing
        await archive.catch_up()
        assert not list(archive.find(Query(Level.STUDY, {tags.STUDY_UID: study})))
        assert archive.instances(study) == []
        assert [await (await archive.open(each)).read() for each in archive.instances(other)] == [kept]
    after = blobs(home / "index.sqlite") | blobs(home / "dicom.sqlite")
    traces |= {each for blob in before - after for each in pieces(blob)}
    assert left(traces, home, nodes) == []
    async with gateway(home, trial.passphrase) as archive:  # as whoever recovers the vault's root key from its escrow
        await archive.vault.reindex()
        await archive.catch_up()
        assert archive.vault.row(sha256(files[0]).digest()) is None
        with pytest.raises(Absent):
            await archive.vault.get(sha256(files[0]).digest(), tmp_path / "back")
        assert [each.study for each in archive.find(Query(Level.STUDY, {tags.STUDY_UID: other}))] == [other]


def salts(spool: Path) -> set[bytes]:
    """Of all instances in a spool: what their keys are made of beside the vault's."""
    found, begins = set(), salt_size.to_bytes(4) + bytes([SALT])
    for path in spool.glob("*.spool"):
        data = path.read_bytes()
        at = len(magic) + salt_size
        while size := int.from_bytes(data[at : at + 4]):
            if data[at : at + 5] == begins:
                found.add(data[at + 5 : at + 5 + salt_size])
            at += 5 + size
    return found


async def test_an_instance_erased_right_after_it_was_stored_leaves_the_spool_and_its_neighbour_stays(
    trial: LocalConsortium, tmp_path: Path
) -> None:
    home = copied_home(trial, tmp_path)
    erased, killed, kept = (make_instance(size=200) for _ in range(3))
    async with gateway(home, trial.passphrase) as archive:
        spool = home / "gateway" / "spool"
        assert (await archive.receive(Incoming(kept))).outcome is Outcome.STORED
        neighbour = salts(spool)
        for file in (erased, killed):
            verdict = await archive.receive(Incoming(file))
            if file is killed:  # between the put and the word of it to the spool
                archive.spool.done = lambda entries: None  # type: ignore[method-assign]
            else:
                traces = salts(spool) - neighbour
            await archive.settle([(verdict.study, verdict.series)])
            assert archive.vault.row(sha256(file).digest()) is not None
        assert len(traces) == 1
        assert left(traces, home) == []
        assert len(list(spool.glob("*.spool"))) == 1, "one file, in which the neighbour lies"
        async with Vault.open(home, trial.passphrase) as beside:
            await beside.custody.end([sha256(file).digest() for file in (erased, killed)])
    async with gateway(home, trial.passphrase) as archive:
        assert salts(spool) == neighbour | {bytes(salt_size)}
        assert archive.waiting() == (1, 1), "neither of the two is stored once more"
        await archive.settle()
        assert archive.vault.row(sha256(erased).digest()) is None
        assert archive.vault.row(sha256(killed).digest()) is None
        row = archive.vault.row(sha256(kept).digest())
        assert row is not None
        (instance,) = archive.instances(row.attributes["study-uid"])
        assert await (await archive.open(instance)).read() == kept
        for file in (erased, kept):  # sent once more: taken as new, and known
            assert (await archive.receive(Incoming(file))).outcome is (Outcome.STORED if file is erased else Outcome.ALREADY)


async def test_a_gateway_sees_what_its_own_vault_has_erased(trial: LocalConsortium, tmp_path: Path) -> None:
    home = copied_home(trial, tmp_path)
    file = make_instance(size=200)
    async with gateway(home, trial.passphrase) as archive:
        verdict = await archive.receive(Incoming(file))
        await archive.settle()
        await archive.catch_up()
        (instance,) = archive.instances(verdict.study)
        assert await (await archive.open(instance)).read() == file
        cached = await kept_of(home)
        await archive.vault.custody.end([sha256(file).digest()])
        await archive.catch_up()
        assert archive.instances(verdict.study) == []
        assert left(cached, home) == []


async def test_a_gateway_sees_what_another_home_of_its_vault_has_erased(trial: LocalConsortium, tmp_path: Path) -> None:
    home, office = copied_home(trial, tmp_path), tmp_path / "office"
    shutil.copytree(home, office)
    file, kept = make_instance(size=200), make_instance()
    async with gateway(home, trial.passphrase) as archive:
        verdicts = [await archive.receive(Incoming(each)) for each in (file, kept)]
        await archive.settle()
        await archive.catch_up()
        (instance,) = archive.instances(verdicts[0].study)
        assert await (await archive.open(instance)).read() == file
        cached = await kept_of(home)
        async with Vault.open(office, trial.passphrase) as administrator:
            await administrator.reindex()
            await administrator.custody.end([sha256(file).digest()])
        async with asyncio.timeout(30):
            while archive.instances(verdicts[0].study):  # as the gateway does every ten seconds; enough nodes must have heard
                await archive.ask()
                await archive.catch_up()
        assert not list(archive.find(Query(Level.STUDY, {tags.STUDY_UID: verdicts[0].study})))
        assert left(cached, home) == []
        with pytest.raises(Absent, match="was erased by this vault"):
            await archive.vault.get(sha256(file).digest(), tmp_path / "back")
        with pytest.raises(MedshardError):
            await (await archive.open(instance)).read()
        (other,) = archive.instances(verdicts[1].study)
        assert await (await archive.open(other)).read() == kept
