"""Promise 6: what medshard stored opens without medshard, from shards, a manifest and the key file."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from medshard.encoding import Encoder
from medshard.keys import VaultKeys, create_key_file
from medshard.model import Description, Header, Member
from medshard.sealing import FileSeal, padme, wrap
from medshard.source import Part, Source
from medshard_protocol import evidence
from medshard_protocol.erasure import code
from medshard_protocol.ids import NodeId
from medshard_protocol.manifest import Manifest, ShardRef
from medshard_protocol.shards import Layout
from storenode.shardstore import ShardStore

program = Path(__file__).parents[2] / "tools" / "recover.py"
vectors = json.loads((Path(__file__).parents[1] / "vectors" / "sealing.json").read_text())["objects"]
passphrase = "drei Häuser, kein Dach"
blocker = """
import runpy, sys
for name in {blocked!r}:
    sys.modules[name] = None  # importing it now fails
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    found = [name for name in sys.modules if name.split(".")[0] in {blocked!r} and sys.modules[name] is not None]
    assert not found, found
"""


@dataclass(frozen=True)
class Stored:
    manifest: Manifest
    shards: tuple[bytes, ...]


@dataclass(frozen=True)
class Vault:
    """A folder with a key file, and objects sealed for it."""

    folder: Path
    keys: VaultKeys

    def seal(self, k: int, n: int, cell_size: int, *plains: bytes) -> Stored:
        """Seal one file, or several as a pack, as `medshard put` does."""
        parts = []
        for number, plain in enumerate(plains):
            path = self.folder / f"plain {number}"
            path.write_bytes(plain)
            parts.append(Part.at(path, b"ct/IM%d.dcm" % number, Description("application/dicom")))
        source, seal = Source(parts), FileSeal.fresh()
        layout = Layout.for_plain(padme(source.size), k, n, cell_size)
        encoder = Encoder(source, seal, layout)
        columns: list[list[memoryview]] = [[] for _ in range(n)]
        while encoder:
            for column, cell in zip(columns, encoder.next().cells, strict=True):
                column.append(cell)
        header = self._header(parts, source.hashes)
        refs = tuple(ShardRef(NodeId(bytes([i]) * 16), root) for i, root in enumerate(encoder.roots()))
        tags = tuple(sorted({self.keys.tag(digest) for digest in source.hashes}))
        sealed_header, wrapped = seal.seal_header(header.to_bytes()), wrap(self.keys.vault, seal)
        proof = evidence.root(evidence.leaves(self.keys.public, seal.file_id, seal.evidence_key, header.documents))
        manifest = Manifest(seal.file_id, layout, "blake3", seal.commitment, refs, self.keys.public, sealed_header, wrapped, tags, proof)
        return Stored(manifest, tuple(b"".join(column) for column in columns))

    def write(self, stored: Stored, without: tuple[int, ...] = ()) -> list[str]:
        """Put manifest and shards into the folder; the arguments that name them."""
        (self.folder / "manifest").write_bytes(stored.manifest.to_bytes())
        shards = self.folder / "shards"
        shards.mkdir(exist_ok=True)
        for index, shard in enumerate(stored.shards):
            if index not in without:
                (shards / f"shard-{index}.bin").write_bytes(shard)
        return ["--manifest", str(self.folder / "manifest"), "--shards", str(shards)]

    @staticmethod
    def _header(parts: list[Part], hashes: list[bytes]) -> Header:
        if len(parts) == 1:
            return Header("file", parts[0].name, parts[0].size, hashes[0], "application/dicom")
        members, at = [], 0
        for part, digest in zip(parts, hashes, strict=True):
            members.append(Member(part.name, at, part.size, digest, "application/dicom"))
            at += part.size
        return Header.pack(b"ct", at, sha256(b"".join(hashes)).digest(), members)


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    keys = create_key_file(tmp_path / "vault.key", passphrase, fast=True)
    (tmp_path / "passphrase").write_text(passphrase + "\n")
    return Vault(tmp_path, keys)


@pytest.fixture(scope="session")
def recover() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recover", program)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["recover"] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


Run = Callable[..., int]


@pytest.fixture(params=["with blake3", "without blake3"])
def blake3_or_not(request: pytest.FixtureRequest, recover: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without blake3":
        monkeypatch.setattr(recover, "blake3", None)


either_way = pytest.mark.usefixtures("blake3_or_not")


@pytest.fixture
def run(vault: Vault, recover: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run the program in this process, with arguments after those that name the key; gives the exit code."""

    def call(*args: str | Path) -> int:
        common = ["--key", str(vault.folder / "vault.key"), "--passphrase-file", str(vault.folder / "passphrase")]
        monkeypatch.setattr(sys, "argv", ["recover.py", *common, *map(str, args)])
        try:
            return int(recover.main())
        except SystemExit as exit_:
            return int(exit_.code or 0)

    yield call
    assert not list(vault.folder.rglob("*.part"))


