"""Who this node is, and who is at the other end of a connection.

    HOME/keys/ca.key  ca.crt     the institution; ca.key vouches for new vaults and nodes, and may live elsewhere
    HOME/keys/node.key node.crt  this node in TLS, as server and as client
    HOME/keys/cosigner.key       signs the ledger's checkpoints
    HOME/keys/cosigner-pq.key    signs them a second time, with ML-DSA-44
    HOME/keys/log.key            signs the log itself while this node is sequencer

Law: a peer is the key it proved to hold, and belongs to the institution whose CA itself signed its certificate: never to a name it
states, never through another CA. Private keys lie in files that only their owner can read, or are refused.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from medshard_protocol import identity
from medshard_protocol.errors import Absent, Conflict, Malformed, Refused
from medshard_protocol.ids import Key, NodeId, node_id_of
from medshard_protocol.roster import Institution as Member
from medshard_protocol.roster import Roster
from storenode import durable

keys_name: Final = "keys"
key_file_bytes_max: Final = 16 * 1024
peers_max: Final = 8192  # certificates remembered; each took a handshake with a trusted CA's signature to get here


@dataclass(frozen=True)
class NodeKeys:
    """A node's keys and certificates (DER). ``ca`` is None where the institution keeps its CA key elsewhere."""

    folder: Path
    node: Ed25519PrivateKey = field(repr=False)
    certificate: bytes
    cosigner: Ed25519PrivateKey = field(repr=False)
    cosigner_pq: MLDSA44PrivateKey = field(repr=False)
    log: Ed25519PrivateKey | None = field(repr=False)
    ca: Ed25519PrivateKey | None = field(repr=False)
    ca_certificate: bytes
    node_id: NodeId

    @classmethod
    def load(cls, home: Path) -> NodeKeys:
        """Read HOME/keys. Raises Absent, Malformed, or Refused for a private key that others can read."""
        if not (home / keys_name).is_dir():
            raise Absent(f"{home / keys_name} does not exist", hint=f"make a node there: storenode --home {home} init --help")
        return cls.load_from(home / keys_name)

    @classmethod
    def load_from(cls, folder: Path) -> NodeKeys:
        """Read a folder of keys. Raises as ``load`` does."""
        ca_certificate = load_certificate(folder / "ca.crt")
        certificate = load_certificate(folder / "node.crt")
        ca, log = folder / "ca.key", folder / "log.key"
        keys = cls(
            folder=folder,
            node=load_key(folder / "node.key"),
            certificate=certificate,
            cosigner=load_key(folder / "cosigner.key"),
            cosigner_pq=load_pq_key(folder / "cosigner-pq.key"),
            log=load_key(log) if log.exists() else None,
            ca=load_key(ca) if ca.exists() else None,
            ca_certificate=ca_certificate,
            node_id=_certified_node(folder / "node.crt", certificate),
        )
        keys._check()
        return keys

    @property
    def tls_key(self) -> Key:
        """The key that this node shows in TLS."""
        return identity.public_key(self.node)

    def _check(self) -> None:
        if identity.certificate_key(self.certificate) != self.tls_key:
            raise Malformed(f"{self.folder}: node.crt is not for node.key", hint="restore both from the same backup")
        if not identity.is_issued_by(self.certificate, self.ca_certificate):
            raise Malformed(f"{self.folder}: node.crt was not issued by ca.crt", hint="restore both from the same backup")
        if self.ca is not None and identity.certificate_key(self.ca_certificate) != identity.public_key(self.ca):
            raise Malformed(f"{self.folder}: ca.crt is not for ca.key", hint="restore both from the same backup")


@dataclass(frozen=True)
class Institution:
    """A CA: what an institution signs with, and its certificate (DER)."""

    key: Ed25519PrivateKey = field(repr=False)
    certificate: bytes

    @classmethod
    def load(cls, folder: Path) -> Institution:
        """Read ca.key and ca.crt from a folder. Raises Absent, Malformed or Refused."""
        certificate = load_certificate(folder / "ca.crt")
        key = load_key(folder / "ca.key")
        if identity.certificate_key(certificate) != identity.public_key(key):
            raise Malformed(f"{folder}: ca.crt is not for ca.key", hint="restore both from the same backup")
        return cls(key, certificate)


def create_institution(name: str, *, now: datetime | None = None) -> Institution:
    """Draw a CA key and certify it for 30 years."""
    key = Ed25519PrivateKey.generate()
    return Institution(key, identity.institution_certificate(key, name, now or datetime.now(UTC)))


