"""A log in static files: written out, gone on with, and checked to the last hash, also by a reader that is not ours."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests import c2sp

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint
from medshard_protocol.entries import Access, Approve, Enrol, Genesis, Register, Rotate, rotation_signed, sign_entry
from medshard_protocol.errors import Absent, Damaged, Malformed, MedshardError, Refused
from medshard_protocol.identity import public_key
from medshard_protocol.merkle import sha256
from medshard_protocol.tiles import TileName, Tree, pack_bundle, tile_names, tile_width
from storenode.logtool.audit import audit
from storenode.logtool.export import export, policy, read_rosters
from storenode.logtool.hashing import _unsigned
from storenode.logtool.source import Folder, Web

size = 70_100  # 273 full tiles of leaves, one full and one partial tile above, one of width 1 on top
voters = range(3)


class InMemory:
    """A source that makes the files of any size of one log."""

    def __init__(self, c: Any, entries: Sequence[bytes]) -> None:
        self.c = c
        self.entries = entries
        tiles: dict[tuple[int, int], bytes] = {}
        self.trees: dict[int, Tree] = {}
        self._tree = Tree(lambda level, number: tiles[level, number])
        for entry in entries:
            for full in self._tree.append(merkle.leaf_hash(entry, sha256)):
                tiles[full.level, full.number] = full.hashes
        self.size = len(entries)
        self.cosigners: tuple[Sequence[int], Sequence[int]] = (voters, voters)

    def read(self, path: str) -> bytes:
        if path == "checkpoint":
            return self.c.note(Checkpoint(self.c.roster.origin, self.size, self._tree.root(self.size)), *self.cosigners).to_bytes()
        if not path.startswith("tile/"):
            raise Absent(path)
        name = TileName.from_path(path.removeprefix("tile/"))
        start = name.index * tile_width
        return pack_bundle(self.entries[start : start + name.width]) if name.level is None else self._tree.tile(name)


def few_signed(c: Any, count: int) -> list[bytes]:
    """Entries of which only the first are signed: authors' signatures are not what most of these tests are about."""
    genesis = sign_entry(c.roster.origin, Genesis(c.roster.sha256, bytes(16)), c.roster.log_key, c.key("log").sign)
    entries = [genesis, c.entry("ca 0", Enrol(public_key(c.key("vault")), 0, bytes(16)))]
    entries += [c.entry("vault", Register(bytes([n]) * 32, bytes(32), bytes([n]) * 16)) for n in range(20)]
    entries += [c.entry("vault", Access((bytes([n]) * 32,), 1, b"", bytes([n + 100]) * 16)) for n in range(8)]
    entries += [c.entry("stranger", Register(b"s" * 32, bytes(32), bytes(16)))]
    noise = (b"noise %d" % n for n in range(count))
    return [*(entry.to_bytes() for entry in entries), *noise][:count]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, consortium: Callable[..., Any]) -> SimpleNamespace:
    """A log of several levels in a folder."""
    c = consortium(4, pq=True)
    source, folder = InMemory(c, few_signed(c, size)), tmp_path_factory.mktemp("log")
    export(source, folder, c.roster, ())
    return SimpleNamespace(c=c, source=source, folder=folder)


@pytest.fixture
def small(tmp_path: Path, consortium: Callable[..., Any]) -> SimpleNamespace:
    """A log of 300 entries, to break."""
    c = consortium(4, pq=True)
    source = InMemory(c, few_signed(c, 300))
    export(source, tmp_path / "log", c.roster, ())
    return SimpleNamespace(c=c, source=source, folder=tmp_path / "log")


def test_a_whole_log_passes_and_is_counted(large: SimpleNamespace) -> None:
    report = audit(large.folder, large.c.roster, {}, processes=2)
    assert (report.size, dict(report.counts)) == (size, {"ROSTER": 2, "REGISTER": 20, "ACCESS": 8})
    assert (report.void, report.unsigned) == (size - 30, size - 31)
    assert report.void_named[:2] == ((30, True), (31, False))
    assert report.pq_quorum
    assert (sorted(report.cosigned), sorted(report.cosigned_pq)) == (["node0", "node1", "node2"],) * 2


