"""The spool: what it has said yes to is there after a crash, byte for byte, and nothing else is."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medshard.gateway import spool as spools
from medshard.gateway.segments import Entry, Segment, chunk_plain
from medshard.gateway.spool import Spool
from medshard.keys import VaultKeys
from medshard.sealing import hkdf
from medshard_protocol.errors import Absent, Conflict, Damaged, Full, Malformed

vectors = Path(__file__).parent.parent / "vectors" / "spool.json"
about = {"sop-uid": "1.2.3", "patient-name": "Müller^Änne=山田^太郎"}


@contextmanager
def opened(folder: Path, bytes_max: int = 1 << 30) -> Iterator[Spool]:
    spool = Spool(folder, b"k" * 32, bytes_max=bytes_max)
    try:
        yield spool
    finally:
        spool.close()


def stored(spool: Spool, file: bytes) -> Entry:
    arrival = spool.begin()
    for at in range(0, len(file), 100_000):
        arrival.write(file[at : at + 100_000])
    return arrival.finish(about)


def test_the_vector_is_read_as_its_document_says(tmp_path: Path) -> None:
    vector = json.loads(vectors.read_text())
    key = hkdf(VaultKeys.from_root(bytes.fromhex(vector["root"])).root, b"", b"medshard/vault/v1/spool")
    assert key.hex() == vector["spool_key"]
    (tmp_path / "000000000001.spool").write_bytes(bytes.fromhex(vector["segment"]))
    spool = Spool(tmp_path, key, bytes_max=1 << 20)
    entries = spool.recover()
    assert [spool.read(entry, 0, entry.size).hex() for entry in entries] == [each["file"] for each in vector["instances"]]
    assert [(each.received, each.attributes) for each in entries] == [
        (each["received"], each["attributes"]) for each in vector["instances"]
    ]
    spool.close()


@pytest.mark.parametrize("size", [0, 1, chunk_plain - 1, chunk_plain, chunk_plain + 1, 3 * chunk_plain + 77])
def test_any_size_comes_back_whole_and_by_ranges_before_and_after_a_restart(tmp_path: Path, size: int) -> None:
    file = os.urandom(size)
    ranges = [(0, size), (size // 2, size // 2 + 10), (max(0, size - 5), size + 5), (chunk_plain - 1, chunk_plain + 1)]
    with opened(tmp_path) as spool:
        entry = stored(spool, file)
        assert entry.sha256 == sha256(file).digest()
        assert [spool.read(entry, *each) for each in ranges] == [file[slice(*each)] for each in ranges]
    with opened(tmp_path) as spool:
        assert spool.recover() == [entry]
        assert [spool.read(entry, *each) for each in ranges] == [file[slice(*each)] for each in ranges]


def test_wherever_the_last_segment_is_cut_only_what_was_finished_before_comes_back(tmp_path: Path) -> None:
    files = [os.urandom(200), os.urandom(100)]
    with opened(tmp_path / "whole") as spool:
        entries = [stored(spool, file) for file in files]
        second = entries[1].offset
    (path,) = (tmp_path / "whole").glob("*.spool")
    whole = path.read_bytes()
    for cut in [*range(0, second, 37), *range(second, len(whole) + 1)]:
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / path.name).write_bytes(whole[:cut])
        with opened(folder) as spool:
            found = spool.recover()
            assert found == entries[: 0 if cut < second else 2 if cut == len(whole) else 1], cut
            assert [spool.read(entry, 0, entry.size) for entry in found] == files[: len(found)]


def changed(folder: Path, entry: Entry) -> None:
    (path,) = folder.glob("*.spool")
    data = bytearray(path.read_bytes())
    data[entry.offset + 50] ^= 1
    path.write_bytes(data)


def test_a_changed_byte_is_found_when_it_is_read(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        entries = [stored(spool, os.urandom(5000)), stored(spool, b"last")]
    changed(tmp_path, entries[0])
    with opened(tmp_path) as spool:
        assert spool.recover() == entries
        with pytest.raises(Damaged):
            spool.read(entries[0], 0, 10)


def test_an_end_that_reached_the_disk_before_its_data_makes_no_instance(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        first, last = stored(spool, b"answered"), stored(spool, os.urandom(2 * chunk_plain))
    changed(tmp_path, last)
    with opened(tmp_path) as spool:
        assert spool.recover() == [first]
        assert spool.cut_off == 1


def test_segments_are_used_again_and_nothing_of_their_earlier_use_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "segment_bytes", 8 * chunk_plain)
    with opened(tmp_path) as spool:
        spool.provide()
        names = {path.name for path in tmp_path.glob("*.spool")}
        assert len(names) == spools.spares_max
        long = [stored(spool, os.urandom(chunk_plain)) for _ in range(6)]
        assert {path.name for path in tmp_path.glob("*.spool")} == names
        spool.done(long)
        assert spool.used_bytes == 0
        again = [stored(spool, bytes([number]) * chunk_plain) for number in range(3)]  # before what is left of the six
        with pytest.raises(Absent):
            spool.read(long[5], 0, 1)
    assert {path.stat().st_size for path in tmp_path.glob("*.spool")} == {8 * chunk_plain}
    with opened(tmp_path) as spool:  # the same files, after a restart
        assert spool.recover() == again
        assert [spool.read(entry, 0, 3) for entry in again] == [bytes([number]) * 3 for number in range(3)]
        spool.done(again)
        last = stored(spool, b"x" * chunk_plain * 3)
    with opened(tmp_path) as spool:
        assert spool.recover() == [last]
        assert len(list(tmp_path.glob("*.spool"))) == spools.spares_max


def test_what_is_done_while_another_comes_takes_no_file_from_under_it(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        first = stored(spool, b"first")
        coming = spool.begin()
        coming.write(b"second")
        spool.done([first])
        second = coming.finish(about)
        assert spool.read(second, 0, 10) == b"second"
        with pytest.raises(Absent):
            spool.read(first, 0, 10)
    with opened(tmp_path) as spool:
        assert spool.recover() == [second]


def opens(folder: Path, key: bytes) -> set[bytes]:
    """Everything that whoever has the key and these files can open, begun and broken off or not: docs/formats/spool.md and nothing else."""
    found = set()
    for path in folder.glob("*.spool"):
        data = path.read_bytes()
        segment = hkdf(key, data[18:50], b"medshard/spool/v2/segment")
        at, number, cipher = 50, 0, AESGCM(segment)
        while size := int.from_bytes(data[at : at + 4]):
            kind = data[at + 4]
            chunk = data[at + 5 : at + 5 + size]
            if kind == 1:
                number, cipher = 0, AESGCM(hkdf(segment, chunk, b"medshard/spool/v2/instance"))
            else:
                with contextlib.suppress(InvalidTag):
                    found.add(cipher.decrypt(number.to_bytes(12), chunk, bytes([kind])))
                number += 1
            at += 5 + size
    return found


def test_what_is_done_opens_under_no_key_while_its_neighbours_wait(tmp_path: Path) -> None:
    files = [os.urandom(size) for size in (1000, chunk_plain + 500, 0, 3000)]
    with opened(tmp_path) as spool:
        entries = [stored(spool, file) for file in files]
        assert len({entry.segment for entry in entries}) == 1
        assert {files[0], files[1][:chunk_plain], files[1][chunk_plain:], files[3]} < opens(tmp_path, b"k" * 32), (
            "else nothing is looked for"
        )
        spool.done(entries[1:3])
        kept = [entries[0], entries[3]]
        left = opens(tmp_path, b"k" * 32)
        assert len(left) == 4, "two neighbours, each its file and what is said of it"
        assert {files[0], files[3]} < left
        broken = spool.begin()
        broken.write(files[1])
        broken.drop()
        assert opens(tmp_path, b"k" * 32) == left, "nor does what was broken off, or was known already"
        cut_off = spool.begin()
        cut_off.write(files[1])
        assert len(opens(tmp_path, b"k" * 32)) == 5
    with opened(tmp_path) as spool:  # after a kill, while one came
        assert spool.recover() == kept
        assert [spool.read(entry, 0, entry.size) for entry in kept] == [files[0], files[3]]
        assert opens(tmp_path, b"k" * 32) == left


def test_a_kill_at_any_step_of_shredding_takes_no_neighbour_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [os.urandom(1000 + number) for number in range(5)]
    done, kept = slice(1, 4, 2), slice(0, 5, 2)
    step, last = 0, False
    while not last:
        folder = tmp_path / str(step)
        with opened(folder) as spool:
            entries = [stored(spool, file) for file in files]
            with monkeypatch.context() as patched:
                last = not killed_after(patched, step, partial(spool.done, entries[done]))
            left = opens(folder, b"k" * 32)
        with opened(folder) as spool:
            found = spool.recover()
            assert [entry for entry in found if entry not in entries[done]] == entries[kept], step
            assert [spool.read(entry, 0, entry.size) for entry in found if entry in entries[kept]] == files[kept], step
            for entry in found:
                assert files[entries.index(entry)] in left, step
            spool.done(entry for entry in found if entry in entries[done])  # the archive knows them as stored
            assert not opens(folder, b"k" * 32) & set(files[done]), step
        step += 1
    assert step == 4, "two salts, each whole or half, and a sync: as many steps were tried"


def test_shredding_never_hits_what_has_come_into_the_file_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = Segment.end
    with opened(tmp_path) as spool:
        first, second = stored(spool, b"first"), stored(spool, b"second")
        later: list[Entry] = []

        def slow(segment: Segment, offsets: Iterable[int]) -> None:
            monkeypatch.setattr(Segment, "end", end)
            spool.done([second])  # another series' thread: now the file is empty, and is used again
            later.append(stored(spool, b"third"))
            end(segment, offsets)

        monkeypatch.setattr(Segment, "end", slow)
        spool.done([first])
        assert spool.read(later[0], 0, 10) == b"third"
    with opened(tmp_path) as spool:
        assert spool.recover() == later


def killed_after(patched: pytest.MonkeyPatch, steps: int, act: Callable[[], None]) -> bool:
    """Do it, and stop dead in the step of that number: in the middle of what it writes. Whether there was such a step."""
    write, sync, left = os.pwrite, os.fdatasync, steps

    class Killed(BaseException):
        pass

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            write(descriptor, data[: len(data) // 2], offset)
            raise Killed
        return write(descriptor, data, offset)

    def fdatasync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        sync(descriptor)

    patched.setattr(os, "pwrite", pwrite)
    patched.setattr(os, "fdatasync", fdatasync)
    try:
        act()
    except Killed:
        return True
    return False


def test_finish_returns_after_the_disk_has_it_and_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    data, folder = os.fdatasync, spools.fsync_folder

    def fdatasync(descriptor: int) -> None:
        data(descriptor)
        synced.append("data")

    def fsync_folder(path: Path) -> None:
        folder(path)
        synced.append("folder")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(spools, "fsync_folder", fsync_folder)
    with opened(tmp_path) as spool:
        stored(spool, b"x" * 1000)
        assert synced == ["folder", "data"]


def test_a_failed_sync_is_no_yes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with opened(tmp_path) as spool:
        kept = stored(spool, b"first")
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", fails)
            with pytest.raises(Full, match="disk fails"):
                stored(spool, b"second")
        assert spool.read(stored(spool, b"third"), 0, 9) == b"third"
        assert spool.read(kept, 0, 9) == b"first"


def test_what_is_over_the_limit_is_full_and_done_makes_room(tmp_path: Path) -> None:
    with opened(tmp_path, bytes_max=3 * chunk_plain) as spool:
        first = stored(spool, bytes(chunk_plain))
        with pytest.raises(Full):
            stored(spool, bytes(4 * chunk_plain))
        assert spool.read(first, 0, 3) == bytes(3)
        spool.done([first])
        assert spool.used_bytes == 0
        assert not list(tmp_path.glob("*.spool"))
        with pytest.raises(Absent):
            spool.read(first, 0, 3)
        stored(spool, bytes(chunk_plain))


def test_what_a_sender_broke_off_is_not_there(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        first = stored(spool, b"whole")
        broken = spool.begin()
        broken.write(bytes(2 * chunk_plain))
        broken.drop()
        last = stored(spool, b"after it")
    with opened(tmp_path) as spool:
        assert spool.recover() == [first, last]
        assert spool.read(last, 0, 20) == b"after it"


def test_many_at_once_do_not_mix(tmp_path: Path) -> None:
    files = [os.urandom(chunk_plain + 1000 * number) for number in range(8)]
    entries: dict[int, Entry] = {}
    with opened(tmp_path) as spool:

        def work(number: int) -> None:
            entries[number] = stored(spool, files[number])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [spool.read(entries[number], 0, 1 << 30) for number in range(8)] == files


def test_two_gateways_do_not_share_a_spool_and_strange_files_are_not_touched(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(Conflict):
        Spool(tmp_path, b"k" * 32, bytes_max=1)
    (tmp_path / "000000000009.spool").write_bytes(b"something else, of somebody else, that is long enough to be a segment")
    with opened(tmp_path) as spool, pytest.raises(Malformed):
        spool.recover()
    assert (tmp_path / "000000000009.spool").exists()


def test_no_byte_of_an_instance_is_in_clear_on_the_disk(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        stored(spool, b"Patient: Anna Example" * 1000)
        (path,) = tmp_path.glob("*.spool")
        data = path.read_bytes()
        assert b"Anna" not in data
        assert "Müller".encode() not in data
