"""The promises of the design, each against real node processes: lose nodes, damage shards, interrupt, and get back what was put."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import pytest
from tests.cluster.hearing import heard_everywhere, wait_for_every_shard

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard.ledger import Answered, LedgerClient
from medshard.line import Line, Steps
from medshard.sending import Outgoing, Sending
from medshard_protocol.entries import Access, Entry
from medshard_protocol.errors import Absent, MedshardError, Unavailable
from medshard_protocol.ids import FileId
from medshard_protocol.messages import cell_size_header, shard_path
from medshard_protocol.proofs import Inclusion
from medshard_protocol.roster import Node

small, large = 30_000, 9_000_000  # one object that is sent whole, one that is streamed in several stripes


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("promises"), institutions=6, code=(3, 6)) as consortium:
        yield consortium


@pytest.fixture(autouse=True)
def everybody_up(trial: LocalConsortium) -> Iterator[None]:
    yield
    for name in trial.names:
        if name in trial._running:
            trial.thaw(name)
        else:
            trial.restart(name)


@pytest.fixture
async def vault(trial: LocalConsortium) -> AsyncIterator[Vault]:
    async with Vault.open(trial.vault_home, trial.passphrase) as opened:
        yield opened


@pytest.fixture
def every_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_every_shard(monkeypatch)


def make(folder: Path, size: int, name: str = "file.bin") -> Path:
    path = folder / name
    path.write_bytes(os.urandom(size))
    return path


async def stored(vault: Vault, path: Path) -> bytes:
    report = await vault.put([path])
    assert report.problems == ()
    assert report.stored[0].sha256 == sha256(path.read_bytes()).digest()
    return report.stored[0].sha256


async def assert_comes_back(vault: Vault, digest: bytes, path: Path) -> None:
    back = path.with_name("back")
    await vault.get(digest, back)
    assert back.read_bytes() == path.read_bytes()
    back.unlink()


def sequencer(trial: LocalConsortium) -> str:
    assert trial.roster is not None
    return trial.roster.node(trial.roster.sequencer).name


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 100_000, 4 * 1024 * 1024, 4 * 1024 * 1024 + 1, large])
async def test_a_file_of_any_size_comes_back_bit_for_bit(vault: Vault, tmp_path: Path, size: int) -> None:
    path = make(tmp_path, size)
    await assert_comes_back(vault, await stored(vault, path), path)


@pytest.mark.usefixtures("every_shard")
@pytest.mark.parametrize("size", [small, large])
async def test_with_any_three_of_six_nodes_gone_every_file_comes_back(
    vault: Vault, trial: LocalConsortium, tmp_path: Path, size: int
) -> None:
    path = make(tmp_path, size)
    digest = await stored(vault, path)
    await heard_everywhere(vault)
    for name in [sequencer(trial), *[n for n in trial.names if n != sequencer(trial)][1:3]]:
        trial.kill(name)
    async with Vault.open(trial.vault_home, trial.passphrase) as fresh:
        await assert_comes_back(fresh, digest, path)


@pytest.mark.parametrize("size", [small, large])
async def test_with_fewer_than_k_nodes_the_error_says_how_many_and_which_are_missing(
    vault: Vault, trial: LocalConsortium, tmp_path: Path, size: int
) -> None:
    path = make(tmp_path, size)
    digest = await stored(vault, path)
    gone = trial.names[:4]
    for name in gone:
        trial.kill(name)
    with pytest.raises(Unavailable) as caught:
        await vault.get(digest, tmp_path / "back")
    message = str(caught.value)
    assert "3 of 6" in message
    assert all(name in message for name in gone)
    assert list(tmp_path.iterdir()) == [path]  # nothing, not even a part, under any name


@pytest.mark.parametrize("size", [small, large])
async def test_with_fewer_than_w_nodes_nothing_is_acknowledged_and_a_second_run_finishes(
    vault: Vault, trial: LocalConsortium, tmp_path: Path, size: int
) -> None:
    path = make(tmp_path, size)
    gone = [name for name in trial.names if name != sequencer(trial)][:2]
    for name in gone:
        trial.kill(name)
    before = sum(1 for _ in vault.ls())
    with pytest.raises(Unavailable, match="5 must"):
        await vault.put([path])
    assert sum(1 for _ in vault.ls()) == before
    for name in gone:
        trial.restart(name)
    await assert_comes_back(vault, await stored(vault, path), path)


async def test_one_dead_node_does_not_stop_a_put(vault: Vault, trial: LocalConsortium, tmp_path: Path) -> None:
    trial.kill(next(name for name in trial.names if name != sequencer(trial)))
    for size in (small, large):
        path = make(tmp_path, size)
        await assert_comes_back(vault, await stored(vault, path), path)


@pytest.mark.parametrize("size", [small, large])
async def test_a_frozen_node_stops_neither_put_nor_get(vault: Vault, trial: LocalConsortium, tmp_path: Path, size: int) -> None:
    path = make(tmp_path, size)
    trial.freeze(next(name for name in trial.names if name != sequencer(trial)))
    async with asyncio.timeout(20):  # not a measurement: Tahoe-LAFS hangs for 30 s here, and without hedging so should we
        await assert_comes_back(vault, await stored(vault, path), path)


def shard_files(trial: LocalConsortium, name: str) -> set[Path]:
    return set((trial.home(name) / "data" / "shards").glob("??/*"))


@pytest.mark.usefixtures("every_shard")
async def test_a_flipped_bit_costs_the_node_and_not_the_reader(vault: Vault, trial: LocalConsortium, tmp_path: Path) -> None:
    before = {name: shard_files(trial, name) for name in trial.names}
    path = make(tmp_path, large)
    digest = await stored(vault, path)
    for name in trial.names[:3]:
        (shard,) = shard_files(trial, name) - before[name]
        with shard.open("r+b") as file:
            file.seek(200_000)
            byte = file.read(1)
            file.seek(200_000)
            file.write(bytes([byte[0] ^ 0x10]))
    report = await vault.get(digest, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    assert {name for name, _, _ in report.bad_cells} <= set(trial.names[:3])
    verified = await vault.verify(digest)
    states = {holder.node: (holder.state, holder.bad_cells) for holder in verified.holders}
    assert all(states[name] == ("damaged", (1,)) for name in trial.names[:3])
    assert (verified.ok, verified.margin) == (False, 0)


@pytest.mark.usefixtures("every_shard")
async def test_a_cut_or_missing_shard_is_damage_and_the_file_comes_back(vault: Vault, trial: LocalConsortium, tmp_path: Path) -> None:
    before = {name: shard_files(trial, name) for name in trial.names}
    path = make(tmp_path, large)
    digest = await stored(vault, path)
    (first,), (second,) = (shard_files(trial, name) - before[name] for name in trial.names[:2])
    os.truncate(first, 1000)
    second.unlink()
    await assert_comes_back(vault, digest, path)


async def test_no_institution_holds_k_shards_and_no_node_two(vault: Vault, tmp_path: Path) -> None:
    info = await vault.info(await stored(vault, make(tmp_path, small)))
    assert len({node.node for node in info.nodes}) == info.n
    assert max(Counter(node.institution for node in info.nodes).values()) < info.k


async def test_no_node_sees_a_name_a_plaintext_or_its_hash(vault: Vault, trial: LocalConsortium, tmp_path: Path) -> None:
    secret = b"Mueller^Aenne PID-0001 " * 50_000
    path = tmp_path / "Mueller-Aenne.txt"
    path.write_bytes(secret)
    digest = await stored(vault, path)
    needles = [b"Mueller", b"PID-0001", digest, digest.hex().encode()]
    for name in trial.names:
        for file in trial.home(name).rglob("*"):
            if file.is_file():
                data = file.read_bytes()
                assert not any(needle in data for needle in needles), file


async def test_the_same_file_again_is_stored_once(vault: Vault, tmp_path: Path) -> None:
    path = make(tmp_path, small)
    digest = await stored(vault, path)
    rows = sum(1 for _ in vault.ls())
    for other in (path, path.with_name("copy")):
        other.write_bytes(path.read_bytes())
        report = await vault.put([other])
        assert [(each.sha256, each.already) for each in report.stored] == [(digest, True)]
    assert sum(1 for _ in vault.ls()) == rows


@pytest.mark.usefixtures("every_shard")
async def test_an_interrupted_put_is_finished_without_sending_a_stored_shard_again(
    trial: LocalConsortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medshard.ledger import LedgerClient
    from medshard.transport import Net

    async def no_ledger(self: LedgerClient, manifests: object) -> None:
        raise Unavailable("cut off here")

    sent: list[str] = []
    begin, call = Sending.begin, Net.call

    def counting_begin(self: Sending, node: Node, path: str, size: int, headers: Mapping[str, str]) -> Outgoing:
        sent.append(path)
        return begin(self, node, path, size, headers)

    async def counting_call(self: Net, node: object, method: str, path: str, *rest: object, **more: object) -> bytes:
        if path == "/v1/files":
            sent.append(path)
        return await call(self, node, method, path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Sending, "begin", counting_begin)
    monkeypatch.setattr(Net, "call", counting_call)
    paths = [make(tmp_path, small, "small"), make(tmp_path, large, "large")]
    for path in paths:
        with monkeypatch.context() as broken:
            broken.setattr(LedgerClient, "register", no_ledger)
            async with Vault.open(trial.vault_home, trial.passphrase) as vault:
                with pytest.raises(Unavailable):
                    await vault.put([path])
        assert len(sent) == 6
        sent.clear()
        async with Vault.open(trial.vault_home, trial.passphrase) as vault:
            digest = await stored(vault, path)
            assert sent == []
            await assert_comes_back(vault, digest, path)


async def test_a_file_that_changed_after_an_interrupted_put_gets_other_keys(
    trial: LocalConsortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medshard.ledger import LedgerClient

    async def no_ledger(self: LedgerClient, manifests: object) -> None:
        raise Unavailable("cut off here")

    path = make(tmp_path, large)
    stat = path.stat()
    with monkeypatch.context() as broken:
        broken.setattr(LedgerClient, "register", no_ledger)
        async with Vault.open(trial.vault_home, trial.passphrase) as vault:
            with pytest.raises(Unavailable):
                await vault.put([path])
    path.write_bytes(os.urandom(large))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same name, size and time: only the hash tells
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        await assert_comes_back(vault, await stored(vault, path), path)


async def test_a_folder_becomes_packs_and_each_member_comes_back_alone(vault: Vault, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    (folder / "letters").mkdir(parents=True)
    files = [make(folder, 1000 * i + 1, f"{i:02d}.bin") for i in range(20)] + [make(folder / "letters", 2_000_000, "big.bin")]
    report = await vault.put([folder])
    assert report.problems == ()
    assert len({each.file_id for each in report.stored}) == 2  # one pack, one large file
    by_path = {each.path: each.sha256 for each in report.stored}
    back = tmp_path / "one"
    await vault.get(by_path[files[7]], back)
    assert back.read_bytes() == files[7].read_bytes()
    out = tmp_path / "all"
    await vault.get_many([by_path[file] for file in files], out)
    for file in files:
        assert (out / file.relative_to(tmp_path)).read_bytes() == file.read_bytes()


async def test_a_member_of_a_pack_is_read_by_only_the_stripes_it_lies_in(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    folder = tmp_path / "series"
    folder.mkdir()
    files = [make(folder, 900_000, f"{i:02d}") for i in range(12)]
    report = await vault.put([folder])
    asked: list[str] = []
    ask = Line.ask

    def noting(self: Line, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Steps[None]:
        if method == "GET":
            asked.append(path)
        return ask(self, method, path, headers, body)

    monkeypatch.setattr(Line, "ask", noting)
    await vault.get(report.stored[6].sha256, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == files[6].read_bytes()
    first, last = (int(part) for part in asked[0].split("cells=")[1].split("&")[0].split("-"))
    assert 0 < last - first + 1 <= 900_000 // (3 * 128 * 1024) + 2
    assert {path.partition("cells=")[2] for path in asked} == {asked[0].partition("cells=")[2]}  # of one that is slow another is asked too


async def test_a_range_is_read_by_only_the_stripes_it_lies_in(vault: Vault, tmp_path: Path) -> None:
    path = make(tmp_path, large)
    digest = await stored(vault, path)
    data = path.read_bytes()
    for offset, length in ((0, 1), (0, 0), (large - 5, 100), (large, 10), (393_200, 20), (4_000_000, 1_000_000)):
        assert await vault.read(digest, offset, length) == data[offset : offset + length]


async def test_a_file_that_changes_while_it_is_read_is_refused_and_nothing_of_it_stays(vault: Vault, tmp_path: Path) -> None:
    path = make(tmp_path, 30_000_000)
    changes = 0

    def touch(progress: object) -> None:
        nonlocal changes
        if changes == 0:
            with path.open("ab") as file:
                file.write(b"more")
        changes += 1

    before = sum(1 for _ in vault.ls())
    report = await vault.put([path], progress=touch)
    assert changes > 0
    assert report.stored == ()
    assert "changed while it was read" in report.problems[0].message
    assert sum(1 for _ in vault.ls()) == before
    await assert_comes_back(vault, await stored(vault, path), path)


async def test_without_its_index_the_vault_finds_everything_again(trial: LocalConsortium, tmp_path: Path) -> None:
    path = make(tmp_path, small)
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        digest = await stored(vault, path)
        names = {row.sha256 for row in vault.ls()}
    for file in trial.vault_home.glob("index.sqlite*"):
        file.unlink()
    trial.kill(next(name for name in trial.names if name != sequencer(trial)))
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        await assert_comes_back(vault, digest, path)  # by the nodes' lookup alone
        await vault.reindex()
        assert {row.sha256 for row in vault.ls()} == names
        with pytest.raises(Absent):
            await vault.get(bytes(32), tmp_path / "back")


async def test_a_read_while_the_quorum_is_away_is_kept_and_appended_later(trial: LocalConsortium, tmp_path: Path) -> None:
    """The trial's vault is an emergency identity with a standing reason; test_rights says what becomes of others."""
    path = make(tmp_path, small)
    async with Vault.open(trial.vault_home, trial.passphrase) as vault:
        digest = await stored(vault, path)
        await heard_everywhere(vault)
        for name in trial.names[:3]:
            trial.kill(name)
        assert not (await vault.get(digest, tmp_path / "back")).recorded
        assert len(vault._pending()) == 1
        for name in trial.names[:3]:
            trial.restart(name)
            vault._net.health.well(next(node.id for node in vault.roster.nodes if node.name == name))
        assert (await vault.get(digest, tmp_path / "back")).recorded
        assert vault._pending() == []


