"""The same instance in another transfer syntax: only where a peer does not take it as it is stored.

Law: pixels are decoded by pydicom with GDCM or Pillow, never re-compressed. What cannot be decoded here is said to be so beforehand. Whole
instances pass through memory; whoever retrieves asks only where it must.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Final

import numpy as np
from pydicom import dcmread
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from medshard.gateway.elements import deflated_le, explicit_be, explicit_le, implicit_le
from medshard_protocol.errors import Malformed

targets: Final = (explicit_le, implicit_le)
uncompressed: Final = (explicit_le, implicit_le, explicit_be, deflated_le)
_words: Final = {"OW": "u2", "OL": "u4", "OF": "u4", "OD": "u8", "OV": "u8"}
decodable: Final = frozenset(
    (
        *uncompressed,
        "1.2.840.10008.1.2.5",  # RLE
        "1.2.840.10008.1.2.4.50",  # JPEG baseline, extended, lossless
        "1.2.840.10008.1.2.4.51",
        "1.2.840.10008.1.2.4.57",
        "1.2.840.10008.1.2.4.70",
        "1.2.840.10008.1.2.4.80",  # JPEG-LS
        "1.2.840.10008.1.2.4.81",
        "1.2.840.10008.1.2.4.90",  # JPEG 2000
        "1.2.840.10008.1.2.4.91",
    )
)


def transcoded(file: bytes, syntax: str) -> bytes:
    """The data set of a file in explicit or implicit little endian. Blocking. Raises Malformed where it cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = dcmread(BytesIO(file), force=True)
            stored = dataset.file_meta.TransferSyntaxUID
            if stored == explicit_be:
                dataset.walk(_swap)
            elif stored not in uncompressed and "PixelData" in dataset:
                dataset.decompress(generate_instance_uid=False)
            out = DicomBytesIO()
            out.is_little_endian, out.is_implicit_VR = True, syntax == implicit_le
            write_dataset(out, dataset)
    except Exception as error:  # decoders raise whatever they like
        raise Malformed(f"cannot be decoded here ({type(error).__name__})") from None
    return bytes(out.getvalue())


def _swap(dataset: Dataset, element: DataElement) -> None:
    """Turn words round that pydicom hands on as the file has them."""
    if element.VR in _words and isinstance(element.value, bytes):
        words = np.frombuffer(element.value, dtype=_words[element.VR])
        element.value = words.byteswap().tobytes()
