"""What the watch finds, what is kept of it, and what that proves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Note, cosigner_verifier, log_verifier
from medshard_protocol.entries import Approve, Register
from medshard_protocol.errors import Absent, Damaged, Malformed, MedshardError, Refused, Unavailable
from medshard_protocol.identity import public_key
from medshard_protocol.ids import NodeId
from medshard_protocol.merkle import sha256
from medshard_protocol.rosters import Link, pack_links
from medshard_protocol.tiles import TileName, Tree, pack_bundle, tile_names, tile_width
from storenode import evidence
from storenode.cli.main import main
from storenode.evidence import Evidence, Exhibit
from storenode.watching import Verdict, Watch, judge
from storenode.watching.watch import Trust

now = 1_700_000_000

# -- going around


@dataclass
class Shown:
    """A source made by hand: a log's entries, and who signs its head when."""

    name: str
    node: NodeId | None
    consortium: object
    entries: list[bytes]
    cosigners: tuple[int, ...] = (0, 1, 2, 3)
    at: int = now
    asked: list[str] = field(default_factory=list)
    spoil: Callable[[str, bytes], bytes] = lambda path, data: data

    @property
    def note(self) -> bytes:
        checkpoint = self.consortium.checkpoint(self.entries)
        text, roster = checkpoint.text(), self.consortium.roster
        lines = [log_verifier(roster).sign(text, self.consortium.key("log").sign)]
        for number in self.cosigners:
            verifier = cosigner_verifier(roster, roster.nodes[number].id)
            lines.append(verifier.sign(text, self.consortium.key(f"cosigner {number}").sign, self.at))
        return Note(text, tuple(lines)).to_bytes()

    async def get(self, path: str) -> bytes:
        self.asked.append(path)
        return self.spoil(path, self._get(path))

    def _get(self, path: str) -> bytes:
        if path == "checkpoint":
            return self.note
        name = TileName.from_path(path.removeprefix("tile/"))
        if name.level is None:
            return pack_bundle(self.entries[name.index * tile_width :][: name.width])
        stored: dict[tuple[int, int], bytes] = {}
        tree = Tree(lambda level, index: stored[level, index])
        for entry in self.entries:
            for tile in tree.append(merkle.leaf_hash(entry, sha256)):
                stored[tile.level, tile.number] = tile.hashes
        return tree.tile(name)


@dataclass
class Round:
    """Four mirrors that show one log, and a watch over them."""

    consortium: object
    folder: Path
    clock: float = now
    sample: int | None = None

    def __post_init__(self) -> None:
        entries = [b"entry %d" % number for number in range(700)]
        self.mirrors = [Shown(node.name, node.id, self.consortium, list(entries)) for node in self.consortium.roster.nodes]
        self.evidence = Evidence(self.folder / "evidence")
        self.begin()

    def begin(self) -> None:
        trust = Trust((self.consortium.roster,))
        memory = self.folder / "watch.state"
        self.watch = Watch(lambda: trust, lambda: self.mirrors, self.evidence, memory, sample=self.sample, clock=lambda: self.clock)

    async def found(self) -> list[tuple[str, str]]:
        report = await self.watch.round()
        return sorted((finding.kind, finding.source) for finding in report.findings)

    def grow(self, count: int, *numbers: int, word: bytes = b"entry") -> None:
        for number in numbers or range(4):
            entries = self.mirrors[number].entries
            entries += [b"%s %d" % (word, at) for at in range(len(entries), len(entries) + count)]

    def flip(self, number: int, path: str, at: int = 10) -> None:
        def spoil(asked: str, data: bytes) -> bytes:
            return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if asked == path else data

        self.mirrors[number].spoil = spoil

    async def proof(self, kind: str) -> Verdict:
        (path,) = self.evidence.files(kind)
        return await judge(Exhibit.read(path), self.consortium.roster)


@pytest.fixture
def watched(consortium: Callable[..., object], tmp_path: Path) -> Round:
    return Round(consortium(4), tmp_path)


