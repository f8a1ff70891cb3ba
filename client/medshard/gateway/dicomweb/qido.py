"""QIDO-RS: searches for studies, series and instances (PS3.18 section 10.6).

Law: a query string in, a ``Query`` of the archive out, and its rows as DICOM JSON. Attributes that the archive does not know are not
searched by: a key that cannot be honoured is an error, as a match that it would have ruled out must not be shown as one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Final

from aiohttp import web
from multidict import MultiMapping
from pydicom.datadict import tag_for_keyword

from medshard.gateway import tags
from medshard.gateway.archive import Archive
from medshard.gateway.dicomweb import datasets
from medshard.gateway.dicomweb.http import datasets_answer, dumped, form_of, path_of, uids
from medshard.gateway.model import Query, Row
from medshard.gateway.tags import Level
from medshard_protocol.errors import Malformed

results_max: Final = 10_000  # without a limit of the client's own
value_length_max: Final = 1_024
_special: Final = frozenset(("limit", "offset", "fuzzymatching", "includefield", "emptyvaluematching", "multiplevaluematching", "accept"))
_levels: Final = {"studies": Level.STUDY, "series": Level.SERIES, "instances": Level.INSTANCE}
# PS3.18 tables 10.6.3-3 to 10.6.3-5: what is returned without being asked for, of what the archive knows
_of_study: Final = (
    0x00080020, 0x00080030, 0x00080050, tags.MODALITIES_IN_STUDY, 0x00080090, 0x00080201, 0x00081030, 0x00100010, tags.PATIENT_ID,
    0x00100030, 0x00100040, tags.STUDY_UID, 0x00200010, tags.STUDY_SERIES, tags.STUDY_INSTANCES,
)  # fmt: skip
_of_series: Final = (
    tags.MODALITY, 0x0008103E, tags.SERIES_UID, 0x00200011, tags.SERIES_INSTANCES, 0x00400244, 0x00400245, 0x00180015, 0x00080021,
)  # fmt: skip
_of_instance: Final = (
    tags.SOP_CLASS, tags.SOP_UID, 0x00200013, 0x00280010, 0x00280011, 0x00280100, 0x00280008, tags.TRANSFER_SYNTAX,
)  # fmt: skip
_shown: Final = {
    Level.STUDY: _of_study,
    Level.SERIES: (tags.STUDY_UID, *_of_series),
    Level.INSTANCE: (tags.STUDY_UID, tags.SERIES_UID, *_of_instance),
}


class Qido:
    """Routes of searches."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def routes(self, prefix: str) -> list[web.RouteDef]:
        """All levels, below a study and a series or not."""
        paths = (
            "/studies", "/series", "/instances", "/studies/{study}/series", "/studies/{study}/instances",
            "/studies/{study}/series/{series}/instances",
        )  # fmt: skip
        return [web.get(prefix + path, self.search) for path in paths]

    async def search(self, request: web.Request) -> web.StreamResponse:
        """Search at the level that the path ends with."""
        form_of(request)  # refuses what cannot be accepted, before anything is looked for
        level = _levels[request.path.rstrip("/").rpartition("/")[2]]
        study, series, _ = uids(request) if "study" in request.match_info else ("", None, None)
        query, wanted, remarks = asked(level, request.query, study, series or "")
        rows = await asyncio.to_thread(lambda: list(self._archive.find(query)))
        limit = (query.limit or results_max + 1) - 1
        if len(rows) > limit:
            rows = rows[:limit]
            remarks.append("there are more results than these: ask again with an offset")
        if not study and level is not Level.STUDY:
            wanted |= {*_of_study, *(_of_series if level is Level.INSTANCE else ())}  # they are nowhere else in the answer
        found = [datasets.of_row(row.attributes, _url(level, row), _fields(level, wanted, row)) for row in rows]
        headers = {"Warning": ", ".join(f'299 medshard "{remark}"' for remark in remarks)} if remarks else {}
        return await datasets_answer(request, dumped(found), headers=headers)


def asked(level: Level, given: MultiMapping[str], study: str = "", series: str = "") -> tuple[Query, set[int], list[str]]:
    """The query, with one result more than is wanted; what else is to be returned (0: everything); remarks. Raises Malformed."""
    keys: dict[int, str] = {}
    remarks: list[str] = []
    for name in given:
        if name in _special:
            continue
        tag = _tag(name)
        if tag is None or tags.level_of(tag) is None:
            raise Malformed(f"{name[:80]!a} is nothing that studies, series or instances are searched by here")
        if (tags.level_of(tag) or Level.PATIENT) > level:
            raise Malformed(f"{name[:80]!a} belongs to a lower level than what is searched for")
        values = given.getall(name)
        text = "\\".join(values) if tag in (tags.STUDY_UID, tags.SERIES_UID, tags.SOP_UID) else values[-1]
        if len(text) > 64 * value_length_max:
            raise Malformed(f"{name[:80]!a} has more than 64 KiB")
        keys[tag] = text.replace(",", "\\") if tag in (tags.STUDY_UID, tags.SERIES_UID, tags.SOP_UID) else text
    keys |= {tag: uid for tag, uid in ((tags.STUDY_UID, study), (tags.SERIES_UID, series)) if uid}
    if given.get("fuzzymatching", "false").lower() == "true":
        remarks.append("the fuzzymatching parameter is not supported: only literal matching has been performed")
    wanted: set[int] = set()
    for field in (each.strip() for text in given.getall("includefield", []) for each in text.split(",")):
        tag = 0 if field.lower() == "all" else _tag(field)
        if tag is not None:
            wanted.add(tag)
    limit = min(_count(given, "limit", results_max), results_max)
    return Query(level, keys, limit + 1, _count(given, "offset", 0)), wanted, remarks


def _fields(level: Level, wanted: Iterable[int], row: Row) -> set[int]:
    extra = set(wanted)
    known = row.attributes.keys() if 0 in extra else ()
    return {*_shown[level], *(tag for tag in extra if tags.level_of(tag) is not None), *known}


def _url(level: Level, row: Row) -> str:
    return path_of(row.study, row.series if level >= Level.SERIES else None, row.uid if level >= Level.INSTANCE else None)


def _tag(name: str) -> int | None:
    """A tag as eight hexadecimal digits or a keyword; one inside a sequence is none of ours."""
    if len(name) == 8 and all(letter in "0123456789abcdefABCDEF" for letter in name):
        return int(name, 16)
    return tag_for_keyword(name)


def _count(given: Mapping[str, str], name: str, otherwise: int) -> int:
    text = given.get(name, "")
    if not text:
        return otherwise
    if not text.isdecimal() or len(text) > 9:
        raise Malformed(f"{name} is no number")
    return int(text)
