"""Clients that mean harm, over the real protocol: the node refuses them, stays small, and serves others meanwhile.

Law: what a caller without a certificate can cost is a connection; with one, a connection and the limits in the configuration.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import random
import resource
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.chaos.callers import Door
from tests.chaos.workload import Workload

from medshard.consortium import LocalConsortium
from medshard_protocol.errors import MedshardError
from medshard_protocol.messages import unpack_error

mib = 1024 * 1024
growth_bytes_max = 64 * mib
file_id = "ab" * 32
stall_s = 1.0  # what this node allows a body to stand still


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    trial = LocalConsortium(tmp_path_factory.mktemp("hostile"), institutions=1, code=(1, 1))
    trial._make()
    config = trial.home(trial.names[0]) / "config.toml"
    config.write_text(config.read_text().replace("# body_stall_s = 30.0", f"body_stall_s = {stall_s}"))
    with trial:
        yield Door(trial, trial.names[0])


@pytest.fixture
async def served(door: Door, tmp_path: Path) -> AsyncIterator[Workload]:
    """A file that was stored before; afterwards it comes back, a new one goes in, and the node has no error of its own to tell."""
    work, since = Workload(door.trial, tmp_path, random.Random(1)), door.log.stat().st_size
    async with work.open() as vault:
        await work.put(vault, work.make())
        yield work
        await work.put(vault, work.make())
        assert await work.check(vault) == 2
    assert door.complaints(since) == []


def status_of(answer: bytes) -> int:
    """The status of a raw answer; 0 if there is none."""
    line = answer.partition(b"\r\n")[0].split()
    return int(line[1]) if len(line) > 1 else 0


def request(line: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"{line} HTTP/1.1", "Host: node", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@asynccontextmanager
async def open_file_limit(count: int) -> AsyncIterator[None]:
    """Let this process have so many files open; skips where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_thousand_idle_connections_cost_less_than_64_mib_and_others_are_served(door: Door, served: Workload) -> None:
    before, context, writers = door.memory_bytes(), door.as_vault(), []
    async with open_file_limit(4096):
        try:
            for _ in range(20):
                opened = await asyncio.gather(*(door.open(context) for _ in range(50)))
                writers += [writer for _, writer in opened]
            for writer in writers[::2]:  # half of them say something and never end it: slow headers
                writer.write(b"GET /v1/status HTTP/1.1\r\nHost: node\r\nX-Slow: ")
            async with served.open() as vault, asyncio.timeout(60):
                assert await served.check(vault) == 1
            assert len(writers) == 1000
            growth = door.memory_bytes() - before
            print(f"1,000 idle connections: {growth / mib:.0f} MiB")
            assert growth < growth_bytes_max
        finally:
            for writer in writers:
                writer.transport.abort()


async def test_bodies_that_trickle_are_cut_and_cost_no_memory(door: Door, served: Workload) -> None:
    before, context = door.memory_bytes(), door.as_vault()
    shard = f"PUT /v1/shards/{file_id}/0 HTTP/1.1\r\nHost: node\r\nMedshard-Cell-Size: 1000\r\nContent-Length: 2000000\r\n\r\n".encode()
    files = b"POST /v1/files HTTP/1.1\r\nHost: node\r\nContent-Length: 30000000\r\n\r\n"
    heads = [shard, files] * 50

    async def trickle(head: bytes) -> bytes:
        return await door.say(context, head + os.urandom(1000), wait_s=stall_s * 8)

    async with asyncio.timeout(60):
        answers, _ = await asyncio.gather(asyncio.gather(*map(trickle, heads)), look(served))
    assert {status_of(answer) for answer in answers} <= {408, 0}
    assert door.memory_bytes() - before < growth_bytes_max
    assert list((door.trial.home(door.name) / "data" / "tmp").iterdir()) == []


async def look(served: Workload) -> None:
    await asyncio.sleep(0.3)
    async with served.open() as vault, asyncio.timeout(60):
        assert await served.check(vault) == 1


async def test_too_much_is_refused_before_it_is_kept(door: Door, served: Workload) -> None:
    before, context = door.memory_bytes(), door.as_vault()
    announced = "Content-Length: 99999999999999"
    for line in (f"PUT /v1/shards/{file_id}/0", "POST /v1/files", "POST /v1/lookup", "POST /v1/access", f"PUT /v1/manifests/{file_id}"):
        head = f"{line} HTTP/1.1\r\nHost: node\r\nMedshard-Cell-Size: 131072\r\n{announced}\r\n\r\n".encode()
        assert status_of(await door.say(context, head + bytes(100_000), wait_s=1.0, head=True)) in (0, 400, 413, 507), line
    chunk = b"100000\r\n" + bytes(mib) + b"\r\n"
    for line in ("POST /v1/files", "POST /v1/ledger/append", "POST /v1/join", "PUT /v1/rosters", f"PUT /v1/shards/{file_id}/0"):
        head = f"{line} HTTP/1.1\r\nHost: node\r\nMedshard-Cell-Size: 131072\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        assert status_of(await door.say(context, head + chunk * 40, wait_s=3.0, head=True)) in (0, 400, 403, 413), line
    for header in ("X-Long: " + "a" * 100_000, *[f"X-{i}: 1" for i in range(3)]):
        assert status_of(await door.say(context, request("GET /v1/status", b"", header))) in (0, 200, 400), header[:20]
    many = request("GET /v1/status", b"", *(f"X-Header-{number}: {'v' * 100}" for number in range(20_000)))
    assert status_of(await door.say(context, many)) in (0, 200, 400, 431)
    assert door.memory_bytes() - before < growth_bytes_max


