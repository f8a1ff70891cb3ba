"""Who is who: certificates, keys on disk, and real TLS handshakes over loopback sockets."""

from __future__ import annotations

import json
import socket
import ssl
import tempfile
import threading
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from medshard import tls
from medshard_protocol import identity
from medshard_protocol.errors import Absent, Conflict, Malformed, Refused
from medshard_protocol.ids import node_id_of
from medshard_protocol.roster import Roster
from storenode.genesis import Card, found
from storenode.identity import (
    Institution,
    NodeKeys,
    client_ssl_context,
    create_institution,
    create_node,
    issue_client_cert,
    peer_of,
    renew_node,
    server_ssl_context,
)

now = datetime.now(UTC)


@dataclass
class Member:
    institution: Institution
    keys: NodeKeys


@dataclass
class World:
    members: list[Member]
    roster: Roster


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Four institutions with a node each."""
    members, cards = [], []
    for number in range(4):
        institution = create_institution(f"Institution {number}")
        keys = create_node(tmp_path_factory.mktemp(f"node{number}"), institution, sync=False)
        members.append(Member(institution, keys))
        cards.append(Card.of(f"Institution {number}", f"node{number}", f"https://127.0.0.1:{9700 + number}", 10**12, keys))
    return World(members, found(cards, sequencer="node0"))


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> tuple[ssl.SSLSocket | Exception, Exception | None]:
    """Shake hands over loopback: (the server's end or its error, the client's error). One byte each way, so both have checked."""
    listener = socket.create_server(("127.0.0.1", 0))
    outcome: list[ssl.SSLSocket | Exception] = []

    def serve() -> None:
        plain, _ = listener.accept()
        plain.settimeout(5)
        try:
            end = server.wrap_socket(plain, server_side=True)
            end.recv(1)
            end.send(b"!")
            outcome.append(end)
        except OSError as error:
            plain.close()
            outcome.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    failure = None
    try:
        plain = socket.create_connection(listener.getsockname(), timeout=5)
        with client.wrap_socket(plain, server_hostname=name) as end:
            end.send(b"?")
            assert end.recv(1) == b"!"
    except (OSError, AssertionError) as error:
        failure = error
    thread.join()
    listener.close()
    return outcome[0], failure


def name_of(member: Member) -> str:
    return identity.node_hostname(member.keys.node_id)


def vault(institution: Institution, at: datetime = now) -> tuple[Ed25519PrivateKey, bytes]:
    key = Ed25519PrivateKey.generate()
    return key, issue_client_cert(institution, identity.client_csr(key), now=at)


# -- who is at the other end


def test_a_vault_is_known_by_its_key_and_its_institution(world: World) -> None:
    key, certificate = vault(world.members[2].institution)
    server = server_ssl_context(world.roster, world.members[0].keys)
    end, failure = handshake(server, tls.context_for(world.roster.institutions[0].ca, certificate, key), name_of(world.members[0]))
    assert failure is None
    assert isinstance(end, ssl.SSLSocket)
    assert end.version() == "TLSv1.3"
    peer = peer_of(end, world.roster)
    assert peer is not None
    assert (peer.key, peer.institution, peer.node) == (identity.public_key(key), 2, None)
    assert peer_of(end, world.roster) is peer  # remembered


def test_a_node_is_known_as_the_node_of_the_roster(world: World) -> None:
    server = server_ssl_context(world.roster, world.members[0].keys)
    client = client_ssl_context(world.roster.institutions[0].ca, world.members[3].keys)
    end, failure = handshake(server, client, name_of(world.members[0]))
    assert failure is None
    peer = peer_of(end, world.roster)
    assert peer is not None
    assert (peer.institution, peer.node) == (3, world.roster.nodes[3].id)


def without(roster: Roster, number: int) -> Roster:
    """The same roster without the last institution, or with another TLS key of an earlier one's node."""
    if number == len(roster.institutions) - 1:
        return replace(roster, institutions=roster.institutions[:number], nodes=roster.nodes[:number], code=(1, number, number))
    other = replace(roster.nodes[number], tls_key=identity.public_key(Ed25519PrivateKey.generate()))
    return replace(roster, nodes=(*roster.nodes[:number], other, *roster.nodes[number + 1 :]))


