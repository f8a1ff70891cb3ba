"""Data sets as DICOM JSON (PS3.18 annex F): of what the catalog knows, and of whole instances without their bulk data.

Law: values in, JSON out. URLs are written with the marker ``root`` in front, which whoever sends them replaces, as what is kept must not
depend on how the gateway is called. An element that cannot be read is left out; the instance itself is served as it is.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Iterable, Mapping
from io import BytesIO
from typing import Any, Final

import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from medshard.gateway import tags
from medshard.gateway.matching import vr_of

Json = dict[str, Any]
root: Final = "medshard-root:"
bulk_bytes_least: Final = 1_024  # shorter binary values stand in the metadata themselves
depth_max: Final = 16
_binary: Final = frozenset(("OB", "OD", "OF", "OL", "OV", "OW", "UN"))
_whole: Final = frozenset(("IS", "SL", "SS", "UL", "US", "SV", "UV"))
_groups: Final = ("Alphabetic", "Ideographic", "Phonetic")
RETRIEVE_URL: Final = 0x00081190
AVAILABILITY: Final = 0x00080056


def key(tag: int) -> str:
    """A tag as JSON names it."""
    return f"{tag:08X}"


def element(vr: str, *values: Any) -> Json:
    """One attribute. Without a value, there is none in it."""
    return {"vr": vr, "Value": list(values)} if values else {"vr": vr}


def of_text(tag: int, text: str) -> Json:
    """An attribute of the catalog, which keeps its values as DICOM text."""
    vr = vr_of(tag)
    if not text:
        return {"vr": vr}
    if vr == "PN":
        return {"vr": vr, "Value": [_name(each) for each in text.split("\\")]}
    if vr in _whole or vr == "DS":
        return {"vr": vr, "Value": [_number(vr, each) for each in text.split("\\")]}
    return {"vr": vr, "Value": [each or None for each in text.split("\\")]}


def of_row(attributes: Mapping[int, str], url: str, wanted: Iterable[int]) -> Json:
    """One match of a search: what of it was asked for, and where to get it."""
    found = {key(tag): of_text(tag, attributes.get(tag, "")) for tag in wanted}
    found[key(AVAILABILITY)] = element("CS", "ONLINE")
    found[key(RETRIEVE_URL)] = element("UR", root + url)
    return dict(sorted(found.items()))


def of_known(attributes: Mapping[str, str], url: str) -> Json:
    """An instance of which no more can be read than what the catalog has."""
    found = {key(known.tag): of_text(known.tag, text) for name, text in attributes.items() if (known := tags.by_name.get(name))}
    found[key(RETRIEVE_URL)] = element("UR", root + url)
    return dict(sorted(found.items()))


def of_file(head: bytes, url: str, transfer_syntax: str) -> Json:
    """The data set of an instance, from its file up to the pixels; ``url`` is the instance's. Raises whatever pydicom does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(BytesIO(head), force=True)
        found = _dataset(dataset, f"{url}/bulkdata", 0)
    found[key(tags.TRANSFER_SYNTAX)] = element("UI", transfer_syntax)
    found[key(RETRIEVE_URL)] = element("UR", root + url)
    return dict(sorted(found.items()))


def pixels(url: str, vr: str = "OW") -> Json:
    """The pixel data, by reference."""
    return {"vr": vr, "BulkDataURI": f"{root}{url}/bulkdata/7FE00010"}


def _dataset(dataset: Dataset, url: str, depth: int) -> Json:
    found: Json = {}
    if depth > depth_max:
        return found
    for tag in dataset.keys():  # noqa: SIM118 - a data set gives its elements
        if tag.element == 0 or tag.group == 2:
            continue
        try:
            each = dataset[tag]
            found[key(tag)] = _element(each, f"{url}/{key(tag)}", depth)
        except Exception:  # noqa: S112 - a value that is none: pydicom raises half a dozen kinds
            continue
    return found


def _element(each: DataElement, url: str, depth: int) -> Json:
    if each.VR == "SQ":
        return {"vr": "SQ", "Value": [_dataset(item, f"{url}/{number}", depth + 1) for number, item in enumerate(each.value)]}
    if each.VR in _binary:
        value = each.value
        if not value:
            return {"vr": each.VR}
        if not isinstance(value, bytes) or len(value) >= bulk_bytes_least:
            return {"vr": each.VR, "BulkDataURI": root + url}
        return {"vr": each.VR, "InlineBinary": base64.b64encode(value).decode()}
    converted: Json = each.to_json_dict(None, bulk_bytes_least)
    return converted


def _name(text: str) -> Json | None:
    return {group: part for group, part in zip(_groups, text.split("="), strict=False) if part} or None


def _number(vr: str, text: str) -> int | float | str | None:
    try:
        return (int(text) if vr in _whole else float(text)) if text else None
    except ValueError:
        return text  # PS3.18 F.2.3: what is no number may be written as text
