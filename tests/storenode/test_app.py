"""One real node behind real TLS on loopback: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol import merkle
from medshard_protocol.canonical import decode
from medshard_protocol.entries import Enrol, Register, sign_entry
from medshard_protocol.identity import client_csr, node_hostname
from medshard_protocol.ids import FileId, Key, NodeId, Tag
from medshard_protocol.manifest import Manifest, ShardRef
from medshard_protocol.messages import (
    SmallPut,
    SpanHead,
    cell_size_header,
    pack_lookup,
    pack_small_puts,
    pack_small_reads,
    root_header,
    unpack_check,
    unpack_found,
    unpack_outcomes,
    unpack_shards,
    unpack_stored,
)
from medshard_protocol.proofs import Inclusion, pack_append
from medshard_protocol.roster import Institution as RosterInstitution
from medshard_protocol.roster import Node as RosterNode
from medshard_protocol.roster import Roster
from medshard_protocol.shards import Layout, digests, shard_root, split
from storenode.app import Parts, build, quick_ways
from storenode.config import Config, write_config
from storenode.doorkeeper import Doorkeeper
from storenode.draining import Draining
from storenode.following import Following
from storenode.identity import (
    Institution,
    NodeKeys,
    create_institution,
    create_node,
    issue_client_cert,
    server_ssl_context,
)
from storenode.ledger import Ledger
from storenode.membership import Membership
from storenode.metrics import Metrics
from storenode.peers import Peers
from storenode.routes import Node
from storenode.shardstore import ShardStore
from storenode.traffic import Traffic
from storenode.watching.inside import node_watch
from storenode.watching.watch import Trust
from storenode.wire import Answered, TlsSite

cell = 1000


def public(key: Ed25519PrivateKey) -> Key:
    return Key(key.public_key().public_bytes_raw())


@dataclass
class Running:
    url: str
    node: NodeId
    roster: Roster
    store: ShardStore
    institution: Institution
    owner: Ed25519PrivateKey
    session: aiohttp.ClientSession
    context: ssl.SSLContext

    async def ask(
        self, method: str, path: str, body: object = None, context: ssl.SSLContext | None = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, bytes):
            body = io.BytesIO(body)
        async with self.session.request(
            method,
            self.url + path,
            data=body,
            headers=named,
            ssl=context or self.context,
            server_hostname=node_hostname(self.node),
        ) as response:
            return response.status, await response.read(), dict(response.headers)

    async def put(self, data: bytes, file_id: FileId, index: int = 0) -> tuple[int, bytes]:
        status, body, _ = await self.ask("PUT", f"/v1/shards/{file_id.hex()}/{index}", data, Medshard_Cell_Size=str(cell))
        return status, body


def context_with(institution: Institution, key: Ed25519PrivateKey, folder: Path) -> ssl.SSLContext:
    from medshard.tls import context_for

    return context_for(institution.certificate, issue_client_cert(institution, client_csr(key)), key)


@pytest.fixture(autouse=True)
def open_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about bytes; who gets them is in test_gate.py and test_sharing.py."""
    monkeypatch.setattr("storenode.gate.enforced", False)


@pytest.fixture
async def node(tmp_path: Path, unused_tcp_port: int) -> AsyncIterator[Running]:
    institution, log_key, owner = create_institution("Clinic"), Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    home = tmp_path / "home"
    home.mkdir()
    create_node(home, institution)
    keys = NodeKeys.load(home)
    url = f"https://127.0.0.1:{unused_tcp_port}"
    write_config(home, url=url, listen=f"127.0.0.1:{unused_tcp_port}", capacity_bytes=50_000_000)
    config = Config.load(home)
    import msgspec  # its structs are frozen: limits small enough to meet in a test

    limits = msgspec.structs.replace(config.limits, shard_bytes_max=2_000_000, body_stall_s=0.3, manifest_bytes_max=70_000)
    config = replace(config, limits=limits)
    roster = Roster(
        "clinic.example/log",
        keys.node_id,
        (RosterInstitution("Clinic", institution.certificate, public(institution.key)),),
        (RosterNode(keys.node_id, "one", 0, url, 50_000_000, keys.tls_key, public(keys.cosigner), public(log_key)),),
        (1, 1, 1),
    )
    peers = Peers(roster, {})
    store = ShardStore(config.data, capacity=config.capacity_bytes, small_bytes_max=4096)
    ledger = Ledger.open(config.data, roster, keys.node_id, keys.cosigner, log_key, peers)
    await ledger.start()
    membership = Membership(config.data, roster)
    following = Following(membership, ledger, keys.node_id, peers)
    watch = node_watch(config.data, lambda: Trust((roster,)), peers)
    parts = Parts(Node(config, keys.node_id, store, ledger), membership, peers, Metrics(), following, watch)
    app = build(parts, keys)
    draining, doorkeeper = Draining(app), Doorkeeper(app)
    runner = web.AppRunner(app, access_log_class=Answered, lingering_time=0.2)
    await runner.setup()
    site = TlsSite(runner, *config.listen_address, server_ssl_context(roster, keys))
    site.quick = quick_ways(parts, app, draining, doorkeeper)
    await site.start()
    async with aiohttp.ClientSession() as session:
        running = Running(url, keys.node_id, roster, store, institution, owner, session, context_with(institution, owner, tmp_path))
        yield running
    await runner.cleanup()
    await ledger.close()
    await peers.close()
    store.close()


