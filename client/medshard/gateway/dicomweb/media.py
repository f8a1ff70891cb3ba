"""What a client accepts, and what it gets: PS3.18 sections 8.7.3 to 8.7.8.

Law: header text in, a choice out. Ranges are taken in the order of their weight; of two that weigh the same, the one named first. A media
type of a DICOM web service may carry a transfer syntax; ``*`` stands for whatever is stored, and none for Explicit VR Little Endian.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

accept_bytes_max: Final = 4_096
ranges_max: Final = 32

DICOM: Final = "application/dicom"
JSON: Final = "application/dicom+json"
XML: Final = "application/dicom+xml"
OCTETS: Final = "application/octet-stream"
MULTIPART: Final = "multipart/related"

explicit_le: Final = "1.2.840.10008.1.2.1"
# PS3.18 table 8.7.3-2 and following: which media type a compressed frame has by itself
media_of_syntax: Final = {
    "1.2.840.10008.1.2.4.50": "image/jpeg",
    "1.2.840.10008.1.2.4.51": "image/jpeg",
    "1.2.840.10008.1.2.4.57": "image/jpeg",
    "1.2.840.10008.1.2.4.70": "image/jpeg",
    "1.2.840.10008.1.2.4.80": "image/jls",
    "1.2.840.10008.1.2.4.81": "image/jls",
    "1.2.840.10008.1.2.4.90": "image/jp2",
    "1.2.840.10008.1.2.4.91": "image/jp2",
    "1.2.840.10008.1.2.4.201": "image/jphc",
    "1.2.840.10008.1.2.4.202": "image/jphc",
    "1.2.840.10008.1.2.4.203": "image/jphc",
    "1.2.840.10008.1.2.4.110": "image/jxl",
    "1.2.840.10008.1.2.4.111": "image/jxl",
    "1.2.840.10008.1.2.4.112": "image/jxl",
    "1.2.840.10008.1.2.5": "image/dicom-rle",
    "1.2.840.10008.1.2.4.100": "video/mpeg2",
    "1.2.840.10008.1.2.4.101": "video/mpeg2",
    "1.2.840.10008.1.2.4.102": "video/mp4",
    "1.2.840.10008.1.2.4.103": "video/mp4",
    "1.2.840.10008.1.2.4.104": "video/mp4",
    "1.2.840.10008.1.2.4.105": "video/mp4",
    "1.2.840.10008.1.2.4.106": "video/mp4",
    "1.2.840.10008.1.2.4.107": "video/H265",
    "1.2.840.10008.1.2.4.108": "video/H265",
}
_word: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z/-]+"
_parameter: Final = re.compile(rf'\s*;\s*({_word})\s*=\s*("(?:[^"\\]|\\.)*"|[^;,\s]*)')
_type: Final = re.compile(rf"\s*({_word})")


@dataclass(frozen=True, slots=True)
class Range:
    """One media range: of a multipart, what its parts are. ``syntax`` is empty where the client does not say."""

    media: str
    multipart: bool = False
    syntax: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Choice:
    """What is sent: parts of ``media``, or one body of it. ``syntax`` is the transfer syntax to send, empty for as it is stored."""

    media: str
    multipart: bool
    syntax: str = ""
    as_stored: bool = field(default=False)


class BadAccept(ValueError):
    """An Accept header that is none."""


def parsed(header: str) -> list[Range]:
    """The ranges of an Accept header, best first. An empty one accepts everything. Raises BadAccept."""
    if len(header) > accept_bytes_max:
        raise BadAccept("an Accept header of more than 4 KiB")
    ranges: list[Range] = []
    at = 0
    while at < len(header):
        match = _type.match(header, at)
        if not match:
            raise BadAccept(f"not a media type: {header[at : at + 60]!r}")
        media, at = match[1].lower(), match.end()
        parameters: dict[str, str] = {}
        while match := _parameter.match(header, at):
            value = re.sub(r"\\(.)", r"\1", match[2][1:-1]) if match[2].startswith('"') else match[2]
            parameters[match[1].lower()], at = value.strip(), match.end()
        ranges.append(_range(media, parameters))
        rest = header[at:].lstrip()
        if rest and not rest.startswith(","):
            raise BadAccept(f"not a parameter: {rest[:60]!r}")
        at = len(header) - len(rest) + 1 if rest else len(header)
        if len(ranges) > ranges_max:
            raise BadAccept("more than 32 media ranges")
    return sorted((each for each in ranges or [Range("*/*")] if each.weight > 0), key=lambda each: -each.weight)


def _range(media: str, parameters: dict[str, str]) -> Range:
    try:
        weight = float(parameters.get("q", "1"))
    except ValueError:
        raise BadAccept(f"not a weight: {parameters['q'][:20]!r}") from None
    multipart = media in (MULTIPART, "multipart/*")
    inner = parameters.get("type", "*/*").lower() if multipart else media
    return Range(inner, multipart, parameters.get("transfer-syntax", ""), weight)


def fits(wanted: str, media: str) -> bool:
    """Whether a range such as ``image/*`` lets a media type through."""
    return wanted in ("*/*", "*", media) or (wanted.endswith("/*") and media.startswith(wanted[:-1]))


def for_instances(ranges: Sequence[Range], stored: Iterable[str], decodable: Iterable[str]) -> Choice | None:
    """How to send whole instances that are stored in these transfer syntaxes; None where none of the ranges can be met."""
    stored, decodable = set(stored), set(decodable)
    for each in ranges:
        if not fits(each.media, DICOM):
            continue
        multipart = each.multipart or each.media != DICOM
        syntax = each.syntax or explicit_le
        if syntax == "*" or stored == {syntax}:
            return Choice(DICOM, multipart, as_stored=True)
        if syntax == explicit_le and stored <= decodable | {explicit_le}:
            return Choice(DICOM, multipart, explicit_le)
    return None


def for_frames(ranges: Sequence[Range], stored: str, decodable: Iterable[str], native: Iterable[str]) -> Choice | None:
    """How to send frames that are stored in one transfer syntax; None where none of the ranges can be met."""
    compressed = stored not in set(native)
    can_decode = stored in set(decodable)
    own = media_of_syntax.get(stored, OCTETS) if compressed else OCTETS
    for each in ranges:
        everything = each.media in ("*/*", "*")
        multipart = each.multipart or everything
        if compressed and each.syntax in ("*", stored) and (fits(each.media, own) or each.media == OCTETS):
            return Choice(own if fits(each.media, own) and not everything else OCTETS, multipart, stored, as_stored=True)
        if compressed and not each.syntax and not everything and each.media != OCTETS and fits(each.media, own):
            return Choice(own, multipart, stored, as_stored=True)
        if fits(each.media, OCTETS) and each.syntax in ("", explicit_le, "*") and (not compressed or (can_decode and each.syntax != "*")):
            return Choice(OCTETS, multipart, explicit_le, as_stored=not compressed)
    return None


def for_pictures(ranges: Sequence[Range], offered: Sequence[str], *, single: bool) -> Choice | None:
    """How to send pictures, one or several; None where none of the ranges can be met. Several go out as a multipart alone."""
    for each in ranges:
        for media in offered:
            if fits(each.media, media) and (each.multipart or single or each.media in ("*/*", "*")):
                return Choice(media, each.multipart or not single)
    return None


def first_of(ranges: Sequence[Range], offered: Sequence[str]) -> str | None:
    """The first of the media types offered that the best range lets through."""
    for each in ranges:
        if not each.multipart:
            for media in offered:
                if fits(each.media, media):
                    return media
    return None
