"""A report as a PDF with its charts. Same report, same pages: nothing else goes in.

Law: all text is escaped before it reaches the layout, so no name of a file or a person is taken for markup.
"""

from __future__ import annotations

import io
import re
from functools import partial
from typing import Any, Final
from xml.sax.saxutils import escape

from reportlab.graphics.charts.barcharts import HorizontalBarChart
from reportlab.graphics.shapes import Drawing, String
from reportlab.lib.colors import HexColor, white
from reportlab.lib.pagesizes import A4, landscape
from reportlab.lib.styles import ParagraphStyle
from reportlab.pdfbase.pdfmetrics import stringWidth
from reportlab.platypus import CondPageBreak, LongTable, Paragraph, SimpleDocTemplate, Spacer, TableStyle

from medshard.paper import Numbered, grey, latin, runs, width_of
from medshard.reports.model import Bars, Report, Table, moment

accent: Final = HexColor("#1f5f8b")
pale: Final = HexColor("#eef3f7")
alert: Final = HexColor("#fdeceb")
margin: Final = 42
rows_max: Final = 2_000  # on paper; CSV and JSON have all of them
cell_chars_max: Final = 300
padding: Final = 6  # on either side of a cell, and of the frame
few_columns: Final = 7  # with more of them, of a hash the first digits stand for all: the CSV has it whole
wide: Final = 260.0  # points; a whole hash fits
_time: Final = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d)")
_hash: Final = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{48}\b")
_body: Final = ParagraphStyle("body", fontName="Helvetica", fontSize=9, leading=12)
_label: Final = ParagraphStyle("label", parent=_body, textColor=grey)
_small: Final = ParagraphStyle("small", fontName="Helvetica", fontSize=7, leading=8.5)
_head: Final = ParagraphStyle("head", parent=_small, fontName="Helvetica-Bold", textColor=white)
_title: Final = ParagraphStyle("title", fontName="Helvetica-Bold", fontSize=18, leading=24)
_part: Final = ParagraphStyle("part", fontName="Helvetica-Bold", fontSize=12, leading=22, spaceBefore=10)


def pdf(report: Report) -> bytes:
    """The document's bytes."""
    out = io.BytesIO()
    size = landscape(A4)
    document = SimpleDocTemplate(out, pagesize=size, leftMargin=margin, rightMargin=margin, topMargin=margin, bottomMargin=48, invariant=1)
    document.title, document.author = report.title, "medshard"
    width = size[0] - 2 * margin - 2 * padding
    story: list[Any] = [
        _paragraph(report.title, _title),
        _paragraph(f"{report.period[:1].upper()}{report.period[1:]}. Made {moment(report.made)} UTC.", _body),
        Spacer(0, 8),
        _facts(report.facts, width),
    ]
    for chart in report.charts:
        if chart.values:
            story += [Spacer(0, 8), _chart(chart, width)]
    for table in report.tables:
        story += [CondPageBreak(90), _paragraph(table.title, _part), _table(table, width)]
    story += [Spacer(0, 10), _paragraph(_NOTE, _body)]
    foot = f"medshard report: {latin(report.title)}, made {moment(report.made)} UTC"
    document.build(story, canvasmaker=partial(Numbered, foot=foot[:120], left=margin + padding))
    return out.getvalue()


def _paragraph(text: str, style: ParagraphStyle) -> Paragraph:
    told = (f'<font name="{font}">{escape(piece)}</font>' if font else escape(piece) for font, piece in runs(text))
    return Paragraph("".join(told), style)


def _facts(facts: tuple[tuple[str, str], ...], width: float) -> Any:
    lines = [[_paragraph(f"{name[:1].upper()}{name[1:]}", _label), _paragraph(value, _body)] for name, value in facts]
    style = [("LEFTPADDING", (0, 0), (0, -1), 0), ("VALIGN", (0, 0), (-1, -1), "TOP")]
    style += [(f"{side}PADDING", (0, 0), (-1, -1), 0) for side in ("TOP", "BOTTOM")]
    return LongTable(lines, colWidths=[310, width - 310], style=TableStyle(style), hAlign="LEFT") if lines else Spacer(0, 0)


