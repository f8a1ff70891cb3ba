"""POST /v1/join over a real HTTP server, with a ledger that can fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol import identity
from medshard_protocol.entries import Enrol, Rotate, Sender
from medshard_protocol.errors import MedshardError, Unavailable
from medshard_protocol.ids import Key
from medshard_protocol.invite import Rotation, pack_join, pack_sender, unpack_joined
from medshard_protocol.messages import pack_error, unpack_error
from storenode.config import Config, write_config
from storenode.identity import NodeKeys, create_institution, create_node
from storenode.invites import Invites
from storenode.join import Throttle, join_routes, wrong_max


@dataclass
class Desk:
    """A node's join route, and the ledger behind it."""

    url: str
    keys: NodeKeys
    invites: Invites
    session: aiohttp.ClientSession
    enrolled: list[Key] = field(default_factory=list)
    said: list[Enrol | Rotate | Sender] = field(default_factory=list)
    ledger_is_up: bool = True
    slow_s: float = 0.0

    async def enrol(self, body: Enrol | Rotate | Sender) -> None:
        await asyncio.sleep(self.slow_s)
        if not self.ledger_is_up:
            raise Unavailable("no quorum")
        self.enrolled.append(body.key)
        self.said.append(body)

    def invite(self) -> bytes:
        return self.invites.issue("", now=time.time(), lifetime_s=3600)

    async def post(self, body: bytes, route: str = "join") -> tuple[int, bytes]:
        async with self.session.post(f"{self.url}/v1/{route}", data=body) as response:
            return response.status, await response.read()

    async def join(self, secret: bytes, key: Ed25519PrivateKey) -> bytes | str:
        """The certificate, or what the error says."""
        status, body = await self.post(pack_join(secret, identity.client_csr(key)))
        return unpack_joined(body) if status == 200 else f"{status} {unpack_error(status, body, 'node')}"


async def open_desk(home: Path, *, keep_ca_key: bool = True) -> AsyncIterator[Desk]:
    create_node(home, create_institution("Hospital"), keep_ca_key=keep_ca_key, sync=False)
    keys = NodeKeys.load(home)
    write_config(home, url="https://node.example:9700", durable=False)
    config = Config.load(home)

    @web.middleware
    async def translate(request: web.Request, handler: object) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[operator]
        except MedshardError as error:
            status, body = pack_error(error)
            return web.Response(status=status, body=body)

    async with aiohttp.ClientSession() as session:
        desk = Desk("", keys, Invites(config.data), session)
        app = web.Application(middlewares=[translate], client_max_size=0)
        app.add_routes(join_routes(config, keys, desk.enrol, lambda key: key in desk.enrolled))
        runner = web.AppRunner(app, shutdown_timeout=0.05)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        desk.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield desk
        await runner.cleanup()


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async for each in open_desk(tmp_path):
        yield each


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


async def test_a_code_brings_a_certificate_for_the_vaults_key(desk: Desk, key: Ed25519PrivateKey) -> None:
    certificate = await desk.join(desk.invite(), key)
    assert isinstance(certificate, bytes)
    assert identity.certificate_key(certificate) == identity.public_key(key)
    assert identity.is_issued_by(certificate, desk.keys.ca_certificate)
    assert desk.enrolled == [identity.public_key(key)]


async def test_joining_again_with_the_same_key_and_code_is_no_change(desk: Desk, key: Ed25519PrivateKey) -> None:
    secret = desk.invite()
    assert isinstance(await desk.join(secret, key), bytes)
    assert isinstance(await desk.join(secret, key), bytes)
    assert len(desk.enrolled) == 1


