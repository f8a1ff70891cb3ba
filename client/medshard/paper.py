"""What all PDF pages here share: letters that their fonts have, and a foot with page numbers.

Law: nothing is embedded, so a page stays small. Western letters are in the fonts that every reader has; Korean, Chinese and Japanese names
are written in fonts that readers bring along; of other letters the plain one is shown, and a question mark where there is none.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Final

from reportlab.lib.colors import HexColor
from reportlab.pdfbase.cidfonts import UnicodeCIDFont
from reportlab.pdfbase.pdfmetrics import registerFont, stringWidth
from reportlab.pdfgen.canvas import Canvas

grey: Final = HexColor("#555555")
foot_y: Final = 28
_scripts: Final = {  # in this order: kana tell Japanese from Chinese
    "HYSMyeongJo-Medium": re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]"),
    "HeiseiMin-W3": re.compile("[\u3040-\u30ff]"),
    "STSong-Light": re.compile("[\u2e80-\u9fff\uf900-\ufaff]"),
}
_far: Final = re.compile("[\u1100-\u11ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]")


def latin(text: str) -> str:
    """Text in the letters of the built-in fonts, windows-1252; of others the plain letter, or a question mark."""
    return "".join(map(_letter, text))


def runs(text: str) -> list[tuple[str, str]]:
    """Text in pieces, each with the font that it wants, or none for the built-in ones."""
    font = next((name for name, pattern in _scripts.items() if pattern.search(text)), "")
    if not font:
        return [("", latin(text))]
    registerFont(UnicodeCIDFont(font))
    pieces = re.split(f"({_far.pattern}+)", text)
    return [(font if _far.match(piece) else "", piece if _far.match(piece) else latin(piece)) for piece in pieces if piece]


def width_of(text: str, font: str, size: float) -> float:
    """How many points a text takes, in ``font`` where that has its letters."""
    return sum(float(stringWidth(piece, other or font, size)) for other, piece in runs(text))


class Numbered(Canvas):  # type: ignore[misc] # reportlab is untyped
    """A canvas that writes ``foot`` and "page 2 of 7" under every page, which it knows when all of them are drawn."""

    def __init__(self, *arguments: Any, foot: str, left: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._foot, self._left, self._drawn = foot, left, list[dict[str, Any]]()

    def showPage(self) -> None:  # noqa: N802 - reportlab's name
        """Keep the page until the last one is drawn."""
        self._drawn.append(dict(self.__dict__))
        self._startPage()

    def save(self) -> None:
        """Write all of them."""
        pages = self._drawn
        for number, page in enumerate(pages, 1):
            self.__dict__.update(page)
            self.setFillColor(grey)
            self.setFont("Helvetica", 8)
            self.drawString(self._left, foot_y, self._foot)
            self.drawRightString(self._pagesize[0] - self._left, foot_y, f"page {number} of {len(pages)}")
            super().showPage()
        super().save()


def _letter(letter: str) -> str:
    for candidate in (letter, _strokes.get(letter, ""), unicodedata.normalize("NFKD", letter)[:1]):
        try:
            candidate.encode("cp1252")
        except UnicodeEncodeError:
            continue
        if candidate:
            return candidate
    return "?"


_strokes: Final = {"ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ħ": "h", "Ħ": "H", "ı": "i"}
