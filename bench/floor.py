"""The least that a put and a get of 100 MiB can cost here: `python -m bench.floor`.

Each primitive is run by itself, on its own, from memory, and the quickest of three counts: SHA-256, AES-256-GCM, coding, BLAKE3 at both
ends, and moving the bytes over TLS 1.3 on loopback between two processes. No disk, no ledger, no HTTP: a system that does all this work
and nothing else would take this much CPU, and on `machine.CORES` cores no less than the ideal time.
"""

from __future__ import annotations

import datetime
import hashlib
import multiprocessing
import os
import selectors
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from blake3 import blake3
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from bench.machine import CORES, MIB
from bench.report import OURS, Medians
from bench.side import NEEDED, NODES
from medshard_protocol.erasure import code

PLAIN_BYTES = 100 * MIB
_cell = 128 * 1024  # the product's default; one stripe is `NEEDED` of them
_repeats = 3


@dataclass(frozen=True)
class Part:
    """CPU seconds of one primitive, both ends together, in a put and in a get of `PLAIN_BYTES`."""

    name: str
    put_cpu_s: float
    get_cpu_s: float


@dataclass(frozen=True)
class Floor:
    parts: tuple[Part, ...]
    longest_serial_s: float

    @property
    def put_cpu_s(self) -> float:
        return sum(part.put_cpu_s for part in self.parts)

    @property
    def get_cpu_s(self) -> float:
        return sum(part.get_cpu_s for part in self.parts)

    def ideal_wall_s(self, cpu_s: float) -> float:
        """All cores busy with nothing else; but one file's SHA-256 is a chain that no second core shortens."""
        return max(cpu_s / CORES, self.longest_serial_s)


def measure() -> Floor:
    plain = memoryview(os.urandom(PLAIN_BYTES))
    scale = NODES / NEEDED
    sha256 = _least(lambda: hashlib.sha256(plain).digest())
    sealing, opening = _aes_gcm(plain)
    blake = _least(lambda: [blake3(plain[at : at + _cell]).digest() for at in range(0, len(plain), _cell)])
    sending = min(_tls_cpu_s(NODES, int(PLAIN_BYTES * scale)) for _ in range(_repeats))
    receiving = min(_tls_cpu_s(NEEDED, PLAIN_BYTES) for _ in range(_repeats))
    parts = (
        Part("SHA-256 of the plaintext", sha256, sha256),
        Part("AES-256-GCM", sealing, opening),
        Part(f"Reed-Solomon {NEEDED}/{NODES} (none in a get while all data shards are there)", _coding(plain), 0.0),
        Part("BLAKE3 of all cells at both ends (in a get of the data cells, by the reader)", 2 * blake * scale, blake),
        Part("TLS 1.3 over loopback, both ends", sending, receiving),
    )
    return Floor(parts, longest_serial_s=sha256)


def _least(work: Callable[[], object]) -> float:
    """CPU seconds of the quickest of a few goes."""
    return min(_cpu_s(work) for _ in range(_repeats))