def root_of(data: bytes) -> bytes:
    blake3 = digests["blake3"]
    return shard_root([blake3(part) for part in split(data, cell)], blake3)


def manifest_of(node: Running, shard: bytes, file_id: FileId, **changes: object) -> Manifest:
    manifest = Manifest(
        file_id,
        Layout(1, 1, cell, len(shard)),
        "blake3",
        bytes(32),
        (ShardRef(node.node, root_of(shard)),),
        public(node.owner),
        b"",
        bytes(48),
        (Tag(b"t" * 32),),
        bytes(32),
    )
    return replace(manifest, **changes)  # type: ignore[arg-type]


async def test_a_read_is_answered_alike_whichever_way_its_answer_comes(node: Running) -> None:
    data, file_id, url = os.urandom(5000), FileId(os.urandom(32)), urlsplit(node.url)
    await node.put(data, file_id)
    known = pack_small_reads([(file_id, 0), (FileId(bytes(32)), 0)])
    nobody = ssl.create_default_context()
    nobody.check_hostname, nobody.verify_mode = False, ssl.CERT_NONE
    for context, body, header, status in (
        (node.context, known, "", b"200 OK"),
        (node.context, b"junk", "", b"400 Bad Request"),
        (nobody, known, "", b"403 Forbidden"),
        (node.context, known, "Medshard-Log: another.example/log\r\n", b"403 Forbidden"),
    ):
        bodies = []
        for unusual in ("", "Accept: */*\r\n"):
            reader, writer = await asyncio.open_connection(url.hostname, url.port, ssl=context, server_hostname=node_hostname(node.node))
            writer.write(f"POST /v1/read HTTP/1.1\r\nHost: n\r\nContent-Length: {len(body)}\r\n{header}{unusual}\r\n".encode() + body)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 " + status)
            assert (b"Server: " in head) == bool(unusual), "aiohttp says who it is"
            bodies.append(await reader.readexactly(int(re.findall(rb"Content-Length: (\d+)", head)[0])))
            writer.close()
        assert bodies[0] == bodies[1]


@pytest.mark.parametrize("size", [1, 4096, 4097, 1_500_000])
async def test_a_shard_goes_in_and_comes_back_with_its_digests(node: Running, size: int) -> None:
    data, file_id = os.urandom(size), FileId(os.urandom(32))
    status, body = await node.put(data, file_id)
    assert (status, unpack_stored(body)) == (201, root_of(data))
    status, body, _ = await node.ask("GET", f"/v1/shards/{file_id.hex()}/0")
    length = int.from_bytes(body[:4], "big")
    head = SpanHead.from_bytes(body[4 : 4 + length])
    assert body[4 + length :] == data
    assert head.digests == b"".join(digests["blake3"](part) for part in split(data, cell))
    status, _, headers = await node.ask("HEAD", f"/v1/shards/{file_id.hex()}/0")
    assert (status, headers[root_header]) == (204, root_of(data).hex())


async def test_long_bodies_count_as_traffic_both_ways(node: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Traffic] = []
    body = Traffic.body

    def counting(traffic: Traffic) -> AbstractContextManager[None]:
        counted.append(traffic)
        return body(traffic)

    monkeypatch.setattr(Traffic, "body", counting)
    file_id = FileId(os.urandom(32))
    await node.put(os.urandom(1_500_000), file_id)
    assert len(counted) == 1
    await node.ask("GET", f"/v1/shards/{file_id.hex()}/0")
    assert len(counted) == 2


