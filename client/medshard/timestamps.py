"""Checking what an outside authority signed (RFC 3161): its token over a checkpoint, against certificates that the user trusts.

Law: the parsing and the signatures are ``rfc3161_client``'s (OpenSSL's, in the end). Here is what a token must be for us: over exactly this
text, by SHA-256 or stronger, from one of the given certificates that may sign timestamps and that the given authorities issued, valid
at the time it states. Whether a certificate was revoked since is not looked up: the check works offline.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID

from medshard_protocol.errors import Malformed, Refused

certificates_bytes_max = 1 << 20


@dataclass(frozen=True)
class Stamped:
    """Who says when."""

    authority: str
    time: datetime


def load_certificates(pem: bytes) -> list[x509.Certificate]:
    """Certificates in PEM. Raises Malformed."""
    if len(pem) > certificates_bytes_max:
        raise Malformed(f"certificates: more than {certificates_bytes_max} bytes")
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise Malformed("certificates: expected PEM, the authority's own certificate and those above it") from None


def check_token(text: bytes, token: bytes, certificates: Iterable[x509.Certificate]) -> Stamped:
    """Check a token over a text. Raises Refused or Malformed."""
    import rfc3161_client as tsp  # late: only who checks timestamps needs it
    from rfc3161_client.errors import VerificationError

    try:
        response = tsp.decode_timestamp_response(response_of(token))
        certificates = list(certificates)
        signers = [each for each in certificates if _may_sign(each)]
        roots = [each for each in certificates if not _may_sign(each)]
        if not signers or not roots:
            raise Refused("timestamp: the certificates must hold the authority's own and the one that issued it")
        refusal = Refused("timestamp: no certificate at hand made it")
        for signer in signers:
            builder = tsp.VerifierBuilder(tsa_certificate=signer, roots=roots)
            try:
                _check_chain(signer, roots, response.tst_info.gen_time)
                builder.build().verify_message(response, text)
                return Stamped(signer.subject.rfc4514_string(), response.tst_info.gen_time)
            except VerificationError as error:
                refusal = Refused(f"timestamp: {error}")
            except Refused as error:
                refusal = error
        raise refusal
    except (ValueError, TypeError) as error:
        raise Malformed(f"timestamp: not an RFC 3161 token ({error})") from None


def response_of(token: bytes) -> bytes:
    """A TimeStampResp, status granted, around a TimeStampToken: the ledger keeps the token alone."""
    body = b"\x30\x03\x02\x01\x00" + token
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return b"\x30" + (size if len(body) < 128 else bytes([0x80 | len(size)]) + size) + body


def _may_sign(certificate: x509.Certificate) -> bool:
    try:
        purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    except x509.ExtensionNotFound:
        return False
    return purposes.critical and list(purposes.value) == [ExtendedKeyUsageOID.TIME_STAMPING]


def _check_chain(signer: x509.Certificate, roots: list[x509.Certificate], at: datetime) -> None:
    """The signer's certificate leads to a self-signed one of those given, each valid at that time. Raises Refused."""
    certificate = signer
    for _ in range(len(roots) + 1):
        if not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
            raise Refused(f"timestamp: the certificate of {certificate.subject.rfc4514_string()} was not valid then")
        if certificate.issuer == certificate.subject:
            return
        above = [each for each in roots if _issued(each, certificate)]
        if not above:
            raise Refused(f"timestamp: nobody given issued the certificate of {certificate.subject.rfc4514_string()}")
        certificate = above[0]
    raise Refused("timestamp: the certificates lead nowhere")


def _issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound):
        return False
    return constraints.ca
