"""What a department sets: from a file and from flags, checked before anything is opened.

Law: a setting that would let strangers in is refused here, with what to do instead. Nothing is guessed.
"""

from __future__ import annotations

import re
import ssl
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from medshard.gateway.dimse.peers import Peer
from medshard.gateway.dimse.server import Listening, loopback
from medshard_protocol.errors import Absent, Malformed, Refused

# BCP 195 (RFC 9325): TLS 1.2 with ephemeral keys and authenticated encryption, or TLS 1.3
ciphers: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
config_bytes_max: Final = 1024 * 1024
_units: Final = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_title: Final = re.compile(r"[!-\[\]-~](?:[ -\[\]-~]{0,14}[!-\[\]-~])?")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for DICOM over TLS: our certificate and key, and the CA of those who may call."""

    certificate: Path
    key: Path
    peers: Path


def address(text: str) -> tuple[str, int]:
    """HOST:PORT. Raises Malformed."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise Malformed(f"{text!a} is no address", hint="write HOST:PORT, such as 127.0.0.1:11112")
    return host.strip("[]"), int(port)


def size(text: str) -> int:
    """A number of bytes, such as ``20GiB``. Raises Malformed."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]iB)?", text.strip(), re.IGNORECASE)
    if not match:
        raise Malformed(f"{text!a} is no size", hint="write a number and KiB, MiB, GiB or TiB, such as 20GiB")
    return int(float(match[1]) * _units[(match[2] or "").upper()])


def title(text: str) -> str:
    """An AE title. Raises Malformed."""
    if not _title.fullmatch(text):
        raise Malformed(f"{text!a} is no AE title", hint="1 to 16 letters, digits and signs, no backslash, no space at its ends")
    return text


def peer(text: str) -> Peer:
    """``TITLE=HOST:PORT``, with ``tls:`` before the host for TLS. Raises Malformed."""
    name, equals, where = text.partition("=")
    if not equals:
        raise Malformed(f"{text!a} is no peer", hint="write TITLE=HOST:PORT, or TITLE=tls:HOST:PORT")
    tls = where.startswith("tls:")
    return Peer(title(name), *address(where.removeprefix("tls:")), tls)


def read_file(path: Path) -> dict[str, Any]:
    """The settings of a TOML file, by the names of the flags; ``[[peers]]`` become what ``--peer`` takes. Raises Absent or Malformed."""
    try:
        data = path.read_bytes()
        found = tomllib.loads(data.decode())
    except FileNotFoundError:
        raise Absent(f"there is no configuration {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Malformed(f"{path}: {error}") from None
    settings = {key.replace("-", "_"): value for key, value in found.items()}
    try:
        settings["peers"] = [_peer_text(each) for each in settings.get("peers", [])]
    except (TypeError, KeyError):
        raise Malformed(f"{path}: each of [[peers]] has title, host and port, and may have tls") from None
    return settings


def listening(
    where: str, own: str, *, calling: Iterable[str], any_calling: bool, any_called: bool, peers: Iterable[Peer], private: Iterable[str],
    associations_max: int, tls: TlsFiles | None,
) -> Listening:  # fmt: skip
    """How the DICOM node listens. Raises Refused for a node that strangers could reach, Absent or Malformed for bad files."""
    host, port = address(where)
    peers = tuple(peers)
    allowed = frozenset(map(title, calling)) | {each.title for each in peers}
    if not loopback([host]):
        if any_calling or not allowed:
            raise Refused(
                f"the DICOM node would listen on {host} for anybody",
                hint="name the AE titles that may call with --calling or --peer; or listen on 127.0.0.1",
            )
        if tls is None:
            raise Refused(
                f"the DICOM node would listen on {host} without TLS",
                hint="give --tls-cert, --tls-key and --tls-peers; or listen on 127.0.0.1 behind a tunnel",
            )
    return Listening(
        host, port, title(own), any_called, None if any_calling or not allowed else allowed, peers, frozenset(private), associations_max,
        tls_in=_server_tls(tls) if tls else None, tls_out=_client_tls(tls) if tls else None,
    )  # fmt: skip


def _peer_text(value: Mapping[str, Any]) -> str:
    if unknown := set(value) - {"title", "host", "port", "tls"}:
        raise Malformed(f"[[peers]]: {', '.join(sorted(unknown))} is not known here")
    return f"{value['title']}={'tls:' if value.get('tls') else ''}{value['host']}:{value['port']}"


def _server_tls(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _loaded(context, files)


def _client_tls(files: TlsFiles) -> ssl.SSLContext:
    return _loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), files)


def _loaded(context: ssl.SSLContext, files: TlsFiles) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(ciphers)
    try:
        context.load_cert_chain(files.certificate, files.key)
        context.load_verify_locations(files.peers)
    except FileNotFoundError as error:
        raise Absent(f"a file of the TLS settings is missing: {error.filename or files.certificate}") from None
    except ssl.SSLError as error:
        raise Malformed(
            f"the TLS files do not fit together: {error}", hint="PEM files of one certificate, its key, and the peers' CA"
        ) from None
    return context
