"""Asking the node of this home, or another of the roster, as this node itself: over TLS, with its own certificate."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from medshard_protocol.errors import Absent, Conflict, Malformed, MedshardError, Unavailable
from medshard_protocol.identity import node_hostname
from medshard_protocol.ids import NodeId
from medshard_protocol.messages import unpack_error
from medshard_protocol.roster import Node, Roster
from storenode.config import Config
from storenode.identity import NodeKeys, client_ssl_context, outside_ssl_context
from storenode.running import running

answer_bytes_max: Final = 6 << 20
wait_s: Final = 5.0
append_wait_s: Final = 15.0  # the sequencer gives up after 10
_anywhere: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what a server listens on, not what we connect to


class _Connection(http.client.HTTPSConnection):
    """Connects to an address and checks the node's name."""

    def __init__(self, host: str, port: int, node: NodeId, tls: ssl.SSLContext, timeout_s: float = wait_s) -> None:
        self._tls, self._name = tls, node_hostname(node)
        super().__init__(host, port, timeout=timeout_s, context=tls)

    def connect(self) -> None:
        self.sock = self._tls.wrap_socket(socket.create_connection((self.host, self.port), self.timeout), server_hostname=self._name)


def ask(config: Config, keys: NodeKeys, path: str, method: str = "GET", body: bytes = b"", *, timeout_s: float = wait_s) -> dict[str, Any]:
    """Ask the running node for one JSON answer. Raises Unavailable with what to do, or what the node answered."""
    host, port = config.listen_address
    connection = _Connection(_anywhere.get(host, host), port, keys.node_id, client_ssl_context(keys.ca_certificate, keys), timeout_s)
    try:
        connection.request(method, path, body=body or None)
        response = connection.getresponse()
        data = response.read(answer_bytes_max)
    except ssl.SSLCertVerificationError as error:
        hint = "another node runs there; see `listen` in config.toml"
        raise Unavailable(f"{config.listen} is not this node ({error.verify_message})", hint=hint) from None
    except (OSError, http.client.HTTPException) as error:
        raise _why_not(config, error) from None
    finally:
        connection.close()
    if response.status == 204:
        return {}
    if response.status != 200:
        raise unpack_error(response.status, data, "node")
    try:
        answer = json.loads(data)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Malformed(f"the node's answer to {path} is no JSON object")
    return answer


def connect(node: Node, roster: Roster, files: tuple[Path, Path] | None, *, timeout_s: float = wait_s) -> http.client.HTTPConnection:
    """A connection to one node of a roster, for many requests: with this certificate and key (PEM), or as nobody. Raises Malformed."""
    address = urlsplit(node.url)
    tls = outside_ssl_context(roster.institutions[node.institution], files)
    return _Connection(address.hostname or "", address.port or 443, node.id, tls, timeout_s)


def exchange(
    node: Node, roster: Roster, keys: NodeKeys, method: str, path: str, body: bytes = b"", *, timeout_s: float = wait_s
) -> tuple[int, bytes]:
    """One request to one node of a roster: status and body of the answer. Raises Unavailable."""
    address, owner = urlsplit(node.url), roster.institutions[node.institution]
    tls = client_ssl_context(owner.ca, keys, owner.former)
    connection = _Connection(address.hostname or "", address.port or 443, node.id, tls, timeout_s)
    try:
        connection.request(method, path, body=body or None)
        response = connection.getresponse()
        return response.status, response.read(answer_bytes_max)
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"{node.name} does not answer ({error or type(error).__name__})") from None
    finally:
        connection.close()


def ask_any(
    roster: Roster, keys: NodeKeys, method: str, path: str, body: bytes = b"", *, timeout_s: float = wait_s, spreading: bool = False
) -> tuple[Node, bytes]:
    """Ask this home's own node, then one after another of the roster until one answers well; who did, and what.

    What is ``spreading`` reaches some nodes a moment later: then another is asked where one does not have it.
    Raises what the first that answered at all had to say, or Unavailable where none did.
    """
    elsewhere = (Unavailable, Conflict, Absent) if spreading else (Unavailable, Conflict)
    refusal: MedshardError | None = None
    silent: list[str] = []
    for node in sorted(roster.nodes, key=lambda each: (each.id != keys.node_id, each.id != roster.sequencer)):
        try:
            status, answer = exchange(node, roster, keys, method, path, body, timeout_s=timeout_s)
        except Unavailable as error:
            silent.append(str(error))
            continue
        if status in (200, 201, 204):
            return node, answer
        refusal = refusal or unpack_error(status, answer, node.name)
        if not isinstance(refusal, elsewhere):
            break  # another node would say the same
    raise refusal or Unavailable(f"no node of the roster answers: {'; '.join(silent[:4])}", hint="is this machine online?")


def _why_not(config: Config, error: Exception) -> Unavailable:
    pid = running(config.home)
    if pid is None:
        return Unavailable("the node is not running", hint=f"start it: storenode --home {config.home} run")
    if isinstance(error, TimeoutError):
        return Unavailable(f"the node runs (process {pid}) and does not answer within {wait_s:g} s", hint="is its disk stuck? See its log")
    hint = "it may be starting or stopping; see its log"
    return Unavailable(f"the node runs (process {pid}) and does not answer on {config.listen} ({error})", hint=hint)
