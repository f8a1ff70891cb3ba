"""How fast the fold is, and how fast a node's state is there again: python -m bench.state [ENTRIES]

A log of registrations, reads and grants by 50 vaults. Signatures are not checked here: a node checks each once, at 0.1 ms. Prints entries a
second from bytes to saved state, the state's file and this process's memory, and the time from opening the file to the first answers.
"""

from __future__ import annotations

import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol.entries import Access, Body, Enrol, Entry, Genesis, Grant, Register, nonce_size, signature_size
from medshard_protocol.identity import institution_certificate, public_key
from medshard_protocol.ids import FileId, Key, Sha256, node_id_of
from medshard_protocol.roster import Institution, Node, Roster
from medshard_protocol.state import State
from storenode.ledger.tables import SqliteTables, save_rows_max

vaults = 50


def roster() -> Roster:
    """One institution with one node."""
    keys = [Ed25519PrivateKey.generate() for _ in range(4)]
    ca, tls, cosigner, log = map(public_key, keys)
    institution = Institution("Clinic", institution_certificate(keys[0], "Clinic", datetime.now(UTC)), ca)
    node = Node(node_id_of(tls), "one", 0, "https://127.0.0.1:9700", 10**12, tls, cosigner, log)
    return Roster("clinic.example/log", node.id, (institution,), (node,), (1, 1, 1))


def written(of: Roster, count: int) -> Iterator[bytes]:
    """Entries without signatures, most of them with effect."""
    draw = random.Random(1)
    keys = [Key(draw.randbytes(32)) for _ in range(vaults)]
    files: list[tuple[FileId, Key]] = []

    def entry(body: Body, author: Key) -> bytes:
        return Entry(body, author, bytes(signature_size)).to_bytes()

    yield entry(Genesis(of.sha256, bytes(nonce_size)), of.log_key)
    for key in keys:
        yield entry(Enrol(key, 0, draw.randbytes(nonce_size)), of.institutions[0].key)
    for _ in range(count):
        kind, author, nonce = draw.random(), draw.choice(keys), draw.randbytes(nonce_size)
        if kind < 0.4 or len(files) < 8:
            files.append((FileId(draw.randbytes(32)), author))
            yield entry(Register(files[-1][0], Sha256(draw.randbytes(32)), nonce), author)
        elif kind < 0.9:
            yield entry(Access(tuple({draw.choice(files)[0] for _ in range(2)}), 1, b"", nonce), author)
        else:
            file_id, owner = draw.choice(files)
            yield entry(Grant((file_id,), draw.choice(keys), 0, 1, nonce), owner)


def save(tables: SqliteTables, size: int) -> None:
    """Save as a node does, but not in a thread."""
    tables.begin_save()
    tables.write(size, b"")
    tables.end_save(written=True)


def memory_mib() -> float:
    """This process's memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main(count: int) -> None:
    """Fold, save, open again, and print."""
    of = roster()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        path, took, most = Path(folder) / "state.sqlite", 0.0, 0.0
        tables = SqliteTables(path)
        state = State(of, tables)
        for data in written(of, count):
            began = time.perf_counter()
            state.apply(Entry.from_bytes(data))
            if tables.unsaved > save_rows_max:
                save(tables, state.size)
            took += time.perf_counter() - began
            if state.size % 50_000 == 0:
                most = max(most, memory_mib())
        save(tables, state.size)
        size, counts = state.size, state.counts
        print(f"fold     {size / took:10,.0f} entries/s   ({size:,} entries: {counts})")
        print(f"file     {sum(each.stat().st_size for each in path.parent.iterdir()) / 2**20:10,.0f} MiB")
        print(f"memory   {max(most, memory_mib()):10,.0f} MiB")
        tables.close()
        began = time.perf_counter()
        tables = SqliteTables(path)
        state = State(of, tables)
        assert (state.size, state.counts) == (size, counts)
        print(f"start    {(time.perf_counter() - began) * 1000:10,.1f} ms")
        tables.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
