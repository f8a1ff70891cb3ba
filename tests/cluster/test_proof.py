"""A proof from a real consortium, handed to somebody who has nothing but the genesis file."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests import c2sp

from medshard import nursery
from medshard.cli.exits import Exit
from medshard.cli.main import main
from medshard.consortium import LocalConsortium
from medshard.vault import Vault
from medshard_protocol.entries import Access
from medshard_protocol.ids import FileId, Sha256
from medshard_protocol.roster import Roster
from medshard_protocol.tlogproof import TlogProof


class Outsider(NamedTuple):
    """Somebody with files and no vault."""

    folder: Path
    genesis: Path
    document: Path
    proof: Path
    page: Path
    others: tuple[bytes, ...]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalConsortium]:
    with LocalConsortium(tmp_path_factory.mktemp("trial"), institutions=4) as consortium:
        yield consortium


@pytest.fixture(scope="module")
def outsider(trial: LocalConsortium, tmp_path_factory: pytest.TempPathFactory) -> Outsider:
    """One document of a pack of five is proved, as a text and as a page."""
    own, away = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("away")
    (own / "policies").mkdir()
    for number in range(5):
        (own / "policies" / f"policy {number}.txt").write_bytes(b"Versicherungsschein %d\n" % number * 50)
    data = (own / "policies" / "policy 3.txt").read_bytes()
    others = tuple((own / "policies" / f"policy {n}.txt").read_bytes() for n in (0, 1, 2, 4))
    home = ["--home", str(trial.vault_home)]
    assert main([*home, "put", "-q", str(own / "policies")]) == Exit.OK
    proof, page = away / "policy.tlog-proof", away / "page.pdf"
    assert main([*home, "prove", sha256(data).hexdigest(), "-o", str(proof), "--pdf", str(page)]) == Exit.OK
    (away / "policy.txt").write_bytes(data)
    (away / "genesis.medshard").write_bytes((trial.vault_home / "genesis.medshard").read_bytes())
    return Outsider(away, away / "genesis.medshard", away / "policy.txt", proof, page, others)


def check(outsider: Outsider, *arguments: object) -> tuple[int, str, str]:
    """Run check-proof as a program, in an empty home."""
    done = nursery.run(["-m", "medshard", "--home", str(outsider.folder / "nothing"), "check-proof", *map(str, arguments)])
    return done.returncode, done.stdout, done.stderr


def test_it_holds_with_only_the_genesis_file(outsider: Outsider) -> None:
    code, out, _ = check(outsider, outsider.proof, outsider.document, "--genesis", outsider.genesis)
    assert code == Exit.OK
    assert out.startswith("The proof holds.\n")
    assert sha256(outsider.document.read_bytes()).hexdigest() in out


def test_it_is_json_for_programs(outsider: Outsider) -> None:
    code, out, _ = check(outsider, outsider.proof, "--genesis", outsider.genesis, "--json")
    told: dict[str, Any] = json.loads(out)
    assert (code, told["holds"], told["document"]) == (Exit.OK, True, None)
    assert told["institution"]
    assert len(told["cosigned"]) >= 3  # a quorum of four
    assert len(told["cosigned_ml_dsa"]) >= 3


def test_the_page_alone_can_be_checked(outsider: Outsider) -> None:
    pinned = sha256(outsider.genesis.read_bytes()).hexdigest()
    assert check(outsider, outsider.page, outsider.document, "--genesis-sha256", pinned)[0] == Exit.OK
    assert check(outsider, outsider.page, outsider.document, "--genesis", outsider.genesis)[0] == Exit.OK
    assert check(outsider, outsider.page, outsider.document)[0] == Exit.ABSENT  # what lies inside is trusted by nobody
    assert check(outsider, outsider.page, outsider.document, "--genesis-sha256", "00" * 32)[0] == Exit.REFUSED


def test_another_document_is_refused(outsider: Outsider) -> None:
    other = outsider.folder / "other.txt"
    other.write_bytes(outsider.document.read_bytes() + b" ")
    code, _, err = check(outsider, outsider.proof, other, "--genesis", outsider.genesis)
    assert code == Exit.REFUSED
    assert "another document" in err


def test_another_genesis_file_is_refused(outsider: Outsider, consortium: Any) -> None:
    other = outsider.folder / "other.medshard"
    other.write_bytes(consortium(6, pq=True).roster.to_bytes())
    assert check(outsider, outsider.proof, "--genesis", other)[0] == Exit.REFUSED


def test_a_changed_proof_is_refused(outsider: Outsider) -> None:
    data = outsider.proof.read_bytes()
    for at in (0, 40, 200, len(data) // 2, len(data) - 10):
        changed = outsider.folder / "changed.tlog-proof"
        changed.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        code, _, err = check(outsider, changed, "--genesis", outsider.genesis)
        assert code in (Exit.REFUSED, Exit.DAMAGED)
        assert "Traceback" not in err


@pytest.mark.parametrize("data", [b"", b"%PDF-", b"%PDF-1.7\n" + bytes(5000), b"x" * 100_000, b"c2sp.org/tlog-proof@v1\n"], ids=range(5))
def test_any_other_file_is_no_proof(outsider: Outsider, data: bytes) -> None:
    file = outsider.folder / "noise"
    file.write_bytes(data)
    code, _, err = check(outsider, file, "--genesis", outsider.genesis)
    assert code == Exit.DAMAGED
    assert "Traceback" not in err


def test_it_gives_away_nothing_of_its_neighbours(outsider: Outsider) -> None:
    text = outsider.proof.read_bytes()
    extra = TlogProof.from_bytes(text).extra
    for held in (text, extra, outsider.page.read_bytes()):
        for other in outsider.others:
            assert sha256(other).digest() not in held
            assert sha256(other).hexdigest().encode() not in held
        assert b"policy 3" not in held
        assert b"policies" not in held


def test_a_reader_of_c2sp_proofs_accepts_it(outsider: Outsider) -> None:
    import msgpack

    from storenode.logtool.export import policy

    text = outsider.proof.read_text()
    entry = msgpack.unpackb(TlogProof.from_bytes(text.encode()).extra)[1]
    rules = c2sp.Policy(policy(Roster.from_bytes(outsider.genesis.read_bytes())))
    assert c2sp.check_proof(text, c2sp.sha256(b"\x00" + entry), rules)[0] > 0


def test_the_log_can_be_exported_and_audited_by_any_member(trial: LocalConsortium, outsider: Outsider, tmp_path: Path) -> None:
    def storenode(*words: object) -> dict[str, Any]:
        done = nursery.run(["-m", "storenode", *map(str, words), "--json"])
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    homes = sorted(path.parent for path in trial.folder.rglob("config.toml"))
    url = trial.roster.nodes[1].url
    beside = storenode("--home", homes[0], "log", "export", tmp_path / "beside")
    over = storenode("--home", homes[0], "log", "export", tmp_path / "over", "--from", f"{url}/log")
    assert beside["size"] > 2
    assert over["size"] >= beside["size"]
    for folder in (tmp_path / "beside", tmp_path / "over"):
        report = storenode("log", "verify", folder, "--genesis", outsider.genesis)
        assert (report["genesis_pinned"], report["without_effect"]) == (True, 0)
        assert c2sp.check_log(folder, c2sp.Policy((folder / "policy").read_text())) if report["both_kinds"] else True
    nowhere, keys = ("--home", tmp_path / "nowhere"), homes[2] / "keys"
    identity = ("--certificate", keys / "node.crt", "--key", keys / "node.key")
    asked = storenode(*nowhere, "log", "verify", f"{url}/log", "--genesis", outsider.genesis, *identity)
    assert (asked["size"] >= over["size"], asked["genesis_pinned"]) == (True, True)
    for words, code, hint in (([], 5, "--genesis FILE"), (["--genesis", outsider.genesis], 4, "--certificate and --key")):
        refused = nursery.run(["-m", "storenode", *map(str, (*nowhere, "log", "verify", f"{url}/log", *words))])
        assert (refused.returncode, hint in refused.stderr) == (code, True), refused.stderr


def test_when_it_was_registered_is_proved_after_the_index_was_made_anew(
    trial: LocalConsortium, outsider: Outsider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes keep a head now and then, one when they start: so restarted here, and the log grows afterwards."""
    monkeypatch.setattr("medshard.proving.first_older_s", -(10**9))
    first = trial.roster.nodes[0]  # whom a vault asks first
    trial.kill(first.name)
    trial.restart(first.name)

    async def proved() -> tuple[bytes, bytes]:
        digest = Sha256(sha256(outsider.document.read_bytes()).digest())
        async with Vault.open(trial.vault_home, trial.passphrase) as vault:
            index = (await vault.prove(digest))[1].index
            kept = await vault._net.call(first, "GET", f"/v1/ledger/heads/{index}", timeout_s=5)
            await vault._ledger.append([Access((FileId(bytes(32)),), 1, b"", os.urandom(16))])
            await vault.reindex()
            proof, proven = await vault.prove(digest)
            assert proof.first is not None
            assert proven.index == index
            return proof.first.note, kept

    note, kept = asyncio.run(proved())
    assert note == kept