async def test_an_honest_log_that_grows_gives_no_finding_over_restarts(watched: Round) -> None:
    assert await watched.found() == []
    for count in (1, 56, 12, 300, 0):
        watched.grow(count)
        assert await watched.found() == []
        watched.begin()
        assert await watched.found() == []
    assert watched.evidence.files() == []


async def test_a_mirror_that_is_behind_or_away_is_no_finding(watched: Round) -> None:
    watched.grow(100, 0, 1, 2)
    assert await watched.found() == []

    def away(path: str, data: bytes) -> bytes:
        raise Unavailable("gone")

    watched.mirrors[2].spoil = away
    watched.grow(30, 0)
    assert await watched.found() == []
    assert [name for name, _ in watched.watch.last.silent] == ["node2"]


async def test_two_roots_of_one_size_are_a_fork_that_names_who_signed_both(watched: Round) -> None:
    watched.mirrors[3].entries[5] = b"another"
    watched.mirrors[3].cosigners = (0, 1, 3)
    watched.mirrors[0].cosigners = watched.mirrors[1].cosigners = watched.mirrors[2].cosigners = (0, 1, 2)
    assert ("fork", "node3") in await watched.found()
    verdict = await watched.proof("fork")
    assert verdict.proven
    text = "\n".join(verdict.lines)
    assert "The log key of node0 signed both." in text
    assert "node0 of Institution 0 cosigned both." in text
    assert "node2 of Institution 2 cosigned both" not in text
    assert "Both have a quorum, so at least one of these broke its word: Institution 0 and Institution 1." in text


async def test_a_fork_is_found_even_when_the_two_views_are_shown_at_different_times(watched: Round) -> None:
    assert await watched.found() == []
    watched.begin()
    for mirror in watched.mirrors:
        mirror.entries[5] = b"another"
    assert {kind for kind, _ in await watched.found()} == {"fork"}


async def test_a_later_head_over_a_changed_past_is_proved_to_be_rewritten(watched: Round) -> None:
    assert await watched.found() == []
    watched.grow(400)
    watched.mirrors[2].entries[699] = b"another"
    watched.mirrors[2].entries.append(b"more")
    assert await watched.found() == [("rewritten", "node2")]
    verdict = await watched.proof("rewritten")
    assert verdict.proven
    assert "The first 700 entries under note 2 have the root" in "\n".join(verdict.lines)
    watched.mirrors[2].entries = list(watched.mirrors[0].entries)
    watched.grow(5)
    assert await watched.found() == []  # the honest ones are followed meanwhile


async def test_of_two_continuations_of_one_past_at_most_one_is_true(watched: Round) -> None:
    assert await watched.found() == []
    watched.grow(20, 0, 1, 3)
    watched.grow(10, 2, word=b"another")
    assert await watched.found() == [("rewritten", "node2")]
    assert (await watched.proof("rewritten")).proven


async def test_a_node_reads_few_tiles_and_compares_every_head(watched: Round) -> None:
    watched.sample = 1
    watched.begin()
    assert await watched.found() == []
    for mirror in watched.mirrors:
        mirror.asked.clear()
    assert await watched.found() == []
    assert sorted(len(mirror.asked) > 1 for mirror in watched.mirrors)[:2] == [False, False]
    watched.grow(20, 0, 1, 3)
    watched.grow(10, 2, word=b"another")
    assert await watched.found() == [("rewritten", "node2")]


