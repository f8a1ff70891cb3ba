"""A log of many entries in one node's folder, and what it costs to audit it and to start from it. Used by bench/ledger.py.

Every entry is signed by one of fifty vaults: registrations and reads, as a consortium would write them. They go straight into the node's
database, since a million appends over the network would take ten minutes and measure something else; from there on the real programs run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench.machine import family
from medshard.consortium import answers
from medshard_protocol import merkle
from medshard_protocol.checkpoint import Checkpoint, Note, cosigner_verifier, log_verifier
from medshard_protocol.entries import Access, Body, Enrol, Genesis, Register, nonce_size, sign_entry
from medshard_protocol.identity import public_key
from medshard_protocol.ids import FileId, Key, Sha256
from medshard_protocol.merkle import sha256 as sha256_digest
from medshard_protocol.roster import Roster
from medshard_protocol.tiles import Tree
from storenode.config import Config
from storenode.consortium import lay_out
from storenode.genesis import load_genesis
from storenode.identity import NodeKeys
from storenode.ledger.engine import Head, name_of
from storenode.ledger.store import Store

vaults = 50
batch = 4096
entries_a_day = 100_000
_poll_s = 0.05


def measure(folder: Path, entries: int) -> dict[str, Any]:
    """Fill a node's ledger; start it twice; export and audit it."""
    home = _filled(folder, entries)
    first = _start(home, entries)
    again = _start(home, entries)
    stored = {file.name: file.stat().st_size for file in (home / "data").glob("*.sqlite")}
    export = folder / "static"
    began = time.perf_counter()
    _storenode(home, "log", "export", str(export))
    exported = time.perf_counter() - began
    return {
        "entries": entries,
        "first_start": first,
        "start": again,
        "database_bytes": stored,
        "static_bytes": sum(file.stat().st_size for file in export.rglob("*") if file.is_file()),
        "export_seconds": exported,
        "audit": _audit(home, export),
    }


def year_bytes(figures: dict[str, Any]) -> dict[str, int]:
    """What a mirror and a static copy grow by in a year of ``entries_a_day``."""
    scale = 365 * entries_a_day / figures["entries"]
    return {"mirror": int(sum(figures["database_bytes"].values()) * scale), "static": int(figures["static_bytes"] * scale)}


def _filled(folder: Path, entries: int) -> Path:
    roster = lay_out(folder, 1, code=None, capacity=10**9).roster
    home = folder / "nodes" / roster.nodes[0].name
    config = Config.load(home)
    store = Store(config.data, roster.origin, sha256_digest(b""))
    stored: dict[tuple[int, int], bytes] = {}
    tree = Tree(lambda level, number: stored[level, number])
    for data in _batches(roster, NodeKeys.load(home), entries):
        leaves = [merkle.leaf_hash(entry, sha256_digest) for entry in data]
        tiles = [tile for leaf in leaves for tile in tree.append(leaf)]
        stored.update({(tile.level, tile.number): tile.hashes for tile in tiles if tile.level > 0})
        size = tree.size
        head = Head(size, tree.root(size), b"")
        store.extend(0, size - len(data), data, tiles, head, [name_of(entry) for entry in data], own=True)
    store.remember(tree.size, (), _published(roster, NodeKeys.load(home), tree).to_bytes())  # a node knows, and folds with no way back
    store.close()
    return home


def _published(roster: Roster, keys: NodeKeys, tree: Tree) -> Note:
    """A head of the whole log with its quorum, which is this one institution."""
    assert keys.log is not None, "a trial's node may be sequencer"
    text = Checkpoint(roster.origin, tree.size, tree.root(tree.size)).text()
    cosigner = cosigner_verifier(roster, roster.nodes[0].id)
    return Note(text, (log_verifier(roster).sign(text, keys.log.sign), cosigner.sign(text, keys.cosigner.sign, int(time.time()))))


