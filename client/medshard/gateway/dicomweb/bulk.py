"""The value of one element of an instance, by the path that its metadata give: ``00420011``, or ``54000100/0/54001010`` in sequences.

Law: bytes in, bytes out, in little endian. What is not there is ``Absent``.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Final

import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from medshard_protocol.errors import Absent

depth_max: Final = 16


def value_at(file: bytes, path: str) -> bytes:
    """The value. Blocking. Raises Absent."""
    steps = path.strip("/").split("/")
    if len(steps) > 2 * depth_max or len(steps) % 2 == 0:
        raise Absent("there is no such element in it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset: Dataset = pydicom.dcmread(BytesIO(file), force=True)
            for tag, item in zip(steps[:-1:2], steps[1::2], strict=True):
                dataset = dataset[int(tag, 16)].value[int(item)]
            element: DataElement = dataset[int(steps[-1], 16)]
            value = element.value
    except Exception:
        raise Absent("there is no such element in it") from None
    if not isinstance(value, bytes):
        raise Absent("this element is no bulk data: its value is in the metadata")
    return value