async def test_where_many_are_watched_each_watch_goes_around_less_often(watched: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = list[float]()

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr("storenode.watching.watch.asyncio.sleep", sleep)
    watched.mirrors *= 3
    for per_pause, least, most in ((None, 7, 13), (12, 7, 13), (4, 21, 39)):
        pauses.clear()
        with pytest.raises(asyncio.CancelledError):
            await watched.watch.run(10.0, per_pause=per_pause)
        assert all(least <= pause <= most for pause in pauses), (per_pause, pauses)


async def test_a_smaller_head_over_a_changed_past_is_found_too(watched: Round) -> None:
    watched.grow(300, 0, 1, 2)
    watched.mirrors[3].entries[3] = b"another"
    assert await watched.found() == [("rewritten", "node3")]
    assert (await watched.proof("rewritten")).proven


async def test_every_flipped_bit_in_a_tile_or_bundle_that_is_read_is_found_and_shown(watched: Round, tmp_path: Path) -> None:
    assert await watched.found() == []
    for number, path in enumerate(("tile/0/002.p/188", "tile/1/000.p/2", "tile/0/000", "tile/0/001", "tile/entries/000")):
        watched.evidence = Evidence(tmp_path / f"evidence {number}")
        watched.begin()
        watched.flip(1, path)
        async with asyncio.timeout(60):
            while ("damaged-tile", "node1") not in await watched.found():
                assert watched.watch.last.findings == ()
        verdict = await watched.proof("damaged-tile")
        assert verdict.proven, verdict.lines
    # the same exhibit with the true tile proves nothing
    exhibit = Exhibit.read(watched.evidence.files()[0])
    true = {name: watched.mirrors[0]._get("tile/" + name) if "/" in name else data for name, data in exhibit.documents.items()}
    assert not (await judge(Exhibit(exhibit.kind, {}, true), watched.consortium.roster)).proven


async def test_forged_entries_behind_an_honest_right_edge_are_found(watched: Round) -> None:
    """The known trap: a loop that folds the right edge alone believes any full tile to the left of it."""
    forger = Shown("forger", None, watched.consortium, [b"forged", *watched.mirrors[2].entries[1:]])
    forged = {path: forger._get(path) for path in ("tile/0/000", "tile/entries/000")}
    watched.mirrors[2].spoil = lambda path, data: forged.get(path, data)
    async with asyncio.timeout(60):
        while await watched.found() != [("damaged-tile", "node2")]:
            assert watched.watch.last.findings == ()
    verdict = await watched.proof("damaged-tile")
    assert verdict.proven
    assert "tile 0/000 does not give the hash that the tile above has for it" in "\n".join(verdict.lines)


async def test_a_head_whose_entries_are_not_given_out_is_withheld(watched: Round) -> None:
    def absent(path: str, data: bytes) -> bytes:
        if path.startswith("tile/entries"):
            raise Absent("nothing here")
        return data

    watched.mirrors[2].spoil = absent
    assert await watched.found() == [("withheld", "node2")]


async def test_signatures_of_too_few_institutions_are_found_and_one_counted_twice_is_one(
    consortium: Callable[..., object], tmp_path: Path
) -> None:
    watched = Round(consortium(4, nodes_each=2), tmp_path)
    watched.mirrors[0].cosigners = (0, 1, 4, 5)  # four nodes of two institutions
    assert ("few-cosigners", "node0") in await watched.found()
    assert "2 institutions cosigned it, and 3 are needed" in "\n".join((await watched.proof("few-cosigners")).lines)


async def test_a_signature_that_does_not_hold_or_another_log_is_found(watched: Round) -> None:
    watched.mirrors[1].spoil = lambda path, data: data.replace(b"\n700\n", b"\n701\n") if path == "checkpoint" else data
    watched.mirrors[2].spoil = lambda path, data: b"no note" if path == "checkpoint" else data
    assert await watched.found() == [("bad-signature", "node1"), ("bad-signature", "node2")]
    for path in watched.evidence.files():
        assert (await judge(Exhibit.read(path), watched.consortium.roster)).proven


async def test_a_mirror_that_serves_a_head_without_its_own_cosignature_is_found(watched: Round) -> None:
    watched.mirrors[3].cosigners = (0, 1, 2)
    assert await watched.found() == []  # a node that restarts has it again in a moment
    assert await watched.found() == [("not-cosigned", "node3")]


async def test_a_cosigner_that_goes_back_convicts_itself(watched: Round) -> None:
    assert await watched.found() == []
    del watched.mirrors[3].entries[500:]
    watched.mirrors[3].at = now + 1
    assert await watched.found() == [("rollback", "node3")]
    verdict = await watched.proof("rollback")
    assert verdict.proven
    assert "node3 of Institution 3 cosigned the smaller head after it had cosigned the larger one." in verdict.lines


async def test_an_old_head_with_its_old_signatures_counts_when_it_is_shown_again(watched: Round) -> None:
    assert await watched.found() == []
    del watched.mirrors[3].entries[500:]
    watched.mirrors[3].at = now - 10
    assert await watched.found() == []  # a node that restarts may not know better for a moment
    assert await watched.found() == [("rollback", "node3")]
    assert not (await watched.proof("rollback")).proven  # a note that somebody serves is signed by others


async def test_a_mirror_that_shows_an_old_head_while_others_show_a_new_one_is_stale(watched: Round) -> None:
    for mirror in watched.mirrors[:3]:
        mirror.at = now + 120
    watched.clock = now + 120
    assert await watched.found() == [("stale", "node3")]


async def test_a_log_that_stands_still_is_stale_and_a_wrong_clock_here_is_called_one(watched: Round) -> None:
    watched.clock = now + 3600
    assert await watched.found() == [("stale", "the log")]  # nobody can tell yet
    for mirror in watched.mirrors:
        mirror.at += 5
    assert await watched.found() == [("clock", "this machine")]
    watched.clock = now - 3600
    assert await watched.found() == [("clock", "this machine")]


async def test_a_cosigner_whose_clock_is_an_hour_off_is_named(watched: Round) -> None:
    note = watched.mirrors[0]
    text = watched.consortium.checkpoint(note.entries).text()
    verifier = cosigner_verifier(watched.consortium.roster, watched.mirrors[3].node)
    late = verifier.sign(text, watched.consortium.key("cosigner 3").sign, now + 3600)
    for mirror in watched.mirrors:
        mirror.cosigners = (0, 1, 2)
        mirror.spoil = lambda path, data: Note.from_bytes(data).signed_by([late]).to_bytes() if path == "checkpoint" else data
    assert set(await watched.found()) == {("clock", "node3")}
    assert (await watched.proof("clock")).proven


async def test_a_finding_is_counted_when_it_begins_and_its_evidence_kept_once(watched: Round) -> None:
    watched.mirrors[3].cosigners = (0, 3)
    for later in range(3):
        watched.mirrors[3].at = now + later
        assert await watched.found() == [("few-cosigners", "node3")]
    assert watched.watch.found == {"few-cosigners": 1}
    assert watched.evidence.counts() == {"few-cosigners": 1}
    watched.mirrors[3].cosigners = (0, 1, 2, 3)
    assert await watched.found() == []
    assert watched.watch.active() == {}


async def test_a_round_asks_a_mirror_for_a_handful_of_tiles(watched: Round) -> None:
    await watched.found()
    watched.grow(3)
    for mirror in watched.mirrors:
        mirror.asked.clear()
    await watched.found()
    assert max(len(mirror.asked) for mirror in watched.mirrors) <= 8


async def test_a_damaged_memory_is_refused_rather_than_forgotten(watched: Round, tmp_path: Path) -> None:
    await watched.found()
    path = tmp_path / "watch.state"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged):
        watched.begin()


