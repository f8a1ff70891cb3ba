"""Asking an outside authority for its signed time over the ledger (RFC 3161), and writing the answer onto the ledger.

Law: the authority is shown a hash of a published checkpoint and nothing else: it learns how often it is asked, not what is in the log.
Its answer is taken only if it is over exactly that hash and bears our nonce; whether its signature holds is judged by whoever has its
certificates (``medshard check-proof --tsa-ca``). Off unless config.toml names an authority; one node of a consortium is enough.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable
from datetime import datetime
from typing import Final

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol.entries import Entry, Timestamp, nonce_size, sign_entry, token_bytes_max
from medshard_protocol.errors import Malformed, MedshardError, Refused, Unavailable
from medshard_protocol.identity import public_key
from medshard_protocol.ids import Sha256
from storenode.config import TimestampSection
from storenode.ledger import Ledger

ask_wait_s: Final = 20.0
answer_bytes_max: Final = 64 * 1024
again_after_s: Final = 300.0
look_every_s: Final = 60.0
_kinds: Final = ("application/timestamp-query", "application/timestamp-reply")

log = logging.getLogger(__name__)


class Timestamping:
    """One node's errand. ``start`` after the ledger, ``close`` before it."""

    def __init__(self, ledger: Ledger, key: Ed25519PrivateKey, section: TimestampSection, clock: Callable[[], float] = time.time) -> None:
        self._ledger = ledger
        self._key = key
        self._section = section
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Ask now and then from here on, if there is anybody to ask."""
        if self._section.url:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def stamp(self) -> int:
        """Have the newest published checkpoint stamped; the index of the TIMESTAMP entry. Raises Unavailable, Malformed or Refused."""
        published = self._ledger.published
        if published is None:
            raise Unavailable("no checkpoint has been published yet")
        checkpoint = published.checkpoint
        token = await ask(self._section.url, checkpoint.text().encode(), self._section.digest)
        body = Timestamp(checkpoint.size, Sha256(checkpoint.root), token, os.urandom(nonce_size))
        origin, author = self._ledger.roster.origin, public_key(self._key)
        (inclusion,) = await self._ledger.append([sign_entry(origin, body, author, self._key.sign)])
        log.info("timestamped", extra={"size": checkpoint.size, "entry": inclusion.index})
        return inclusion.index

    async def _run(self) -> None:
        while True:
            try:
                due = self._due_at()
                if due <= self._clock() and self._grown():
                    await self.stamp()
                await asyncio.sleep(min(look_every_s, max(1.0, due - self._clock())))
            except MedshardError as error:
                log.warning("no timestamp: %s", error)
                await asyncio.sleep(again_after_s)

    def _due_at(self) -> float:
        """When the next one is due: so long after the last one on the ledger, whichever node asked for it."""
        stamps = self._ledger.state.timestamps()
        if not stamps:
            return 0.0
        entry = Entry.from_bytes(self._ledger.journal.entries(stamps[-1][0], stamps[-1][0] + 1)[0])
        when = time_of(entry.body.token) if isinstance(entry.body, Timestamp) else None
        return 0.0 if when is None else when.timestamp() + self._section.every_h * 3600

    def _grown(self) -> bool:
        """Whether there is more on the ledger than the last timestamp's own entry."""
        stamps, published = self._ledger.state.timestamps(), self._ledger.published
        return published is not None and (not stamps or published.checkpoint.size > stamps[-1][0] + 1)


async def ask(url: str, text: bytes, digest: str = "sha256") -> bytes:
    """A TimeStampToken over a text, without certificates. Raises Unavailable, Malformed or Refused."""
    import rfc3161_client as tsp  # late: few nodes ask

    kind = tsp.base.HashAlgorithm.SHA512 if digest == "sha512" else tsp.base.HashAlgorithm.SHA256
    request = tsp.TimestampRequestBuilder().data(text).hash_algorithm(kind).cert_request(cert_request=False).build()
    answer = await _post(url, request.as_bytes())
    try:
        response = tsp.decode_timestamp_response(answer)
        if response.status not in (0, 1):
            raise Refused(f"the timestamp authority refuses: status {response.status} {', '.join(response.status_string)}")
        imprint = response.tst_info.message_imprint
        if imprint.message != hashlib.new(digest, text).digest() or imprint.hash_algorithm != request.message_imprint.hash_algorithm:
            raise Malformed("the timestamp is over something else")
        if response.tst_info.nonce != request.nonce:
            raise Malformed("the timestamp answers another request")
        token = response.time_stamp_token()
    except (ValueError, TypeError) as error:
        raise Malformed(f"no RFC 3161 answer ({error})") from None
    if len(token) > token_bytes_max:
        raise Malformed(f"the timestamp has {len(token)} bytes; at most {token_bytes_max} fit into an entry (does it hold certificates?)")
    return token


def time_of(token: bytes) -> datetime | None:
    """The time that a token states, unchecked; None for one that cannot be read."""
    import rfc3161_client as tsp

    body = b"\x30\x03\x02\x01\x00" + token
    try:
        return tsp.decode_timestamp_response(b"\x30\x82" + len(body).to_bytes(2, "big") + body).tst_info.gen_time
    except (ValueError, TypeError, OverflowError):
        return None


async def _post(url: str, body: bytes) -> bytes:
    try:
        async with (
            asyncio.timeout(ask_wait_s),
            aiohttp.ClientSession() as session,
            session.post(url, data=body, headers={"Content-Type": _kinds[0], "Accept": _kinds[1]}, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise Unavailable(f"the timestamp authority answers {response.status}")
            data = bytearray()
            async for chunk in response.content.iter_any():
                data += chunk
                if len(data) > answer_bytes_max:
                    raise Malformed("the timestamp authority's answer has no end")
            return bytes(data)
    except TimeoutError:
        raise Unavailable(f"the timestamp authority does not answer within {ask_wait_s:.0f} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise Unavailable(f"the timestamp authority cannot be asked ({error or type(error).__name__})") from None
