"""Read title, author and dates of a PDF, in a process of its own with a time limit.

Law: a hostile PDF costs at most ``wait_s`` and never this process's memory. One reader process serves all files, one at a
time, and is started anew when it fails; it ends with us. It is never told a file's name.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

from medshard.text import clean

pdf_bytes_max = 64 * 2**20  # larger ones are stored like any file, without title and dates
wait_s = 8.0  # a policy takes 5 ms; starting the reader takes 0.4 s; it gives up by itself after 3 s of CPU
answer_bytes_max = 2**20
_piece = 2**18
_names = ("title", "author", "created", "modified")


def read_attributes(source: BinaryIO) -> tuple[dict[str, str], str | None]:
    """Read the attributes of ``source``, a seekable PDF, and say what is wrong with it. Raises OSError where it cannot be read."""
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    if size > pdf_bytes_max:
        return {}, f"title and dates not read: larger than {pdf_bytes_max // 2**20} MiB"
    with _lock:
        try:
            answer = _Reader.running().ask(source, size)
        except _Failed as failed:
            _Reader.stop()
            return {}, str(failed)
    problem = answer.pop("problem", None)
    attributes = {name: text for name in _names if (text := clean(answer.get(name, "")))}
    return attributes, clean(problem) if problem else None


class _Failed(Exception):
    """The reader did not answer; the message says why, for people."""


class _Reader:
    _current: _Reader | None = None

    def __init__(self) -> None:
        program = Path(__file__).with_name("reader.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-W", "ignore", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is ours to handle
            bufsize=0,
        )

    @classmethod
    def running(cls) -> _Reader:
        if cls._current is None or cls._current._process.poll() is not None:
            cls.stop()
            cls._current = cls()
        return cls._current

    @classmethod
    def stop(cls) -> None:
        reader, cls._current = cls._current, None
        if reader is not None:
            reader._process.kill()
            reader._process.communicate()

    def ask(self, source: BinaryIO, size: int) -> dict[str, str]:
        deadline = time.monotonic() + wait_s
        sent = self._send(struct.pack(">Q", size), deadline)
        while sent and size > 0:
            piece = source.read(min(_piece, size))
            if not piece:
                raise _Failed("the file became shorter while it was read")
            size -= len(piece)
            sent = self._send(piece, deadline)
        answer = b""
        assert self._process.stdout is not None
        while not answer.endswith(b"\n") and len(answer) < answer_bytes_max:
            if not self._ready(self._process.stdout.fileno(), selectors.EVENT_READ, deadline):
                raise _Failed("takes too long to open")
            piece = os.read(self._process.stdout.fileno(), _piece)
            if not piece:
                raise _Failed("takes too much time or memory to open")
            answer += piece
        try:
            parsed = dict(json.loads(answer))
        except (ValueError, TypeError):
            raise _Failed("could not be opened") from None
        return {name: value for name, value in parsed.items() if isinstance(value, str)}

    def _send(self, data: bytes, deadline: float) -> bool:
        assert self._process.stdin is not None
        descriptor = self._process.stdin.fileno()
        os.set_blocking(descriptor, False)
        view = memoryview(data)
        while view:
            if not self._ready(descriptor, selectors.EVENT_WRITE, deadline):
                raise _Failed("takes too long to open")
            try:
                view = view[os.write(descriptor, view) :]
            except BrokenPipeError:
                return False  # it ended; reading its answer tells why
        return True

    @staticmethod
    def _ready(descriptor: int, event: int, deadline: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, event)
            return bool(selector.select(max(0.0, deadline - time.monotonic())))


_lock = threading.Lock()
atexit.register(_Reader.stop)
