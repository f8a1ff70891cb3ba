"""A certificate of destruction as pages to print, with the certificate itself attached to the PDF.

Law: the pages are for reading; what counts is the attached file, and the pages say so. Same certificate and time, same pages.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Final

import pypdf
from reportlab.lib.colors import HexColor
from reportlab.lib.pagesizes import A4
from reportlab.lib.utils import simpleSplit
from reportlab.pdfgen.canvas import Canvas

from medshard.certificate import Certified
from medshard.proofpage import latin, moment
from medshard_protocol.entries import Type

certificate_name: Final = "certificate.json"
margin: Final = 56
line: Final = 13
grey: Final = HexColor("#555555")
documents_listed_max: Final = 200  # the attached file has all of them


def page(certified: Certified, certificate: bytes, made: int) -> bytes:
    """The PDF, made at ``made`` (Unix seconds)."""
    drawn = io.BytesIO()
    canvas = Canvas(drawn, pagesize=A4, invariant=1, pageCompression=1)
    canvas.setTitle("Certificate of destruction")
    canvas.setAuthor("medshard")
    _draw(canvas, certified, made)
    canvas.save()
    writer = pypdf.PdfWriter(io.BytesIO(drawn.getvalue()))
    writer.add_attachment(certificate_name, certificate)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def _draw(canvas: Canvas, certified: Certified, made: int) -> None:
    y = A4[1] - margin - 10
    canvas.setFont("Helvetica-Bold", 18)
    canvas.drawString(margin, y, "Certificate of destruction")
    y -= 24
    for font, text in _lines(certified):
        size = 8.5 if font == "Courier" else 10
        for part in simpleSplit(latin(text), font, size, A4[0] - 2 * margin) or [""]:
            if y < margin + 20:
                _foot(canvas, made)
                canvas.showPage()
                y = A4[1] - margin
            canvas.setFillColorRGB(0, 0, 0)
            canvas.setFont(font, size)
            canvas.drawString(margin, y, part)
            y -= line
    _foot(canvas, made)
    canvas.showPage()


def _lines(certified: Certified) -> Iterator[tuple[str, str]]:
    what = "erased: wrapped keys, manifests and shards" if certified.type is Type.ERASE else "retired: shards"
    yield "Helvetica", f"{len(certified.documents)} document(s) were {what}, by order of the key {certified.author.hex()[:32]}…"
    yield "Helvetica", f"Ledger {certified.origin}, entry {certified.index}, published not later than {moment(certified.known_by)}"
    yield "Helvetica", "Confirmed by " + ", ".join(certified.cosigners)
    yield "Helvetica", ""
    yield "Helvetica-Bold", "Documents"
    for size, sha256 in certified.documents[:documents_listed_max]:
        yield "Courier", f"SHA-256 {sha256.hex()}  {size} bytes"
    if len(certified.documents) > documents_listed_max:
        yield "Helvetica", f"and {len(certified.documents) - documents_listed_max} more, in the attached file"
    yield "Helvetica", ""
    yield "Helvetica-Bold", "Signed by the nodes that held them"
    for name, receipt in zip(certified.nodes, certified.receipts, strict=True):
        held = "no shard" if receipt.shard is None else f"shard {receipt.shard}"
        yield "Helvetica", f"{name}: {held} and {receipt.keys} wrapped key(s) destroyed, {moment(receipt.at)}"
    if certified.missing:
        yield "Helvetica", "No receipt yet from: " + ", ".join(certified.missing)
    yield "Helvetica", ""
    for text in _NOTES:
        yield "Helvetica", text


def _foot(canvas: Canvas, made: int) -> None:
    canvas.setFillColor(grey)
    canvas.setFont("Helvetica", 8)
    canvas.drawString(
        margin, margin - 20, f"Made {moment(made)} by medshard certificate. The attached {certificate_name} counts, not this page."
    )


_NOTES: Final[Sequence[str]] = (
    "To check it offline: medshard check-certificate FILE.pdf --genesis genesis.medshard",
    "A receipt is its node's signed word. What was read or copied before the destruction is not within anybody's reach.",
)
