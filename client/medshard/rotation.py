"""New keys for a vault: drawn here, vouched for by its institution in the place of the old ones, and put in their place.

    keys = await rotate(Home(folder), passphrase, invitation)
    async with Vault.open(folder, passphrase) as vault:
        await keep_former(vault)

Law: nothing is lost wherever this is cut off, and running it again ends in the same state. The new root is on the disk before anybody hears
of its public key; the old one stays in use until the certificate for the new one is on the disk, which it gets only once the ledger has
taken the change; then both files are put in place, and whoever opens the vault first finishes that. The roots before lie beside the key
file, and in a stored file of the vault, sealed under the new one: so the new root and the nodes are enough for everything.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from medshard import enrolment, recovery
from medshard.durable import fsync_folder, write_durably
from medshard.home import Home
from medshard.keys import (
    VaultKeys,
    create_key_file,
    former_bytes_max,
    former_max,
    former_path,
    open_key_file,
    open_root,
    roots_of,
    seal_former,
)
from medshard.ledger import LedgerClient
from medshard.model import Description
from medshard.packs import Plan, Unit
from medshard.rights import Rights
from medshard.source import Part
from medshard.tls import Shown
from medshard.transport import Net
from medshard_protocol import canonical
from medshard_protocol.errors import Conflict, Damaged, Refused, Unavailable

if TYPE_CHECKING:
    from medshard.vault import Vault

former_type: Final = "application/x-medshard-former-keys"
former_of: Final = "former-of"  # attribute: the public key that these roots came before
version: Final = 1


async def rotate(home: Home, passphrase: str, code: str, *, fast_kdf: bool = False) -> VaultKeys:
    """Draw new keys for a vault and have them vouched for, with an invitation of its institution; run again, it goes on.

    Raises Refused for a wrong passphrase or an invitation of another institution, and what joining raises.
    """
    if finish(home):
        return open_key_file(home.key_file, passphrase)
    old = open_key_file(home.key_file, passphrase)
    if len(old.former) >= former_max:
        raise Refused(f"this vault's key was rotated {former_max} times", hint="Make a new vault and share the files with it.")
    fresh = not home.next_key.exists()
    new = create_key_file(home.next_key, passphrase, fast=fast_kdf) if fresh else open_root(home.next_key.read_bytes(), passphrase)
    sealed_here = home.index.exists() or home.contacts.exists()
    new = new.remember([keys.root for keys in old.line], old.at_home.root if sealed_here else None)
    write_durably(former_path(home.folder, new.public), seal_former(new), mode=0o600)
    try:
        certificate = await enrolment.rotate(home, old, new, code)
    except (Refused, Conflict):
        if fresh:  # nobody has taken the new key, and nobody will with this code
            home.next_key.unlink(missing_ok=True)
            former_path(home.folder, new.public).unlink(missing_ok=True)
        raise
    write_durably(home.next_certificate, certificate)
    finish(home)
    return new


async def adopt(home: Home, passphrase: str, root: bytes, *, fast_kdf: bool = False) -> VaultKeys:
    """Take the keys into this home that another home of the same vault was rotated to; what lies on this disk stays as it is.

    Raises Refused where they did not come right after this home's, by the ledger.
    """
    if finish(home):
        return open_key_file(home.key_file, passphrase)
    old, new = open_key_file(home.key_file, passphrase), VaultKeys.from_root(root)
    if new.public == old.public:
        return old
    roster = home.roster()
    certificate, _ = await recovery.certificate_of(new, [node.url for node in roster.nodes], home.genesis.read_bytes())
    async with Net(roster, Shown(certificate, new.signing).contexts(roster), certificate) as net:
        heirs = await Rights(net, new, LedgerClient(net, new)).heirs(old.public)
    if heirs[:1] != [new.public]:
        hint = "Make a home anew from it: medshard --home NEW recover --kit FILE."
        raise Refused("these are not the keys that came right after this home's", hint=hint)
    home.next_key.unlink(missing_ok=True)
    new = create_key_file(home.next_key, passphrase, root=root, fast=fast_kdf)
    new = new.remember([keys.root for keys in old.line], old.at_home.root)
    write_durably(former_path(home.folder, new.public), seal_former(new), mode=0o600)
    write_durably(home.next_certificate, certificate)
    finish(home)
    return new


def finish(home: Home) -> bool:
    """Put keys in place that the ledger has taken; whether there were any. Of several processes that do so at once, each finds it done."""
    if not home.next_certificate.exists():
        return False
    with suppress(FileNotFoundError):
        os.replace(home.next_key, home.key_file)
    fsync_folder(home.folder)  # the key first: without its certificate it is found again, the other way round it would be lost
    with suppress(FileNotFoundError):
        os.replace(home.next_certificate, home.certificate)
    fsync_folder(home.folder)
    return True


async def keep_former(vault: Vault) -> None:
    """Store the roots before in the vault itself, unless they are there: then its present root is enough for everything."""
    named = vault.keys.public.hex()
    if not vault.keys.former or any(row.media_type == former_type and row.attributes.get(former_of) == named for row in vault.ls()):
        return
    data = canonical.encode([version, [keys.root for keys in vault.keys.former]])
    part = Part.holding(data, b"keys/former-%s" % named[:16].encode(), Description(former_type, {former_of: named}))
    report = await vault.store(Plan((Unit(part.name, (part,), is_pack=False),), ()))
    if not report.stored:
        raise Unavailable(report.problems[0].message if report.problems else "the former keys could not be stored", hint="Run it again.")


async def learn_former(vault: Vault) -> bool:
    """Find the roots before in the vault's own files, and note them beside the key file. Whether there were any that were not known."""
    known = len(vault.keys.former)
    for row in [row for row in vault.ls() if row.media_type == former_type and row.size <= former_bytes_max]:
        line = vault.keys.line
        of = next((at for at, keys in enumerate(line) if keys.public.hex() == row.attributes.get(former_of)), None)
        if of is None:
            continue
        roots, noted = _parse(await vault.read(row.sha256, 0, row.size)), [keys.root for keys in line[of + 1 :]]
        if roots[: len(noted)] == noted:
            vault.keys.former.extend(VaultKeys.from_root(root) for root in roots[len(noted) :])
    if len(vault.keys.former) == known:
        return False
    write_durably(former_path(vault.home.folder, vault.keys.public), seal_former(vault.keys), mode=0o600)
    return True


def _parse(data: bytes) -> list[bytes]:
    f = canonical.Fields(canonical.decode(data, bytes_max=former_bytes_max, what="former keys"), count=2, what="former keys")
    if f.uint() != version:
        raise Damaged("the stored former keys are of a version this program does not know")
    return roots_of(f.list(most=former_max))
