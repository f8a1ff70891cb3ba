"""Certificates: how an institution vouches for a key, as bytes in and bytes out.

Law: an identity is an Ed25519 key, and a certificate only carries it through TLS. Nothing in a certificate speaks of a person, and
nothing that a requester writes is copied into what is issued, save the public key whose possession was proved. Who may connect
is decided by the roster and the ledger, so lifetimes here are long: expiry must never be what makes an archive unreadable.

It knows no clock (``now`` comes in), no disk and no TLS library; serial numbers are derived, so equal inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.ids import Key, NodeId, node_id_from_hex, node_id_of

node_domain: Final = "node.medshard"
institution_lifetime: Final = timedelta(days=30 * 365)  # what an archive of scans has to live
node_lifetime: Final = timedelta(days=10 * 365)  # outlives the machine; renewed with the same key, so the roster stays as it is
client_lifetime: Final = timedelta(days=10 * 365)  # the ledger withdraws a vault, not the calendar
backdated: Final = timedelta(days=1)  # a clock that is hours behind must not refuse a fresh certificate

certificate_bytes_max: Final = 2048  # ours have about 500
csr_bytes_max: Final = 1024  # ours have about 150
_extension_errors: Final = (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)  # none is a ValueError


def node_hostname(node_id: NodeId) -> str:
    """Give the DNS name that a node's certificate carries, whatever its address: ``<node id hex>.node.medshard``."""
    return f"{node_id.hex()}.{node_domain}"


def public_key(key: Ed25519PrivateKey) -> Key:
    """Give the identity of a private key."""
    return Key(key.public_key().public_bytes_raw())


def institution_certificate(ca_key: Ed25519PrivateKey, institution: str, now: datetime) -> bytes:
    """Make the self-signed CA certificate (DER) of an institution. It may issue leaves under ``node.medshard`` and nothing else."""
    key = public_key(ca_key)
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, institution[:64]),
            x509.NameAttribute(NameOID.COMMON_NAME, f"medshard CA {key.hex()[:16]}"),
        ]
    )
    usage = _usage(sign_certificates=True)
    # Should somebody import this CA into a browser, it still cannot vouch for any name but ours.
    names = x509.NameConstraints(permitted_subtrees=[x509.DNSName(node_domain)], excluded_subtrees=None)
    builder = _builder(name, name, key, key, now, institution_lifetime)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True).add_extension(names, critical=True)
    return builder.sign(ca_key, None).public_bytes(Encoding.DER)


def node_certificate(ca_key: Ed25519PrivateKey, ca: bytes, tls_key: Key, now: datetime, *, node_id: NodeId | None = None) -> bytes:
    """Issue a node's certificate (DER), good as TLS server and client. ``node_id`` is that of its first key if this is a later one."""
    host = node_hostname(node_id_of(tls_key) if node_id is None else node_id)
    return _leaf(ca_key, ca, tls_key, now, node_lifetime, host)


def client_csr(key: Ed25519PrivateKey) -> bytes:
    """Ask for a certificate for ``key``: a PKCS#10 request (DER) with an empty subject, signed as proof of possession."""
    return x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, None).public_bytes(Encoding.DER)


def csr_key(csr: bytes) -> Key:
    """Read whose certificate is asked for. Raises Malformed, and Refused where the request does not prove possession of the key."""
    if len(csr) > csr_bytes_max:
        raise Malformed(f"certificate request: {len(csr)} bytes, more than the {csr_bytes_max} allowed")
    try:
        request = x509.load_der_x509_csr(csr)
        public = request.public_key()
        if not isinstance(public, Ed25519PublicKey):
            raise Malformed("certificate request: expected an Ed25519 key")
        proved = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise Malformed(f"certificate request: not a PKCS#10 request ({error})") from None
    if not proved:
        raise Refused("certificate request: not signed by the key it names")
    return Key(public.public_bytes_raw())


def client_certificate(ca_key: Ed25519PrivateKey, ca: bytes, csr: bytes, now: datetime) -> bytes:
    """Issue a vault's certificate (DER), good as TLS client only. Raises as ``csr_key`` does."""
    return _leaf(ca_key, ca, csr_key(csr), now, client_lifetime, None)