def test_an_audit_sees_that_a_rotation_was_not_signed_by_both_keys(consortium: Callable[..., Any]) -> None:
    c = consortium(4)
    old, new, origin = c.key("old"), c.key("new"), c.roster.origin
    said = rotation_signed(origin, public_key(old), public_key(new))
    entries = [
        c.entry("ca 0", Rotate(public_key(old), public_key(new), *signatures, bytes(16))).to_bytes()
        for signatures in ((old.sign(said), new.sign(said)), (new.sign(said), new.sign(said)), (old.sign(said), bytes(64)))
    ]
    assert list(_unsigned([*entries, b"", b"\x01"], 7, ((100, origin),))) == [8, 9, 10, 11]


def test_a_reader_written_from_the_c2sp_documents_accepts_the_export(large: SimpleNamespace) -> None:
    assert c2sp.check_log(large.folder, c2sp.Policy((large.folder / "policy").read_text())) == size


gocode = Path("/usr/share/gocode")  # where Debian's golang-golang-x-mod-dev puts it


@pytest.mark.skipif(
    not (shutil.which("go") and (gocode / "src/golang.org/x/mod/sumdb/tlog").is_dir()), reason="needs Go and golang.org/x/mod"
)
def test_gos_own_code_for_transparency_logs_accepts_the_export_and_finds_a_flipped_bit(small: SimpleNamespace, tmp_path: Path) -> None:
    program, source = tmp_path / "check", Path(__file__).parents[1] / "c2sp_go" / "main.go"
    environment = os.environ | {"GO111MODULE": "off", "GOPATH": str(gocode), "GOCACHE": str(tmp_path / "cache"), "GOFLAGS": ""}
    subprocess.run(["go", "build", "-o", str(program), str(source)], env=environment, check=True, timeout=240)
    done = subprocess.run([program, small.folder], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "300 entries, 3 cosigners\n"), done.stderr
    flip(small.folder / "tile/0/000", 1000)
    assert subprocess.run([program, small.folder], capture_output=True, check=False, timeout=60).returncode == 1


def test_the_c2sp_policy_asks_for_a_quorum_of_institutions_with_each_kind_of_key(consortium: Callable[..., Any]) -> None:
    c = consortium(4, nodes_each=2, pq=True)
    rules = c2sp.Policy(policy(c.roster))
    checkpoint = Checkpoint(c.roster.origin, 7, bytes(32))
    assert c2sp.open_checkpoint(c.note(checkpoint, [0, 1, 2], [1, 2, 3]).to_bytes().decode(), rules) == (7, bytes(32))
    for cosigners in (([0, 1, 2], [3, 4, 5]), ([0, 4, 1, 5], [0, 1, 2]), ([0, 1, 2, 3], [])):
        with pytest.raises(AssertionError, match="quorum"):
            c2sp.open_checkpoint(c.note(checkpoint, *cosigners).to_bytes().decode(), rules)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "path",
    ["0/000", "0/100", "0/272", "0/273.p/212", "1/000", "1/001.p/17", "2/000.p/1", "entries/000", "entries/150", "entries/273.p/212"],
)
def test_one_changed_bit_in_any_tile_or_bundle_is_found(large: SimpleNamespace, path: str) -> None:
    file = large.folder / "tile" / path
    at = file.stat().st_size // 3
    flip(file, at)
    with pytest.raises(Damaged, match=path.replace("entries", "(entries|0)")):  # a changed entry shows in the tile of its hash
        audit(large.folder, large.c.roster, {}, processes=2 if path in ("0/000", "entries/150") else 1)
    flip(file, at)