# -- proving


async def test_a_file_without_the_documents_of_its_kind_is_malformed_and_honest_documents_prove_nothing(watched: Round) -> None:
    note, roster = watched.mirrors[0].note, watched.consortium.roster
    for kind in evidence.kinds:
        with pytest.raises((Malformed, Refused)):
            await judge(Exhibit(kind, {}, {}), roster)
    for kind in ("fork", "rollback", "stale", "few-cosigners", "bad-signature", "not-cosigned", "clock"):
        verdict = await judge(Exhibit(kind, {}, {"note 1": note, "note 2": note}), roster)
        assert not verdict.proven, kind


async def test_a_forged_proof_is_shown_and_a_true_one_is_not_called_forged(watched: Round) -> None:
    entries, roster = watched.mirrors[0].entries, watched.consortium.roster
    inclusion = watched.consortium.inclusion(entries, 17, (0, 1, 2))
    documents = {"note 1": inclusion.checkpoint, "entry": inclusion.entry, "path": b"".join(inclusion.path)}
    assert not (await judge(Exhibit("forged-proof", {"index": 17}, documents), roster)).proven
    for forged in ({"entry": b"another"}, {"path": b"".join(inclusion.path[1:])}, {"path": bytes(len(documents["path"]))}):
        assert (await judge(Exhibit("forged-proof", {"index": 17}, documents | forged), roster)).proven