def _batches(roster: Roster, keys: NodeKeys, entries: int) -> Iterator[list[bytes]]:
    assert keys.ca is not None, "a trial keeps it"
    assert keys.log is not None, "a trial's node may be sequencer"
    opening: list[tuple[Body, Ed25519PrivateKey]] = [(Genesis(roster.sha256, bytes(nonce_size)), keys.log)]
    opening += [(Enrol(public_key(_vault(number)), 0, os.urandom(nonce_size)), keys.ca) for number in range(vaults)]
    yield [sign_entry(roster.origin, body, public_key(key), key.sign).to_bytes() for body, key in opening]
    left = entries - len(opening)
    jobs = [(roster.origin, number, min(batch, left - at)) for number, at in enumerate(range(0, left, batch))]
    with multiprocessing.get_context("forkserver").Pool() as pool:
        yield from pool.imap(_signed, jobs)


def _signed(job: tuple[str, int, int]) -> list[bytes]:
    """Registrations and reads of files of the same batch, two to one."""
    origin, number, count = job
    draw = random.Random(number)
    made, files = [], []
    for at in range(count):
        key, nonce = _vault(draw.randrange(vaults)), draw.randbytes(nonce_size)
        body: Body
        if at % 3 < 2:
            files.append(FileId(draw.randbytes(32)))
            body = Register(files[-1], Sha256(draw.randbytes(32)), nonce)
        else:
            body = Access((draw.choice(files),), 1, b"", nonce)
        made.append(sign_entry(origin, body, _public(key), key.sign).to_bytes())
    return made


@lru_cache
def _vault(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(sha256(f"vault {number}".encode()).digest())


@lru_cache
def _public(key: Ed25519PrivateKey) -> Key:
    return public_key(key)


def _start(home: Path, entries: int) -> dict[str, float]:
    """Seconds from the start of the process until it answers, until it says that all entries are folded and published, and its memory then.

    Without the time that the command `storenode status` takes for itself.
    """
    roster = load_genesis(home)
    began = time.perf_counter()
    with (home / "log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "storenode", "--home", str(home), "run"], stdout=log, stderr=log)
    try:
        while not answers(roster.nodes[0], roster):
            if process.poll() is not None:
                raise RuntimeError((home / "log").read_text()[-2000:])
            time.sleep(_poll_s)
        answered = took = time.perf_counter() - began
        while True:
            took = time.perf_counter() - began
            ledger = _status(home)["ledger"]
            if ledger["published"] >= entries and sum(ledger["entries"].values()) >= entries:
                break
        return {"answers_seconds": answered, "seconds": took, "memory_mib": _memory_mib(process.pid), "peak_mib": _peak_mib(process.pid)}
    finally:
        process.terminate()
        process.wait()


def _status(home: Path) -> dict[str, Any]:
    asked = _run(home, "status", "--json")
    if asked.returncode != 0:
        raise RuntimeError(asked.stderr[-2000:])
    status: dict[str, Any] = json.loads(asked.stdout)
    return status


def _audit(home: Path, export: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "storenode", "log", "verify", str(export), "--genesis", str(home / "genesis.medshard"), "--json"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    peak, ended = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(_poll_s):
            peak = max(peak, sum(map(_memory_mib, family(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    said, _ = process.communicate()
    took = time.perf_counter() - began
    ended.set()
    watcher.join()
    if process.returncode != 0:
        raise RuntimeError(f"the audit failed: {said[-2000:]!r}")
    return {"seconds": took, "peak_mib": peak, "processes": os.cpu_count() or 1}


def _memory_mib(pid: int) -> float:
    """Proportional: what several processes share counts once."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1]) / 1024
    except (OSError, StopIteration):
        return 0.0


def _peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1024


def _storenode(home: Path, *arguments: str) -> None:
    done = _run(home, *arguments)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])


def _run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = [sys.executable, "-m", "storenode", "--home", str(home), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
