"""Attacks on the ledger, each against real nodes over TLS: what an attacker tries, who refuses it, what is left as evidence, and that
the honest rest goes on. Attacks on readers' rights are in test_rights.py and test_gate.py; docs/guides/watch.md lists all of them.

Four institutions with a node each; a quorum is three, and one may be faulty. All run ``attackers.py``, which is the real program until a
file tells it what to do wrong. Where an attack takes more than one faulty institution, the test signs with keys taken from their homes.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from medshard import Vault, nursery
from medshard.consortium import LocalConsortium
from medshard.home import Home
from medshard.keys import open_key_file
from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, cosigner_verifier, log_verifier
from medshard_protocol.entries import Register, sign_entry
from medshard_protocol.errors import MedshardError, Refused, Unavailable
from medshard_protocol.ids import FileId, Sha256
from medshard_protocol.proofs import pack_append
from medshard_protocol.tiles import Tree, pack_bundle, tile_names, tile_width, unpack_bundle
from storenode.asking import ask
from storenode.config import Config
from storenode.consortium import free_ports
from storenode.evidence import Evidence, Exhibit
from storenode.identity import NodeKeys
from storenode.watching import Report, judge
from storenode.watching.auditing import auditing

sequencer, liar, honest = "hospital-01", "insurer-04", ("hospital-03", "insurer-02")


def sha(data: bytes) -> bytes:
    return sha256(data).digest()


class Attacked(LocalConsortium):
    """A consortium whose nodes can be told to misbehave, and look around twice a second."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, institutions=4)
        self.metrics_port = free_ports(1)[0]

    def misbehave(self, name: str, *, answers: Sequence[object] = (), pushes: Sequence[object] = ()) -> None:
        path = self.home(name) / "misbehave.json"
        path.with_suffix(".part").write_text(json.dumps({"answers": answers, "pushes": pushes}))
        path.with_suffix(".part").replace(path)

    def behave(self) -> None:
        for name in self.names:
            (self.home(name) / "misbehave.json").unlink(missing_ok=True)

    async def let_the_first_lead(self) -> None:
        """Undo a takeover, as the rules bend what one node says to its mirrors."""
        async with asyncio.timeout(60):
            while (leader := self.status(honest[0])["ledger"]["leader"]) != sequencer:
                if leader:
                    self.kill(leader)
                    await asyncio.sleep(2.0)
                    self.restart(leader)
                await asyncio.sleep(0.2)

    def status(self, name: str) -> dict[str, Any]:
        return ask(Config.load(self.home(name)), self.keys(name), "/v1/status")

    def evidence(self, name: str) -> Evidence:
        return Evidence(self.home(name) / "data" / "evidence")

    def keys(self, name: str) -> NodeKeys:
        return NodeKeys.load(self.home(name))

    def _make(self) -> None:
        super()._make()
        for name in self.names:
            path = self.home(name) / "config.toml"
            text = path.read_text()
            assert "# watch_every_s" in text
            text = text.replace("# watch_every_s = 15.0", "watch_every_s = 0.5")
            if name == honest[0]:
                text = text.replace('listen = ""', f'listen = "127.0.0.1:{self.metrics_port}"')
            path.write_text(text)

    def _program(self, name: str) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name("attackers.py")), str(self.home(name))]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with Attacked(tmp_path_factory.mktemp("attacks")) as consortium:
        yield consortium


@pytest.fixture
async def vault(trial: Attacked) -> AsyncIterator[Vault]:
    trial.behave()
    for name in trial.names:
        for path in trial.evidence(name).files():
            path.unlink()
    async with Vault.open(trial.vault_home, trial.passphrase) as opened:
        yield opened
    trial.behave()


async def assert_the_honest_rest_goes_on(vault: Vault, folder: Path) -> None:
    """A file goes in, and comes back to somebody who knows nothing yet."""
    path, back = folder / "honest", folder / "honest-back"
    path.write_bytes(os.urandom(20_000))
    report = await vault.put([path])
    assert report.problems == ()
    await vault.get(report.stored[0].sha256, back)
    assert back.read_bytes() == path.read_bytes()
    back.unlink()


