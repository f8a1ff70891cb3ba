"""What leaves a client's machine, and what nodes keep, write and send: nothing that says who a file is about, in any spelling.

Real DICOM and PDF files full of names, numbers and UIDs go through everything a client does, against real node processes. Every word of
them that could tell a patient, and every hash of them, is then looked for in node folders (also value by value in their databases, since
SQLite may cut a value in two), in ledger entries and manifests, in logs, in the bytes between client and nodes as they crossed the
network, and in the same bytes before TLS sealed them.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import sqlite3
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard.demo import insured, policy_number, policy_pdf
from medshard.home import Home
from medshard.query import Query
from medshard_protocol.entries import Entry, Purpose, Type
from medshard_protocol.errors import MedshardError
from medshard_protocol.roster import Roster

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")

passphrase = "three words suffice"
name, given = "Quittenbaum", "Hannelore"
patient_id, accession = "PID-7730442", "ACC-99120817"
study, series, instance = "1.2.826.0.1.3680043.9.7711.1", "1.2.826.0.1.3680043.9.7711.2", "1.2.826.0.1.3680043.9.7711.3"
words = (name, given, patient_id, accession, study, series, instance, "19510429", "Zuckerkandl", "Herzkatheter", "quittenbaum-arztbrief")


def make_files(folder: Path) -> list[Path]:
    """Two slices of one series, a policy, and a letter, each with what must not be seen."""
    folder.mkdir()
    for number in range(2):
        data = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
        data.PatientName, data.PatientID, data.AccessionNumber = f"{name}^{given}", patient_id, accession
        data.PatientBirthDate, data.ReferringPhysicianName, data.StudyDescription = "19510429", "Zuckerkandl^Emil", "Herzkatheter"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.SOPInstanceUID = study, series, f"{instance}.{number}"
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.InstanceNumber = number
        data.save_as(folder / f"{name}-{number}.dcm")
    (folder / f"{patient_id}.pdf").write_bytes(policy_pdf())
    (folder / "quittenbaum-arztbrief.txt").write_text(f"{given} {name}, {patient_id}: Herzkatheter am 3. Mai. " * 2000)
    return sorted(folder.iterdir())


def spellings(text: str) -> set[bytes]:
    """A word in the encodings that it could stand in; in base64 at each of the three places where it may begin."""
    found = set()
    for variant in {text, text.upper(), text.lower()}:
        for raw in (variant.encode(), variant.encode("utf-16-le"), variant.encode("utf-16-be")):
            found |= {raw, raw.hex().encode(), raw.hex().upper().encode(), *in_base64(raw)}
    return found


def spellings_of_hash(digest: bytes) -> set[bytes]:
    text = digest.hex()
    return {
        digest,
        digest[::-1],
        text.encode(),
        text.upper().encode(),
        text.encode("utf-16-le"),
        text.encode("utf-16-be"),
        *in_base64(digest),
    }


def in_base64(raw: bytes) -> set[bytes]:
    found = set()
    for shift in range(3):
        coded = base64.b64encode(bytes(shift) + raw)
        core = coded[(0, 2, 3)[shift] : len(coded) - (4 if (len(raw) + shift) % 3 else 0)]
        if len(core) >= 8:
            found |= {core, core.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def needles_of(files: list[Path]) -> dict[bytes, str]:
    needles: dict[bytes, str] = {}
    for word in (*words, policy_number, insured.decode()):
        needles.update(dict.fromkeys(spellings(word), word))
    for path in files:
        needles.update(dict.fromkeys(spellings(path.name), path.name))
        for kind in ("sha256", "sha1", "md5", "blake2b"):
            digest = hashlib.new(kind, path.read_bytes()).digest()
            needles.update(dict.fromkeys(spellings_of_hash(digest), f"{kind} of {path.name}"))
        salted = hashlib.sha256(hashlib.sha256(path.read_bytes()).digest()).digest()
        needles.update(dict.fromkeys(spellings_of_hash(salted), f"hash of the hash of {path.name}"))
    return needles


def found_in(data: bytes, needles: dict[bytes, str]) -> set[str]:
    return {what for needle, what in needles.items() if needle in data}


# -- what crosses the network


@dataclass
class Wire:
    """Relays before the nodes, which keep what passes; and what was written into TLS and read out of it."""

    crossed: list[bytes] = field(default_factory=list)
    plain: list[bytes] = field(default_factory=list)
    ports: dict[str, str] = field(default_factory=dict)  # urls of nodes, and of the relays before them
    _servers: list[asyncio.Server] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def before(self, url: str) -> None:
        """Put a relay before this node."""
        host, port = url.removeprefix("https://").rsplit(":", 1)

        async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there = await asyncio.open_connection(host, int(port))
            await asyncio.gather(self._pass(reader, there[1]), self._pass(there[0], writer))

        def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._tasks.append(asyncio.create_task(both(reader, writer)))

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        self._servers.append(server)
        self.ports[url] = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                self.crossed.append(data)
                writer.write(data)
                await writer.drain()
        with suppress(OSError):
            writer.close()

    def relayed(self, roster: Roster) -> Roster:
        """The same roster, reached through the relays."""
        return replace(roster, nodes=tuple(replace(node, url=self.ports[node.url]) for node in roster.nodes))

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def tapped(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Wire]:
    wire = Wire()
    for node in roster.nodes:
        await wire.before(node.url)
    real, write, read = Home.roster, ssl.SSLObject.write, ssl.SSLObject.read

    def tapped_write(self: ssl.SSLObject, data: bytes) -> int:
        wire.plain.append(bytes(data))
        return write(self, data)

    def tapped_read(self: ssl.SSLObject, length: int = 1024, buffer: bytearray | None = None) -> object:
        got = read(self, length, buffer)  # type: ignore[arg-type]
        wire.plain.append(bytes(memoryview(buffer)[:got]) if buffer is not None else got)  # type: ignore[arg-type,misc]
        return got

    monkeypatch.setattr(Home, "roster", lambda self: wire.relayed(real(self)))
    monkeypatch.setattr(ssl.SSLObject, "write", tapped_write)
    monkeypatch.setattr(ssl.SSLObject, "read", tapped_read)
    try:
        yield wire
    finally:
        monkeypatch.undo()
        await wire.close()


# -- what nodes keep


def values(path: Path) -> Iterator[bytes]:
    """Every value of a database, whole."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for row in database.execute(f'SELECT * FROM "{table}"'):
                yield from (value if isinstance(value, bytes) else str(value).encode() for value in row if value is not None)
    database.close()