def _table(table: Table, width: float) -> Any:
    if not table.rows:
        return _paragraph("None.", _body)
    cells = [[_cell(cell, len(table.columns)) for cell in row] for row in table.rows[:rows_max]]
    if len(table.rows) > rows_max:
        rest = f"and {len(table.rows) - rows_max:,} more: see the CSV or the JSON"
        cells.append([rest, *("" for _ in table.columns[1:])])
    heads = [name[:30] for name in table.columns]
    lines = [[_paragraph(name, _head) for name in heads], *([_paragraph(cell, _small) for cell in row] for row in cells)]
    laid = LongTable(lines, colWidths=_widths(heads, cells, width), repeatRows=1, splitInRow=1, hAlign="LEFT")
    style = [
        ("BACKGROUND", (0, 0), (-1, 0), accent),
        ("ROWBACKGROUNDS", (0, 1), (-1, -1), [white, pale]),
        ("VALIGN", (0, 0), (-1, -1), "TOP"),
        ("TOPPADDING", (0, 0), (-1, -1), 2),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 2),
        ("LEFTPADDING", (0, 0), (-1, -1), padding),
        ("RIGHTPADDING", (0, 0), (-1, -1), padding),
    ]
    if urgent := min(table.urgent, len(cells)):
        style.append(("BACKGROUND", (0, 1), (-1, urgent), alert))
    laid.setStyle(TableStyle(style))
    return laid


def _cell(text: str, columns: int) -> str:
    text = _time.sub("\\1\u00a0\\2", text)  # kept on one line
    if columns > few_columns:
        text = _hash.sub(r"\1…", text)
    return text if len(text) <= cell_chars_max else f"{text[: cell_chars_max - 1]}…"


def _widths(heads: list[str], cells: list[list[str]], width: float) -> list[float]:
    """Of each column: as wide as its widest cell if all fit, else no narrower than its longest word, as far as that can be."""
    want, need = list[float](), list[float]()
    for at, head in enumerate(heads):
        texts = {row[at] for row in cells}
        words = {word for text in texts for word in text.split(" ")}
        title = max(_wide(word, _head) for word in head.split(" "))
        need.append(min(max([title, *(_wide(word, _small) for word in words)]), wide) + 2 * padding + 1)
        want.append(max(need[at], min(max([_wide(head, _head), *(_wide(text, _small) for text in texts)]), wide) + 2 * padding + 1))
    if sum(want) <= width:
        return [each * width / sum(want) for each in want]
    if sum(need) >= width:
        return [each * width / sum(need) for each in need]
    spare, missing = width - sum(need), sum(want) - sum(need)
    return [least + spare * (most - least) / missing for least, most in zip(need, want, strict=True)]


def _wide(text: str, style: ParagraphStyle) -> float:
    return width_of(text, style.fontName, style.fontSize)


def _chart(bars: Bars, width: float) -> Drawing:
    values = bars.values[::-1]
    height = 26 + 13 * len(values)
    drawing = Drawing(width, height)
    drawing.add(String(0, height - 10, latin(bars.title), fontName="Helvetica-Bold", fontSize=10))
    chart = HorizontalBarChart()
    chart.x, chart.y, chart.width, chart.height = 150, 2, width - 260, height - 22
    chart.data = [[value for _, value in values]]
    chart.categoryAxis.visibleLabels = 0
    chart.categoryAxis.strokeColor = grey
    chart.categoryAxis.visibleTicks = 0
    chart.valueAxis.valueMin = 0
    chart.valueAxis.visible = False
    chart.bars[0].fillColor = accent
    chart.bars[0].strokeColor = None
    chart.barLabels.boxAnchor = "w"
    chart.barLabels.nudge = 4
    chart.barLabels.fontSize = 8
    chart.barLabelFormat = lambda value: f"{value:,g}{f' {bars.unit}' if bars.unit else ''}"
    drawing.add(chart)
    step = chart.height / len(values)
    for number, (name, _) in enumerate(values):
        _name_bar(drawing, name, chart.x - 4, chart.y + (number + 0.5) * step - 3)
    return drawing


def _name_bar(drawing: Drawing, name: str, right: float, y: float) -> None:
    """Write a bar's name to the left of it, as much as has room."""
    text = name
    while width_of(text, "Helvetica", 8) > right:
        name = name[:-1]
        text = f"{name}…"
    x = right - width_of(text, "Helvetica", 8)
    for font, piece in runs(text):
        drawing.add(String(x, y, piece, fontName=font or "Helvetica", fontSize=8))
        x += float(stringWidth(piece, font or "Helvetica", 8))


_NOTE: Final = (
    "What is said of access and grants comes from a log that a quorum of institutions cosigned; names of people are this vault's own. "
    "The report supports a review and certifies nothing: see docs/compliance.md."
)