def connected(world: World, number: int) -> ssl.SSLSocket:
    """Node 0's end of a connection by another node."""
    server = server_ssl_context(world.roster, world.members[0].keys)
    client = client_ssl_context(world.roster.institutions[0].ca, world.members[number].keys)
    end, failure = handshake(server, client, name_of(world.members[0]))
    assert failure is None
    assert isinstance(end, ssl.SSLSocket)
    return end


def test_who_left_the_roster_is_nobody_although_tls_still_knows_its_ca(world: World) -> None:
    end, now_without = connected(world, 3), without(world.roster, 3)
    assert peer_of(end, world.roster) is not None
    assert peer_of(end, now_without) is None
    assert peer_of(end, now_without, world.roster) is None  # not for a moment longer


def test_a_nodes_key_of_a_moment_ago_is_still_that_node(world: World) -> None:
    end, rotated = connected(world, 2), without(world.roster, 2)
    after, during = peer_of(end, rotated), peer_of(end, rotated, world.roster)
    assert after is not None
    assert during is not None
    assert (after.institution, after.node) == (2, None)
    assert (during.institution, during.node) == (2, world.roster.nodes[2].id)


def test_what_a_former_ca_issued_counts_until_it_is_dropped(world: World) -> None:
    fresh = create_institution("Institution 1")
    own = replace(world.roster.institutions[1], ca=fresh.certificate, key=identity.public_key(fresh.key))

    def with_former(former: tuple[bytes, ...]) -> Roster:
        return replace(
            world.roster, institutions=(world.roster.institutions[0], replace(own, former=former), *world.roster.institutions[2:])
        )

    end = connected(world, 1)
    kept = peer_of(end, with_former((world.members[1].institution.certificate,)))
    assert kept is not None
    assert (kept.institution, kept.node) == (1, world.roster.nodes[1].id)
    assert peer_of(end, with_former(())) is None


def test_nobody_in_particular_may_connect_and_is_nobody(world: World) -> None:
    server = server_ssl_context(world.roster, world.members[0].keys)
    end, failure = handshake(server, tls.context_for(world.roster.institutions[0].ca), name_of(world.members[0]))
    assert failure is None
    assert peer_of(end, world.roster) is None
    assert peer_of(None, world.roster) is None


def test_a_certificate_of_a_foreign_ca_is_refused(world: World) -> None:
    key, certificate = vault(create_institution("Institution 0"))  # the name of a member, and another key
    server = server_ssl_context(world.roster, world.members[0].keys)
    end, _ = handshake(server, tls.context_for(world.roster.institutions[0].ca, certificate, key), name_of(world.members[0]))
    assert isinstance(end, ssl.SSLError)
    assert "certificate verify failed" in str(end)


def test_an_expired_certificate_is_refused(world: World) -> None:
    key, certificate = vault(world.members[0].institution, at=now - identity.client_lifetime - timedelta(hours=1))
    server = server_ssl_context(world.roster, world.members[0].keys)
    end, _ = handshake(server, tls.context_for(world.roster.institutions[0].ca, certificate, key), name_of(world.members[0]))
    assert isinstance(end, ssl.SSLError)
    assert "expired" in str(end)


def test_a_certificate_is_good_on_a_clock_that_is_hours_behind_its_issuer(world: World) -> None:
    key, certificate = vault(world.members[0].institution, at=now + timedelta(hours=23))
    server = server_ssl_context(world.roster, world.members[0].keys)
    end, failure = handshake(server, tls.context_for(world.roster.institutions[0].ca, certificate, key), name_of(world.members[0]))
    assert failure is None
    assert peer_of(end, world.roster) is not None


def test_a_node_certified_by_another_institution_is_not_that_node(world: World, tmp_path: Path) -> None:
    """Even with the node's own key: a CA speaks for its own nodes only."""
    stolen, thief = world.members[1].keys, world.members[2].institution
    certificate = identity.node_certificate(thief.key, thief.certificate, stolen.tls_key, now)
    server = server_ssl_context(world.roster, world.members[0].keys)
    context = tls.context_for(world.roster.institutions[0].ca, certificate, stolen.node)
    end, failure = handshake(server, context, name_of(world.members[0]))
    assert failure is None
    peer = peer_of(end, world.roster)
    assert peer is not None
    assert (peer.institution, peer.node) == (2, None)


