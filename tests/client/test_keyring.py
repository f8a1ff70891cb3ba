"""The passphrase in the keyring of the operating system: kept, changed, missed. The keyring is one of this test's own making."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from medshard.cli import keyring, passphrase
from medshard.cli.exits import Exit
from medshard.cli.main import main
from medshard.keys import create_key_file, open_key_file
from medshard_protocol.errors import Absent, Malformed, Refused, Unavailable

backends = pytest.importorskip("keyring.backend")


class Kept(backends.KeyringBackend):  # type: ignore[name-defined, misc]
    """A keyring in memory."""

    priority = 1
    name = "of a test"

    def __init__(self) -> None:
        super().__init__()
        self.secrets: dict[tuple[str, str], str] = {}
        self.is_locked = self.forgets = False

    def set_password(self, service: str, username: str, password: str) -> None:
        self._check()
        if not self.forgets:
            self.secrets[service, username] = password

    def get_password(self, service: str, username: str) -> str | None:
        self._check()
        return self.secrets.get((service, username))

    def delete_password(self, service: str, username: str) -> None:
        self._check()
        del self.secrets[service, username]

    def _check(self) -> None:
        if self.is_locked:
            raise RuntimeError("locked")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    backend = Kept()
    monkeypatch.setattr("keyring.get_keyring", lambda: backend)
    for name in ("MEDSHARD_PASSPHRASE", "MEDSHARD_PASSPHRASE_FILE", "MEDSHARD_NEW_PASSPHRASE"):
        monkeypatch.delenv(name, raising=False)
    return backend


def test_a_drawn_passphrase_is_asked_of_nobody(kept: Kept, tmp_path: Path) -> None:
    secret = keyring.draw(tmp_path)
    assert passphrase.known(tmp_path) == secret
    assert secret not in (tmp_path / "keyring").read_text()
    assert (tmp_path / "keyring").stat().st_mode & 0o777 == 0o600
    assert list(kept.secrets.values()) == [secret]


def test_the_passphrase_goes_into_the_keyring_and_out_again(kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_key_file(tmp_path / "vault.key", "words", fast=True)
    command = ["--home", str(tmp_path), "keys", "passphrase"]
    monkeypatch.setenv("MEDSHARD_PASSPHRASE", "words")
    assert main([*command, "--keyring"]) == Exit.OK
    monkeypatch.delenv("MEDSHARD_PASSPHRASE")
    first = passphrase.known(tmp_path)
    open_key_file(tmp_path / "vault.key", first)
    assert main([*command, "--keyring"]) == Exit.OK
    assert list(kept.secrets.values()) == [passphrase.known(tmp_path)] != [first]
    monkeypatch.setenv("MEDSHARD_NEW_PASSPHRASE", "other words")
    assert main(command) == Exit.OK
    open_key_file(tmp_path / "vault.key", "other words")
    assert not keyring.is_used(tmp_path)
    assert kept.secrets == {}


def test_a_change_that_was_cut_off_leaves_a_vault_that_opens(kept: Kept, tmp_path: Path) -> None:
    before = keyring.draw(tmp_path)
    create_key_file(tmp_path / "vault.key", before, fast=True)
    keyring.draw(tmp_path)  # and then the power went
    assert passphrase.known(tmp_path) == before


def write_names(home: Path) -> None:
    (home / "keyring").write_text("0" * keyring.name_chars)


def test_a_trials_passphrase_stays_where_the_trial_finds_it(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create_key_file(tmp_path / "vault.key", "words", fast=True)
    (tmp_path / "passphrase").write_text("words")
    monkeypatch.setenv("MEDSHARD_NEW_PASSPHRASE", "other words")
    for more in ([], ["--keyring"]):
        assert main(["--home", str(tmp_path), "keys", "passphrase", *more]) == Exit.REFUSED
        assert "medshard join" in capsys.readouterr().err
    open_key_file(tmp_path / "vault.key", passphrase.known(tmp_path))
    assert kept.secrets == {}


def test_without_a_keyring_that_keeps_it_is_said_what_to_do(kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.forgets = True
    with pytest.raises(Unavailable, match="does not give back"):
        keyring.draw(tmp_path)
    kept.is_locked = True
    with pytest.raises(Unavailable, match="locked"):
        keyring.draw(tmp_path)
    assert not keyring.is_used(tmp_path)  # nothing was noted that is not so
    kept.forgets = kept.is_locked = False
    keyring.draw(tmp_path)
    kept.is_locked = True
    with pytest.raises(Unavailable, match="does not answer") as caught:
        passphrase.known(tmp_path)
    assert "Unlock it" in caught.value.hint
    kept.is_locked = False
    kept.secrets.clear()
    with pytest.raises(Absent, match="has no passphrase"):
        passphrase.known(tmp_path)
    (tmp_path / "keyring").write_text("../x")
    with pytest.raises(Malformed):
        passphrase.known(tmp_path)
    from keyring.backends import fail

    monkeypatch.setattr("keyring.get_keyring", fail.Keyring)
    with pytest.raises(Unavailable, match="no keyring runs") as caught:
        keyring.draw(tmp_path / "other")
    assert "Without --keyring" in caught.value.hint
    write_names(tmp_path)
    with pytest.raises(Unavailable, match="no keyring runs") as caught:
        passphrase.known(tmp_path)  # its passphrase is in one: to be told of another way to keep it is no help
    assert "medshard recover" in caught.value.hint
    assert "Without --keyring" not in caught.value.hint
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(Refused, match="not installed"):
        keyring.draw(tmp_path / "other")
