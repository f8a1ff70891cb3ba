"""The process in which PDF files are opened, because some are made to hang or to swell.

Law: runs alone, under limits that it sets itself, on pypdf and the standard library; it sees one PDF after the other on its
standard input (8-byte big-endian length, bytes) and answers each with one line of JSON. It writes no file. Whoever starts it
(medshard.policies.attributes) holds the clock and kills it when the answer does not come.
"""

from __future__ import annotations

import io
import json
import resource
import struct
import sys
import time
from contextlib import suppress
from typing import BinaryIO

memory_bytes_max = 768 * 2**20  # Python and pypdf take 100 MiB of address space, the file up to 64 MiB
cpu_seconds_max = 3  # for one file; a usual policy takes 5 ms


def main() -> None:
    """Answer until standard input ends."""
    _limit(resource.RLIMIT_AS, memory_bytes_max)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(8)) == 8:
        data = _take(source, struct.unpack(">Q", head)[0])
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + cpu_seconds_max + 1, resource.RLIM_INFINITY))
        answers.write(json.dumps(read(data)).encode() + b"\n")
        answers.flush()


def read(data: bytes) -> dict[str, str]:
    """Read title, author and dates. An unreadable file gives a ``problem``; a password-protected one gives nothing."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError, FileNotDecryptedError
    except ImportError:
        return {"problem": "title and dates not read: install medshard[dicom]"}
    try:
        document = PdfReader(io.BytesIO(data), strict=False)
        if document.is_encrypted and not document.decrypt(""):
            return {}
        return _information(document) or _metadata_stream(document)
    except (FileNotDecryptedError, DependencyError):
        return {}
    except MemoryError:
        return {"problem": "needs too much memory to open"}
    except Exception as error:
        return {"problem": f"broken inside ({type(error).__name__}: {str(error)[:120]})"}


def _information(document) -> dict[str, str]:  # type: ignore[no-untyped-def] # pypdf is imported late
    information = document.metadata
    if information is None:
        return {}
    found = {"title": information.title, "author": information.author}
    for name in ("created", "modified"):
        with suppress(ValueError, TypeError, AttributeError):
            date = information.creation_date if name == "created" else information.modification_date
            found[name] = date.isoformat(timespec="seconds")
    return {name: str(value) for name, value in found.items() if value}


def _metadata_stream(document) -> dict[str, str]:  # type: ignore[no-untyped-def]
    xmp = document.xmp_metadata  # PDF 2.0 deprecates the information dictionary in its favour
    if xmp is None:
        return {}
    titles = xmp.dc_title or {}
    found = {"title": titles.get("x-default") or next(iter(titles.values()), ""), "author": ", ".join(xmp.dc_creator or ())}
    for name, date in (("created", xmp.xmp_create_date), ("modified", xmp.xmp_modify_date)):
        if date:
            found[name] = date.isoformat(timespec="seconds")
    return {name: str(value) for name, value in found.items() if value}


def _take(source: BinaryIO, size: int) -> bytes:
    data = source.read(size)
    if len(data) < size:
        raise SystemExit  # whoever asked is gone
    return data


def _limit(what: int, most: int) -> None:
    with suppress(ValueError, OSError):  # macOS knows no limit on address space
        resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    main()
