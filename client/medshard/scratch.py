"""A folder for plaintext that is on its way from one object to another, gone when the work is over, or when the next work begins.

Law: whoever works in a folder holds a lock on it, which ends with the process, however that ends; a folder that nobody holds is left over
and is removed. It lies in the vault's home, which only its user can read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

prefix: Final = ".sharing-"
new_s: Final = 60.0  # one so young may be about to be locked


@contextlib.contextmanager
def scratch_folder(home: Path) -> Iterator[Path]:
    """A new folder in ``home``; removes what earlier processes left there."""
    remove_left(home)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=home) as place:
        held = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield Path(place)
        finally:
            os.close(held)


def remove_left(home: Path) -> int:
    """Remove the folders of processes that did not come to their end; how many there were."""
    removed = 0
    for path in home.glob(prefix + "*"):
        with contextlib.suppress(OSError):  # it is held, or just being removed by its owner
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(held).st_mtime > new_s:
                    shutil.rmtree(path)
                    removed += 1
            finally:
                os.close(held)
    return removed
