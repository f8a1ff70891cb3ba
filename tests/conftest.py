"""What tests of several parts share: a consortium whose keys are derived from their names, so that every run has the same ones."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, cosigner_verifier, log_verifier, pq_verifier
from medshard_protocol.entries import Body, Entry, sign_entry
from medshard_protocol.identity import institution_certificate, public_key
from medshard_protocol.ids import node_id_of
from medshard_protocol.merkle import sha256
from medshard_protocol.proofs import Inclusion
from medshard_protocol.roster import Institution, Node, Roster

cosigned_at = 1_700_000_000


@cache
def key_named(name: str) -> Ed25519PrivateKey:
    """The private key whose seed is the SHA-256 of its name."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


@cache
def pq_key_named(name: str) -> MLDSA44PrivateKey:
    """The ML-DSA-44 key whose seed is the SHA-256 of its name."""
    return MLDSA44PrivateKey.from_seed_bytes(hashlib.sha256(name.encode()).digest())


@cache
def entry_of(origin: str, author: str, body: Body) -> Entry:
    """Signed once: these signatures are the same every time, and thousands are made."""
    key = key_named(author)
    return sign_entry(origin, body, public_key(key), key.sign)


@dataclass(frozen=True)
class Consortium:
    """A roster and everybody's private keys: ``ca 0``, ``tls 0``, ``cosigner 0``, ``pq 0``, ``log``, and any other name for a vault."""

    roster: Roster

    def key(self, name: str) -> Ed25519PrivateKey:
        return key_named(name)

    def entry(self, author: str, body: Body) -> Entry:
        return entry_of(self.roster.origin, author, body)

    def note(self, checkpoint: Checkpoint, cosigners: Collection[int], pq: Collection[int] = ()) -> Note:
        """A checkpoint signed by the log and cosigned by these nodes, with Ed25519 and with ML-DSA keys."""
        text = checkpoint.text()
        signatures = [log_verifier(self.roster).sign(text, key_named("log").sign)]
        for number in cosigners:
            verifier = cosigner_verifier(self.roster, self.roster.nodes[number].id)
            signatures.append(verifier.sign(text, key_named(f"cosigner {number}").sign, cosigned_at))
        for number in pq:
            verifier = pq_verifier(self.roster, self.roster.nodes[number].id)
            signatures.append(verifier.sign(text, pq_key_named(f"pq {number}").sign, cosigned_at))
        return Note(text, tuple(signatures))

    def checkpoint(self, entries: Sequence[bytes]) -> Checkpoint:
        leaves = [merkle.leaf_hash(entry, sha256) for entry in entries]
        return Checkpoint(self.roster.origin, len(entries), merkle.root(leaves, sha256))

    def inclusion(self, entries: Sequence[bytes], index: int, cosigners: Collection[int]) -> Inclusion:
        leaves = [merkle.leaf_hash(entry, sha256) for entry in entries]
        note = self.note(self.checkpoint(entries), cosigners)
        return Inclusion(index, entries[index], tuple(merkle.inclusion_path(leaves, index, sha256)), note.to_bytes())


@cache
def consortium_of(institutions: int, nodes_each: int = 1, port: int = 9700, pq: bool = False) -> Consortium:
    """Institutions 0, 1, …; node i belongs to institution i modulo their number; node 0 is the sequencer; with ML-DSA keys or without."""
    made = []
    for number in range(institutions):
        key = key_named(f"ca {number}")
        certificate = institution_certificate(key, f"Institution {number}", datetime(2025, 1, 1, tzinfo=UTC))
        made.append(Institution(f"Institution {number}", certificate, public_key(key)))
    nodes = []
    for number in range(institutions * nodes_each):
        tls, cosigner = public_key(key_named(f"tls {number}")), public_key(key_named(f"cosigner {number}"))
        url = f"https://127.0.0.1:{port + number}"
        pq_key = pq_key_named(f"pq {number}").public_key().public_bytes_raw() if pq else b""
        log = public_key(key_named(f"log {number}" if number else "log"))
        nodes.append(Node(node_id_of(tls), f"node{number}", number % institutions, url, 10**12, tls, cosigner, log, pq_key))
    k = max(1, len(nodes) // 2)
    return Consortium(
        Roster(
            origin="consortium.example/log",
            sequencer=nodes[0].id,
            institutions=tuple(made),
            nodes=tuple(nodes),
            code=(k, len(nodes), len(nodes)),
        )
    )


@pytest.fixture(scope="session")
def consortium() -> Callable[..., Consortium]:
    """Make a consortium: ``consortium(4)``, or ``consortium(4, nodes_each=2)``."""
    return consortium_of


def pytest_collection_finish() -> None:
    """Thousands of tests and the modules they use stay until the end: do not look for garbage among them again and again."""
    gc.collect()
    gc.freeze()


# The folders whose files run longest: started first, so that no worker is left with one of them when the others have ended.
longest = ("simulation", "cluster", "chaos", "gateway")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that run long at the front; within a file the order stays."""

    def rank(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return longest.index(folder) if folder in longest else len(longest)

    items.sort(key=rank)
