"""Data sets as XML: the Native DICOM Model of PS3.19 section A.1, made of their DICOM JSON (PS3.18 annex F), which says the same.

Law: values in, bytes out. Characters that XML cannot have are replaced, as no document could be read with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final
from xml.sax.saxutils import escape, quoteattr

from pydicom.datadict import keyword_for_tag

from medshard.gateway.dicomweb.datasets import Json

_declaration: Final = '<?xml version="1.0" encoding="UTF-8"?>\n'
_root: Final = '<NativeDicomModel xmlns="http://dicom.nema.org/PS3.19/models/NativeDICOM" xml:space="preserve">'
_parts: Final = ("FamilyName", "GivenName", "MiddleName", "NamePrefix", "NameSuffix")
_groups: Final = ("Alphabetic", "Ideographic", "Phonetic")
_impossible: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def document(dataset: Json) -> bytes:
    """One data set."""
    return "".join([_declaration, _root, *_attributes(dataset), "</NativeDicomModel>\n"]).encode()


def _attributes(dataset: Json) -> Iterator[str]:
    for tag, said in dataset.items():
        creator = _creator(dataset, tag)
        about = f" privateCreator={quoteattr(_clean(creator))}" if creator else ""
        if keyword := _keyword(tag):
            about += f' keyword="{keyword}"'
        yield f'<DicomAttribute tag="{tag}" vr="{said["vr"]}"{about}>'
        yield from _value(said)
        yield "</DicomAttribute>"


def _value(said: Json) -> Iterator[str]:
    if "BulkDataURI" in said:
        yield f"<BulkData uri={quoteattr(said['BulkDataURI'])}/>"
    if "InlineBinary" in said:
        yield f"<InlineBinary>{said['InlineBinary']}</InlineBinary>"
    for number, value in enumerate(said.get("Value", ()), 1):
        if said["vr"] == "SQ":
            yield f'<Item number="{number}">'
            yield from _attributes(value or {})
            yield "</Item>"
        elif value is None:
            continue
        elif said["vr"] == "PN":
            yield f'<PersonName number="{number}">{"".join(_name(value))}</PersonName>'
        else:
            yield f'<Value number="{number}">{_text(value)}</Value>'


def _name(value: Json) -> Iterator[str]:
    for group in _groups:
        if text := value.get(group):
            parts = zip(_parts, text.split("^"), strict=False)
            yield f"<{group}>{''.join(f'<{name}>{_text(part)}</{name}>' for name, part in parts if part)}</{group}>"


def _creator(dataset: Json, tag: str) -> str:
    """Who a private element belongs to: what the creator element of its block says."""
    if int(tag[3], 16) % 2 == 0 or tag[4:6] == "00":
        return ""
    values = dataset.get(f"{tag[:4]}00{tag[4:6]}", {}).get("Value") or [""]
    return str(values[0] or "")


@lru_cache(4096)
def _keyword(tag: str) -> str:
    return keyword_for_tag(int(tag, 16))


def _text(value: Any) -> str:
    return escape(_clean(str(value)), {"\r": "&#13;"})  # or whoever reads it takes CR LF for LF


def _clean(text: str) -> str:
    return _impossible.sub("\ufffd", text)