# -- looking


@asynccontextmanager
async def auditor(trial: Attacked, folder: Path, stale_s: float = 60.0) -> AsyncIterator[Callable[[], object]]:
    """Somebody outside, with the genesis file and a certificate."""
    assert trial.roster is not None
    keys = trial.home(honest[1]) / "keys"
    async with auditing(trial.roster, folder, identity=(keys / "node.crt", keys / "node.key"), places=(), stale_s=stale_s) as opened:
        yield opened.watch.round


def found(report: Report) -> set[tuple[str, str]]:
    return {(finding.kind, finding.source) for finding in report.findings}


def verify(trial: Attacked, path: Path) -> tuple[int, str]:
    """As a third party would, with the file, the genesis file and the program."""
    told = nursery.run(["-m", "storenode", "evidence", "verify", str(path), "--genesis", str(trial.folder / "genesis.medshard")])
    return told.returncode, told.stdout + told.stderr


async def until(true: Callable[[], object], within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.05)


# -- forging


async def entries_of(vault: Vault, trial: Attacked) -> list[bytes]:
    """All published entries, from an honest mirror, as soon as it has heard of what this vault wrote last."""
    node, size = next(node for node in vault.roster.nodes if node.name == honest[0]), 0
    async with asyncio.timeout(60):
        while size < max(1, vault._ledger.reached):
            note = await vault._net.call(node, "GET", "/log/checkpoint", timeout_s=5.0)
            size = Checkpoint.from_text(Note.from_bytes(note).text).size
    entries: list[bytes] = []
    for name in tile_names(size):
        if name.level is None:
            entries += unpack_bundle(await vault._net.call(node, "GET", f"/log/tile/{name.path()}", timeout_s=5.0), name.width)
    return entries


def forged_log(trial: Attacked, folder: Path, entries: Sequence[bytes], cosigners: Sequence[str], at: int) -> Path:
    """The static files of a log with these entries, signed by the sequencer and these nodes."""
    assert trial.roster is not None
    roster, stored = trial.roster, {}
    tree = Tree(lambda level, index: stored[level, index])
    for entry in entries:
        for tile in tree.append(merkle.leaf_hash(entry, sha)):
            stored[tile.level, tile.number] = tile.hashes
    text = Checkpoint(roster.origin, tree.size, tree.root(tree.size)).text()
    lines = [log_verifier(roster).sign(text, trial.keys(sequencer).log.sign)]
    for number, name in enumerate(cosigners):
        keys = trial.keys(name)
        lines.append(cosigner_verifier(roster, keys.node_id).sign(text, keys.cosigner.sign, at + number))
    for name in tile_names(len(entries)):
        path = folder / "tile" / name.path()
        path.parent.mkdir(parents=True, exist_ok=True)
        start = name.index * tile_width
        path.write_bytes(tree.tile(name) if name.level is not None else pack_bundle(entries[start : start + name.width]))
    (folder / "checkpoint").write_bytes(Note(text, tuple(lines)).to_bytes())
    return folder


async def newest_time(vault: Vault) -> int:
    node = next(node for node in vault.roster.nodes if node.name == honest[0])
    from medshard_protocol.checkpoint import cosigners

    return max(cosigners(Note.from_bytes(await vault._net.call(node, "GET", "/log/checkpoint", timeout_s=5.0)), vault.roster).values())


# -- attacks on the whole log