def test_an_old_tile_that_is_forged_together_with_its_bundle_is_found_above(small: SimpleNamespace) -> None:
    """A loop that checks only the right edge of the tree accepts this: nothing there changes."""
    forged = [*small.source.entries]
    forged[7] = b"never said"
    leaves = [merkle.leaf_hash(entry, sha256) for entry in forged[:tile_width]]
    (small.folder / "tile/entries/000").write_bytes(pack_bundle(forged[:tile_width]))
    (small.folder / "tile/0/000").write_bytes(b"".join(leaves))
    with pytest.raises(Damaged, match=r"1/000\.p/1"):
        audit(small.folder, small.c.roster, {})
    (small.folder / "tile/1/000.p/1").write_bytes(merkle.root(leaves, sha256))
    with pytest.raises(Damaged, match="root"):
        audit(small.folder, small.c.roster, {})


def test_an_older_partial_tile_must_be_the_beginning_of_the_newer_one(small: SimpleNamespace) -> None:
    newer = (small.folder / "tile/0/001.p/44").read_bytes()
    older = small.folder / "tile/0/001.p/20"
    older.write_bytes(newer[: 20 * 32])
    bundle = small.folder / "tile/entries/001.p/20"
    bundle.write_bytes(pack_bundle(small.source.entries[256:276]))
    audit(small.folder, small.c.roster, {})
    for file, name in ((older, "0/001.p/20"), (bundle, "entries/001.p/20")):
        flip(file, 5)
        with pytest.raises(Damaged, match=name):
            audit(small.folder, small.c.roster, {})
        flip(file, 5)


@pytest.mark.parametrize("path", ["checkpoint", "tile/0/000", "tile/1/000.p/1", "tile/entries/001.p/44"])
def test_a_file_that_is_missing_is_named(small: SimpleNamespace, path: str) -> None:
    (small.folder / path).unlink()
    with pytest.raises(Absent, match=path):
        audit(small.folder, small.c.roster, {})


def test_a_checkpoint_without_its_quorum_is_refused(small: SimpleNamespace) -> None:
    checkpoint = Checkpoint.from_text(small.source.read("checkpoint").decode().partition("\n\n")[0] + "\n")
    (small.folder / "checkpoint").write_bytes(small.c.note(checkpoint, [0, 1]).to_bytes())
    with pytest.raises(Refused, match="fewer than 3"):
        audit(small.folder, small.c.roster, {})
    (small.folder / "checkpoint").write_bytes(small.c.note(checkpoint, [0, 1, 2], [0]).to_bytes())
    assert not audit(small.folder, small.c.roster, {}).pq_quorum


def test_a_log_of_another_genesis_file_gives_nothing_an_effect(small: SimpleNamespace, consortium: Callable[..., Any]) -> None:
    with pytest.raises(Refused):
        audit(small.folder, consortium(6, pq=True).roster, {})


def test_a_change_of_the_roster_needs_its_document(tmp_path: Path, consortium: Callable[..., Any]) -> None:
    from dataclasses import replace

    from medshard_protocol.rosters import Link

    c = consortium(4, pq=True)
    new = replace(c.roster, number=1, previous=c.roster.sha256, nodes=(replace(c.roster.nodes[0], capacity=5), *c.roster.nodes[1:]))
    votes = [c.entry(f"ca {n}", Approve(new.sha256, bytes(16))).to_bytes() for n in range(3)]
    source = InMemory(c, [*few_signed(c, 5), *votes])
    export(source, tmp_path, c.roster, [Link(new.to_bytes(), tuple(votes))])
    genesis, links = read_rosters(tmp_path)
    assert genesis == c.roster
    assert audit(tmp_path, genesis, {new.sha256: new}).rosters == ((7, 1),)
    assert len(links) == 1
    with pytest.raises(Absent, match="proposed roster"):
        audit(tmp_path, genesis, {})


