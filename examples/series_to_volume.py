"""Load a CT or MR series out of medshard into a NumPy volume, slices in the order in which they lie in the patient.

    pip install 'medshard[fsspec,dicom]'
    export MEDSHARD_HOME=/tmp/trial/vault
    python series_to_volume.py                          # lists the studies and series
    python series_to_volume.py STUDY_UID SERIES_UID     # loads one

Nothing is written to disk, and the ledger says that the series was read, for research.
"""

from __future__ import annotations

import sys
from typing import Any

import fsspec
import numpy as np
import pydicom
from numpy.typing import NDArray


def load_series(study: str, series: str, **options: Any) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """(volume of shape (slices, rows, columns) in the modality's units, spacing between voxels along the same axes in mm)."""
    fs = fsspec.filesystem("medshard", purpose="research", **options)
    slices = []
    for path in fs.ls(f"studies/{study}/{series}", detail=False):
        with fs.open(path) as file:
            dataset = pydicom.dcmread(file)
        if "ImagePositionPatient" in dataset and "PixelData" in dataset:
            slices.append(dataset)
    if not slices:
        raise SystemExit("there are no slices in this series")
    row, column = np.reshape([float(each) for each in slices[0].ImageOrientationPatient], (2, 3))
    normal = np.cross(row, column)
    slices.sort(key=lambda each: float(np.dot(normal, [float(place) for place in each.ImagePositionPatient])))
    volume = np.stack([_values(each) for each in slices])
    places = [np.dot(normal, [float(place) for place in each.ImagePositionPatient]) for each in slices]
    thickness = float(np.median(np.diff(places))) if len(places) > 1 else float(slices[0].get("SliceThickness", 1))
    return volume, np.array([thickness, *(float(each) for each in slices[0].PixelSpacing)])


def _values(dataset: pydicom.Dataset) -> NDArray[np.float32]:
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    return dataset.pixel_array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def main() -> None:
    """List what there is, or load what is named and say what it is."""
    if len(sys.argv) == 3:
        volume, spacing = load_series(*sys.argv[1:])
        print(f"{volume.shape} voxels of {' x '.join(f'{each:.3f}' for each in spacing)} mm, from {volume.min():g} to {volume.max():g}")
        return
    fs = fsspec.filesystem("medshard")
    for study in fs.ls("studies", detail=False):
        for series in fs.ls(study, detail=False):
            print(f"{series.removeprefix('studies/').replace('/', ' ')}  ({len(fs.ls(series))} instances)")


if __name__ == "__main__":
    main()