async def test_every_read_is_on_the_ledger_and_reads_of_one_file_within_ten_minutes_are_one_entry(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[tuple[FileId, ...]] = []
    append = LedgerClient.append_signed

    async def noting(self: LedgerClient, entries: Sequence[Entry], *more: Answered | None) -> list[Inclusion]:
        announced.extend(entry.body.file_ids for entry in entries if isinstance(entry.body, Access))
        return await append(self, entries, *more)

    monkeypatch.setattr(LedgerClient, "append_signed", noting)
    first, second = [await stored(vault, make(tmp_path, small, name)) for name in ("one", "two")]
    await heard_everywhere(vault)  # or a holder that had not heard of the file would have the read announced anew
    await vault.get(first, tmp_path / "back")
    await vault.read(first, 100, 10)
    await vault.read(second, 0, 10)
    assert [len(files) for files in announced] == [1, 1]
    assert announced[0] != announced[1]
    vault._reader.tickets.expire()  # ten minutes later
    await vault.read(first, 100, 10)
    assert announced[2] == announced[0]


async def test_an_unregistered_shard_is_not_a_file(vault: Vault, trial: LocalConsortium, tmp_path: Path) -> None:
    """A shard that was sent and never registered is nobody's file: it is swept, and no lookup finds it."""
    node = vault.roster.nodes[0]
    sending = Sending(vault._net, lambda: None)
    outgoing = sending.begin(node, shard_path(FileId(os.urandom(32)), 0), 5000, {cell_size_header: "5000"})
    outgoing.parts.append(memoryview(bytes(5000)))
    sending.ring()
    await outgoing.answer
    await sending.close()
    with pytest.raises(Absent):
        await vault.get(sha256(bytes(5000)).digest(), tmp_path / "back")


def test_kill_nine_of_the_client_in_the_middle_loses_nothing_that_was_acknowledged(trial: LocalConsortium, tmp_path: Path) -> None:
    """Four clients killed at four different moments; whatever one had printed comes back, and the rest can be put again."""
    paths = [make(tmp_path, 2_000_000 if i % 2 else 6_000_000, f"f{i}") for i in range(4)]
    environment = {**os.environ, "MEDSHARD_HOME": str(trial.vault_home)}
    acknowledged: list[str] = []
    for number, path in enumerate(paths):
        process = subprocess.Popen(
            [sys.executable, "-m", "medshard", "put", str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        time.sleep(0.4 + 0.09 * number)
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate()
        acknowledged += [line.split()[0].decode() for line in out.splitlines()]

    async def check() -> None:
        async with Vault.open(trial.vault_home, trial.passphrase) as vault:
            for digest in acknowledged:
                await vault.get(bytes.fromhex(digest), tmp_path / "back")
            for path in paths:
                await assert_comes_back(vault, await stored(vault, path), path)

    asyncio.run(check())


async def test_every_error_of_the_vault_is_one_of_ours(vault: Vault, tmp_path: Path) -> None:
    with pytest.raises(MedshardError):
        await vault.get(b"\x00" * 32, tmp_path / "back")
    with pytest.raises(MedshardError):
        await vault.get(await stored(vault, make(tmp_path, 10)), tmp_path / "no" / "such" / "folder")