def test_a_proof_crosses_changes_of_the_roster(trial: LocalConsortium, outsider: Outsider, tmp_path: Path) -> None:
    """Last in this file: the consortium is another afterwards. The outsider still has the genesis file alone."""

    def operate(name: str, *words: str) -> dict[str, Any]:
        done = nursery.run(["-m", "storenode", "--home", str(trial.home(name)), "--json", *words])
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    names = trial.names
    for number in (1, 2):
        document = operate(names[0], "roster", "propose", "--set-capacity", f"{names[number]}=7GB", "--yes")["sha256"]
        signed: dict[str, Any] = {}
        for name in names[1:4]:
            signed = operate(name, "roster", "sign", "--yes", document)
        assert signed["in_effect"]
        deadline = time.monotonic() + 20
        while not all((trial.home(name) / "data" / "rosters" / f"{number:08}.link").exists() for name in names):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    digest, proof = sha256(outsider.document.read_bytes()).hexdigest(), tmp_path / "later.tlog-proof"
    assert main(["--home", str(trial.vault_home), "prove", digest, "-o", str(proof)]) == Exit.OK
    code, out, err = check(outsider, proof, outsider.document, "--genesis", outsider.genesis, "--json")
    assert (code, err) == (Exit.OK, "")
    told = json.loads(out)
    assert told["roster"] == 2
    before = json.loads(check(outsider, outsider.proof, "--genesis", outsider.genesis, "--json")[1])
    assert told["log_size"] > before["log_size"]
    assert told["index"] == before["index"]
    audited = operate(names[0], "log", "verify", f"{trial.roster.nodes[2].url}/log")
    assert ([each["number"] for each in audited["rosters"]], audited["genesis_pinned"], audited["both_kinds"]) == ([1, 2], True, True)
    assert any((trial.home(name) / "data" / "full-checkpoint-0").exists() for name in names)  # the first roster's cosigners sealed its end
