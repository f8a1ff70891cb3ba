"""A certificate of destruction as pages to print, with the certificate itself attached to the PDF.

Law: the pages are for reading; what counts is the attached file, and the pages say so. Same certificate and time, same pages.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Final

import pypdf
from reportlab.lib.pagesizes import A4
from reportlab.lib.utils import simpleSplit
from reportlab.pdfgen.canvas import Canvas

from medshard.certificate import Certified
from medshard.paper import Numbered, latin
from medshard.proofpage import moment
from medshard_protocol.entries import Type

certificate_name: Final = "certificate.json"
margin: Final = 56
line: Final = 13
documents_listed_max: Final = 200  # the attached file has all of them


def page(certified: Certified, certificate: bytes, made: int) -> bytes:
    """The PDF, made at ``made`` (Unix seconds)."""
    drawn = io.BytesIO()
    foot = f"Made {moment(made)} by medshard certificate. The attached {certificate_name} counts, not this page."
    canvas = Numbered(drawn, pagesize=A4, invariant=1, pageCompression=1, foot=foot, left=margin)
    canvas.setTitle("Certificate of destruction")
    canvas.setAuthor("medshard")
    _draw(canvas, certified)
    canvas.save()
    writer = pypdf.PdfWriter(io.BytesIO(drawn.getvalue()))
    writer.add_attachment(certificate_name, certificate)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def _draw(canvas: Canvas, certified: Certified) -> None:
    y = A4[1] - margin - 10
    canvas.setFont("Helvetica-Bold", 18)
    canvas.drawString(margin, y, "Certificate of destruction")
    y -= 24
    for font, text in _lines(certified):
        size = 8.5 if font == "Courier" else 10
        for part in simpleSplit(latin(text), font, size, A4[0] - 2 * margin) or [""]:
            if y < margin + 20:
                canvas.showPage()
                y = A4[1] - margin
            canvas.setFillColorRGB(0, 0, 0)
            canvas.setFont(font, size)
            canvas.drawString(margin, y, part)
            y -= line
    canvas.showPage()


def _lines(certified: Certified) -> Iterator[tuple[str, str]]:
    what = "erased: wrapped keys, manifests and shards" if certified.type is Type.ERASE else "retired: shards"
    count = len(certified.documents)
    yield "Helvetica", f"{count:,} documents were {what}" if count != 1 else f"1 document was {what}"
    yield "Helvetica", "By order of the key"
    yield "Courier", certified.author.hex()
    yield "Helvetica", f"Ledger {certified.origin}, entry {certified.index}, published not later than {moment(certified.known_by)}"
    yield "Helvetica", "Confirmed by " + ", ".join(certified.cosigners)
    yield "Helvetica", ""
    yield "Helvetica-Bold", "Documents"
    for size, sha256 in certified.documents[:documents_listed_max]:
        yield "Courier", f"SHA-256 {sha256.hex()}  {size:,} bytes"
    if len(certified.documents) > documents_listed_max:
        yield "Helvetica", f"and {len(certified.documents) - documents_listed_max} more, in the attached file"
    yield "Helvetica", ""
    receipts = sorted(zip(certified.nodes, certified.receipts, strict=True), key=lambda pair: pair[0])
    holders = len(receipts) + len(certified.missing)
    yield "Helvetica-Bold", f"Signed by {len(receipts)} of {holders} nodes that held {'it' if count == 1 else 'them'}"
    for name, receipt in receipts:
        held = "no shard" if receipt.shard is None else f"shard {receipt.shard}"
        keys = "1 wrapped key" if receipt.keys == 1 else f"{receipt.keys} wrapped keys"
        yield "Helvetica", f"{name}: {held} and {keys} destroyed, {moment(receipt.at)}"
    if certified.missing:
        yield "Helvetica", "No receipt yet from: " + ", ".join(certified.missing)
    yield "Helvetica", ""
    for text in _NOTES:
        yield "Helvetica", text


_NOTES: Final[Sequence[str]] = (
    "To check it offline: medshard check-certificate FILE.pdf --genesis genesis.medshard",
    "A receipt is its node's signed word. What was read or copied before the destruction is not within anybody's reach.",
)
