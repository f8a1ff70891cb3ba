"""Connections to one node of a trial under any identity: its vault, another node, a stranger, nobody."""

from __future__ import annotations

import asyncio
import json
import ssl
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard.consortium import LocalConsortium
from medshard.home import Home
from medshard.keys import open_key_file
from medshard.tls import context_for
from medshard_protocol.identity import client_certificate, client_csr, institution_certificate, node_hostname
from medshard_protocol.roster import Node
from storenode.identity import NodeKeys, client_ssl_context

answer_bytes_max = 1 << 20


@dataclass(frozen=True)
class Door:
    """One node's address, and the contexts with which one may knock."""

    trial: LocalConsortium
    name: str

    @property
    def node(self) -> Node:
        assert self.trial.roster is not None
        return next(node for node in self.trial.roster.nodes if node.name == self.name)

    @property
    def ca(self) -> bytes:
        assert self.trial.roster is not None
        return self.trial.roster.institutions[self.node.institution].ca

    @property
    def log(self) -> Path:
        return self.trial.home(self.name) / "log"

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.node.url)
        return parts.hostname or "", parts.port or 0

    def as_vault(self) -> ssl.SSLContext:
        home = Home(self.trial.vault_home)
        return context_for(self.ca, home.certificate_bytes(), open_key_file(home.key_file, self.trial.passphrase).signing)

    def as_node(self, name: str) -> ssl.SSLContext:
        return client_ssl_context(self.ca, NodeKeys.load(self.trial.home(name)))

    def as_nobody(self) -> ssl.SSLContext:
        return context_for(self.ca)

    def as_stranger(self) -> ssl.SSLContext:
        """An identity that a CA outside the roster made up, under an institution's own name."""
        assert self.trial.roster is not None
        name, key, ca = self.trial.roster.institutions[0].name, Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        now = datetime.now(UTC)
        certificate = client_certificate(ca, institution_certificate(ca, name, now), client_csr(key), now)
        return context_for(self.ca, certificate, key)

    def as_expired(self) -> ssl.SSLContext:
        """An identity that the institution did vouch for, ten years ago."""
        keys, key = NodeKeys.load(self.trial.home(self.name)), Ed25519PrivateKey.generate()
        assert keys.ca is not None
        certificate = client_certificate(keys.ca, keys.ca_certificate, client_csr(key), datetime.now(UTC) - timedelta(days=3653))
        return context_for(self.ca, certificate, key)

    async def open(self, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.address, ssl=context, server_hostname=node_hostname(self.node.id))

    async def say(self, context: ssl.SSLContext, data: bytes, wait_s: float = 10.0, *, head: bool = False) -> bytes:
        """Send bytes and read what comes until the node hangs up, or for so long; b"" if it hung up without a word.

        With ``head`` only what comes first is waited for.
        """
        answer = b""
        writer = None
        try:
            async with asyncio.timeout(wait_s):
                reader, writer = await self.open(context)
                writer.write(data)
                with suppress(OSError):  # a node that has refused reads no further: its answer counts
                    await writer.drain()
                while len(answer) < answer_bytes_max and (chunk := await reader.read(65536)):
                    answer += chunk
                    if head:
                        break
        except (OSError, TimeoutError):
            pass
        finally:
            if writer is not None:
                writer.transport.abort()
        return answer

    def complaints(self, since: int = 0) -> list[str]:
        """What the node's log has of errors of its own, from byte ``since`` on: tracebacks, and lines of level error."""
        found = []
        for line in self.log.read_bytes()[since:].decode(errors="replace").splitlines():
            try:
                told = json.loads(line)
            except ValueError:
                found.append(line)  # a traceback that no logger wrote
                continue
            if told.get("level") == "error" or "Traceback" in line:
                found.append(line)
        return found

    def memory_bytes(self) -> int:
        """What the node's process holds in memory now (VmRSS)."""
        for line in Path(f"/proc/{self.trial.pid(self.name)}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")
