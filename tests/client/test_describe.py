"""What a file is: by content first, by name second, and never an exception for a broken one."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from medshard.describe import Described, describe


def told(data: bytes, name: bytes = b"file") -> Described:
    source = io.BytesIO(data)
    described = describe(source, name)
    assert source.tell() == 0
    return described


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        (b"notes.txt", "text/plain"),
        (b"a/b/photo.JPG", "image/jpeg"),
        (b"archive", "application/octet-stream"),
        (b"caf\xe9.png", "image/png"),
        (b"weird.xyz123", "application/octet-stream"),
    ],
)
def test_plain_files_are_named_by_their_ending(name: bytes, media_type: str) -> None:
    described = told(b"some bytes", name)
    assert (described.description.media_type, described.problem) == (media_type, None)
    assert described.description.attributes == {}


@pytest.mark.parametrize("name", [b"x", b"x.dcm", b"x.pdf", b"x.txt"])
def test_an_empty_file_is_no_problem(name: bytes) -> None:
    assert told(b"", name).problem is None


@pytest.mark.parametrize(("name", "kind"), [(b"x.dcm", "DICOM"), (b"x.IMA", "DICOM"), (b"x.pdf", "PDF")])
def test_a_file_that_is_not_what_it_is_called_is_remarked_on(name: bytes, kind: str) -> None:
    described = told(b"just some text, no image and no document", name)
    assert described.description.media_type == "application/octet-stream"
    assert described.problem is not None
    assert kind in described.problem


def test_describing_plain_files_loads_neither_pydicom_nor_pypdf() -> None:
    program = "import io, sys; from medshard.describe import describe; describe(io.BytesIO(b'x'), b'x.txt'); "
    program += "sys.exit('pydicom' in sys.modules or 'pypdf' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
