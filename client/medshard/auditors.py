"""The auditors' private key in a file, under a passphrase: with it the reasons of emergency reads are opened, and nothing else."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path
from typing import Final

from medshard.durable import write_durably
from medshard.hpke import PrivateKey
from medshard.keys import open_sealed, seal
from medshard_protocol.errors import Absent, Malformed, Refused

magic: Final = "medshard/auditors/v1"


def create(path: Path, passphrase: str, *, fast: bool = False) -> PrivateKey:
    """Draw a key and keep it at ``path``. Raises Refused if the file exists. ``fast`` is for passphrases drawn by a machine."""
    if path.exists():
        raise Refused(f"{path} exists already", hint="A key file is never overwritten; choose another name.")
    key = PrivateKey(os.urandom(32))
    write_durably(path, seal(magic, key.seed, sha256(key.public).digest(), passphrase, fast=fast), mode=0o600)
    return key


def load(path: Path, passphrase: str) -> PrivateKey:
    """Open the file. Raises Absent, Malformed (not such a file) or Refused (wrong passphrase)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Absent(f"{path} does not exist", hint="`medshard auditor-key create FILE` makes an auditors' key.") from None
    try:
        seed, named = open_sealed(magic, data, passphrase)
    except Malformed as error:
        hint = "it is what `medshard auditor-key create FILE` wrote there, not the public key that it printed"
        raise Malformed(f"{path} is no auditors' key file ({error})", hint=hint) from None
    except Refused:
        hint = "check MEDSHARD_AUDITORS_PASSPHRASE, or type it again; in a trial made by `medshard up` it is the vault's"
        raise Refused(f"the passphrase does not open {path}", hint=hint) from None
    key = PrivateKey(seed)
    if sha256(key.public).digest() != named:
        raise Malformed("key file: its public key is not the one its seed gives")
    return key