async def test_single_cells_come_with_merkle_paths_that_lead_to_the_root(node: Running) -> None:
    data, file_id = os.urandom(12_345), FileId(os.urandom(32))
    await node.put(data, file_id)
    _, body, _ = await node.ask("GET", f"/v1/shards/{file_id.hex()}/0?cells=5-6&proof=paths")
    length = int.from_bytes(body[:4], "big")
    head = SpanHead.from_bytes(body[4 : 4 + length])
    assert body[4 + length :] == data[5000:7000]
    blake3 = digests["blake3"]
    leaf = merkle.leaf_hash(blake3(data[5000:6000]), blake3)
    assert merkle.root_from_path(leaf, 5, 13, head.paths[0], blake3) == root_of(data)


@pytest.mark.parametrize("size", [3000, 30_000])
async def test_the_same_shard_twice_is_idempotent_and_other_bytes_conflict(node: Running, size: int) -> None:
    data, file_id = os.urandom(size), FileId(os.urandom(32))
    assert (await node.put(data, file_id))[0] == 201
    assert (await node.put(data, file_id))[0] == 200
    assert (await node.put(os.urandom(size), file_id))[0] == 409
    assert (await node.put(data, file_id, index=1))[0] == 409


async def test_refusals_have_the_right_status(node: Running) -> None:
    file = os.urandom(32).hex()
    good = {"Medshard_Cell_Size": str(cell)}
    shard = f"/v1/shards/{file}/0"
    cases = [
        ("PUT", shard, bytes(2_000_001), good, 413),
        ("PUT", shard, b"x", {**good, "Content_Encoding": "gzip"}, 415),
        ("PUT", shard, b"x", {}, 400),
        ("PUT", shard, b"x", {"Medshard_Cell_Size": "0"}, 400),
        ("PUT", shard, b"", good, 400),
        ("PUT", f"/v1/shards/{file}/255", b"x", good, 400),
        ("PUT", f"/v1/shards/{file.upper()}/0", b"x", good, 400),
        ("PUT", "/v1/shards/..%2f..%2fetc/0", b"x", good, 400),
        ("PUT", f"/v1/shards/{file[:-2]}/0", b"x", good, 400),
        ("GET", shard, None, {}, 404),
        ("GET", f"/v1/manifests/{file}", None, {}, 404),
        ("PUT", f"/v1/manifests/{file}", b"\xc1", {}, 400),
        ("PUT", f"/v1/manifests/{file}", bytes(70_001), {}, 413),
        ("POST", "/v1/files", b"junk", {}, 400),
        ("POST", "/v1/read", b"junk", {}, 400),
        ("POST", "/v1/lookup", b"junk", {}, 400),
        ("GET", "/v1/nothing", None, {}, 404),
        ("DELETE", shard, None, {}, 405),
    ]
    for method, path, body, headers, expected in cases:
        status, answer, _ = await node.ask(method, path, body, **headers)
        assert status == expected, (method, path, status, answer)
    assert node.store.used == 0
    assert node.store.counts() == (0, 0)


async def test_a_body_without_length_is_refused_before_it_is_read(node: Running) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(65536)

    try:
        status, _, _ = await node.ask("PUT", f"/v1/shards/{os.urandom(32).hex()}/0", endless(), Medshard_Cell_Size=str(cell))
    except aiohttp.ClientError:
        status = 400  # the node answered and hung up while we were still sending
    assert status == 400
    assert node.store.used == 0


async def test_a_stalled_body_is_cut_and_leaves_nothing(node: Running) -> None:
    async def stalling() -> AsyncIterator[bytes]:
        yield bytes(5000)
        await asyncio.sleep(5)
        yield bytes(5000)

    started = asyncio.get_running_loop().time()
    try:
        status, _, _ = await node.ask(
            "PUT", f"/v1/shards/{os.urandom(32).hex()}/0", stalling(), Medshard_Cell_Size=str(cell), Content_Length="10000"
        )
        assert status == 408
    except aiohttp.ClientError:
        pass  # cut is cut
    assert asyncio.get_running_loop().time() - started < 4
    assert node.store.used == 0
    assert node.store.counts() == (0, 0)