def certificate_key(certificate: bytes) -> Key:
    """Read whose certificate this is. Checks no signature. Raises Malformed."""
    return _subject_key(_load(certificate))


def certificate_expiry(certificate: bytes) -> datetime:
    """Read when a certificate ends. Raises Malformed."""
    return _load(certificate).not_valid_after_utc


def certified_node(certificate: bytes) -> NodeId | None:
    """Read which node a certificate names; None for a vault's. Checks no signature. Raises Malformed."""
    try:
        names = _load(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
    except (ValueError, *_extension_errors):
        return None
    first = names[0] if names else ""
    return node_id_from_hex(first.removesuffix(f".{node_domain}")) if first.endswith(f".{node_domain}") else None


def is_issued_by(certificate: bytes, ca: bytes) -> bool:
    """Say whether the CA's key itself signed this certificate, with no link between. Raises Malformed for bytes that are neither."""
    try:
        _load(certificate).verify_directly_issued_by(_load(ca))
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def check_institution(ca: bytes) -> Key:
    """Check that bytes from outside are a CA certificate as ``institution_certificate`` makes it. Raises Malformed; gives its key."""
    certificate = _load(ca)
    key = _subject_key(certificate)
    try:
        certificate.verify_directly_issued_by(certificate)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except (ValueError, TypeError, InvalidSignature, *_extension_errors):
        raise Malformed("institution certificate: not a self-signed CA certificate") from None
    if not constraints.ca or constraints.path_length != 0:
        raise Malformed("institution certificate: expected a CA that issues no other CA")
    return key


def to_pem(certificate: bytes) -> str:
    """Give a certificate as PEM text. Raises Malformed."""
    return _load(certificate).public_bytes(Encoding.PEM).decode()


def _load(certificate: bytes) -> x509.Certificate:
    if len(certificate) > certificate_bytes_max:
        raise Malformed(f"certificate: {len(certificate)} bytes, more than the {certificate_bytes_max} allowed")
    try:
        loaded = x509.load_der_x509_certificate(certificate)
    except (ValueError, x509.InvalidVersion) as error:
        raise Malformed(f"certificate: not DER X.509 ({error})") from None
    if loaded.serial_number < 1:  # RFC 5280 forbids it, and later releases of `cryptography` will not read it
        raise Malformed("certificate: a serial number that is not positive")
    return loaded


def _subject_key(certificate: x509.Certificate) -> Key:
    try:
        public = certificate.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Malformed(f"certificate: a key that cannot be read ({error})") from None
    if not isinstance(public, Ed25519PublicKey):
        raise Malformed("certificate: expected an Ed25519 key")
    return Key(public.public_bytes_raw())


def _leaf(ca_key: Ed25519PrivateKey, ca: bytes, key: Key, now: datetime, lifetime: timedelta, host: str | None) -> bytes:
    issuer = _load(ca)
    if _subject_key(issuer) != public_key(ca_key):
        raise ValueError("the CA key does not belong to the CA certificate")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, key.hex()[:16])])
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH] if host is None else [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = _builder(name, issuer.subject, key, _subject_key(issuer), now, lifetime)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(sign_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if host is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
    return builder.sign(ca_key, None).public_bytes(Encoding.DER)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Key, issuer_key: Key, now: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    if now.tzinfo is None:
        raise ValueError("expected a time with its zone")
    start = (now - backdated).replace(microsecond=0)
    public = Ed25519PublicKey.from_public_bytes(key)
    # Derived rather than drawn: Ed25519 needs no unpredictable serial against collisions, and equal inputs then give equal bytes.
    drawn = hashlib.sha256(b"medshard/serial/v1" + issuer_key + key + start.isoformat().encode()).digest()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(int.from_bytes(drawn[:16], "big") | 1)
        .not_valid_before(start)
        .not_valid_after(start + backdated + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(Ed25519PublicKey.from_public_bytes(issuer_key)), critical=False)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