def create_node(
    home: Path, institution: Institution, *, keep_ca_key: bool = True, now: datetime | None = None, sync: bool = True
) -> NodeKeys:
    """Draw a node's keys, certify them, and write HOME/keys. Raises Conflict where keys exist: they are never overwritten."""
    folder = home / keys_name
    if folder.exists():
        raise Conflict(f"{folder} exists already", hint="this node has its keys; choose another --home for another node")
    folder.mkdir(mode=0o700, parents=True)
    node, cosigner, log = (Ed25519PrivateKey.generate() for _ in range(3))
    tls_key = identity.public_key(node)
    certificate = identity.node_certificate(institution.key, institution.certificate, tls_key, now or datetime.now(UTC))
    secrets = {"node.key": node, "cosigner.key": cosigner, "log.key": log} | ({"ca.key": institution.key} if keep_ca_key else {})
    cosigner_pq = MLDSA44PrivateKey.generate()
    durable.create(folder / "cosigner-pq.key", key_pem(cosigner_pq), durable=sync)
    for name, key in secrets.items():
        durable.create(folder / name, key_pem(key), durable=sync)
    for name, der in (("ca.crt", institution.certificate), ("node.crt", certificate)):
        durable.create(folder / name, identity.to_pem(der).encode(), mode=0o644, durable=sync)
    ca = institution.key if keep_ca_key else None
    return NodeKeys(folder, node, certificate, cosigner, cosigner_pq, log, ca, institution.certificate, node_id_of(tls_key))


def renew_node(keys: NodeKeys, institution: Institution, *, now: datetime | None = None) -> bytes:
    """Issue a new node.crt for the same key and put it in place; the roster stays as it is. Raises Refused for another CA."""
    if institution.certificate != keys.ca_certificate:
        raise Refused("this CA is not the one that the node belongs to")
    at = now or datetime.now(UTC)
    certificate = identity.node_certificate(institution.key, institution.certificate, keys.tls_key, at, node_id=keys.node_id)
    durable.replace(keys.folder / "node.crt", identity.to_pem(certificate).encode(), mode=0o644)
    return certificate


def issue_client_cert(institution: Institution, csr: bytes, *, now: datetime | None = None) -> bytes:
    """Certify a vault's key (DER). Raises Malformed, or Refused where possession of the key is not proved."""
    return identity.client_certificate(institution.key, institution.certificate, csr, now or datetime.now(UTC))


# -- TLS


def server_ssl_context(roster: Roster, keys: NodeKeys) -> ssl.SSLContext:
    """Serve as this node. A client may come without a certificate; one it shows must be from a CA of the roster."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0  # connections live long; a ticket would be one more secret, and two more messages a handshake
    trust(context, roster)
    return _finished(context, keys)


def trust(context: ssl.SSLContext, roster: Roster) -> None:
    """Let a server's context accept what this roster's CAs issue, from the next connection on. It forgets none: ``peer_of`` does."""
    context.load_verify_locations(cadata="".join(identity.to_pem(ca) for each in roster.institutions for ca in (each.ca, *each.former)))


def client_contexts(roster: Roster, keys: NodeKeys) -> dict[int, ssl.SSLContext]:
    """For each institution of a roster, what to speak to its nodes with."""
    return {number: client_ssl_context(each.ca, keys, each.former) for number, each in enumerate(roster.institutions)}


def client_ssl_context(ca: bytes, keys: NodeKeys, former: Iterable[bytes] = ()) -> ssl.SSLContext:
    """Speak as this node to the nodes of the one institution whose CA certificate (DER) is ``ca``, or was one of ``former``.

    Connect with ``server_hostname=node_hostname(node id)``: that name is checked, whatever the address.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.hostname_checks_common_name = False
    context.load_verify_locations(cadata="".join(map(identity.to_pem, (ca, *former))))
    return _finished(context, keys)


def outside_ssl_context(institution: Member, files: tuple[Path, Path] | None) -> ssl.SSLContext:
    """Speak to the nodes of one institution with a certificate and key from these files (PEM), or as nobody. Raises Malformed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.hostname_checks_common_name = False
    context.load_verify_locations(cadata="".join(map(identity.to_pem, (institution.ca, *institution.former))))
    if files is not None:
        try:
            context.load_cert_chain(*files)
        except (OSError, ssl.SSLError) as error:
            raise Malformed(f"{files[0]} and {files[1]} cannot be used: {error}") from None
    return context


def _finished(context: ssl.SSLContext, keys: NodeKeys) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_cert_chain(keys.folder / "node.crt", keys.folder / "node.key")
    return context


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end: the key it proved, the institution (index in the roster) that vouches for it, and which node if one."""

    key: Key
    institution: int
    node: NodeId | None