async def test_a_second_history_shown_to_others_is_found_by_every_node_and_names_who_signed_both(
    vault: Vault, trial: Attacked, tmp_path: Path
) -> None:
    """Two faulty institutions and one that they deceived: enough for two histories with a quorum each."""
    await assert_the_honest_rest_goes_on(vault, tmp_path)
    entries = await entries_of(vault, trial)
    fork = forged_log(trial, tmp_path / "fork", [*entries[:-1], entries[0]], [sequencer, honest[1], liar], await newest_time(vault))
    trial.misbehave(liar, answers=[{"path": "^/log/", "do": "folder", "folder": str(fork)}])
    await until(lambda: trial.evidence(honest[0]).files("fork"))
    trial.behave()
    path = trial.evidence(honest[0]).files("fork")[0]
    code, said = verify(trial, path)
    assert code == 0, said
    assert f"The log key of {sequencer} signed both." in said
    assert f"Both have a quorum, so at least one of these broke its word: {sequencer}" in said
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{trial.metrics_port}/metrics").read().decode()
    assert 'medshard_evidence{kind="fork"} 0.0' not in metrics
    assert 'medshard_evidence{kind="fork"}' in metrics
    assert trial.status(honest[0])["watch"]["evidence"]["fork"] >= 1
    shown = nursery.run(["-m", "storenode", "--home", str(trial.home(honest[0])), "status"])
    assert "files of evidence, see: storenode evidence list" in shown.stdout, shown
    await assert_the_honest_rest_goes_on(vault, tmp_path)


async def test_a_later_head_over_a_rewritten_entry_is_proved_to_be_one(vault: Vault, trial: Attacked, tmp_path: Path) -> None:
    async with auditor(trial, tmp_path / "auditor") as look:
        assert not {kind for kind, _ in found(await look())} - {"not-cosigned"}
        entries = await entries_of(vault, trial)
        forged = [*entries[:1], entries[0], *entries[2:], *entries[:5]]
        folder = forged_log(trial, tmp_path / "fork", forged, [sequencer, honest[1], liar], await newest_time(vault))
        trial.misbehave(liar, answers=[{"path": "^/log/", "do": "folder", "folder": str(folder)}])
        report = await look()
    assert ("rewritten", liar) in found(report)
    path = next(path for path in report.kept if path.name.startswith("rewritten"))
    code, said = verify(trial, path)
    assert (code, "signed over a rewritten history" in said) == (0, True)
    trial.behave()
    await assert_the_honest_rest_goes_on(vault, tmp_path)


async def test_an_entry_that_is_left_out_of_the_log_that_others_have_is_a_rewritten_history(
    vault: Vault, trial: Attacked, tmp_path: Path
) -> None:
    async with auditor(trial, tmp_path / "auditor") as look:
        await look()
        entries = await entries_of(vault, trial)
        middle = len(entries) // 2
        omitted = [*entries[:middle], *entries[middle + 1 :], *entries[:5]]
        folder = forged_log(trial, tmp_path / "fork", omitted, [sequencer, honest[1], liar], await newest_time(vault))
        trial.misbehave(liar, answers=[{"path": "^/log/", "do": "folder", "folder": str(folder)}])
        report = await look()
    assert ("rewritten", liar) in found(report)
    trial.behave()
    await assert_the_honest_rest_goes_on(vault, tmp_path)


async def test_an_old_head_shown_again_is_a_rollback(vault: Vault, trial: Attacked, tmp_path: Path) -> None:
    node = next(node for node in vault.roster.nodes if node.name == liar)
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "checkpoint").write_bytes(await vault._net.call(node, "GET", "/log/checkpoint", timeout_s=5.0))
    await assert_the_honest_rest_goes_on(vault, tmp_path)
    async with auditor(trial, tmp_path / "auditor") as look:
        await until_level(look, liar)
        trial.misbehave(liar, answers=[{"path": "^/log/checkpoint$", "do": "folder", "folder": str(folder)}])
        await look()
        report = await look()
    assert ("rollback", liar) in found(report)
    code, said = verify(trial, next(path for path in report.kept if path.name.startswith("rollback")))
    assert code == 6  # whoever serves an old note signs nothing: this is the auditor's word, and the file says so
    assert "is the keeper's word" in said
    await assert_the_honest_rest_goes_on(vault, tmp_path)


