"""A report as a PDF with its charts. Same report, same pages: nothing else goes in.

Law: all text is escaped before it reaches the layout, so no name of a file or a person is taken for markup.
"""

from __future__ import annotations

import io
from typing import Any, Final
from xml.sax.saxutils import escape

from reportlab.graphics.charts.barcharts import HorizontalBarChart
from reportlab.graphics.shapes import Drawing, String
from reportlab.lib.colors import HexColor, black, white
from reportlab.lib.pagesizes import A4, landscape
from reportlab.lib.styles import ParagraphStyle
from reportlab.platypus import LongTable, Paragraph, SimpleDocTemplate, Spacer, TableStyle

from medshard.proofpage import latin
from medshard.reports.model import Bars, Report, Table, moment

accent: Final = HexColor("#1f5f8b")
pale: Final = HexColor("#eef3f7")
grey: Final = HexColor("#555555")
rows_max: Final = 2_000  # on paper; CSV and JSON have all of them
cell_chars_max: Final = 300
_body: Final = ParagraphStyle("body", fontName="Helvetica", fontSize=9, leading=12)
_small: Final = ParagraphStyle("small", fontName="Helvetica", fontSize=7, leading=8.5, wordWrap="CJK")
_head: Final = ParagraphStyle("head", parent=_small, fontName="Helvetica-Bold", textColor=white)
_title: Final = ParagraphStyle("title", fontName="Helvetica-Bold", fontSize=18, leading=24)
_part: Final = ParagraphStyle("part", fontName="Helvetica-Bold", fontSize=12, leading=20)


def pdf(report: Report) -> bytes:
    """The document's bytes."""
    out = io.BytesIO()
    size = landscape(A4)
    document = SimpleDocTemplate(out, pagesize=size, leftMargin=42, rightMargin=42, topMargin=42, bottomMargin=42, invariant=1)
    document.title, document.author = report.title, "medshard"
    width = size[0] - 84
    story: list[Any] = [
        _paragraph(report.title, _title),
        _paragraph(f"{report.period}. Made {moment(report.made)} UTC.", _body),
        Spacer(0, 8),
    ]
    story += [_paragraph(f"{name}: {value}", _body) for name, value in report.facts]
    for chart in report.charts:
        if chart.values:
            story += [Spacer(0, 8), _chart(chart, width)]
    for table in report.tables:
        story += [_paragraph(table.title, _part), _table(table, width)]
    story += [Spacer(0, 10), _paragraph(_NOTE, _body)]
    document.build(story, onFirstPage=_foot, onLaterPages=_foot)
    return out.getvalue()


def _paragraph(text: str, style: ParagraphStyle) -> Paragraph:
    return Paragraph(escape(latin(text)), style)


def _table(table: Table, width: float) -> Any:
    if not table.rows:
        return _paragraph("None.", _body)
    lines: list[list[Paragraph]] = [[_paragraph(name[:30], _head) for name in table.columns]]
    lines += [[_paragraph(cell[:cell_chars_max], _small) for cell in row] for row in table.rows[:rows_max]]
    if len(table.rows) > rows_max:
        rest = f"and {len(table.rows) - rows_max} more: see the CSV or the JSON"
        lines.append([_paragraph(rest, _small), *[_paragraph("", _small) for _ in table.columns[1:]]])
    longest = [
        max(6, min(len(name), 30), *(min(len(row[at]), 44) for row in table.rows[:200])) + 2 for at, name in enumerate(table.columns)
    ]
    laid = LongTable(lines, colWidths=[width * each / sum(longest) for each in longest], repeatRows=1, splitInRow=1)
    laid.setStyle(
        TableStyle(
            [
                ("BACKGROUND", (0, 0), (-1, 0), accent),
                ("ROWBACKGROUNDS", (0, 1), (-1, -1), [white, pale]),
                ("VALIGN", (0, 0), (-1, -1), "TOP"),
                ("TOPPADDING", (0, 0), (-1, -1), 2),
                ("BOTTOMPADDING", (0, 0), (-1, -1), 2),
            ]
        )
    )
    return laid


def _chart(bars: Bars, width: float) -> Drawing:
    values = bars.values[::-1]
    height = 26 + 13 * len(values)
    drawing = Drawing(width, height)
    drawing.add(String(0, height - 10, latin(bars.title), fontName="Helvetica-Bold", fontSize=10))
    chart = HorizontalBarChart()
    chart.x, chart.y, chart.width, chart.height = 150, 2, width - 260, height - 22
    chart.data = [[value for _, value in values]]
    chart.categoryAxis.categoryNames = [latin(name)[:28] for name, _ in values]
    chart.categoryAxis.labels.fontSize = 8
    chart.categoryAxis.strokeColor = black
    chart.valueAxis.valueMin = 0
    chart.valueAxis.visible = False
    chart.bars[0].fillColor = accent
    chart.bars[0].strokeColor = None
    chart.barLabels.nudge = 14
    chart.barLabels.fontSize = 8
    chart.barLabelFormat = lambda value: f"{value:g}{f' {bars.unit}' if bars.unit else ''}"
    drawing.add(chart)
    return drawing


def _foot(canvas: Any, document: Any) -> None:
    canvas.setFillColor(grey)
    canvas.setFont("Helvetica", 7)
    canvas.drawString(42, 24, f"medshard report, page {document.page}")


_NOTE: Final = (
    "What is said of access and grants comes from a log that a quorum of institutions cosigned; names of people are this vault's own. "
    "The report supports a review and certifies nothing: see docs/compliance.md."
)
