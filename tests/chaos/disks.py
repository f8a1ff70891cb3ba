"""Disks for tests: an ext4 of one's own whose power can be cut, and a tmpfs that is soon full.

Law: the cut can hit nothing but its own image. Before each one the mount is looked up again in the kernel's tables: it must be an ext4 on a
loop device over our image file, at our folder, and the descriptor that the ioctl goes to must lie on just that device.

A cut is the ioctl FS_IOC_SHUTDOWN without flushing (as xfstests do it): whatever the file system had not made durable is gone, and after
unmounting and mounting again its journal is replayed as after a real power cut. What the disk itself would lose from its cache is not.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

shutdown_ioctl = 0x8004587D  # FS_IOC_SHUTDOWN, _IOR('X', 125, __u32)
without_flush = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH
unmount_wait_s = 10.0


@dataclass(frozen=True)
class LoopDisk:
    """An ext4 in the file ``image``, mounted at ``folder``."""

    image: Path
    folder: Path

    def cut(self) -> None:
        """Cut its power. Everything on it fails from now on; kill who uses it, then ``power_on``."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._check(os.fstat(descriptor).st_dev)
            fcntl.ioctl(descriptor, shutdown_ioctl, struct.pack("I", without_flush))
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Make all that is on it durable now."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert ctypes.CDLL(None).syncfs(descriptor) == 0
        finally:
            os.close(descriptor)

    def power_on(self) -> None:
        """Mount it again, as a machine does that boots after a power cut."""
        self.unmount()
        self.mount()

    def mount(self) -> None:
        """Mount the image. Nothing but fsync makes anything durable within a test: the journal's own clock is slowed down."""
        run("mount", "-o", "loop,commit=300", str(self.image), str(self.folder))

    def unmount(self) -> None:
        """Unmount it, waiting for the processes on it to be gone."""
        deadline = time.monotonic() + unmount_wait_s
        while subprocess.run(["umount", str(self.folder)], capture_output=True).returncode != 0:
            if time.monotonic() > deadline:
                run("umount", "-l", str(self.folder))
                return
            time.sleep(0.02)

    def _check(self, device: int) -> None:
        """Refuse unless ``device`` is the loop device over our own image, with an ext4 on it, mounted at our folder."""
        number = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            fields, (kind, source, _) = before.split(), after.split(" ", 2)
            if fields[2] == number and fields[4] == str(self.folder) and kind == "ext4" and source.startswith("/dev/loop"):
                backing = Path("/sys/block", Path(source).name, "loop/backing_file").read_text().rstrip("\n")
                if backing == str(self.image):
                    return
        raise AssertionError(f"{self.folder} is not the ext4 on {self.image}: its power is not cut")


@contextmanager
def loop_disk(folder: Path, size: int) -> Iterator[LoopDisk]:
    """An ext4 of ``size`` bytes (a sparse file) under ``folder``. Skips, saying why, where there can be none."""
    missing = [tool for tool in ("mount", "umount", "mkfs.ext4") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"an ext4 of its own needs {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("an ext4 of its own needs root")
    disk = LoopDisk((folder / "image").resolve(), (folder / "disk").resolve())
    disk.folder.mkdir(parents=True)
    with disk.image.open("wb") as file:
        file.truncate(size)
    run("mkfs.ext4", "-q", str(disk.image))
    mounted = subprocess.run(["mount", "-o", "loop,commit=300", str(disk.image), str(disk.folder)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"loop mounts are not allowed here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        disk.unmount()


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs with ``size`` bytes at ``folder``. Skips, saying why, where mounts are not allowed."""
    folder.mkdir(exist_ok=True)
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system needs root and mount")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounts are not allowed here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        run("umount", "-l", str(folder))


def run(*arguments: str) -> str:
    """Run a tool that must succeed; what it printed."""
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
