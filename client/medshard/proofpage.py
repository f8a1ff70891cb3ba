"""A proof as a page to print: what it says in words, a QR code with what it is about, and the proof itself attached to the PDF.

Law: the page is for reading. What counts is the attached proof, and the page says so and how to check it. The QR code holds only facts that
the proof shows anyway. Same proof and time, same page: nothing else goes in, no user, no machine.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import pypdf
import segno
from reportlab.lib.colors import HexColor
from reportlab.lib.pagesizes import A4
from reportlab.lib.utils import simpleSplit
from reportlab.pdfgen.canvas import Canvas

from medshard.paper import latin
from medshard.prooffile import genesis_name, proof_name
from medshard_protocol.documentproof import Proven

margin: Final = 56
label_x: Final = margin
value_x: Final = margin + 110
line: Final = 13
qr_side: Final = 130
grey: Final = HexColor("#555555")


def page(proven: Proven, proof: bytes, genesis: bytes, made: int) -> bytes:
    """The PDF of one page, made at ``made`` (Unix seconds)."""
    drawn = io.BytesIO()
    canvas = Canvas(drawn, pagesize=A4, invariant=1, pageCompression=1)
    canvas.setTitle("Proof of registration")
    canvas.setAuthor("medshard")
    _draw(canvas, proven, made)
    canvas.showPage()
    canvas.save()
    writer = pypdf.PdfWriter(io.BytesIO(drawn.getvalue()))
    for name, data in ((proof_name, proof), (genesis_name, genesis)):
        attachment = writer.add_attachment(name, data)
        _compress(attachment)
    writer.compress_identical_objects(remove_duplicates=False, remove_unreferenced=True)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def reference(proven: Proven) -> str:
    """What the QR code says: enough to find the registration, and to tell one document from another."""
    return "\n".join(
        (
            "medshard proof of registration v1",
            f"sha256 {proven.sha256.hex()}",
            f"size {proven.size}",
            f"log {proven.origin}",
            f"entry {proven.index} of {proven.log_size}",
            f"file {proven.file_id.hex()[:16]}",
            f"key {proven.owner.hex()[:16]}",
            f"genesis {proven.genesis_sha256.hex()}",
        )
    )


def facts(proven: Proven) -> list[tuple[str, Sequence[str]]]:
    """What the page says, label by label."""
    voices = sorted({each.institution for each in proven.cosigned} & {each.institution for each in proven.cosigned_pq})
    digest, key, genesis = proven.sha256.hex(), proven.owner.hex(), proven.genesis_sha256.hex()
    rows: list[tuple[str, Sequence[str]]] = [
        ("Document", (f"SHA-256 {digest[:32]}", f"        {digest[32:]}", f"{proven.size:,} bytes".replace(",", " "))),
        ("Registered by", (f"key {key[:32]}", f"    {key[32:]}")),
        ("Vouched for by", (proven.institution,)),
        ("Ledger", (f"{proven.origin}, entry {proven.index} of {proven.log_size}",)),
        ("Not later than", (f"{moment(proven.known_by)}, by the clocks of the institutions below",)),
        ("Confirmed by", (", ".join(voices), "each with an Ed25519 and an ML-DSA-44 signature")),
        ("Genesis file", (f"SHA-256 {genesis[:32]}", f"        {genesis[32:]}")),
    ]
    if proven.stamp is not None:
        rows.insert(5, ("Timestamp", ("of an outside authority (RFC 3161), in the attached proof",)))
    return rows


def moment(seconds: int) -> str:
    """A time for people, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _draw(canvas: Canvas, proven: Proven, made: int) -> None:
    width, height = A4
    y = height - margin - 10
    canvas.setFont("Helvetica-Bold", 18)
    canvas.drawString(margin, y, "Proof of registration")
    y -= 20
    canvas.setFillColor(grey)
    y = _paragraph(canvas, y, "This very document was in the hands of the key below when it was registered in the ledger of a consortium.")
    y -= 14
    for label, values in facts(proven):
        canvas.setFillColor(grey)
        canvas.setFont("Helvetica", 9)
        canvas.drawString(label_x, y, label)
        canvas.setFillColorRGB(0, 0, 0)
        for value in values:
            mono = "SHA-256" in value or value.startswith((" ", "key"))
            font, size = ("Courier", 9) if mono else ("Helvetica", 10)
            for part in [value] if mono else simpleSplit(latin(value), font, size, width - margin - value_x):
                canvas.setFont(font, size)
                canvas.drawString(value_x, y, part)
                y -= line
        y -= 5
    _qr(canvas, reference(proven), margin, y - qr_side)
    canvas.setFillColor(grey)
    _paragraph(canvas, y - 14, _HOW, x=margin + qr_side + 20)
    canvas.setFont("Helvetica", 8)
    canvas.drawString(margin, margin - 20, f"Made {moment(made)} by medshard prove. The attached proof counts, not this page.")


def _paragraph(canvas: Canvas, y: float, text: str, x: float = margin) -> float:
    for part in text.split("\n"):
        mono = part.startswith("  ")
        font, size = ("Courier", 7.5) if mono else ("Helvetica", 9)
        for each in simpleSplit(part, font, size, A4[0] - margin - x) or [""]:
            canvas.setFont(font, size)
            canvas.drawString(x, y, each)
            y -= 12
    return y


def _qr(canvas: Canvas, text: str, x: float, y: float) -> None:
    code = segno.make_qr(text, error="m")
    rows = [list(row) for row in code.matrix]
    side = qr_side / len(rows)
    canvas.setFillColorRGB(0, 0, 0)
    path = canvas.beginPath()
    for number, row in enumerate(rows):
        for column, dark in enumerate(row):
            if dark:
                path.rect(x + column * side, y + (len(rows) - 1 - number) * side, side, side)
    canvas.drawPath(path, stroke=0, fill=1)


def _compress(attachment: Any) -> None:
    stream = attachment.pdf_object["/EF"]["/F"].get_object()
    attachment.pdf_object["/EF"][pypdf.generic.NameObject("/F")] = stream.flate_encode()


_HOW: Final = """To check it, offline, with the PDF file and the document:

  medshard check-proof PAGE.pdf DOCUMENT \\
    --genesis genesis.medshard

Take the genesis file, or its SHA-256, from an institution of the consortium, not from here.

The proof is attached to this PDF as proof.tlog-proof. It is a C2SP tlog-proof, which other programs read as well.

It does not say that the document is still stored, nor that the key was not withdrawn later."""
