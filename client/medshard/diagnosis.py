"""What is wrong with this vault and its consortium, why it matters, what to do. Looks at everything, changes nothing."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import time
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509

from medshard.home import Home
from medshard.index import Index
from medshard.keys import VaultKeys
from medshard.ledger import LedgerClient
from medshard.model import Finding
from medshard.rights import Rights
from medshard.transport import Net
from medshard_protocol.checkpoint import Checkpoint, open_published
from medshard_protocol.errors import MedshardError
from medshard_protocol.roster import Node
from medshard_protocol.rosters import differences

ping_timeout_s: Final = 3.0
slow_s: Final = 1.0
low_disk_bytes: Final = 256 * 1024 * 1024
renew_before: Final = timedelta(days=60)
changes_shown: Final = 5


async def diagnose(home: Home, keys: VaultKeys, net: Net, index: Index, ledger: LedgerClient) -> list[Finding]:
    """All findings, good ones included."""
    findings = [*_files(home), _certificate(home), _disk(home), _index(index)]
    findings += await _roster(home, net)
    findings += await _key(home, keys, Rights(net, keys, ledger))
    answers = await asyncio.gather(*(_ask(net, node) for node in net.roster.nodes))
    findings += [finding for finding, _ in answers]
    alive = [node for node, (_, checkpoint) in zip(net.roster.nodes, answers, strict=True) if checkpoint is not None]
    findings += _consortium(net, alive)
    findings.append(_ledger(net, alive, [checkpoint for _, checkpoint in answers if checkpoint is not None]))
    return findings


def _files(home: Home) -> list[Finding]:
    findings = []
    mode = home.key_file.stat().st_mode & 0o077
    if mode:
        findings.append(
            Finding("warn", "the key file can be read by others", "it is the vault, behind a passphrase", f"chmod 600 {home.key_file}")
        )
    else:
        findings.append(Finding("ok", "key file", "keep a copy elsewhere: without it and its passphrase nothing can be restored"))
    if (home.folder / "passphrase").exists():
        findings.append(
            Finding("warn", "the passphrase lies beside the key file", "fine for a local trial, not for patients' data", "delete it")
        )
    return findings


def _certificate(home: Home) -> Finding:
    expires = x509.load_der_x509_certificate(home.certificate_bytes()).not_valid_after_utc
    if expires - datetime.now(UTC) < renew_before:
        return Finding(
            "bad", f"the certificate expires on {expires:%Y-%m-%d}", "nodes refuse it after that", "ask for a new invitation and join"
        )
    return Finding("ok", f"certificate valid until {expires:%Y-%m-%d}")


async def _key(home: Home, keys: VaultKeys, rights: Rights) -> list[Finding]:
    """Whether the institution still vouches for this vault's key, in its nodes' word."""
    found = []
    vouched = await rights.vouched(keys.public)
    if vouched is not None and vouched.withdrawn:
        fix = "ask it for an invitation, then: medshard keys rotate CODE"
        found.append(Finding("bad", f"{vouched.institution} has withdrawn this vault's key", "no node takes anything from it", fix))
    elif vouched is not None and vouched.institution:
        found.append(Finding("ok", f"{vouched.institution} vouches for this vault's key"))
    if home.next_key.exists():
        fix = "run it again with the same code: medshard keys rotate CODE"
        found.append(Finding("warn", "a rotation of this vault's keys was cut off", "the old key may be withdrawn already", fix))
    return found


def _disk(home: Home) -> Finding:
    free = shutil.disk_usage(home.folder).free
    if free < low_disk_bytes:
        return Finding("bad", f"only {free >> 20} MiB free at {home.folder}", "the index must be able to grow", "free some space")
    return Finding("ok", f"{free >> 30} GiB free at {home.folder}")


def _index(index: Index) -> Finding:
    return Finding("ok", f"local index: {index.count()} files")


async def _roster(home: Home, net: Net) -> list[Finding]:
    """Which roster this vault goes by, and what the changes since the genesis file were."""
    await net.follow()
    rosters = home.rosters()
    found = [
        Finding("ok", f"roster {net.roster.number}", "the genesis file" if len(rosters) == 1 else f"{len(rosters) - 1} changes so far")
    ]
    for old, new in itertools.pairwise(rosters[-changes_shown - 1 :]):
        texts = "; ".join(f"{each.what}: {each.text}" for each in differences(old, new))
        found.append(Finding("ok", f"roster {new.number} changed: {texts}"))
    return found


async def _ask(net: Net, node: Node) -> tuple[Finding, Checkpoint | None]:
    started = time.monotonic()
    try:
        note = await net.call(node, "GET", "/log/checkpoint", timeout_s=ping_timeout_s)
        checkpoint = open_published(note, net.roster)
    except MedshardError as error:
        return Finding("warn", f"node {node.name} does not answer", str(error), f"tell its operator ({node.url})"), None
    took = time.monotonic() - started
    if took > slow_s:
        return Finding("warn", f"node {node.name} is slow", f"{took:.1f} s for a small answer", "tell its operator"), checkpoint
    return Finding("ok", f"node {node.name}: {took * 1000:.0f} ms, ledger at {checkpoint.size}"), checkpoint


def _consortium(net: Net, alive: list[Node]) -> list[Finding]:
    k, n, w = net.roster.code
    institutions = len({node.institution for node in alive})
    findings = []
    if len(alive) < k:
        findings.append(
            Finding("bad", f"{len(alive)} nodes answer, {k} are needed to restore", "a file needs k of its n shards", "bring nodes back")
        )
    elif len(alive) < n:
        findings.append(Finding("warn", f"{n - len(alive)} of {n} holders are away", "restores work, with less margin", "bring nodes back"))
    if institutions < w:
        findings.append(
            Finding(
                "bad",
                f"{institutions} institutions answer, {w} are needed to store",
                "nothing is acknowledged on fewer",
                "bring nodes back",
            )
        )
    return findings or [Finding("ok", f"{len(alive)} nodes of {institutions} institutions: stores ({w}) and restores ({k}) work")]


def _ledger(net: Net, alive: list[Node], checkpoints: list[Checkpoint]) -> Finding:
    quorum = net.roster.quorum.q
    institutions = len(net.roster.voices.intersection(node.id for node in alive))
    if institutions < quorum:
        return Finding(
            "bad", f"{institutions} institutions of the {quorum} that make a quorum", "nothing new can be acknowledged", "bring nodes back"
        )
    by_size: dict[int, set[bytes]] = {}
    for checkpoint in checkpoints:
        by_size.setdefault(checkpoint.size, set()).add(checkpoint.root)
    if any(len(roots) > 1 for roots in by_size.values()):
        return Finding("bad", "two ledgers of one size differ", "history was forked", "keep this output and tell every institution")
    return Finding("ok", f"ledger: {max(by_size)} entries, {institutions} institutions, quorum {quorum}")