async def test_a_compressed_body_is_refused_and_never_inflated(door: Door, served: Workload) -> None:
    before, context, bomb = door.memory_bytes(), door.as_vault(), gzip.compress(bytes(200 * mib), 9)
    for line in ("POST /v1/files", "POST /v1/lookup", f"PUT /v1/manifests/{file_id}", "POST /v1/ledger/append", "POST /v1/access"):
        for how in ("gzip", "deflate", "br", "gzip, gzip"):
            status = status_of(await door.say(context, request(line, bomb, f"Content-Encoding: {how}"), head=True))
            assert status in (0, 400, 415), (line, how)
    head = request(f"PUT /v1/shards/{file_id}/0", bomb, "Content-Encoding: gzip", "Medshard-Cell-Size: 131072")
    assert status_of(await door.say(context, head)) in (0, 400, 415)
    assert door.memory_bytes() - before < growth_bytes_max


async def test_an_id_is_never_a_path(door: Door, served: Workload) -> None:
    context = door.as_vault()
    names = ["../../keys/node.key", "..%2f..%2fkeys%2fnode.key", "%2e%2e/%2e%2e/keys/node.key", "....//keys", "%00", "AB" * 32]
    for name in names:
        for line in (
            f"GET /v1/shards/{name}/0",
            f"GET /v1/manifests/{name}",
            f"GET /log/tile/{name}",
            f"GET /v1/keys/{name}",
            f"GET /v1/rosters/{name}",
            f"DELETE /v1/grants/{name}/{name}",
            f"PUT /v1/shards/{name}/0",
        ):
            answer = await door.say(context, request(line, b"x" * 10 if line.startswith("PUT") else b"", "Medshard-Cell-Size: 10"))
            assert status_of(answer) in (400, 403, 404, 405), (line, answer[:200])
            assert b"PRIVATE KEY" not in answer
    for index in ("-1", "255", "1e1", "0x1", "٣", "00000000000000000001"):
        answer = await door.say(context, request(f"GET /v1/shards/{file_id}/{index}"))
        assert status_of(answer) in (400, 404), index
    home = door.trial.home(door.name)
    assert {path.name for path in home.iterdir()} <= {"config.toml", "data", "genesis.medshard", "keys", "log", "pid"}


async def test_whoever_is_not_of_the_consortium_gets_nothing_but_the_way_in(door: Door, served: Workload) -> None:
    for context in (door.as_nobody(), door.as_stranger(), door.as_expired()):
        for line in ("GET /v1/status", f"GET /v1/shards/{file_id}/0", "POST /v1/lookup", "GET /log/checkpoint", "GET /v1/openapi.json"):
            assert status_of(await door.say(context, request(line))) in (0, 403), line
    answer = await door.say(door.as_nobody(), request("GET /v1/status"))
    assert status_of(answer) == 403
    error = unpack_error(403, answer.partition(b"\r\n\r\n")[2], "node")
    assert isinstance(error, MedshardError)
    assert status_of(await door.say(door.as_nobody(), request("GET /v1/genesis"))) == 200


async def test_what_is_not_http_or_not_tls_13_is_hung_up_on(door: Door, served: Workload) -> None:
    context = door.as_vault()
    odd = (b"\x00" * 100_000, os.urandom(50_000), b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 10_000)
    for garbage in (*odd, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        assert status_of(await door.say(context, garbage, wait_s=1.0, head=True)) in (0, 400, 404, 405, 505), garbage[:20]
    second = b"GET /v1/status HTTP/1.1\r\nHost: n\r\n\r\n"
    smuggled = b"POST /v1/lookup HTTP/1.1\r\nHost: n\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + second
    assert status_of(await door.say(context, smuggled, wait_s=1.0, head=True)) in (0, 400)
    old = door.as_vault()
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    assert await door.say(old, request("GET /healthz")) == b""
    reader, writer = await asyncio.open_connection(*door.address)  # no TLS at all
    writer.write(request("GET /healthz"))
    async with asyncio.timeout(60):
        assert b"ok" not in await reader.read(100)
    writer.close()