async def test_room_that_a_slow_sender_has_announced_is_there_for_others(node: Running) -> None:
    going = asyncio.Event()

    async def stalling() -> AsyncIterator[bytes]:
        yield bytes(5000)
        await going.wait()

    path, size = f"/v1/shards/{os.urandom(32).hex()}/0", "1900000"
    slow = [asyncio.create_task(node.ask("PUT", path, stalling(), Medshard_Cell_Size=str(cell), Content_Length=size)) for _ in range(8)]
    async with asyncio.timeout(60):
        while not node.store._coming:
            await asyncio.sleep(0.01)
    node.store.used += 50_000_000 - 8 * (1 << 20) - 2_000_000  # room for one, beside what may come of the others without asking again
    assert (await node.put(bytes(1_900_000), FileId(os.urandom(32))))[0] == 201
    going.set()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_an_upload_that_finds_the_room_gone_is_507_and_leaves_nothing(node: Running, tmp_path: Path) -> None:
    async def sending() -> AsyncIterator[bytes]:
        yield bytes(900_000)
        async with asyncio.timeout(60):
            while not any(each.received for each in node.store._coming):
                await asyncio.sleep(0.01)
        node.store.used += 49_000_000
        yield bytes(1_000_000)

    path = f"/v1/shards/{os.urandom(32).hex()}/0"
    status, body, _ = await node.ask("PUT", path, sending(), Medshard_Cell_Size=str(cell), Content_Length="1900000")
    assert (status, decode(body, bytes_max=4096, what="error")[1]) == (507, "full")
    assert not node.store._coming
    assert list((tmp_path / "home" / "data" / "tmp").iterdir()) == []


async def test_a_broken_off_body_leaves_nothing(node: Running, tmp_path: Path) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield bytes(500_000)
        raise OSError("the sender dies")

    with pytest.raises((aiohttp.ClientError, OSError)):
        await node.ask("PUT", f"/v1/shards/{os.urandom(32).hex()}/0", breaking(), Medshard_Cell_Size=str(cell), Content_Length="1000000")
    for _ in range(50):
        if not list((tmp_path / "home" / "data" / "tmp").iterdir()):
            break
        await asyncio.sleep(0.05)
    assert list((tmp_path / "home" / "data" / "tmp").iterdir()) == []
    assert not node.store._coming


async def test_over_quota_is_507_and_nothing_is_half_written(node: Running, tmp_path: Path) -> None:
    while node.store.used + 1_900_000 <= 50_000_000:
        assert (await node.put(bytes(1_900_000), FileId(os.urandom(32))))[0] == 201
    status, body = await node.put(bytes(1_900_000), FileId(os.urandom(32)))
    assert status == 507
    assert decode(body, bytes_max=4096, what="error")[1] == "full"
    assert list((tmp_path / "home" / "data" / "tmp").iterdir()) == []


async def test_without_a_certificate_only_the_way_in_is_open(node: Running) -> None:
    from medshard.tls import context_for

    anonymous = context_for(node.institution.certificate)
    assert (await node.ask("GET", "/healthz", context=anonymous))[0] == 200
    status, body, _ = await node.ask("GET", "/v1/genesis", context=anonymous)
    assert (status, body) == (200, node.roster.to_bytes())
    for method, path in (("GET", "/v1/status"), ("PUT", f"/v1/shards/{'00' * 32}/0"), ("POST", "/v1/lookup"), ("GET", "/log/checkpoint")):
        assert (await node.ask(method, path, b"x" if method != "GET" else None, context=anonymous))[0] == 403


async def test_a_certificate_of_a_foreign_ca_does_not_get_in(node: Running, tmp_path: Path) -> None:
    from medshard.tls import context_for

    stranger, key = create_institution("Stranger"), Ed25519PrivateKey.generate()
    context = context_for(node.institution.certificate, issue_client_cert(stranger, client_csr(key)), key)
    with pytest.raises(aiohttp.ClientError):
        await node.ask("GET", "/v1/status", context=context)


async def test_a_manifest_is_kept_only_by_its_owner_and_beside_its_shard(node: Running, tmp_path: Path) -> None:
    shard, file_id = os.urandom(5_000), FileId(os.urandom(32))
    manifest = manifest_of(node, shard, file_id)
    path = f"/v1/manifests/{file_id.hex()}"
    assert (await node.ask("PUT", path, manifest.to_bytes()))[0] == 404
    await node.put(shard, file_id)
    assert (await node.ask("PUT", path, manifest_of(node, os.urandom(5_000), file_id).to_bytes()))[0] == 400
    assert (await node.ask("PUT", path, manifest_of(node, shard, file_id, owner=Key(b"x" * 32)).to_bytes()))[0] == 403
    assert (await node.ask("PUT", path, manifest.to_bytes()))[0] == 201
    assert (await node.ask("PUT", path, manifest.to_bytes()))[0] == 200
    assert (await node.ask("PUT", path, manifest_of(node, shard, file_id, header=b"other").to_bytes()))[0] == 409
    other = context_with(node.institution, Ed25519PrivateKey.generate(), tmp_path)
    assert (await node.ask("GET", path, context=other))[1] == manifest.to_bytes()