async def until_level(look: Callable[[], object], name: str) -> None:
    """Look until a mirror shows what the others show: it hears of a head a moment later."""
    async with asyncio.timeout(60):
        while True:
            sizes = {head.source: head.checkpoint.size for head in (await look()).heads}
            if sizes.get(name) == max(sizes.values()):
                return
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("cosigners", [(sequencer, liar), (sequencer, liar, liar)], ids=["two institutions", "one of them twice"])
async def test_a_head_without_a_quorum_convinces_neither_auditor_nor_client(
    vault: Vault, trial: Attacked, tmp_path: Path, cosigners: tuple[str, ...]
) -> None:
    await trial.let_the_first_lead()
    entries = await entries_of(vault, trial)
    folder = forged_log(trial, tmp_path / "few", [*entries, entries[0]], cosigners, await newest_time(vault))
    trial.misbehave(
        liar,
        answers=[{"path": "^/log/", "do": "folder", "folder": str(folder)}],
    )
    trial.misbehave(sequencer, answers=[{"path": "^/v1/ledger/append$", "do": "other-note", "file": str(folder / "checkpoint")}])
    async with auditor(trial, tmp_path / "auditor") as look:
        report = await look()
    assert ("few-cosigners", liar) in found(report)
    _, said = verify(trial, next(path for path in report.kept if path.name.startswith("few-cosigners")))
    assert "2 institutions cosigned it, and 3 are needed" in said
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1000))
    with pytest.raises(MedshardError, match="fewer than 3 institutions"):
        await vault.put([path])
    trial.behave()
    await assert_the_honest_rest_goes_on(vault, tmp_path)


# -- attacks on parts of it


@pytest.mark.parametrize("path", ["tile/0/", "tile/entries/"])
async def test_a_flipped_bit_in_a_tile_or_bundle_is_found_and_shown(vault: Vault, trial: Attacked, tmp_path: Path, path: str) -> None:
    trial.misbehave(liar, answers=[{"path": f"^/log/{path}", "do": "flip", "at": 5}])
    async with auditor(trial, tmp_path / "auditor") as look:
        report = await look()
    assert ("damaged-tile", liar) in found(report)
    assert {source for kind, source in found(report) if kind == "damaged-tile"} == {liar}
    code, said = verify(trial, next(path for path in report.kept if path.name.startswith("damaged-tile")))
    assert code == 0, said
    await assert_the_honest_rest_goes_on(vault, tmp_path)


async def test_tiles_and_entries_that_fit_each_other_and_not_the_head_are_found(vault: Vault, trial: Attacked, tmp_path: Path) -> None:
    async with auditor(trial, tmp_path / "first") as look:
        await until_level(look, liar)
    for attempt in range(5):  # tiles of one size lie: where the log has grown meanwhile, others are read, and they are true
        entries = await entries_of(vault, trial)
        folder = forged_log(trial, tmp_path / f"fork {attempt}", [entries[1], entries[0], *entries[2:]], [], 0)
        trial.misbehave(liar, answers=[{"path": "^/log/tile/", "do": "folder", "folder": str(folder)}])
        async with auditor(trial, tmp_path / f"auditor {attempt}") as look:  # another: the first read these tiles when they were true
            report = await look()
        if report.findings:
            break
    assert ("damaged-tile", liar) in found(report)
    code, said = verify(trial, next(path for path in report.kept if path.name.startswith("damaged-tile")))
    assert (code, "do not give the root" in said) == (0, True), said
    await assert_the_honest_rest_goes_on(vault, tmp_path)