async def test_an_entry_that_was_left_out_is_told_in_the_words_of_its_keeper(watched: Round) -> None:
    entry = watched.consortium.entry("vault", Register(bytes(32), bytes(32), bytes(16)))
    note = watched.mirrors[0].note
    exhibit = Exhibit("left-out", {"seconds": 12}, {"entry": entry.to_bytes(), "before": note, "after": note})
    verdict = await judge(exhibit, watched.consortium.roster)
    assert not verdict.proven
    assert verdict.lines[1] == "Its keeper says: seconds 12."
    assert "of type REGISTER" in verdict.lines[2]


async def test_a_dropped_head_of_one_size_with_the_published_one_is_shown_to_exclude_it(watched: Round) -> None:
    published, roster = watched.mirrors[0].note, watched.consortium.roster
    for change, proven in ((b"another", True), (b"entry 699", False)):
        watched.mirrors[1].entries[699] = change
        watched.mirrors[1].cosigners = (1,)
        dropped = watched.mirrors[1].note
        exhibit = Exhibit("abandoned", {"from": 699}, {"published": published, "signed": dropped, "entry 699": change})
        verdict = await judge(exhibit, roster)
        assert verdict.proven is proven
        assert ("The log key of node0 signed both." in verdict.lines) is proven


# -- the commands


def exported(watched: Round, folder: Path) -> str:
    """A static copy of the first mirror's log."""
    mirror = watched.mirrors[0]
    for name in tile_names(len(mirror.entries)):
        path = folder / "tile" / name.path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mirror._get(f"tile/{name.path()}"))
    (folder / "checkpoint").write_bytes(mirror.note)
    return str(folder)


