"""Become another program that dies with its parent: ``python tether.py PARENT_PID PROGRAM ARGUMENT...``.

``medshard up`` starts its nodes so. A parent that is killed outright cannot stop its children; on Linux the kernel does it. This stands in
a program of its own because code between fork and exec must not touch a threaded process. It imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def main() -> None:
    """Ask for the signal, make sure that the parent still lives, and become the program."""
    parent = int(sys.argv[1])
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            raise SystemExit(1)  # it went before we asked
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606


if __name__ == "__main__":
    main()