async def test_a_mirror_that_shows_a_head_and_keeps_its_entries_back_is_found(vault: Vault, trial: Attacked, tmp_path: Path) -> None:
    entries = await entries_of(vault, trial)
    assert entries
    folder = tmp_path / "empty"
    folder.mkdir()
    node = next(node for node in vault.roster.nodes if node.name == honest[0])
    (folder / "checkpoint").write_bytes(await vault._net.call(node, "GET", "/log/checkpoint", timeout_s=5.0))
    async with auditing(trial.roster, tmp_path / "auditor", identity=None, places=[str(folder)], stale_s=60.0) as copy:
        report = await copy.watch.round()
    assert found(report) == {("withheld", str(folder))}
    await assert_the_honest_rest_goes_on(vault, tmp_path)


async def test_entries_kept_from_one_mirror_stop_nobody_and_it_is_found_to_be_behind(vault: Vault, trial: Attacked, tmp_path: Path) -> None:
    await trial.let_the_first_lead()
    trial.misbehave(sequencer, pushes=[{"to": honest[1], "do": "drop"}])
    await assert_the_honest_rest_goes_on(vault, tmp_path)
    async with auditor(trial, tmp_path / "auditor", stale_s=1.5) as look, asyncio.timeout(60):
        while ("stale", honest[1]) not in found(await look()):
            await assert_the_honest_rest_goes_on(vault, tmp_path)
            await asyncio.sleep(0.5)
    trial.behave()
    await assert_the_honest_rest_goes_on(vault, tmp_path)
    async with auditor(trial, tmp_path / "auditor") as look:
        await until_level(look, honest[1])  # it has caught up


async def test_entries_kept_from_so_many_that_no_quorum_has_them_are_acknowledged_to_nobody(
    vault: Vault, trial: Attacked, tmp_path: Path
) -> None:
    await trial.let_the_first_lead()
    trial.misbehave(sequencer, pushes=[{"to": name, "do": "drop"} for name in honest])
    entry = signed_for(trial, vault.roster.origin)
    node = next(node for node in vault.roster.nodes if node.name == sequencer)
    with pytest.raises(Unavailable):
        await vault._net.call(node, "POST", "/v1/ledger/append", pack_append([entry]), timeout_s=1.5)
    trial.behave()
    await assert_the_honest_rest_goes_on(vault, tmp_path)


async def test_a_forged_proof_of_inclusion_is_refused_and_nothing_is_acknowledged(vault: Vault, trial: Attacked, tmp_path: Path) -> None:
    await trial.let_the_first_lead()
    trial.misbehave(sequencer, answers=[{"path": "^/v1/ledger/append$", "do": "forge"}])
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1000))
    before = sum(1 for _ in vault.ls())
    with pytest.raises(MedshardError, match="is not in the ledger that the checkpoint describes"):
        await vault.put([path])
    assert sum(1 for _ in vault.ls()) == before
    trial.behave()
    await assert_the_honest_rest_goes_on(vault, tmp_path)