def _cpu_s(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _aes_gcm(plain: memoryview) -> tuple[float, float]:
    cipher, segment = AESGCM(os.urandom(32)), NEEDED * _cell - 16
    pieces = [plain[at : at + segment] for at in range(0, len(plain), segment)]
    nonces = [number.to_bytes(12, "big") for number in range(len(pieces))]
    sealed = [cipher.encrypt(nonce, piece, None) for nonce, piece in zip(nonces, pieces, strict=True)]
    room = memoryview(bytearray(NEEDED * _cell))

    def seal() -> None:
        for nonce, piece in zip(nonces, pieces, strict=True):
            cipher.encrypt_into(nonce, piece, None, room[: len(piece) + 16])

    def unseal() -> None:
        for nonce, piece in zip(nonces, sealed, strict=True):
            cipher.decrypt_into(nonce, piece, None, room[: len(piece) - 16])

    return _least(seal), _least(unseal)


def _coding(plain: memoryview) -> float:
    coder = code(NEEDED, NODES)
    parity = [bytearray(_cell) for _ in range(NODES - NEEDED)]
    stripe = NEEDED * _cell

    def encode() -> None:
        for at in range(0, len(plain) - stripe + 1, stripe):
            coder.encode([plain[at + index * _cell : at + (index + 1) * _cell] for index in range(NEEDED)], parity)

    return _least(encode) * len(plain) / (len(plain) // stripe * stripe)


def _tls_cpu_s(connections: int, total: int) -> float:
    """CPU seconds, of a sending and of a receiving process, for moving `total` bytes spread over some connections."""
    with tempfile.TemporaryDirectory() as folder:
        certificate = _certificate(Path(folder) / "server.pem")
        ours, theirs = multiprocessing.Pipe()
        # Forked, not spawned: this process has no threads, and the child needs nothing imported anew.
        sink = multiprocessing.get_context("fork").Process(target=_receive, args=(theirs, certificate, connections, total), daemon=True)
        sink.start()
        try:
            return _send(ours, connections, total)
        finally:
            sink.join(10)
            sink.kill()


def _send(control: Connection, connections: int, total: int) -> float:
    port = int(control.recv())
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    sockets = [context.wrap_socket(socket.create_connection(("127.0.0.1", port))) for _ in range(connections)]
    cell = os.urandom(_cell)
    control.recv()  # the receiver has shaken all hands
    began = time.process_time()
    for number in range(total // _cell):
        sockets[number % connections].sendall(cell)
    spent = time.process_time() - began
    received = float(control.recv())
    for each in sockets:
        each.close()
    return spent + received


def _receive(control: Connection, certificate: Path, connections: int, total: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate)
    with socket.create_server(("127.0.0.1", 0), backlog=connections) as listener, selectors.DefaultSelector() as selector:
        control.send(listener.getsockname()[1])
        for _ in range(connections):
            accepted = context.wrap_socket(listener.accept()[0], server_side=True)
            accepted.setblocking(False)
            selector.register(accepted, selectors.EVENT_READ)
        control.send("ready")
        began = time.process_time()
        _drain(selector, total // _cell * _cell)
        control.send(time.process_time() - began)


def _drain(selector: selectors.BaseSelector, left: int) -> None:
    buffer = bytearray(_cell)
    while left:
        for key, _ in selector.select():
            assert isinstance(key.fileobj, ssl.SSLSocket)
            try:
                while count := key.fileobj.recv_into(buffer):
                    left -= count
            except ssl.SSLWantReadError:
                continue


def _certificate(file: Path) -> Path:
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
    certificate = builder.sign(key, None)
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM))
    return file


def table(floor: Floor, figures: Medians | None = None) -> str:
    """The parts, their sum, the ideal time, and what medshard took as a ratio to both, as markdown."""
    lines = ["| floor for 100 MiB, CPU seconds | put | get |", "|---|---|---|"]
    lines += [f"| {part.name} | {part.put_cpu_s:.3f} | {part.get_cpu_s:.3f} |" for part in floor.parts]
    totals = {"put": floor.put_cpu_s, "get": floor.get_cpu_s}
    lines.append(_row("**together**", totals))
    ideal = {verb: floor.ideal_wall_s(cpu) for verb, cpu in totals.items()}
    lines.append(_row(f"ideal time on {CORES} cores", ideal))
    ours = (figures or {}).get(OURS, {})
    costs = {verb: ours[f"{verb} 100 MiB"].cost for verb in totals if f"{verb} 100 MiB" in ours}
    if len(costs) == len(totals):
        cpu = {verb: cost.client_cpu_s + cost.servers_cpu_s for verb, cost in costs.items()}
        lines.append(_row("medshard, CPU of the client and all nodes", cpu))
        lines.append(_row("**CPU, times the floor**", {verb: cpu[verb] / totals[verb] for verb in totals}))
        lines.append(_row("medshard, time", {verb: cost.wall_s for verb, cost in costs.items()}))
        lines.append(_row("**time, times the ideal**", {verb: costs[verb].wall_s / ideal[verb] for verb in totals}))
    return "\n".join(lines) + "\n"


def _row(name: str, values: dict[str, float]) -> str:
    return f"| {name} | {values['put']:.3f} | {values['get']:.3f} |"


if __name__ == "__main__":
    print(table(measure()))
    sys.exit(0)
