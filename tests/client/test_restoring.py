"""The last look at restored bytes: what has not the SHA-256 that was asked for gets no name, and neither does what is too short."""

from __future__ import annotations

import io
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medshard.restoring import Restore, publish
from medshard_protocol.errors import Damaged

data = b"the bytes that were put"


def target(digest: bytes = sha256(data).digest(), size: int = len(data)) -> Any:
    return SimpleNamespace(sha256=digest, size=size)


def test_bytes_with_their_sha256_get_their_name_and_others_leave_nothing(tmp_path: Path) -> None:
    for number, (wanted, is_right) in enumerate(((target(), True), (target(bytes(32)), False), (target(size=len(data) + 1), False))):
        path = tmp_path / str(number)
        path.write_bytes(b"what was there before")
        restore = Restore(wanted, path)
        restore.write(data[:9])
        restore.write(memoryview(data)[9:])
        if is_right:
            publish([restore])
            assert path.read_bytes() == data
        else:
            with pytest.raises(Damaged, match="SHA-256"):
                publish([restore])
            assert path.read_bytes() == b"what was there before"
    assert len(list(tmp_path.iterdir())) == 3


def test_what_goes_to_an_open_file_is_compared_too() -> None:
    restore = Restore(target(bytes(32)), None, io.BytesIO())
    restore.write(data)
    with pytest.raises(Damaged, match="SHA-256"):
        restore.finish()


def test_a_file_that_its_disk_does_not_keep_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(5, "the disk lost it")

    restore = Restore(target(), tmp_path / "got")
    restore.write(data)
    monkeypatch.setattr("medshard.restoring.os.fsync", fails)
    with pytest.raises(OSError, match="lost it"):
        publish([restore])
    restore.abandon()
    assert list(tmp_path.iterdir()) == []
