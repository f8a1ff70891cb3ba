"""TLS to the nodes of one institution, as the vault.

Law: a context trusts one institution's CA and nothing else, so no other institution, and no CA of the operating system, can stand in
for its nodes. Callers connect with ``server_hostname=node_hostname(node id)``: that name, not the address, is what is checked.
The vault's private key is never left on disk in the clear.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from medshard_protocol.identity import to_pem
from medshard_protocol.roster import Roster


def context_for(
    ca: bytes, certificate: bytes | None = None, key: Ed25519PrivateKey | None = None, *, former: Iterable[bytes] = ()
) -> ssl.SSLContext:
    """Trust the institution whose CA certificate (DER) is ``ca``, or was one of ``former``, and show ``certificate`` (DER) to its nodes.

    Without certificate and key the connection is anonymous, which is what ``join`` needs. Raises Malformed for bytes that are no
    certificate, ssl.SSLError where key and certificate do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.hostname_checks_common_name = False
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata="".join(map(to_pem, (ca, *former))))
    if certificate is not None and key is not None:
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with _as_file(secret + to_pem(certificate).encode()) as path:
            context.load_cert_chain(path)
    return context


@dataclass
class Shown:
    """What nodes know an open vault by; another after its keys were rotated."""

    certificate: bytes
    signing: Ed25519PrivateKey

    def contexts(self, roster: Roster) -> dict[int, ssl.SSLContext]:
        """For the nodes of each institution, by its place in the roster."""
        each = enumerate(roster.institutions)
        return {number: context_for(of.ca, self.certificate, self.signing, former=of.former) for number, of in each}


def unverified_context() -> ssl.SSLContext:
    """Trust nobody and check nothing: only to fetch a genesis file whose SHA-256 is known beforehand."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@contextmanager
def _as_file(secret: bytes) -> Iterator[str]:
    """OpenSSL reads keys from files only: give it one in memory, or where there is no memfd, one that is gone at once."""
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        fd = os.memfd_create("medshard", os.MFD_CLOEXEC)
        path = f"/proc/self/fd/{fd}"
    else:
        fd, path = tempfile.mkstemp(prefix=".medshard-")  # mode 0600
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(secret)
        yield path
    finally:
        os.close(fd)
        if not path.startswith("/proc/"):
            os.unlink(path)