def test_a_peer_behind_an_intermediate_ca_is_nobody(world: World) -> None:
    """A CA certificate that allows links between would never get into a roster; should one, its links' vaults are nobody."""
    root, link, leaf = (Ed25519PrivateKey.generate() for _ in range(3))
    root_name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Root")])
    link_name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Link")])
    root_certificate = _ca(root, root, root_name, root_name)
    link_certificate = _ca(link, root, link_name, root_name)
    certificate = identity.client_certificate(link, link_certificate, identity.client_csr(leaf), now)
    with pytest.raises(Malformed, match="issues no other CA"):
        identity.check_institution(root_certificate)
    server = server_ssl_context(world.roster, world.members[0].keys)
    server.load_verify_locations(cadata=root_certificate)
    client = tls.context_for(world.roster.institutions[0].ca)
    _load_chain(client, leaf, certificate, link_certificate)
    end, failure = handshake(server, client, name_of(world.members[0]))
    assert failure is None
    assert peer_of(end, world.roster) is None


def _ca(key: Ed25519PrivateKey, issuer_key: Ed25519PrivateKey, subject: x509.Name, issuer: x509.Name) -> bytes:
    builder = identity._builder(subject, issuer, identity.public_key(key), identity.public_key(issuer_key), now, timedelta(days=10))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(identity._usage(sign_certificates=True), critical=True)
    return builder.sign(issuer_key, None).public_bytes(Encoding.DER)


def _load_chain(context: ssl.SSLContext, key: Ed25519PrivateKey, *chain: bytes) -> None:
    from storenode.identity import key_pem

    with tempfile.NamedTemporaryFile() as file:
        file.write(key_pem(key) + "".join(map(identity.to_pem, chain)).encode())
        file.flush()
        context.load_cert_chain(file.name)


# -- whom a client believes