def test_a_head_that_a_change_of_the_roster_ends_with_may_be_published_by_the_next_quorum(
    tmp_path: Path, consortium: Callable[..., Any]
) -> None:
    """As happens while nothing follows the change. The former quorum's voices are too few there: it had more members."""
    from dataclasses import replace

    from medshard_protocol.rosters import Link

    c = consortium(7, pq=True)
    left = {"institutions": c.roster.institutions[:5], "nodes": c.roster.nodes[:5], "code": (2, 5, 4)}
    new = replace(c.roster, number=1, previous=c.roster.sha256, **left)
    votes = [c.entry(f"ca {n}", Approve(new.sha256, bytes(16))).to_bytes() for n in range(5)]
    for more in ([], [b"noise"]):
        source = InMemory(c, [*few_signed(c, 5), *votes, *more])
        source.cosigners = (range(4), range(4))  # a quorum of the five that stay, and not of the seven
        folder = tmp_path / str(len(more))
        export(source, folder, c.roster, [Link(new.to_bytes(), tuple(votes))])
        assert audit(folder, c.roster, {new.sha256: new}).pq_quorum
    source = InMemory(c, [*few_signed(c, 5), *votes[:4]])
    source.cosigners = (range(4), range(4))
    with pytest.raises(Refused, match="fewer than 5"):
        export(source, tmp_path / "before", c.roster, ())


# -- going on, and from elsewhere


def test_an_export_goes_on_where_the_last_one_stopped(tmp_path: Path, consortium: Callable[..., Any]) -> None:
    c = consortium(4, pq=True)
    source = InMemory(c, few_signed(c, 700))
    for entries, new in ((0, 0), (20, 2), (300, 5), (300, 0), (700, 5)):
        source.size = entries
        assert export(source, tmp_path, c.roster, ()).files_new == new
        assert audit(tmp_path, c.roster, {}).size == entries if entries else True
    assert not (tmp_path / "tile/0/000.p").exists()  # its full tile has come
    assert (tmp_path / "tile/0/001").exists()
    source.size = 500
    with pytest.raises(Damaged, match="never shrinks"):
        export(source, tmp_path, c.roster, ())


def test_an_export_takes_nothing_that_no_quorum_has_cosigned(tmp_path: Path, consortium: Callable[..., Any]) -> None:
    c = consortium(4, pq=True)
    source = InMemory(c, few_signed(c, 30))
    source.cosigners = ([0, 1], voters)
    with pytest.raises(Refused):
        export(source, tmp_path, c.roster, ())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def web(small: SimpleNamespace) -> Iterator[str]:
    handler = partial(Quiet, directory=str(small.folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_any_web_server_can_serve_an_export(small: SimpleNamespace, web: str, tmp_path: Path) -> None:
    export(Web(web), tmp_path / "copy", small.c.roster, ())
    assert audit(tmp_path / "copy", small.c.roster, {}).size == 300
    with pytest.raises(Absent):
        Web(web).read("tile/3/000")


def test_a_source_answers_with_any_bytes_and_an_audit_raises_only_ours(small: SimpleNamespace) -> None:
    for path in ("checkpoint", "tile/0/000", "tile/entries/000"):
        file = small.folder / path
        good = file.read_bytes()
        for bad in (b"", b"x", good[:-1], good + b"x", bytes(len(good)), good[1:]):
            file.write_bytes(bad)
            with pytest.raises(MedshardError):
                audit(small.folder, small.c.roster, {})
        file.write_bytes(good)
    shutil.rmtree(small.folder / "tile")
    with pytest.raises((Absent, Malformed)):
        audit(small.folder, small.c.roster, {})
    (small.folder / "checkpoint").write_bytes(bytes(30 << 20))
    with pytest.raises(Malformed, match="more than"):
        Folder(small.folder).read("checkpoint")


def test_all_tiles_of_a_log_are_named_once(large: SimpleNamespace) -> None:
    names = [name.path() for name in tile_names(size)]
    files = sorted(str(path.relative_to(large.folder / "tile")) for path in (large.folder / "tile").rglob("*") if path.is_file())
    assert sorted(names) == files
