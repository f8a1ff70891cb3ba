"""Going on under new keys: what has a vault open for days notices that they were rotated, in its home, by another process.

Law: nothing is told to it and nothing is asked of the ledger. The key file says which keys are the vault's, and only keys that have the
present ones among those before them are taken. What is under way ends as it began; what nodes refuse of it is tried again by whoever asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from medshard.home import Home
from medshard.keys import VaultKeys, open_key_file
from medshard.rotation import finish
from medshard_protocol.errors import MedshardError, Refused
from medshard_protocol.identity import certificate_key
from medshard_protocol.rights import Reason, phrases

if TYPE_CHECKING:
    from medshard.vault import Vault

look_every_s: Final = 0.5
rekeyed_within_s: Final = 5.0  # after the ledger has taken a rotation its keys lie in the home
log = logging.getLogger(__name__)

withdrawn: Final = ("withdrawn this key", phrases[Reason.WITHDRAWN])  # in the words of the ledger and its nodes
T = TypeVar("T")
Seen = tuple[int, int, int] | None


@asynccontextmanager
async def rekeying(vault: Vault, passphrase: str) -> AsyncIterator[None]:
    """Have an open vault go on under the keys that come into its home while the block runs."""
    task = asyncio.create_task(_watch(vault, passphrase))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def through(vault: Vault, work: Callable[[], Awaitable[T]]) -> T:
    """Do this; once more, if it is refused because the keys of this vault were rotated a moment ago."""
    keys = vault.keys
    try:
        return await work()
    except Refused as error:
        deadline = time.monotonic() + rekeyed_within_s
        while vault.keys is keys:
            if not any(each in str(error) for each in withdrawn) or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)
    return await work()


async def _watch(vault: Vault, passphrase: str) -> None:
    home, seen = vault.home, _seen(vault.home)
    while True:
        await asyncio.sleep(look_every_s)
        if (now := _seen(home)) == seen and not home.next_certificate.exists():
            continue
        try:
            found = await asyncio.to_thread(_found, home, vault.keys, passphrase)
        except (MedshardError, OSError) as error:  # another passphrase, say
            log.warning("%s has changed and does not open; what has this vault open must be started anew: %s", home.key_file, error)
            found = None
        else:
            if found is not None:
                vault.succeed(*found)
                log.info("this vault goes on under the key %s", found[0].public.hex())
        seen = now


def _found(home: Home, present: VaultKeys, passphrase: str) -> tuple[VaultKeys, bytes] | None:
    """The keys in a home with their certificate, if they are others than the present ones and came after them. Blocking."""
    finish(home)
    keys = open_key_file(home.key_file, passphrase)
    if keys.public == present.public or keys.of(present.public) is None:
        return None
    certificate = home.certificate_bytes()
    return (keys, certificate) if certificate_key(certificate) == keys.public else None


def _seen(home: Home) -> Seen:
    with contextlib.suppress(OSError):
        stat = home.key_file.stat()
        return stat.st_ino, stat.st_mtime_ns, stat.st_size
    return None