def test_an_auditor_needs_the_genesis_file_and_a_static_copy(watched: Round, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    genesis, copy = tmp_path / "genesis.medshard", tmp_path / "copy"
    genesis.write_bytes(watched.consortium.roster.to_bytes())
    for mirror in watched.mirrors:
        mirror.at = int(time.time())
    command = ["watch", "--once", "--genesis", str(genesis), "--log", exported(watched, copy), "--folder", str(tmp_path / "auditor")]
    assert main(command) == 0
    assert "700 entries" in capsys.readouterr().out
    tile = copy / "tile" / "0" / "002.p" / "188"
    tile.write_bytes(bytes(32) + tile.read_bytes()[32:])
    assert main([*command, "--json"]) == 6
    told = json.loads(capsys.readouterr().out)
    assert [(each["kind"], each["source"]) for each in told["findings"]] == [("damaged-tile", str(copy))]
    (path,) = told["evidence"]
    assert main(["evidence", "verify", path, "--genesis", str(genesis)]) == 0
    out = capsys.readouterr().out
    assert "the tiles of the right edge do not give the root of 700 entries" in out
    assert "PROVEN" in out
    assert main(["evidence", "list", "--folder", str(tmp_path / "auditor" / "evidence"), "--json"]) == 0
    assert [each["kind"] for each in json.loads(capsys.readouterr().out)["evidence"]] == ["damaged-tile"]
    assert main(["evidence", "show", path]) == 0
    assert "consortium.example/log\n700\n" in capsys.readouterr().out


def test_what_nobody_shows_is_no_answer_and_what_proves_nothing_is_said_so(
    watched: Round, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    genesis = tmp_path / "genesis.medshard"
    genesis.write_bytes(watched.consortium.roster.to_bytes())
    assert main(["watch", "--once", "--genesis", str(genesis), "--log", str(tmp_path / "no"), "--folder", str(tmp_path / "auditor")]) == 5
    assert "nobody showed a head" in capsys.readouterr().err
    path = watched.evidence.keep("stale", {"seconds": 90}, {"note 1": watched.mirrors[0].note})
    assert main(["evidence", "verify", str(path), "--genesis", str(genesis)]) == 6
    assert "NOT PROVEN by the documents alone." in capsys.readouterr().out
    path.write_bytes(b"no evidence")
    assert main(["evidence", "verify", str(path), "--genesis", str(genesis)]) == 6
    assert "not canonical msgpack" in capsys.readouterr().err


# -- whatever comes


async def test_any_change_of_a_file_of_evidence_ends_in_one_of_our_errors_or_a_verdict(watched: Round) -> None:
    watched.mirrors[3].entries[5] = b"another"
    watched.flip(1, "tile/0/002.p/188")
    watched.mirrors[2].entries += [b"more"]
    watched.mirrors[2].entries[3] = b"another"
    await watched.found()
    files = [path.read_bytes() for path in watched.evidence.files()]
    assert len(files) >= 2
    rng = random.Random(7)
    for _ in range(1500):
        data = bytearray(rng.choice(files))
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(data))
            data[at : at + rng.choice((0, 1, 1, 3))] = rng.randbytes(rng.choice((0, 1, 1, 2)))
        with contextlib.suppress(MedshardError):
            await judge(Exhibit.from_bytes(bytes(data)), watched.consortium.roster)


async def test_documents_of_one_kind_under_the_name_of_another_end_in_one_of_our_errors_or_a_verdict(watched: Round) -> None:
    note, entry = watched.mirrors[0].note, watched.consortium.entry("vault", Register(bytes(32), bytes(32), bytes(16))).to_bytes()
    pieces = [note, entry, b"", bytes(32), bytes(31), Note.from_bytes(note).text.encode(), note.replace(b"700", b"0")]
    names = ["note 1", "note 2", "root", "path", "entry", "before", "after", "published", "signed", "rosters", "0/000", "entries/000"]
    rng = random.Random(8)
    for _ in range(600):
        documents = {name: rng.choice(pieces) for name in rng.sample(names, rng.randrange(len(names)))}
        exhibit = Exhibit(rng.choice(list(evidence.kinds)), {"index": rng.choice((0, 5, 2**60))}, documents)
        with contextlib.suppress(MedshardError):
            await judge(exhibit, watched.consortium.roster)


async def test_heads_of_a_later_roster_are_checked_along_the_chain_from_genesis(watched: Round) -> None:
    old = watched.consortium.roster
    key = public_key(watched.consortium.key("a new cosigner"))
    nodes = (*old.nodes[:3], replace(old.nodes[3], cosigner_key=key))
    new = replace(old, number=1, previous=old.sha256, nodes=nodes)
    approvals = [watched.consortium.entry(f"ca {number}", Approve(new.sha256, bytes(16))).to_bytes() for number in range(3)]
    links = pack_links([Link(new.to_bytes(), tuple(approvals))])
    trust = Trust((old, new), links)
    assert await watched.found() == []  # under the old roster
    watched.watch = Watch(lambda: trust, lambda: watched.mirrors, watched.evidence, watched.folder / "watch.state", clock=lambda: now)
    verifier = cosigner_verifier(new, nodes[3].id)

    def with_new_key(path: str, data: bytes) -> bytes:
        note = Note.from_bytes(data) if path == "checkpoint" else None
        return (
            data
            if note is None
            else note.signed_by([verifier.sign(note.text, watched.consortium.key("a new cosigner").sign, now)]).to_bytes()
        )

    watched.grow(5)
    for mirror in watched.mirrors:
        mirror.cosigners, mirror.spoil = (0, 1), with_new_key  # with the new key it is a quorum, and without it none
    assert await watched.found() == []
    watched.mirrors[2].entries[3] = b"another"
    assert ("fork", "node2") in await watched.found()
    exhibit = Exhibit.read(watched.evidence.files("fork")[0])
    verdict = await judge(exhibit, old)
    assert verdict.proven
    assert "Both have a quorum" in "\n".join(verdict.lines)
    without = Exhibit(exhibit.kind, {}, {name: data for name, data in exhibit.documents.items() if name != "rosters"})
    assert "Both have a quorum" not in "\n".join((await judge(without, old)).lines)