async def test_forged_proofs_of_some_nodes_are_passed_over_when_a_file_is_looked_up(vault: Vault, trial: Attacked, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1000))
    digest = (await vault.put([path])).stored[0].sha256
    home = tmp_path / "fresh"
    shutil.copytree(trial.vault_home, home)
    for file in home.glob("index.sqlite*"):
        file.unlink()
    forge = [{"path": "^/v1/(lookup|ledger/registrations/.*)$", "do": "forge"}]
    async with Vault.open(home, trial.passphrase) as fresh:
        for name in trial.names:
            trial.misbehave(name, answers=forge)
        with pytest.raises(MedshardError):
            await fresh._lookup.targets([digest])
        for name in honest:
            trial.misbehave(name)
        await fresh.get(digest, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


def signed_for(trial: Attacked, origin: str) -> bytes:
    """A vault's entry for a log of that name."""
    keys = open_key_file(Home(trial.vault_home).key_file, trial.passphrase)
    body = Register(FileId(os.urandom(32)), Sha256(os.urandom(32)), os.urandom(16))
    return sign_entry(origin, body, keys.public, keys.signing.sign).to_bytes()


async def test_an_entry_signed_for_another_log_is_refused(vault: Vault, trial: Attacked, tmp_path: Path) -> None:
    node = next(node for node in vault.roster.nodes if node.name == sequencer)
    with pytest.raises(Refused, match="the author's signature does not hold"):
        await vault._net.call(node, "POST", "/v1/ledger/append", pack_append([signed_for(trial, "other.example/log")]), timeout_s=5.0)
    await assert_the_honest_rest_goes_on(vault, tmp_path)


async def test_a_sequencer_that_shows_one_mirror_another_history_gets_no_quorum_for_it(
    vault: Vault, trial: Attacked, tmp_path: Path
) -> None:
    await trial.let_the_first_lead()
    trial.misbehave(sequencer, pushes=[{"to": honest[0], "do": "fork"}])
    await assert_the_honest_rest_goes_on(vault, tmp_path)
    trial.behave()
    await assert_the_honest_rest_goes_on(vault, tmp_path)
    kept = trial.evidence(honest[0])
    await until(lambda: kept.files("rewritten") or kept.files("fork"))
    assert kept.files("abandoned")
    code, said = verify(trial, (kept.files("rewritten") + kept.files("fork"))[0])
    assert (code, f"The log key of {sequencer} signed both." in said) == (0, True), said
    async with auditor(trial, tmp_path / "auditor") as look:
        await until_level(look, honest[0])  # it has dropped what it was told, and follows the others


async def test_a_sequencer_that_refuses_one_client_is_accused_and_replaced(vault: Vault, trial: Attacked, tmp_path: Path) -> None:
    await trial.let_the_first_lead()
    author = open_key_file(Home(trial.vault_home).key_file, trial.passphrase).public.hex()
    trial.misbehave(sequencer, answers=[{"path": "^/v1/ledger/(append|forward)$", "do": "refuse-author", "author": author, "before": True}])
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1000))
    with pytest.raises(Unavailable):
        await vault.put([path])
    home = tmp_path / "other"
    await Vault.join(home, await asyncio.to_thread(trial.invite), "another passphrase", fast_kdf=True)
    async with Vault.open(home, "another passphrase") as other:
        await assert_the_honest_rest_goes_on(other, tmp_path)
    await until(lambda: any(trial.evidence(name).files("left-out") for name in honest), within_s=20)
    exhibits = [path for name in honest for path in trial.evidence(name).files("left-out")]  # of each node that the client tried
    code, said = verify(trial, exhibits[0])
    assert code == 6  # an absence cannot be proved; the file says who would have to show what
    assert f"signed by {author[:16]}… for this log" in said
    assert "Whoever denies leaving it out can show where it stands" in said
    await until(lambda: trial.status(honest[0])["ledger"]["leader"] not in ("", sequencer), within_s=20)
    await assert_the_honest_rest_goes_on(vault, tmp_path)  # while the first still refuses


# -- clocks


async def test_a_cosigner_whose_clock_is_an_hour_off_is_named_and_stops_nothing(vault: Vault, trial: Attacked, tmp_path: Path) -> None:
    library = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not library:
        pytest.skip("libfaketime is not installed (Debian: faketime)")
    wrong = {"LD_PRELOAD": str(library[0]), "FAKETIME": "+1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    trial.kill(honest[1])
    with pytest.MonkeyPatch.context() as skewed:
        for key, value in wrong.items():
            skewed.setenv(key, value)
        trial.restart(honest[1])
    try:
        await assert_the_honest_rest_goes_on(vault, tmp_path)
        async with auditor(trial, tmp_path / "auditor") as look:
            async with asyncio.timeout(60):
                while ("clock", honest[1]) not in found(await look()):
                    await asyncio.sleep(0.3)
        exhibit = Exhibit.read(Evidence(tmp_path / "auditor" / "evidence").files("clock")[0])
        assert (await judge(exhibit, vault.roster)).proven
    finally:
        trial.kill(honest[1])
        trial.restart(honest[1])
    await assert_the_honest_rest_goes_on(vault, tmp_path)