async def everything(trial: LocalConsortium, files: list[Path], folder: Path) -> None:
    """All that a client does with files, by two vaults."""
    digests = {path: hashlib.sha256(path.read_bytes()).digest() for path in files}
    async with Vault.open(trial.vault_home, trial.passphrase) as owner, Vault.open(trial.folder / "reader", passphrase) as reader:
        report = await owner.put([files[0].parent])
        assert report.problems == ()
        assert {each.sha256 for each in report.stored} == set(digests.values())
        some = digests[files[0]]
        await owner.get(some, folder / "back")
        assert (folder / "back").read_bytes() == files[0].read_bytes()
        await owner.shares.share([some], reader.keys.public, purpose=Purpose.TREATMENT)
        await reader.shares.sync()
        await reader.get(some, folder / "shared")
        assert (folder / "shared").read_bytes() == files[0].read_bytes()
        assert [each.what for each in await owner.shares.log(some)]
        await owner.shares.revoke([some], reader.keys.public)
        reader._reader.tickets.expire()
        with pytest.raises(MedshardError):
            await reader.get(some, folder / "refused")
        assert [row.sha256 for row in owner.find(Query(patient=patient_id))]
        await owner.verify(some)
        await owner.prove(some)
        await owner.doctor()
    for path in trial.vault_home.glob("index.sqlite*"):
        path.unlink()
    async with Vault.open(trial.vault_home, trial.passphrase) as owner:
        await owner.get(some, folder / "looked up")
        await owner.custody.hold([some])
        await owner.custody.release([some])
        ended = await owner.custody.end([some])  # what stays of an erased file on ledger and nodes is searched, too
        assert [(each.type, each.missing) for each in ended] == [
            (Type.ERASE, ())
        ] * 2  # the copy that was shared alone, which no index knew
        with pytest.raises(MedshardError):
            await owner.get(some, folder / "erased")


async def test_nothing_that_tells_a_patient_leaves_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_files(tmp_path / "scans")
    needles = needles_of(files)
    for path in files:  # the search finds what is there to be found
        assert found_in(path.read_bytes(), needles), path
    with LocalConsortium(tmp_path / "trial", institutions=4, code=(2, 4)) as trial:
        await Vault.join(trial.folder / "reader", trial.invite(), passphrase, fast_kdf=True)
        assert trial.roster is not None
        async with tapped(trial.roster, monkeypatch) as wire:
            await everything(trial, files, tmp_path)
            await asyncio.sleep(1.5)  # until nodes have saved what they know
        crossed, plain = b"".join(wire.crossed), b"".join(wire.plain)
        homes = {each: trial.home(each) for each in trial.names}
    assert len(crossed) > 500_000
    for way in (b"POST /v1/files", b"POST /v1/lookup", b"PUT /v1/grants/", b"POST /v1/ledger/append", b"Medshard-Access: "):
        assert way in plain, way
    assert found_in(plain, needles) == set()
    assert found_in(crossed, needles) == set()
    entries = manifests = 0
    for node, home in homes.items():
        for path in home.rglob("*"):
            if not path.is_file():
                continue
            assert found_in(path.read_bytes(), needles) == set(), path
            assert found_in(str(path.relative_to(home)).encode(), needles) == set(), path
            if path.suffix == ".sqlite":
                kept = list(values(path))
                entries += sum(_is_entry(value) for value in kept)
                manifests += sum(len(value) > 400 for value in kept) if path.name == "store.sqlite" else 0
                assert found_in(b"\0".join(kept), needles) == set(), (node, path)
        assert (home / "log").stat().st_size > 0
    assert entries >= 4 * 8
    assert manifests >= 4


def _is_entry(value: bytes) -> bool:
    try:
        Entry.from_bytes(value)
    except MedshardError:
        return False
    return True


def test_the_search_knows_every_spelling() -> None:
    needles = dict.fromkeys(spellings(name), name)
    for shift in range(4):
        for text in (name, name.upper()):
            for raw in (text.encode(), text.encode("utf-16-le"), text.encode("utf-16-be")):
                around = b"x" * shift + raw + b"more"
                for coded in (around, around.hex().encode(), base64.b64encode(around), base64.urlsafe_b64encode(around)):
                    assert found_in(coded, needles) == {name}
    assert found_in(b"Quitten and other fruit", needles) == set()
