"""POST /v1/join: a vault shows an invitation, proves its key, and gets the institution's word for it. POST /v1/rotate: so does a new key
in the place of an old one, POST /v1/senders: one that will only send. POST /v1/certificate: the certificate once more.

Law: the order is claim, enrol, certify, mark as used. After a crash anywhere the same key with the same code goes through again and ends
in the same state; another key never does. Nothing that the vault wrote reaches its certificate but its key.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from medshard_protocol.entries import Body, Rotate, Sender, nonce_size
from medshard_protocol.entries import Enrol as Enrolment
from medshard_protocol.errors import Malformed, Refused, TooLarge, Unavailable
from medshard_protocol.identity import csr_key
from medshard_protocol.ids import Key
from medshard_protocol.invite import Rotation, pack_joined, rotate_bytes_max, unpack_join, unpack_readmission, unpack_sender
from medshard_protocol.messages import body_type
from storenode.config import Config
from storenode.identity import Institution, NodeKeys, issue_client_cert
from storenode.invites import Invites

log = logging.getLogger(__name__)

Enrol = Callable[[Body], Awaitable[None]]
Vouched = Callable[[Key], bool]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
wrong_max: Final = 10  # wrong codes from one address in a window; right ones do not count, for a clinic may sit behind one address
window_s: Final = 60.0
addresses_max: Final = 4096
joins_max: Final = 64  # at once: a stalled ledger must not collect requests without end


class Throttle:
    """Counts wrong codes by address, in a table that cannot grow without bound."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: dict[str, list[float]] = {}

    def check(self, address: str) -> None:
        """Raise Unavailable for an address that was wrong too often of late."""
        since = self._clock() - window_s
        recent = [when for when in self._wrong.get(address, ()) if when > since]
        if recent:
            self._wrong[address] = recent
        else:
            self._wrong.pop(address, None)
        if len(recent) >= wrong_max:
            raise Unavailable("too many wrong invitations from this address", hint=f"wait {window_s:g} s")

    def wrong(self, address: str) -> None:
        """Count one."""
        if len(self._wrong) >= addresses_max:
            self._wrong.pop(next(iter(self._wrong)))  # the one that was first seen; it starts anew
        self._wrong.setdefault(address, []).append(self._clock())


class Desk:
    """Takes joins. The claim is made before anything is awaited, so of two keys with one code only one gets past it."""

    def __init__(self, invites: Invites, institution: Institution, enrol: Enrol, clock: Callable[[], float] = time.time) -> None:
        """``enrol`` brings an entry into the ledger in the institution's name, where its effect is not there already."""
        self._invites = invites
        self._institution = institution
        self._enrol = enrol
        self._clock = clock
        self._running = 0

    async def join(self, secret: bytes, csr: bytes) -> bytes:
        """Give the certificate (DER) for a request (DER). Raises Malformed, Refused, or what enrolling raises."""
        return await self._take(secret, csr, Enrolment(csr_key(csr), 0, os.urandom(nonce_size)))

    async def rotate(self, asked: Rotation) -> bytes:
        """As ``join``, for a key that succeeds another."""
        signatures = asked.old_signature, asked.key_signature
        return await self._take(asked.secret, asked.csr, Rotate(asked.old, csr_key(asked.csr), *signatures, os.urandom(nonce_size)))

    async def sender(self, secret: bytes, csr: bytes, vault: Key) -> bytes:
        """As ``join``, for a key that will only send for this vault."""
        return await self._take(secret, csr, Sender(csr_key(csr), vault, os.urandom(nonce_size)))

    async def _take(self, secret: bytes, csr: bytes, body: Enrolment | Rotate | Sender) -> bytes:
        if self._running >= joins_max:
            raise Unavailable("too many vaults are joining at once", hint="try again in a minute")
        issued = self._invites.claim(secret, body.key, now=self._clock())
        self._running += 1
        try:
            if not issued.used:
                await self._enrol(body)
        finally:
            self._running -= 1
        certificate = issue_client_cert(self._institution, csr)
        if not issued.used:
            self._invites.finish(secret, issued)
        log.info("joined", extra={"peer": body.key.hex(), "as": type(body).__name__.lower()})
        return certificate


def join_routes(config: Config, keys: NodeKeys, enrol: Enrol, vouched: Vouched) -> list[web.RouteDef]:
    """The routes. Where the CA key is kept elsewhere they only say so. ``vouched`` says whether this institution vouches for a key now."""
    throttle = Throttle()
    desk = Desk(Invites(config.data), Institution(keys.ca, keys.ca_certificate), enrol) if keys.ca is not None else None

    def taking(take: Callable[[Desk, bytes], Awaitable[bytes]]) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            if desk is None:
                raise Refused("this node does not keep its institution's CA key", hint="ask for an invitation of the node that does")
            address = request.remote or ""
            throttle.check(address)
            try:
                certificate = await take(desk, await _body(request, config.limits.body_stall_s))
            except (Malformed, Refused):
                throttle.wrong(address)
                raise
            return web.Response(body=pack_joined(certificate), content_type=body_type)

        return handle

    async def certify(request: web.Request) -> web.Response:
        """A certificate again, for whoever still has the key: after a disaster, or when the old one has run out."""
        if keys.ca is None:
            raise Refused("this node does not keep its institution's CA key", hint="ask the node that does")
        address = request.remote or ""
        throttle.check(address)
        try:
            csr = unpack_readmission(await _body(request, config.limits.body_stall_s))
            if not vouched(csr_key(csr)):
                raise Refused("this institution does not vouch for this key", hint="ask the institution that enrolled it, or join anew")
        except (Malformed, Refused):
            throttle.wrong(address)
            raise
        certificate = issue_client_cert(Institution(keys.ca, keys.ca_certificate), csr)
        log.info("certified again", extra={"peer": csr_key(csr).hex()})
        return web.Response(body=pack_joined(certificate), content_type=body_type)

    return [
        web.post("/v1/join", taking(lambda desk, body: desk.join(*unpack_join(body)))),
        web.post("/v1/rotate", taking(lambda desk, body: desk.rotate(Rotation.from_bytes(body)))),
        web.post("/v1/senders", taking(lambda desk, body: desk.sender(*unpack_sender(body)))),
        web.post("/v1/certificate", certify),
    ]


async def _body(request: web.Request, stall_s: float) -> bytes:
    """The whole body, counted as it comes: anybody at all may send one here."""
    data = b""
    try:
        async with asyncio.timeout(stall_s):
            async for chunk in request.content.iter_any():
                data += chunk
                if len(data) > rotate_bytes_max:
                    raise TooLarge(f"join: more than the {rotate_bytes_max} bytes allowed")
    except TimeoutError:
        raise Unavailable(f"join: not whole within {stall_s:g} s") from None
    return data
