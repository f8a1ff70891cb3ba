"""Plaintext on its way: gone with the work, or when the next process comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from medshard.scratch import prefix, remove_left, scratch_folder


def aged(path: Path) -> None:
    os.utime(path, (1, 1))


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_uses_is_not(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from medshard.scratch import scratch_folder\n"
        "with scratch_folder(Path(sys.argv[1])) as place:\n"
        "    (place / 'plain').write_bytes(b'text')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"ready\n"
    (left,) = tmp_path.glob(prefix + "*")
    aged(left)
    assert remove_left(tmp_path) == 0
    other.send_signal(signal.SIGKILL)
    other.wait()
    other.stdout.close()
    assert (left / "plain").exists()
    with scratch_folder(tmp_path) as place:
        assert list(tmp_path.iterdir()) == [place]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_just_made_is_left_alone(tmp_path: Path) -> None:
    young = tmp_path / f"{prefix}x"
    young.mkdir()
    assert remove_left(tmp_path) == 0
    aged(young)
    assert remove_left(tmp_path) == 1
