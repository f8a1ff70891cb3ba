"""New keys for a node or its institution: drawn ahead, listed by a roster, put in place when that roster takes effect.

    HOME/keys-next/      the keys that take the place of those in HOME/keys when the roster lists them
    HOME/keys-until-N/   those that were in use until roster N; to be destroyed once nobody needs them

Law: the keys in HOME/keys change only when the roster says so, by renaming whole folders; a power cut in between is mended at the next
start. No key is deleted here.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from medshard_protocol import identity
from medshard_protocol.errors import Conflict
from medshard_protocol.roster import Roster
from storenode import durable
from storenode.identity import Institution, NodeKeys, key_pem, keys_name

next_name: Final = "keys-next"


def create_next(home: Path, keys: NodeKeys, institution: Institution, *, fresh_ca: bool, node_keys: bool) -> NodeKeys:
    """Draw keys to take the place of some of the present ones: the node's own, the institution's, or both.

    ``institution`` vouches for the node's new certificate; with ``fresh_ca`` it is itself new, and its key is kept with the others. The
    node id stays. Raises Conflict where a rotation is under way: what a proposal lists must not be overwritten.
    """
    folder = home / next_name
    if folder.exists():
        raise Conflict(f"{folder} exists: keys wait there for a roster that lists them", hint="remove it if that proposal was given up")
    part = home / f".{next_name}.part"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was interrupted
    part.mkdir(mode=0o700)
    drawn = tuple(Ed25519PrivateKey.generate() for _ in range(3))
    node, cosigner, log = drawn if node_keys else (keys.node, keys.cosigner, keys.log)
    secrets: dict[str, Ed25519PrivateKey | MLDSA44PrivateKey | None] = {
        "node.key": node,
        "cosigner.key": cosigner,
        "log.key": log,
        "cosigner-pq.key": MLDSA44PrivateKey.generate() if node_keys else keys.cosigner_pq,
        "ca.key": institution.key if fresh_ca else keys.ca,
    }
    for name, key in secrets.items():
        if key is not None:
            durable.create(part / name, key_pem(key))
    tls_key, now = identity.public_key(node), datetime.now(UTC)
    certificate = identity.node_certificate(institution.key, institution.certificate, tls_key, now, node_id=keys.node_id)
    for name, der in (("ca.crt", institution.certificate), ("node.crt", certificate)):
        durable.create(part / name, identity.to_pem(der).encode(), mode=0o644)
    part.rename(folder)
    durable.sync_folder(home)
    return NodeKeys.load_from(folder)


def fits(roster: Roster, keys: NodeKeys) -> bool:
    """Say whether a roster lists this node under these keys. A certificate of a former CA is as good as one of the present CA."""
    node = next((each for each in roster.nodes if each.id == keys.node_id), None)
    if node is None:
        return False
    institution = roster.institutions[node.institution]
    return (
        (node.tls_key, node.cosigner_key) == (keys.tls_key, identity.public_key(keys.cosigner))
        and node.pq_key in (b"", keys.cosigner_pq.public_key().public_bytes_raw())
        and (not node.log_key or (keys.log is not None and node.log_key == identity.public_key(keys.log)))
        and keys.ca_certificate in (institution.ca, *institution.former)
    )


def promote(home: Path, roster: Roster) -> NodeKeys:
    """Give the keys that the roster lists: those in use, or those that wait in HOME/keys-next, which are put in place then.

    Without either it gives those in use, and ``check_membership`` says what is wrong. Raises as ``NodeKeys.load`` does.
    """
    present, waiting = home / keys_name, home / next_name
    if not present.exists() and waiting.is_dir():  # a power cut between the two renames below
        waiting.rename(present)
        durable.sync_folder(home)
    keys = NodeKeys.load(home)
    if not waiting.is_dir() or not _awaited(roster, keys, NodeKeys.load_from(waiting)):
        return keys
    present.rename(home / f"keys-until-{roster.number}")
    waiting.rename(present)
    durable.sync_folder(home)
    return NodeKeys.load(home)


def waits(home: Path, roster: Roster) -> bool:
    """Say whether keys wait that this roster lists."""
    waiting = home / next_name
    return waiting.is_dir() and _awaited(roster, NodeKeys.load(home), NodeKeys.load_from(waiting))


def _awaited(roster: Roster, keys: NodeKeys, following: NodeKeys) -> bool:
    if not fits(roster, following):
        return False
    institution = roster.institutions[roster.node(following.node_id).institution]
    return not fits(roster, keys) or (following.ca_certificate == institution.ca != keys.ca_certificate)
