"""From a stored frame to native pixels, and to a picture that people look at (PS3.18 section 10.4.1.1.3 and 8.3.5).

A frame is decoded by itself: the head of its file and the frame's own bytes make a data set of one frame, which pydicom decodes with
GDCM or Pillow. Nothing else of a large object is touched.

Law: bytes in, bytes out; blocking, and CPU work: call it from a thread. What cannot be decoded raises ``Malformed``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut, convert_color_space

from medshard_protocol.errors import Malformed

picture_side_max: Final = 8_192
quality_default: Final = 90
thumbnail_side: Final = 128
pixels_max: Final = 256 * 1024 * 1024  # of one frame, decoded


@dataclass(frozen=True, slots=True)
class Look:
    """How a picture is to be made: its size, a part of it, a window, a quality."""

    media: str = "image/jpeg"
    width: int = 0
    height: int = 0
    region: tuple[float, float, float, float] | None = None  # x, y, width, height in the source's pixels
    window: tuple[float, float, str] | None = None  # centre, width, function
    quality: int = quality_default


def native(head: bytes, frame: bytes, *, encapsulated: bool) -> bytes:
    """A frame's pixels, little endian, in the colours and the order of planes that its attributes say. Raises Malformed."""
    dataset = _one_frame(head, frame, encapsulated=encapsulated)
    try:
        pixels = _decoded(dataset, raw=True)
    except Exception as error:
        raise Malformed(f"the frame cannot be decoded here ({type(error).__name__})") from None
    if pixels.ndim == 3 and int(dataset.get("PlanarConfiguration", 0) or 0) == 1:
        pixels = pixels.transpose(2, 0, 1)  # as the instance's own attributes say
    return np.ascontiguousarray(pixels).astype(pixels.dtype.newbyteorder("<"), copy=False).tobytes()


def picture(head: bytes, frame: bytes, look: Look, *, encapsulated: bool) -> bytes:
    """A frame as JPEG or PNG. Raises Malformed."""
    try:
        dataset = _one_frame(head, frame, encapsulated=encapsulated)
        image = Image.fromarray(_shown(dataset, look))
    except Malformed:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise Malformed(f"no picture can be made of it here ({type(error).__name__})") from None
    image = _fitted(image, look)
    out = BytesIO()
    if look.media == "image/png":
        image.save(out, "PNG", compress_level=1)
    else:
        image.save(out, "JPEG", quality=look.quality)
    return out.getvalue()


def _one_frame(head: bytes, frame: bytes, *, encapsulated: bool) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(BytesIO(head), force=True, stop_before_pixels=True)
        size = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("SamplesPerPixel", 1)) * -(-int(dataset.BitsAllocated) // 8)
        if size > pixels_max:
            raise Malformed("a frame of more than 256 MiB")
        for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
            if name in dataset:
                del dataset[name]
        dataset.NumberOfFrames = 1
        dataset.PixelData = encapsulate([frame]) if encapsulated else frame + b"\0" * (len(frame) % 2)
        dataset["PixelData"].VR = "OB" if encapsulated or dataset.BitsAllocated <= 8 else "OW"
        if encapsulated:
            dataset["PixelData"].is_undefined_length = True
    return dataset


def _decoded(dataset: Dataset, *, raw: bool) -> NDArray[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.pixel_array_options(raw=raw)
        pixels: NDArray[Any] = dataset.pixel_array
    return pixels


def _shown(dataset: Dataset, look: Look) -> NDArray[np.uint8]:
    """Pixels as a screen shows them: through the modality's and the window's tables, colours as RGB."""
    pixels = _decoded(dataset, raw=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        photometric = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
        if photometric == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, dataset)
            return (pixels >> 8).astype(np.uint8) if pixels.dtype.itemsize > 1 else pixels.astype(np.uint8)
        if pixels.ndim == 3:
            if photometric.startswith("YBR") and dataset.file_meta.TransferSyntaxUID.is_compressed is False:
                pixels = convert_color_space(pixels, photometric, "RGB")
            return pixels.astype(np.uint8) if pixels.dtype.itemsize == 1 else (pixels >> (int(dataset.BitsStored) - 8)).astype(np.uint8)
        values = apply_modality_lut(pixels, dataset).astype(np.float64)
        if look.window is not None:
            shown = _windowed(values, *look.window)
        elif dataset.get("WindowWidth") or "VOILUTSequence" in dataset:
            shown = _scaled(apply_voi_lut(apply_modality_lut(pixels, dataset), dataset).astype(np.float64), dataset)
        else:
            shown = _stretched(values, values.min(), values.max())
        return (255 - shown if photometric == "MONOCHROME1" else shown).astype(np.uint8)


def _windowed(values: NDArray[np.float64], centre: float, width: float, function: str) -> NDArray[np.float64]:
    """PS3.3 section C.11.2.1.2 and C.11.2.1.3."""
    if function.upper() == "SIGMOID":
        return np.round(255 / (1 + np.exp(-4 * (values - centre) / width)))
    if function.upper() == "LINEAR_EXACT":
        return _stretched(values, centre - width / 2, centre + width / 2)
    return _stretched(values, centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)


def _scaled(values: NDArray[np.float64], dataset: Dataset) -> NDArray[np.float64]:
    """What a VOI table gives has the range of the stored values."""
    bits = int(dataset.BitsStored)
    if "VOILUTSequence" in dataset:
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return _stretched(values, 0, 2**bits - 1)
    slope, intercept = float(dataset.get("RescaleSlope", 1) or 1), float(dataset.get("RescaleIntercept", 0) or 0)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0, 2**bits - 1)
    return _stretched(values, low * slope + intercept, high * slope + intercept)


def _stretched(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return np.round(np.clip((values - low) / max(high - low, 1e-9), 0, 1) * 255)


def _fitted(image: Image.Image, look: Look) -> Image.Image:
    if look.region is not None:
        x, y, width, height = look.region
        mirrored = (width < 0, height < 0)
        box = (int(x), int(y), int(x + abs(width)), int(y + abs(height)))
        image = image.crop(box)
        if mirrored[0]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if mirrored[1]:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if look.width or look.height:
        wide, high = look.width or picture_side_max, look.height or picture_side_max
        scale = min(wide / image.width, high / image.height)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BILINEAR)
    return image