def test_another_institutions_ca_cannot_impersonate_a_node(world: World, tmp_path: Path) -> None:
    """The attacker is a member with a good CA of its own, and certifies its own key under the victim's name."""
    victim, attacker = world.members[0], world.members[1]
    forged = identity.node_certificate(
        attacker.institution.key, attacker.institution.certificate, attacker.keys.tls_key, now, node_id=victim.keys.node_id
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_chain(server, attacker.keys.node, forged)
    _, failure = handshake(server, tls.context_for(victim.institution.certificate), name_of(victim))
    assert isinstance(failure, ssl.SSLCertVerificationError)
    _, failure = handshake(server, client_ssl_context(victim.institution.certificate, world.members[2].keys), name_of(victim))
    assert isinstance(failure, ssl.SSLCertVerificationError)


def test_a_node_is_not_taken_for_another_of_its_institution(world: World, tmp_path: Path) -> None:
    sibling = create_node(tmp_path, world.members[0].institution, keep_ca_key=False, sync=False)
    _, failure = handshake(
        server_ssl_context(world.roster, sibling), tls.context_for(world.roster.institutions[0].ca), name_of(world.members[0])
    )
    assert isinstance(failure, ssl.SSLCertVerificationError)
    assert "doesn't match" in str(failure) or "mismatch" in str(failure).lower()


def test_a_vault_cannot_pass_for_a_node(world: World) -> None:
    key, certificate = vault(world.members[0].institution)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_chain(server, key, certificate)
    _, failure = handshake(server, tls.context_for(world.roster.institutions[0].ca), name_of(world.members[0]))
    assert isinstance(failure, ssl.SSLCertVerificationError)


def test_an_expired_node_is_refused(world: World) -> None:
    member = world.members[0]
    old = identity.node_certificate(
        member.institution.key, member.institution.certificate, member.keys.tls_key, now - identity.node_lifetime - timedelta(hours=1)
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_chain(server, member.keys.node, old)
    _, failure = handshake(server, tls.context_for(world.roster.institutions[0].ca), name_of(member))
    assert isinstance(failure, ssl.SSLCertVerificationError)
    assert "expired" in str(failure)


def test_an_older_tls_is_refused(world: World) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(cadata=world.roster.institutions[0].ca)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    _, failure = handshake(server_ssl_context(world.roster, world.members[0].keys), old, name_of(world.members[0]))
    assert isinstance(failure, OSError)


def test_an_institution_vouches_for_no_name_but_ours(world: World) -> None:
    """The CA certificate itself says so, should anybody trust it for more than this."""
    member = world.members[0]
    issuer = x509.load_der_x509_certificate(member.institution.certificate)
    key = Ed25519PrivateKey.generate()
    builder = identity._builder(
        x509.Name([]), issuer.subject, identity.public_key(key), identity.public_key(member.institution.key), now, timedelta(days=1)
    )
    names = x509.SubjectAlternativeName([x509.DNSName("bank.example")])
    certificate = builder.add_extension(names, critical=True).sign(member.institution.key, None).public_bytes(Encoding.DER)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_chain(server, key, certificate)
    _, failure = handshake(server, tls.context_for(world.roster.institutions[0].ca), "bank.example")
    assert isinstance(failure, ssl.SSLCertVerificationError)
    assert "permitted subtree violation" in str(failure)


# -- certificates as bytes


def test_nothing_that_a_requester_writes_reaches_its_certificate(world: World) -> None:
    key = Ed25519PrivateKey.generate()
    wishes = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Anna Muster"), x509.NameAttribute(NameOID.EMAIL_ADDRESS, "a@b.example")])
    names = x509.SubjectAlternativeName([x509.DNSName(name_of(world.members[0]))])
    csr = x509.CertificateSigningRequestBuilder().subject_name(wishes).add_extension(names, critical=False).sign(key, None)
    certificate = issue_client_cert(world.members[0].institution, csr.public_bytes(Encoding.DER))
    assert b"Anna" not in certificate
    assert b"b.example" not in certificate
    assert identity.certified_node(certificate) is None
    parsed = x509.load_der_x509_certificate(certificate)
    assert parsed.subject.rfc4514_string() == f"CN={identity.public_key(key).hex()[:16]}"


def test_a_request_that_does_not_prove_its_key_is_refused() -> None:
    csr = bytearray(identity.client_csr(Ed25519PrivateKey.generate()))
    csr[-1] ^= 1
    with pytest.raises(Refused):
        identity.csr_key(bytes(csr))


def test_a_request_of_another_kind_of_key_is_malformed() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    with pytest.raises(Malformed, match="Ed25519"):
        identity.csr_key(csr)


@pytest.mark.parametrize("junk", [b"", b"\x30\x00", b"junk", bytes(5000)])
def test_junk_is_malformed_everywhere(junk: bytes, world: World) -> None:
    for read in (
        identity.csr_key,
        identity.certificate_key,
        identity.certificate_expiry,
        identity.certified_node,
        identity.check_institution,
    ):
        with pytest.raises(Malformed):
            read(junk)
    with pytest.raises(Malformed):
        identity.is_issued_by(junk, world.roster.institutions[0].ca)


def test_every_cut_of_a_certificate_is_malformed(world: World) -> None:
    ca = world.roster.institutions[0].ca
    for end in range(0, len(ca), 7):
        with pytest.raises(Malformed):
            identity.check_institution(ca[:end])


def test_equal_inputs_give_equal_certificates(world: World) -> None:
    institution, key = world.members[0].institution, Ed25519PrivateKey.generate()
    made = {issue_client_cert(institution, identity.client_csr(key), now=now) for _ in range(2)}
    assert len(made) == 1


# -- keys on disk


def test_a_nodes_keys_come_back_from_disk(tmp_path: Path) -> None:
    made = create_node(tmp_path, create_institution("Hospital"))
    loaded = NodeKeys.load(tmp_path)
    assert (loaded.node_id, loaded.tls_key, loaded.certificate) == (made.node_id, made.tls_key, made.certificate)
    assert loaded.node_id == node_id_of(loaded.tls_key)
    assert loaded.ca is not None
    assert loaded.log is not None
    assert "PRIVATE" not in repr(loaded)
    assert loaded.node.private_bytes_raw().hex() not in repr(loaded)


def test_keys_are_written_for_their_owner_alone_and_never_overwritten(tmp_path: Path) -> None:
    institution = create_institution("Hospital")
    create_node(tmp_path, institution)
    before = (tmp_path / "keys/node.key").read_bytes()
    for path in (tmp_path / "keys").glob("*.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Conflict):
        create_node(tmp_path, institution)
    assert (tmp_path / "keys/node.key").read_bytes() == before


def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    create_node(tmp_path, create_institution("Hospital"), sync=False)
    (tmp_path / "keys/cosigner.key").chmod(0o640)
    with pytest.raises(Refused, match="read by others") as raised:
        NodeKeys.load(tmp_path)
    assert "chmod 600" in raised.value.hint


def test_missing_foreign_and_broken_keys_are_each_explained(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for home in (ours, theirs):
        create_node(home, create_institution("Hospital"), sync=False)
    with pytest.raises(Absent, match="does not exist"):
        NodeKeys.load(tmp_path / "nowhere")
    right = (ours / "keys/node.key").read_bytes()
    (ours / "keys/node.key").unlink()
    with pytest.raises(Absent, match=r"node\.key is missing"):
        NodeKeys.load(ours)
    for wrong, message in (((theirs / "keys/node.key").read_bytes(), "not for node.key"), (b"junk", "not an unencrypted private key")):
        (ours / "keys/node.key").write_bytes(wrong)
        (ours / "keys/node.key").chmod(0o600)
        with pytest.raises(Malformed, match=message):
            NodeKeys.load(ours)
    (ours / "keys/node.key").write_bytes(right)
    for name in ("ca.crt", "node.crt"):
        kept = (ours / "keys" / name).read_bytes()
        (ours / "keys" / name).write_bytes((theirs / "keys" / name).read_bytes())
        with pytest.raises(Malformed):
            NodeKeys.load(ours)
        (ours / "keys" / name).write_bytes(kept)
    NodeKeys.load(ours)


def test_a_node_works_without_its_institutions_key(tmp_path: Path) -> None:
    create_node(tmp_path, create_institution("Hospital"), keep_ca_key=False, sync=False)
    assert NodeKeys.load(tmp_path).ca is None


def test_a_renewed_node_is_the_same_node(tmp_path: Path) -> None:
    institution = create_institution("Hospital", now=now - timedelta(days=365))
    keys = create_node(tmp_path, institution, now=now - timedelta(days=365), sync=False)
    renew_node(keys, institution)
    again = NodeKeys.load(tmp_path)
    assert (again.node_id, again.tls_key) == (keys.node_id, keys.tls_key)
    assert identity.certificate_expiry(again.certificate) > identity.certificate_expiry(keys.certificate)
    with pytest.raises(Refused):
        renew_node(keys, create_institution("Hospital"))


# -- the client's private key


def test_the_clients_key_does_not_stay_on_disk_without_memory_files(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    key, certificate = vault(world.members[0].institution)
    client = tls.context_for(world.roster.institutions[0].ca, certificate, key)
    assert list(tmp_path.iterdir()) == []
    end, failure = handshake(server_ssl_context(world.roster, world.members[0].keys), client, name_of(world.members[0]))
    assert failure is None
    assert peer_of(end, world.roster) is not None


def test_the_clients_key_touches_no_disk_with_memory_files(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(__import__("os"), "memfd_create"):
        pytest.skip("this system has no memory files")
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: pytest.fail("a file on disk"))
    key, certificate = vault(world.members[0].institution)
    tls.context_for(world.roster.institutions[0].ca, certificate, key)


def test_a_key_of_another_certificate_is_refused(world: World) -> None:
    _, certificate = vault(world.members[0].institution)
    with pytest.raises(ssl.SSLError):
        tls.context_for(world.roster.institutions[0].ca, certificate, Ed25519PrivateKey.generate())


# -- vectors


def test_the_vectors_of_the_format_still_come_out() -> None:
    vector = json.loads((Path(__file__).parents[1] / "vectors/identity.json").read_text())

    def key(name: str) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(sha256(name.encode()).digest())

    at, public = datetime.fromisoformat(vector["now"]), identity.public_key
    ca = identity.institution_certificate(key("ca"), vector["institution"], at)
    csr = identity.client_csr(key("vault"))
    url = "https://node.hospital-01.example:9700"
    pq_key = MLDSA44PrivateKey.from_seed_bytes(sha256(b"pq").digest()).public_key().public_bytes_raw()
    keys = (public(key("tls")), public(key("cosigner")), public(key("log")), pq_key)
    card = Card(vector["institution"], ca, "hospital-01", url, 10**12, *keys)
    made = {
        "ca": ca,
        "node_certificate": identity.node_certificate(key("ca"), ca, public(key("tls")), at),
        "csr": csr,
        "client_certificate": identity.client_certificate(key("ca"), ca, csr, at),
        "card": card.to_bytes(Institution(key("ca"), ca)),
    }
    assert {name: value.hex() for name, value in made.items()} == {name: vector[name] for name in made}
    assert card.fingerprint == vector["fingerprint"]
    assert identity.csr_key(csr) == public(key("vault"))