async def test_a_code_brings_a_successor_or_a_sender_in_as_well_and_once(desk: Desk, key: Ed25519PrivateKey) -> None:
    old, vault = Key(b"o" * 32), Key(b"v" * 32)
    secrets, csr = (desk.invite(), desk.invite()), identity.client_csr(key)
    asked = Rotation(secrets[0], csr, old, b"s" * 64, b"t" * 64)
    desk.ledger_is_up = False
    assert (await desk.post(asked.to_bytes(), "rotate"))[0] == 503
    desk.ledger_is_up = True
    for _ in range(2):  # the same key comes again, and only it
        status, body = await desk.post(asked.to_bytes(), "rotate")
        assert (status, identity.certificate_key(unpack_joined(body))) == (200, identity.public_key(key))
    other = identity.client_csr(Ed25519PrivateKey.generate())
    assert (await desk.post(Rotation(secrets[0], other, old, b"s" * 64, b"t" * 64).to_bytes(), "rotate"))[0] == 403
    assert (await desk.post(pack_sender(secrets[0], other, vault), "senders"))[0] == 403
    assert (await desk.post(pack_sender(secrets[1], other, vault), "senders"))[0] == 200
    (rotated, sender) = desk.said
    assert isinstance(rotated, Rotate)
    assert (rotated.old, rotated.key, rotated.old_signature, rotated.key_signature) == (old, identity.public_key(key), b"s" * 64, b"t" * 64)
    assert isinstance(sender, Sender)
    assert (sender.key, sender.vault) == (identity.csr_key(other), vault)


async def test_a_code_serves_no_second_key(desk: Desk, key: Ed25519PrivateKey) -> None:
    secret = desk.invite()
    await desk.join(secret, key)
    assert "403" in str(await desk.join(secret, Ed25519PrivateKey.generate()))
    assert desk.enrolled == [identity.public_key(key)]


async def test_of_two_keys_at_once_one_gets_in(desk: Desk) -> None:
    secret, desk.slow_s = desk.invite(), 0.05
    answers = await asyncio.gather(*(desk.join(secret, Ed25519PrivateKey.generate()) for _ in range(5)))
    assert sum(isinstance(answer, bytes) for answer in answers) == 1
    assert len(desk.enrolled) == 1


async def test_a_join_that_the_ledger_refused_can_be_tried_again(desk: Desk, key: Ed25519PrivateKey) -> None:
    secret, desk.ledger_is_up = desk.invite(), False
    assert "503" in str(await desk.join(secret, key))
    assert [each.state(0) for each in desk.invites.all()] == ["begun"]
    desk.ledger_is_up = True
    assert isinstance(await desk.join(secret, key), bytes)
    assert [each.state(0) for each in desk.invites.all()] == ["used"]


async def test_a_request_without_proof_of_its_key_does_not_use_the_code_up(desk: Desk, key: Ed25519PrivateKey) -> None:
    secret = desk.invite()
    csr = bytearray(identity.client_csr(key))
    csr[-1] ^= 1
    assert (await desk.post(pack_join(secret, bytes(csr))))[0] == 403
    assert isinstance(await desk.join(secret, key), bytes)


async def test_junk_is_malformed_and_too_much_is_too_large(desk: Desk) -> None:
    assert (await desk.post(b"junk"))[0] == 400
    assert (await desk.post(bytes(100_000)))[0] == 413


async def test_guessing_is_slowed_down_and_right_codes_are_not(desk: Desk) -> None:
    for _ in range(wrong_max + 2):
        assert isinstance(await desk.join(desk.invite(), Ed25519PrivateKey.generate()), bytes)
    answers = [str(await desk.join(bytes([number]) * 16, Ed25519PrivateKey.generate()))[:3] for number in range(wrong_max + 2)]
    assert answers == ["403"] * wrong_max + ["503"] * 2


def test_the_throttle_forgets_after_a_while_and_never_grows_without_bound() -> None:
    moment = [0.0]
    throttle = Throttle(lambda: moment[0])
    for _ in range(wrong_max):
        throttle.check("a")
        throttle.wrong("a")
    with pytest.raises(Unavailable):
        throttle.check("a")
    throttle.check("b")
    moment[0] += 61
    throttle.check("a")
    for number in range(10_000):
        throttle.wrong(str(number))
    assert len(throttle._wrong) <= 4096


async def test_a_node_without_the_institutions_key_says_so(tmp_path: Path, key: Ed25519PrivateKey) -> None:
    async for desk in open_desk(tmp_path, keep_ca_key=False):
        assert "CA key" in str(await desk.join(bytes(16), key))