_peers: dict[bytes, tuple[Roster, Roster | None, Peer | None]] = {}


def peer_of(ssl_object: ssl.SSLObject | ssl.SSLSocket | None, roster: Roster, before: Roster | None = None) -> Peer | None:
    """Say who is at the other end of a connection that ``server_ssl_context`` accepted; None for nobody in particular.

    TLS has checked the chain, the dates and the possession of the key; here the certificate is bound to one institution. ``before`` is the
    roster of a moment ago, whose TLS keys still stand for the nodes that stay: not everybody has heard of a change at once. Costs a
    microsecond for a certificate seen before.
    """
    certificate = ssl_object.getpeercert(binary_form=True) if ssl_object is not None else None
    if not certificate:
        return None
    known = _peers.get(certificate)
    if known is not None and known[0] is roster and known[1] is before:
        return known[2]
    if len(_peers) >= peers_max:
        _peers.clear()
    peer = _peer(certificate, roster, before)
    _peers[certificate] = (roster, before, peer)
    return peer


def _peer(certificate: bytes, roster: Roster, before: Roster | None) -> Peer | None:
    try:
        key = identity.certificate_key(certificate)
    except Malformed:
        return None
    for number, institution in enumerate(roster.institutions):
        if any(identity.is_issued_by(certificate, ca) for ca in (institution.ca, *institution.former)):
            return Peer(key, number, _node_with(key, number, roster, before))
    return None  # issued through a link between, or by a CA that is no longer in the roster


def _node_with(key: Key, institution: int, roster: Roster, before: Roster | None) -> NodeId | None:
    """A node is its key in the roster, and only under its own institution: another CA may certify a key, not claim a node."""
    own = {node.id for node in roster.nodes if node.institution == institution}
    listed = (*roster.nodes, *(before.nodes if before is not None else ()))
    return next((node.id for node in listed if node.tls_key == key and node.id in own), None)


# -- files


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 private key (PEM). Raises Absent, Malformed, or Refused if others can read the file."""
    key = _load_private(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise Malformed(f"{path}: expected an Ed25519 key")
    return key


def load_pq_key(path: Path) -> MLDSA44PrivateKey:
    """Read an ML-DSA-44 private key (PEM). Raises as ``load_key`` does."""
    key = _load_private(path)
    if not isinstance(key, MLDSA44PrivateKey):
        raise Malformed(f"{path}: expected an ML-DSA-44 key")
    return key


def _load_private(path: Path) -> PrivateKeyTypes:
    try:
        with path.open("rb") as file:
            mode = path.stat().st_mode
            data = file.read(key_file_bytes_max)
    except FileNotFoundError:
        raise Absent(f"{path} is missing", hint="restore it from the backup of the keys") from None
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})", hint="run as the user that owns the file") from None
    if mode & 0o077:
        raise Refused(f"{path} can be read by others", hint=f"chmod 600 {path}, and think about who may have read it")
    try:
        return load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise Malformed(f"{path}: not an unencrypted private key in PEM", hint="restore it from the backup of the keys") from None


def load_certificate(path: Path) -> bytes:
    """Read a certificate (PEM) as DER. Raises Absent or Malformed."""
    try:
        with path.open("rb") as file:
            certificate = x509.load_pem_x509_certificate(file.read(key_file_bytes_max))
    except FileNotFoundError:
        raise Absent(f"{path} is missing", hint="restore it from the backup of the keys") from None
    except (OSError, ValueError):
        raise Malformed(f"{path}: not a certificate in PEM", hint="restore it from the backup of the keys") from None
    return certificate.public_bytes(Encoding.DER)


def _certified_node(path: Path, certificate: bytes) -> NodeId:
    node_id = identity.certified_node(certificate)
    if node_id is None:
        raise Malformed(f"{path}: names no node", hint="restore it from the backup of the keys")
    return node_id


def key_pem(key: Ed25519PrivateKey | MLDSA44PrivateKey) -> bytes:
    """Write a private key as its file has it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
