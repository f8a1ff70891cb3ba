"""PDF attributes: read in a process of its own, which a hostile file may kill."""

from __future__ import annotations

import io
import time
import zlib
from collections.abc import Iterator

import pytest
from pypdf import PdfWriter
from pypdf.generic import DictionaryObject, NameObject, TextStringObject

from medshard.describe import Described, describe
from medshard.policies import attributes


def policy(**changes: str) -> bytes:
    writer = PdfWriter()
    writer.add_blank_page(595, 842)
    information = {
        "/Title": "Police d’assurance №7",
        "/Author": "Zürich Leben",
        "/CreationDate": "D:20240501100000+02'00'",
        "/ModDate": "D:20240601",
    }
    writer.add_metadata({**information, **{f"/{key}": value for key, value in changes.items()}})
    return written(writer)


def written(writer: PdfWriter) -> bytes:
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def told(data: bytes, name: bytes = b"policy.pdf") -> Described:
    return describe(io.BytesIO(data), name)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    told(policy())  # the reader runs
    monkeypatch.setattr(attributes, "wait_s", 1.0)
    yield
    attributes._Reader.stop()


def test_a_policy_is_described_by_title_author_and_dates() -> None:
    described = told(policy())
    assert described.problem is None
    assert described.description.media_type == "application/pdf"
    assert described.description.attributes == {
        "title": "Police d’assurance №7",
        "author": "Zürich Leben",
        "created": "2024-05-01T10:00:00+02:00",
        "modified": "2024-06-01T00:00:00",
    }


def test_a_pdf_is_known_by_its_content() -> None:
    assert told(policy(), b"document").description.media_type == "application/pdf"


def test_a_bad_date_costs_only_the_date() -> None:
    described = told(policy(CreationDate="last Tuesday"))
    assert described.problem is None
    assert "created" not in described.description.attributes
    assert "title" in described.description.attributes


def test_a_policy_with_scripts_is_stored_as_it_is_and_nothing_in_it_runs() -> None:
    writer = PdfWriter(clone_from=io.BytesIO(policy()))
    script = DictionaryObject({NameObject("/S"): NameObject("/JavaScript"), NameObject("/JS"): TextStringObject("while (true) {}")})
    writer.root_object[NameObject("/OpenAction")] = script
    described = told(written(writer))
    assert (described.description.media_type, described.problem) == ("application/pdf", None)
    assert "title" in described.description.attributes


def test_an_encrypted_policy_is_fine_and_tells_nothing() -> None:
    writer = PdfWriter(clone_from=io.BytesIO(policy()))
    writer.encrypt("secret", algorithm="AES-256")
    described = told(written(writer))
    assert (described.description.media_type, described.description.attributes, described.problem) == ("application/pdf", {}, None)


@pytest.mark.parametrize(
    "data", [b"%PDF-1.7 junk", b"%PDF-", b"%PDF-1.4\n" + bytes(5_000), policy()[:300]], ids=["junk", "head", "zeros", "cut"]
)
def test_a_broken_pdf_is_told_and_kept_as_a_pdf(data: bytes) -> None:
    described = told(data)
    assert described.description.media_type == "application/pdf"
    assert described.problem is not None
    assert described.problem.startswith("PDF: ")
    assert told(policy()).problem is None  # the reader goes on


def bomb() -> bytes:
    """A PDF whose cross-reference stream inflates to 2 GiB."""
    deflate = zlib.compressobj(9)
    start = deflate.compress(b"\0") + deflate.flush(zlib.Z_FULL_FLUSH)
    piece = deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)  # after a full flush, like data make like bytes
    body = start + piece * 2_048 + deflate.flush()
    head = b"%PDF-1.7\n"
    stream = (
        b"1 0 obj\n<< /Type /XRef /Size 3 /W [1 2 1] /Root 2 0 R /Info 2 0 R /Filter /FlateDecode /Length "
        + str(len(body)).encode()
        + b" >>\n"
    )
    return head + stream + b"stream\n" + body + b"\nendstream\nendobj\nstartxref\n" + str(len(head)).encode() + b"\n%%EOF\n"


def test_a_bomb_costs_the_reader_not_us() -> None:
    data = bomb()
    start = time.perf_counter()
    described = told(data)
    assert described.description.media_type == "application/pdf"
    assert time.perf_counter() - start < attributes.wait_s + 10
    assert told(policy()).problem is None


@pytest.mark.usefixtures("impatient")
def test_a_reader_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    reader = attributes._Reader.running()
    os.kill(reader._process.pid, signal.SIGSTOP)
    start = time.perf_counter()
    described = told(policy())
    assert described.problem is not None
    assert "too long" in described.problem
    assert time.perf_counter() - start < 10
    monkeypatch.undo()
    assert told(policy()).problem is None


def test_a_reader_that_dies_is_replaced() -> None:
    told(policy())
    attributes._Reader.running()._process.kill()
    time.sleep(0.1)
    assert told(policy()).problem is None


def test_a_pdf_over_the_limit_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attributes, "pdf_bytes_max", 100)
    described = told(policy())
    assert described.description.attributes == {}
    assert described.problem is not None
