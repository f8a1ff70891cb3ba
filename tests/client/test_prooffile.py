"""What somebody who is handed a proof does with it: read it from a text or a PDF, trust a genesis file, check a timestamp."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pypdf
import pytest
import segno
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import tsa

from medshard import prooffile
from medshard.proofpage import facts, page, reference
from medshard_protocol import evidence, merkle
from medshard_protocol.documentproof import DocumentProof, Opening, Place, Stamp
from medshard_protocol.entries import Enrol, Genesis, Register, Timestamp, sign_entry
from medshard_protocol.errors import Absent, Malformed, MedshardError, Refused
from medshard_protocol.identity import public_key
from medshard_protocol.merkle import sha256

document = b"Versicherungsschein Nr. 7\n"
file_id, content, key = b"f" * 32, b"c" * 32, b"e" * 32
quorum = [0, 1, 2]


def made(c: Any, token: bytes | None = None) -> DocumentProof:
    """A log of genesis, ENROL, REGISTER, perhaps TIMESTAMP, and noise; the proof of its REGISTER entry."""
    owner, digest = public_key(c.key("vault")), hashlib.sha256(document).digest()
    leaf = evidence.leaf(owner, file_id, evidence.salt(key, 0), len(document), digest)
    entries = [
        sign_entry(c.roster.origin, Genesis(c.roster.sha256, bytes(16)), c.roster.log_key, c.key("log").sign),
        c.entry("ca 2", Enrol(owner, 0, bytes(16))),
        c.entry("vault", Register(file_id, evidence.registered_hash(leaf, content), bytes(16))),
    ]
    head = c.checkpoint([entry.to_bytes() for entry in entries])
    if token is not None:
        entries.append(c.entry("tls 1", Timestamp(3, head.root, token, bytes(16))))
    log = [*(entry.to_bytes() for entry in entries), b"noise", b"more noise"]
    leaves = [merkle.leaf_hash(entry, sha256) for entry in log]

    def place(index: int) -> Place:
        return Place(index, log[index], tuple(merkle.inclusion_path(leaves, index, sha256)))

    opening = Opening(content, evidence.salt(key, 0), len(document), digest, 0, 1, ())
    stamp = Stamp(place(3), tuple(merkle.consistency_path(leaves, 3, sha256))) if token is not None else None
    return DocumentProof(place(2), c.note(c.checkpoint(log), quorum, quorum).to_bytes(), opening, place(1), stamp=stamp)


@pytest.fixture
def handed(consortium: Callable[..., Any], tmp_path: Path) -> SimpleNamespace:
    c = consortium(4, pq=True)
    proof = made(c)
    (tmp_path / "genesis").write_bytes(c.roster.to_bytes())
    (tmp_path / "proof").write_bytes(proof.to_bytes())
    (tmp_path / "document").write_bytes(document)
    drawn = page(proof.verify(c.roster), proof.to_bytes(), c.roster.to_bytes(), 1_790_000_000)
    (tmp_path / "page.pdf").write_bytes(drawn)
    return SimpleNamespace(c=c, proof=proof, folder=tmp_path, page=drawn)


def test_a_text_and_a_page_hold_the_same_proof(handed: SimpleNamespace) -> None:
    assert prooffile.read(handed.folder / "proof").proof == handed.proof
    from_page = prooffile.read(handed.folder / "page.pdf")
    assert (from_page.proof, from_page.genesis) == (handed.proof, handed.c.roster.to_bytes())


def test_the_genesis_file_comes_from_the_user_and_from_nobody_else(handed: SimpleNamespace) -> None:
    page, roster = prooffile.read(handed.folder / "page.pdf"), handed.c.roster
    genesis = handed.folder / "genesis"
    assert prooffile.trusted(page, genesis, None, None) == roster
    assert prooffile.trusted(page, None, roster.sha256, None) == roster
    assert prooffile.trusted(page, None, None, genesis) == roster  # that of the user's own vault
    assert prooffile.trusted(page, genesis, roster.sha256, None) == roster
    with pytest.raises(Absent, match="no genesis file"):
        prooffile.trusted(page, None, None, handed.folder / "nothing")
    for file in (genesis, None):
        with pytest.raises(Refused, match="not the one"):
            prooffile.trusted(page, file, bytes(32), None)
    with pytest.raises(Absent):
        prooffile.trusted(prooffile.read(handed.folder / "proof"), None, roster.sha256, None)


def test_the_document_is_compared_byte_for_byte(handed: SimpleNamespace) -> None:
    read = prooffile.read(handed.folder / "proof")
    assert prooffile.check(read, handed.c.roster, handed.folder / "document").document == handed.folder / "document"
    (handed.folder / "document").write_bytes(document[:-1])
    with pytest.raises(Refused, match="another document"):
        prooffile.check(read, handed.c.roster, handed.folder / "document")


# -- timestamps


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tsa.Authority:
    if tsa.openssl is None:
        pytest.skip("the authority is made with openssl")
    return tsa.Authority(tmp_path_factory.mktemp("tsa"))


def token_over(authority: tsa.Authority, text: bytes) -> bytes:
    import rfc3161_client as tsp

    request = tsp.TimestampRequestBuilder().data(text).cert_request(cert_request=False).build()
    return tsp.decode_timestamp_response(authority.answer(request.as_bytes())).time_stamp_token()


def test_a_timestamp_is_checked_when_its_certificates_are_named(
    authority: tsa.Authority, consortium: Callable[..., Any], tmp_path: Path
) -> None:
    c = consortium(4, pq=True)
    stamped = made(c, b"").verify(c.roster).stamp
    assert stamped is not None
    proof = made(c, token_over(authority, stamped.text))
    (tmp_path / "tsa.pem").write_bytes(authority.pem)
    (tmp_path / "proof").write_bytes(proof.to_bytes())
    read = prooffile.read(tmp_path / "proof")
    unchecked = prooffile.check(read, c.roster)
    assert (unchecked.stamped, unchecked.stamp_unchecked) == (None, True)
    verdict = prooffile.check(read, c.roster, certificates=tmp_path / "tsa.pem")
    assert verdict.stamped is not None
    assert (verdict.stamped.authority, verdict.stamp_unchecked) == ("CN=Test timestamps", False)


def test_a_token_of_another_head_does_not_help(authority: tsa.Authority, consortium: Callable[..., Any], tmp_path: Path) -> None:
    c = consortium(4, pq=True)
    (tmp_path / "tsa.pem").write_bytes(authority.pem)
    (tmp_path / "proof").write_bytes(made(c, token_over(authority, b"another head")).to_bytes())
    with pytest.raises(Refused, match="Mismatch"):
        prooffile.check(prooffile.read(tmp_path / "proof"), c.roster, certificates=tmp_path / "tsa.pem")


def test_who_names_certificates_wants_a_timestamp(handed: SimpleNamespace, authority: tsa.Authority) -> None:
    (handed.folder / "tsa.pem").write_bytes(authority.pem)
    read = prooffile.read(handed.folder / "proof")
    with pytest.raises(Refused, match="no timestamp"):
        prooffile.check(read, handed.c.roster, certificates=handed.folder / "tsa.pem")


def test_certificates_that_are_none_are_malformed(handed: SimpleNamespace, consortium: Callable[..., Any]) -> None:
    c = consortium(4, pq=True)
    read = prooffile.Handed(made(c, b"token"), None)
    for pem in (b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", bytes(2 << 20)):
        (handed.folder / "pem").write_bytes(pem)
        with pytest.raises(MedshardError):
            prooffile.check(read, c.roster, certificates=handed.folder / "pem")


# -- the page


def test_the_same_proof_and_time_give_the_same_page(handed: SimpleNamespace) -> None:
    proven = handed.proof.verify(handed.c.roster)
    again = page(proven, handed.proof.to_bytes(), handed.c.roster.to_bytes(), 1_790_000_000)
    assert [each.extract_text() for each in pypdf.PdfReader(io.BytesIO(again)).pages] == [
        each.extract_text() for each in pypdf.PdfReader(io.BytesIO(handed.page)).pages
    ]


def test_the_page_says_what_was_proved(handed: SimpleNamespace) -> None:
    (sheet,) = pypdf.PdfReader(io.BytesIO(handed.page)).pages
    said = "".join(sheet.extract_text().split())
    proven = handed.proof.verify(handed.c.roster)
    for fact in (proven.sha256.hex(), proven.owner.hex(), proven.genesis_sha256.hex(), "Institution2", "2023-11-14"):
        assert fact in said
    assert len(handed.page) < 60_000


def test_an_institution_with_letters_beyond_latin_1_is_still_printed(handed: SimpleNamespace) -> None:
    proven = replace(handed.proof.verify(handed.c.roster), institution="Klinikum Łódź 病院")
    assert page(proven, b"x", b"y", 0).startswith(b"%PDF-")


def test_the_qr_code_holds_the_facts_and_fits(handed: SimpleNamespace) -> None:
    proven = handed.proof.verify(handed.c.roster)
    text = reference(replace(proven, origin="o" * 128, log_size=2**62, index=2**62, size=2**62))
    assert segno.make_qr(text, error="m").version <= 25  # still read by a telephone from a sheet of paper
    assert proven.sha256.hex() in text
    assert dict(facts(proven))["Vouched for by"] == ("Institution 2",)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_page_raises_only_ours(handed: SimpleNamespace, data: st.DataObject) -> None:
    damaged = bytearray(handed.page)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (handed.folder / "damaged.pdf").write_bytes(damaged[: data.draw(st.integers(20, len(damaged)))])
    with contextlib.suppress(MedshardError):
        assert prooffile.read(handed.folder / "damaged.pdf").proof.verify(handed.c.roster)


def test_a_pdf_without_a_proof_is_none(tmp_path: Path) -> None:
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(tmp_path / "blank.pdf")
    with pytest.raises(Malformed, match="without a proof"):
        prooffile.read(tmp_path / "blank.pdf")