async def test_small_files_go_in_together_and_each_is_answered_for_itself(node: Running) -> None:
    shards = [os.urandom(500 + i) for i in range(5)]
    ids = [FileId(os.urandom(32)) for _ in shards]
    puts = [SmallPut(manifest_of(node, shard, file_id).to_bytes(), 0, shard) for shard, file_id in zip(shards, ids, strict=True)]
    puts[2] = SmallPut(puts[2].manifest, 0, os.urandom(502))
    puts[3] = SmallPut(b"\x00", 0, shards[3])
    status, body, _ = await node.ask("POST", "/v1/files", pack_small_puts(puts))
    outcomes = unpack_outcomes(body, "one")
    assert status == 200
    assert [type(outcome).__name__ for outcome in outcomes] == ["NoneType", "NoneType", "Damaged", "Malformed", "NoneType"]
    _, body, _ = await node.ask("POST", "/v1/read", pack_small_reads([(file_id, 0) for file_id in ids]))
    assert unpack_shards(body, 5) == [shards[0], shards[1], None, None, shards[4]]


async def test_lookup_by_tag_brings_the_manifest_and_the_proof_of_its_registration(node: Running) -> None:
    shard, file_id = os.urandom(700), FileId(os.urandom(32))
    manifest = manifest_of(node, shard, file_id)
    await node.ask("POST", "/v1/files", pack_small_puts([SmallPut(manifest.to_bytes(), 0, shard)]))
    ((found,),) = unpack_found((await node.ask("POST", "/v1/lookup", pack_lookup([Tag(b"t" * 32)])))[1], 1)
    assert (found.manifest, found.inclusion) == (manifest.to_bytes(), None)
    ca, me = node.institution.key, public(node.owner)
    enrol = sign_entry(node.roster.origin, Enrol(me, 0, bytes(16)), public(ca), ca.sign)
    register = sign_entry(node.roster.origin, Register(file_id, manifest.sha256, bytes(16)), me, node.owner.sign)
    for entry in (enrol, register):
        assert (await node.ask("POST", "/v1/ledger/append", pack_append([entry.to_bytes()])))[0] == 200
    ((found,),) = unpack_found((await node.ask("POST", "/v1/lookup", pack_lookup([Tag(b"t" * 32)])))[1], 1)
    _, entry = Inclusion.from_value(found.inclusion).verify(node.roster)
    assert entry.body == register.body
    assert unpack_found((await node.ask("POST", "/v1/lookup", pack_lookup([Tag(b"u" * 32)])))[1], 1) == [[]]


async def test_the_node_finds_a_flipped_bit_when_asked_to_check(node: Running, tmp_path: Path) -> None:
    file_id = FileId(os.urandom(32))
    await node.put(os.urandom(50_000), file_id)
    assert unpack_check((await node.ask("POST", f"/v1/shards/{file_id.hex()}/0/check"))[1]) == []
    (path,) = (tmp_path / "home" / "data" / "shards").glob("??/*")
    data = bytearray(path.read_bytes())
    data[33_333] ^= 4
    path.write_bytes(data)
    assert unpack_check((await node.ask("POST", f"/v1/shards/{file_id.hex()}/0/check"))[1]) == [33]


async def test_a_full_disk_is_507_and_no_stack_trace(node: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardStore, "free_bytes", lambda self: 1000)
    status, body = await node.put(bytes(100_000), FileId(os.urandom(32)))
    assert status == 507
    assert b"Traceback" not in body
    assert decode(body, bytes_max=4096, what="error")[2] == "this node's disk is full"


def test_the_cell_size_header_has_the_name_in_the_format_document() -> None:
    assert cell_size_header == "Medshard-Cell-Size"


async def test_a_failing_disk_is_503_and_named_in_the_log(
    node: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: ShardStore) -> int:
        raise OSError(errno.EIO, "Input/output error", "/srv/disk/shards")

    monkeypatch.setattr(ShardStore, "free_bytes", fail)
    status, body = await node.put(bytes(100_000), FileId(os.urandom(32)))
    assert (status, decode(body, bytes_max=4096, what="error")[2]) == (503, "this node's disk fails")
    assert any("/srv/disk/shards fails" in record.getMessage() for record in caplog.records)


async def test_a_node_that_is_told_to_stop_stops_while_it_still_reads_its_ledger() -> None:
    from storenode.app import _done

    stopping, left = asyncio.Event(), []

    async def read() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            left.append(True)

    asyncio.get_running_loop().call_soon(stopping.set)
    assert not await _done(read(), stopping)
    assert left == [True]
    stopping.clear()
    assert await _done(asyncio.sleep(0), stopping)
