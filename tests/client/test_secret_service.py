"""The passphrase in a real Secret Service: GNOME's keyring on a bus of its own, unlocked as a login does it, and the real command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from medshard.cli.exits import Exit
from medshard.keys import create_key_file, open_key_file

secretstorage = pytest.importorskip("secretstorage", reason="the Secret Service is on Linux alone")
message_bus = pytest.importorskip("jeepney").message_bus
programs = ("dbus-daemon", "gnome-keyring-daemon")
pytestmark = pytest.mark.skipif(not all(map(shutil.which, programs)), reason=f"needs {' and '.join(programs)}")


class Session:
    """A user's login: a bus, and the keyring that opened with the login's password."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
        for name, place in (("HOME", "home"), ("XDG_DATA_HOME", "data"), ("XDG_CACHE_HOME", "cache"), ("XDG_RUNTIME_DIR", "run")):
            (folder / place).mkdir(mode=0o700)
            self.environment[name] = str(folder / place)
        words = ["dbus-daemon", "--session", "--nofork", "--nopidfile", "--print-address", f"--address=unix:path={folder}/bus"]
        bus = stack.enter_context(running(words, self.environment))
        assert bus.stdout is not None
        self.environment["DBUS_SESSION_BUS_ADDRESS"] = bus.stdout.readline().decode().strip()
        self._stack = stack

    def log_in(self) -> None:
        """Start the keyring, unlocked."""
        words = ["gnome-keyring-daemon", "--foreground", "--unlock", "--components=secrets"]
        self._keyring = self._stack.enter_context(running(words, self.environment))
        assert self._keyring.stdin is not None
        with self._keyring.stdin as told:
            told.write(b"the login's password")
        deadline = time.monotonic() + 60
        while self.names() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def log_out(self) -> None:
        """End it; what is in it stays."""
        self._keyring.terminate()
        self._keyring.wait(60)

    def comes_to(self, names: list[str]) -> bool:
        """Whether it has these before long: it answers before it has told all that it knows of an item."""
        deadline = time.monotonic() + 60
        while (found := self.names() == names) is False and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def names(self, *, lock: bool = False) -> list[str] | None:
        """Under which names it has passphrases; None while it does not answer or is locked."""
        try:
            with closing(secretstorage.dbus_init()) as connection:
                owned = connection.send_and_get_reply(message_bus.NameHasOwner("org.freedesktop.secrets"))
                if not owned.body[0]:  # asked too early, the bus would start a keyring of its own, which nobody unlocked
                    return None
                login = secretstorage.get_collection_by_alias(connection, "default")  # makes none where the login's is not open yet
                names = [item.get_attributes().get("username", "") for item in login.search_items({"service": "medshard"})]
                if lock:
                    login.lock()
                return None if login.is_locked() else names
        except secretstorage.exceptions.SecretStorageException:
            return None

    def medshard(self, *words: str, **more: str) -> tuple[int, str]:
        """Run the command in this session: exit code and everything printed."""
        done = subprocess.run(
            [sys.executable, "-m", "medshard", *words],
            env={**self.environment, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout.decode()


@contextmanager
def running(words: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(words, env=environment, stdin=pipe, stdout=pipe, stderr=nothing) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    for name in ("MEDSHARD_PASSPHRASE", "MEDSHARD_PASSPHRASE_FILE", "MEDSHARD_NEW_PASSPHRASE"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(prefix="keyring") as folder, ExitStack() as stack:  # a short path: sockets are in it
        made = Session(Path(folder), stack)
        monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", made.environment["DBUS_SESSION_BUS_ADDRESS"])
        yield made


def test_a_login_opens_the_vault_a_locked_keyring_does_not_and_a_passphrase_takes_its_place(session: Session, tmp_path: Path) -> None:
    create_key_file(tmp_path / "vault.key", "words", fast=True)
    command = ["--home", str(tmp_path), "keys", "passphrase"]
    session.log_in()
    code, said = session.medshard(*command, "--keyring", MEDSHARD_PASSPHRASE="words")
    assert (code, "make a kit" in said) == (Exit.OK, True), said
    assert session.comes_to((tmp_path / "keyring").read_text().split())
    session.names(lock=True)
    code, said = session.medshard(*command, "--keyring")
    assert code == Exit.UNAVAILABLE
    assert "does not answer" in said
    assert "Unlock it" in said
    session.log_out()
    session.log_in()
    code, said = session.medshard(*command, MEDSHARD_NEW_PASSPHRASE="other words")  # opened with what the keyring has
    assert code == Exit.OK, said
    assert session.comes_to([])
    assert not (tmp_path / "keyring").exists()
    open_key_file(tmp_path / "vault.key", "other words")