@pytest.mark.parametrize(
    "blocked",
    [("medshard", "medshard_protocol", "storenode", "cryptography", "blake3", "numpy"), ("medshard", "medshard_protocol", "storenode")],
)
def test_it_restores_a_file_on_its_own(vault: Vault, blocked: tuple[str, ...]) -> None:
    plain = os.urandom(300_000)
    given = vault.write(vault.seal(3, 6, 4096, plain), without=(0, 2, 4))
    copy = vault.folder / "elsewhere.py"
    copy.write_bytes(program.read_bytes())
    command = [sys.executable, "-I", "-c", blocker.format(blocked=blocked), str(copy), "--key", str(vault.folder / "vault.key"), *given]
    environment = {"MEDSHARD_PASSPHRASE": passphrase, "PATH": os.environ["PATH"], "PYTHONUTF8": "1"}
    done = subprocess.run(
        [*command, "-o", str(vault.folder / "back")], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sha256((vault.folder / "back").read_bytes()).digest() == sha256(plain).digest()
    assert ("not checked beforehand" in done.stderr) == ("blake3" in blocked)


@pytest.mark.parametrize("size", [0, 1, 5000, 39_993])
@pytest.mark.parametrize("lost", [(), (3, 4, 5), (0, 1, 2), (1, 5)])
def test_any_k_shards_give_the_file_back(vault: Vault, run: Run, size: int, lost: tuple[int, ...]) -> None:
    plain = os.urandom(size)
    given = vault.write(vault.seal(3, 6, 1000, plain), without=lost)
    assert run(*given, "-o", vault.folder / "back") == 0
    assert (vault.folder / "back").read_bytes() == plain


@either_way
def test_fewer_than_k_shards_are_named_and_nothing_is_written(vault: Vault, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    given = vault.write(vault.seal(3, 6, 1000, b"x" * 9000), without=(0, 1, 2, 3))
    assert run(*given, "-o", vault.folder / "back") == 5
    assert "only 2 are here: [4, 5]" in capsys.readouterr().err
    assert not (vault.folder / "back").exists()


@either_way
def test_damaged_shards_are_found_and_done_without(vault: Vault, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    plain = random.Random(1).randbytes(60_000)
    stored = vault.seal(3, 6, 1000, plain)
    given = vault.write(stored, without=(5,))
    for index in (0, 3):
        path = vault.folder / "shards" / f"shard-{index}.bin"
        path.write_bytes(path.read_bytes()[:7000] + b"bad" + path.read_bytes()[7003:])
    assert run(*given, "-o", vault.folder / "back") == 0
    assert (vault.folder / "back").read_bytes() == plain
    assert "damaged" in capsys.readouterr().err


@either_way
def test_shards_damaged_in_different_places_still_suffice(vault: Vault, run: Run) -> None:
    plain = random.Random(2).randbytes(50_000)
    given = vault.write(vault.seal(3, 6, 1000, plain), without=(0,))
    for index in range(1, 6):  # every shard left is damaged, no stripe in more than two cells
        path = vault.folder / "shards" / f"shard-{index}.bin"
        data = bytearray(path.read_bytes())
        data[index * 1000 + 5] ^= 1
        path.write_bytes(data)
    assert run(*given, "-o", vault.folder / "back") == 0
    assert (vault.folder / "back").read_bytes() == plain


@either_way
def test_a_shard_that_was_cut_off_serves_as_far_as_it_goes(vault: Vault, run: Run) -> None:
    plain = random.Random(3).randbytes(30_000)
    given = vault.write(vault.seal(2, 3, 1000, plain))
    path = vault.folder / "shards" / "shard-0.bin"
    path.write_bytes(path.read_bytes()[:4500])
    assert run(*given, "-o", vault.folder / "back") == 0
    assert (vault.folder / "back").read_bytes() == plain


@either_way
def test_too_many_damaged_shards_end_in_an_error(vault: Vault, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    given = vault.write(vault.seal(2, 4, 1000, b"x" * 9000))
    for index in range(3):
        (vault.folder / "shards" / f"shard-{index}.bin").write_bytes(b"\0" * 4700)
    assert run(*given, "-o", vault.folder / "back") == 5
    assert "too many are damaged" in capsys.readouterr().err
    assert not (vault.folder / "back").exists()


def test_stock_reedsolo_alone_decodes_the_same(vault: Vault, run: Run) -> None:
    plain = random.Random(4).randbytes(3000)
    given = vault.write(vault.seal(4, 7, 256, plain), without=(0, 3, 4))
    assert run(*given, "--slow", "-o", vault.folder / "back") == 0
    assert (vault.folder / "back").read_bytes() == plain


@pytest.mark.parametrize(("k", "n"), [(1, 3), (2, 4), (3, 6), (10, 16), (5, 5), (40, 60)])
def test_its_decoder_agrees_with_the_erasure_code(recover: ModuleType, k: int, n: int) -> None:
    draw = random.Random(k)
    data = [draw.randbytes(3) for _ in range(k)]
    parity = [bytearray(3) for _ in range(n - k)]
    code(k, n).encode(data, parity)
    cells = [*data, *map(bytes, parity)]
    for _ in range(2):
        some = {i: cells[i] for i in draw.sample(range(n), k)}
        assert recover.data_of_stripe(k, n, some) == b"".join(data)
        assert recover.data_of_stripe_slowly(k, n, some) == b"".join(data)


def test_one_member_of_a_pack_is_restored_by_its_hash(vault: Vault, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    members = [os.urandom(size) for size in (3000, 0, 2999, 7)]
    given = vault.write(vault.seal(3, 6, 500, *members), without=(1, 2))
    for number, member in enumerate(members):
        back = vault.folder / f"back {number}"
        assert run(*given, "--sha256", sha256(member).hexdigest(), "-o", back) == 0
        assert back.read_bytes() == member
    assert run(*given, "--sha256", "00" * 32, "-o", vault.folder / "none") == 3
    assert run(*given, "-o", vault.folder / "none") == 2
    assert "4 files are here" in capsys.readouterr().err


def test_all_members_of_a_pack_go_into_a_folder_by_name(vault: Vault, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    members = [os.urandom(size) for size in (3000, 0, 2999)]
    given = vault.write(vault.seal(3, 6, 500, *members), without=(0, 4))
    assert run(*given, "--list") == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{sha256(members[0]).hexdigest()}          3000  'ct/IM0.dcm'"
    assert run(*given, "--all", "-o", vault.folder / "out") == 0
    assert [(vault.folder / "out" / "ct" / f"IM{i}.dcm").read_bytes() for i in range(3)] == members


def test_with_all_one_lost_file_does_not_stop_the_others(vault: Vault, run: Run) -> None:
    members = [b"a" * 3000, b"b" * 3000]
    given = vault.write(vault.seal(2, 3, 500, *members))
    for path in (vault.folder / "shards").iterdir():
        path.write_bytes(path.read_bytes()[:2100])  # the second member lies behind
    assert run(*given, "--all", "-o", vault.folder / "out") == 8
    assert [path.name for path in (vault.folder / "out" / "ct").iterdir()] == ["IM0.dcm"]


@either_way
async def test_node_folders_are_read_as_nodes_leave_them(vault: Vault, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    large, small, alien = os.urandom(20_000), b"policy", b"of somebody else"
    other = replace(vault, keys=VaultKeys.from_root(bytes(32)))
    objects = [vault.seal(3, 6, 1000, large), vault.seal(3, 6, 1000, small), other.seal(3, 6, 1000, alien)]
    for index in range(1, 5):  # two of six nodes are gone
        store = ShardStore(vault.folder / "nodes" / f"node{index}" / "data", capacity=10**9, small_bytes_max=1024)
        for stored in objects:
            await store.commit_small(stored.shards[index], stored.manifest, index)
        store.close()
    nodes = vault.folder / "nodes"
    (damaged,) = (nodes / "node1").rglob(f"{objects[0].manifest.file_id.hex()}-*")
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
    assert run("--node-data", nodes, "--list") == 0
    listed = capsys.readouterr().out
    assert listed.count("\n") == 2
    assert all(sha256(plain).hexdigest() in listed for plain in (large, small))
    for plain in (large, small):
        back = vault.folder / sha256(plain).hexdigest()
        assert run("--node-data", nodes, "--sha256", sha256(plain).hexdigest(), "-o", back) == 0
        assert back.read_bytes() == plain
    assert run("--node-data", nodes, "--sha256", sha256(alien).hexdigest(), "-o", vault.folder / "none") == 3
    assert run("--node-data", nodes, "--all", "-o", vault.folder / "out") == 0
    assert sorted(path.stat().st_size for path in (vault.folder / "out" / "ct").iterdir()) == [6, 20_000]
    shards = vault.folder / "nodes" / "node2" / "data" / "shards"
    assert run("--manifest", write(vault, objects[0]), "--shards", shards, nodes, "-o", vault.folder / "by name") == 0
    assert (vault.folder / "by name").read_bytes() == large


async def test_a_node_whose_catalog_is_damaged_stops_nobody(vault: Vault, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    plain, nodes = os.urandom(20_000), vault.folder / "nodes"
    stored = vault.seal(2, 3, 1000, plain)
    for index in range(3):
        store = ShardStore(nodes / f"node{index}", capacity=10**9, small_bytes_max=1024)
        await store.commit_small(stored.shards[index], stored.manifest, index)
        store.close()
    for index in (0, 1):
        (nodes / f"node{index}" / "store.sqlite").write_bytes(b"SQLite format 3\0" + b"\xff" * 9000)
    wanted = ["--node-data", nodes, "--sha256", sha256(plain).hexdigest(), "-o", vault.folder / "back"]
    assert run(*wanted) == 5
    assert "--shards" in capsys.readouterr().err
    assert run(*wanted, "--shards", nodes / "node0" / "shards") == 0  # the manifest is from node 2
    assert (vault.folder / "back").read_bytes() == plain


def write(vault: Vault, stored: Stored) -> Path:
    path = vault.folder / "its manifest"
    path.write_bytes(stored.manifest.to_bytes())
    return path


@pytest.mark.parametrize("vector", vectors, ids=lambda vector: vector["what"])
def test_it_opens_the_vectors(recover: ModuleType, tmp_path: Path, vector: dict[str, Any]) -> None:
    (manifest,) = (
        bytes.fromhex(m["manifest"])
        for m in json.loads((Path(__file__).parents[1] / "vectors" / "manifest.json").read_text())["manifests"]
        if m["what"] == vector["what"]
    )
    stored = recover.StoredObject(recover.Manifest(manifest), recover.Keys(bytes.fromhex(vector["vault_key"]), b""))
    shards = [recover.Shard(i, tmp_path, bytes.fromhex(shard)) for i, shard in enumerate(vector["shards"])]
    assert [stored.manifest.root_of(shard).hex() for shard in shards] == vector["roots"]
    whole = recover.Target(b"", 0, len(vector["plain"]) // 2, b"")
    for some in (shards[: vector["k"]], shards[-vector["k"] :]):
        stored.last = (-1, b"")
        assert b"".join(recover.plaintext(stored, some, whole, False)).hex() == vector["plain"]


def test_a_wrong_passphrase_and_anothers_file_are_refused(vault: Vault, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    given = vault.write(replace(vault, keys=VaultKeys.from_root(bytes(32))).seal(1, 2, 1000, b"x"))
    assert run(*given, "-o", vault.folder / "back") == 4
    assert "another vault" in capsys.readouterr().err
    (vault.folder / "passphrase").write_text("vier Häuser")
    assert run(*given, "-o", vault.folder / "back") == 4
    assert "passphrase" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["vault.key", "manifest"])
def test_what_is_no_key_file_or_manifest_is_said_so(vault: Vault, run: Run, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = vault.write(vault.seal(1, 2, 1000, b"x"))
    for junk in (b"", b"junk", bytes(300), b"\x93\x01\x02\x03", b"\x9d" + bytes(13), b"\x9d\x01" + bytes(12), b"\x99" + bytes(9)):
        (vault.folder / what).write_bytes(junk)
        assert run(*given, "-o", vault.folder / "back") == 6
        assert "this is no" in capsys.readouterr().err


def test_nothing_is_ever_overwritten(vault: Vault, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    given = vault.write(vault.seal(1, 2, 1000, b"new"))
    (vault.folder / "back").write_bytes(b"old")
    assert run(*given, "-o", vault.folder / "back") == 7
    assert "exists already" in capsys.readouterr().err
    assert (vault.folder / "back").read_bytes() == b"old"


def test_a_name_that_leads_outside_is_not_followed(recover: ModuleType, tmp_path: Path) -> None:
    for name in (b"../x", b"/etc/x", b"a/../../x", b"", b"a\0b", b"a//b"):
        assert recover.place(tmp_path, recover.Target(name, 0, 0, bytes(32))) == tmp_path / bytes(32).hex()
    assert recover.place(tmp_path, recover.Target(b"caf\xe9/x", 0, 0, bytes(32))) == tmp_path / os.fsdecode(b"caf\xe9") / "x"


@pytest.mark.parametrize("args", [["--sha256", "00", "-o", "x", "--node-data", "."], ["-o", "x"], ["--node-data", "."]])
def test_a_command_line_without_sense_is_explained(run: Run, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*args) == 2
    assert "usage" in capsys.readouterr().err


def test_help_teaches_by_example(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert "--node-data node1/" in shown
    assert "exit codes" in shown
