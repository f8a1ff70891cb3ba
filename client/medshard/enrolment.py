"""Joining: from an invitation to a certificate and a pinned roster.

The code names the genesis file by its hash, so the first, unverified connection can bring nothing but that file and changes that quorums
have signed since; the second one is checked against the institution's CA in the newest roster before the secret is sent.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from hashlib import sha256
from typing import Final, TypeAlias

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard.durable import write_durably
from medshard.home import Home
from medshard.keys import VaultKeys
from medshard.tls import context_for, unverified_context
from medshard_protocol.entries import rotation_signed
from medshard_protocol.errors import Damaged, MedshardError, Refused, Unavailable
from medshard_protocol.identity import certificate_key, client_csr, is_issued_by, node_hostname, public_key
from medshard_protocol.ids import Key
from medshard_protocol.invite import Invite, Rotation, pack_join, pack_readmission, pack_sender, unpack_joined
from medshard_protocol.messages import unpack_error
from medshard_protocol.roster import Node, Roster
from medshard_protocol.rosters import Link, follow, unpack_links

timeout_s: Final = 30.0
answer_bytes_max: Final = 6 * 1024 * 1024

Links: TypeAlias = list[Link]


async def join(home: Home, keys: VaultKeys, code: str) -> None:
    """Enrol the vault's key and write genesis file and certificate. Raises Malformed, Refused, Damaged or Unavailable."""
    asked = client_csr(keys.signing)
    write_durably(home.certificate, await _enrolled(home, keys.public, code, "/v1/join", lambda secret, _: pack_join(secret, asked)))


async def rotate(home: Home, old: VaultKeys, new: VaultKeys, code: str) -> bytes:
    """Enrol ``new`` in the place of ``old``, and write the genesis file; the certificate of the new key. Raises as ``join``."""

    def asked(secret: bytes, roster: Roster) -> bytes:
        signed = rotation_signed(roster.origin, old.public, new.public)
        return Rotation(secret, client_csr(new.signing), old.public, old.signing.sign(signed), new.signing.sign(signed)).to_bytes()

    return await _enrolled(home, new.public, code, "/v1/rotate", asked)


async def send_for(home: Home, signing: Ed25519PrivateKey, vault: Key, code: str) -> bytes:
    """Enrol a key that will only send for ``vault``, and write the genesis file; its certificate. Raises as ``join``."""
    asked = client_csr(signing)
    return await _enrolled(home, public_key(signing), code, "/v1/senders", lambda secret, _: pack_sender(secret, asked, vault))


async def _enrolled(home: Home, key: Key, code: str, path: str, asked: Callable[[bytes, Roster], bytes]) -> bytes:
    """Show an invitation and get the institution's certificate for ``key``. Writes the genesis file and the rosters since."""
    invite = Invite.from_code(code)
    genesis = await genesis_of(invite.url)
    if sha256(genesis).digest() != invite.genesis_sha256:
        raise Damaged(
            f"{invite.url} serves another genesis file than the invitation names",
            hint="do not join: somebody may be between you and the institution; ask it for a new invitation",
        )
    _same_consortium(home, genesis)
    roster, links = await newest(Roster.from_bytes(genesis), invite.url)
    node = _node(roster, invite)
    institution = roster.institutions[invite.institution]
    context = context_for(institution.ca, former=institution.former)
    certificate = unpack_joined(await _request("POST", invite.url + path, asked(invite.secret, roster), context, node))
    if certificate_key(certificate) != key:
        raise Damaged("the institution certified another key than this vault's")
    if not is_issued_by(certificate, institution.ca):
        raise Damaged("the certificate is not signed by the institution that the invitation names")
    write_durably(home.genesis, genesis)
    home.keep_links(0, links)
    return certificate


async def genesis_of(url: str) -> bytes:
    """The genesis file that a node serves, unchecked. Raises Unavailable."""
    return await _request("GET", url + "/v1/genesis", None, unverified_context(), None)


async def certificate_again(roster: Roster, node: Node, keys: VaultKeys) -> bytes:
    """A certificate for a key that this node's institution has enrolled. Raises Refused where it does not vouch for it, or Unavailable."""
    institution = roster.institutions[node.institution]
    context = context_for(institution.ca, former=institution.former)
    answer = await _request("POST", node.url + "/v1/certificate", pack_readmission(client_csr(keys.signing)), context, node)
    certificate = unpack_joined(answer)
    if certificate_key(certificate) != keys.public or not is_issued_by(certificate, institution.ca):
        raise Unavailable(f"{node.name} gives a certificate for another key, or of another institution")
    return certificate


async def newest(roster: Roster, url: str) -> tuple[Roster, Links]:
    """Follow the rosters from the genesis file on, as the inviting node tells of them. Raises Damaged for a change that does not hold."""
    links: list[Link] = []
    while more := unpack_links(await _request("GET", f"{url}/v1/rosters?after={roster.number}", None, unverified_context(), None)):
        try:
            roster = follow(roster, more)
        except MedshardError as error:
            hint = "do not join: somebody may be between you and the institution; ask it for a new invitation"
            raise Damaged(f"{url} tells of a change of the roster that does not hold ({error})", hint=hint) from None
        links += more
    return roster, links


def _same_consortium(home: Home, genesis: bytes) -> None:
    if home.genesis.exists() and home.genesis.read_bytes() != genesis:
        raise Refused(
            f"the vault at {home.folder} belongs to another consortium", hint="choose another --home for this one; one vault has one roster"
        )


def _node(roster: Roster, invite: Invite) -> Node:
    for node in roster.nodes:
        if node.url == invite.url and node.institution == invite.institution:
            return node
    raise Damaged("the invitation names a node that is not in the newest roster", hint="ask the institution for a new one")


async def _request(method: str, url: str, body: bytes | None, context: ssl.SSLContext, node: Node | None) -> bytes:
    try:
        async with (
            asyncio.timeout(timeout_s),
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(
                method, url, data=body, ssl=context, server_hostname=node_hostname(node.id) if node else None, allow_redirects=False
            ) as response,
        ):
            data = b""
            async for chunk in response.content.iter_any():
                data += chunk
                if len(data) > answer_bytes_max:
                    raise Unavailable(f"{url}: a longer answer than there can be")
            if response.status != 200:
                raise unpack_error(response.status, data, url)
            return data
    except MedshardError:
        raise
    except TimeoutError:
        raise Unavailable(f"{url}: no answer within {timeout_s:g} s", hint="is the node up, and this machine online?") from None
    except (aiohttp.ClientError, OSError, ssl.SSLError) as error:
        raise Unavailable(f"{url}: {error}", hint="is the node up, and this machine online?") from None
