"""``medshard demo``: the promises, kept before your eyes on real DICOM and PDF files over real processes.

Law: every step that shows something also checks it, and one that is not as promised ends the demo with an error. It uses the
library as any program would, and of the nodes only their folders and processes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from medshard import auditors, smallfiles, upload
from medshard.cli import output
from medshard.consortium import LocalConsortium, standing_reason
from medshard.grants import Happened
from medshard.model import StoredFile
from medshard.query import Query
from medshard.vault import Vault
from medshard_protocol.entries import Purpose, Register
from medshard_protocol.errors import Absent, Damaged, MedshardError, Refused, Unavailable

flagged_wait_s = 20.0
patient_s = 15.0, 15.0  # six nodes share one machine, which may have other things to do
insured = b"Jane Demonstration"
policy_number = "VN-2024-0007"
scans = {
    "CT_small.dcm": "CT, uncompressed",
    "MR_small.dcm": "MR, uncompressed",
    "MR_small_bigendian.dcm": "MR, big endian",
    "MR_small_RLE.dcm": "MR, RLE",
    "MR_small_jpeg_ls_lossless.dcm": "MR, JPEG-LS",
    "JPEG2000.dcm": "NM, JPEG 2000",
    "SC_rgb_jpeg_dcmtk.dcm": "secondary capture, JPEG",
    "image_dfl.dcm": "deflated data set",
    "examples_overlay.dcm": "MR with an overlay",
}
large = "examples_overlay.dcm"  # its shards are over 64 KiB, so each is a file of its own on a node
secrets_in_the_clear = (b"CompressedSamples", b"1CT1", insured, policy_number.encode(), b"Sssssss^Jsssss", b"%PDF-1.4", bytes(16) + b"DICM")


class _Stage:
    """Tells the story: headings, remarks, and the commands that would do the same."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._step = 0
        self.started = time.monotonic()

    def step(self, title: str) -> None:
        self._step += 1
        self.say(f"\n{self._step}. {title}  [{time.monotonic() - self.started:.0f} s]")

    def say(self, *lines: str) -> None:
        if not self._silent:
            for line in lines:
                output.line(line)
            sys.stdout.flush()

    def command(self, text: str) -> None:
        self.say(f"   $ medshard {text}")

    def promise(self, kept: bool, text: str) -> None:
        """Say that something holds, or end the demo."""
        if not kept:
            raise Damaged(f"the demo failed: not true that {text}", hint="Please report this, with the output above.")
        self.say(f"   ✓ {text}")


async def play(folder: Path | None, *, quiet: bool = False, json: bool = False) -> int:
    """Run the demo in ``folder``, or in a temporary one; the exit code. Raises MedshardError where a step fails."""
    stage = _Stage(silent=quiet or json)
    upload.linger_s = smallfiles.linger_s = patient_s  # one that is left behind would be missing where half of them are killed
    with _place(folder) as place:
        consortium = LocalConsortium(place / "consortium")
        try:
            await _scenes(stage, consortium, place)
        finally:
            await asyncio.to_thread(consortium.stop)
    took = time.monotonic() - stage.started
    if json:
        output.document({"ok": True, "seconds": round(took, 1)})
    stage.say(f"\nDone in {took:.0f} s: every promise was kept.")
    _tell_next(stage, folder)
    return 0


async def _scenes(stage: _Stage, consortium: LocalConsortium, place: Path) -> None:
    sources = await asyncio.to_thread(_make_files, place / "files")
    stage.step("Six institutions, a node each, every node a process with its own keys")
    stage.command("up --dir DIR")
    await asyncio.to_thread(consortium.start)
    assert consortium.roster is not None
    k, n, w = consortium.roster.code
    stage.say(f"   any {k} of {n} shards restore a file; {w} institutions must have it on disk before it is acknowledged")
    async with Vault.open(consortium.vault_home, consortium.passphrase) as vault:
        stored = await _store(stage, vault, sources)
        subject = next(each for each in stored if each.path.name == large)
        await _look_like_a_node(stage, vault, consortium, subject)
        await _share(stage, vault, consortium, stored[-1], place)
        await _lose_half(stage, vault, consortium, stored, place / "restored")
        await _flip_a_bit(stage, vault, consortium, subject, place / "restored")
        await _check_the_ledger(stage, vault, subject)


async def _store(stage: _Stage, vault: Vault, sources: list[Path]) -> list[StoredFile]:
    folder = sources[0].parent
    stage.step(f"Put {len(scans)} scans of several transfer syntaxes, and a policy")
    stage.command("put scans/")
    stage.command(f"put --policy-number {policy_number} --tag branch=life policy.pdf")
    started = time.monotonic()
    reports = [await vault.put([folder]), await vault.put([sources[-1]], policy_number=policy_number, tags={"branch": "life"})]
    took = time.monotonic() - started
    stored = [each for report in reports for each in report.stored]
    for each in stored:
        stage.say(f"   {each.sha256.hex()[:16]}…  {each.path.name:<30} {scans.get(each.path.name, 'insurance policy')}")
    total = sum(each.size for each in stored)
    stage.promise(len(stored) == len(sources), f"{len(stored)} files, {output.size(total)}, are safe and on the ledger after {took:.1f} s")
    stage.command(f"find --patient ct1        find --policy-number {policy_number}")
    by_patient = {row.sha256 for row in vault.find(Query(patient="ct1"))}
    by_policy = {row.sha256 for row in vault.find(Query(policy_number=policy_number))}
    hashes = {each.path.name: each.sha256 for each in stored}
    stage.promise(by_patient == {hashes["CT_small.dcm"]}, "the CT is found by its patient")
    stage.promise(by_policy == {hashes["policy.pdf"]}, "the policy is found by its number")
    return stored


async def _look_like_a_node(stage: _Stage, vault: Vault, consortium: LocalConsortium, subject: StoredFile) -> None:
    name = consortium.names[0]
    stage.step(f"What one node sees: {name}, asked for {subject.path.name}")
    manifest, _ = await vault.evidence(subject.sha256)
    shard = _shard_file(consortium, name, subject)
    stage.say(f"   its shard of that file, {shard.stat().st_size:,} bytes, begins:")
    stage.say(*_hexdump(shard.read_bytes()[:48]))
    fields = {
        "file id": f"{manifest.file_id.hex()[:32]}…  random",
        "code": f"{manifest.layout.k} of {manifest.layout.n}, {manifest.layout.cell_size:,} bytes a cell",
        "sealed size": f"{manifest.layout.sealed_size:,}  (the file, padded: {subject.size:,} bytes)",
        "owner": f"{manifest.owner.hex()[:32]}…  a key, no name",
        "header": f"{len(manifest.header):,} bytes of ciphertext: names, hashes, attributes",
        "lookup tags": ", ".join(f"{tag.hex()[:16]}…" for tag in manifest.tags) + "  only the vault can make these from a SHA-256",
    }
    stage.say("   and the public part of its manifest:", *(f"     {field:<12} {text}" for field, text in fields.items()))
    searched, found = await asyncio.to_thread(_search, consortium.folder / "nodes", secrets_in_the_clear)
    shown = ", ".join(repr(secret.decode()) for secret in secrets_in_the_clear[:3])
    stage.promise(not found, f"none of {shown}, … is anywhere in {output.size(searched)} on the nodes")


async def _share(stage: _Stage, vault: Vault, consortium: LocalConsortium, policy: StoredFile, place: Path) -> None:
    stage.step("Share the policy with an insurer: another vault, of another institution")
    stage.command("join CODE             # the insurer, with its own keys")
    secret, home = os.urandom(16).hex(), place / "insurer"
    code = await asyncio.to_thread(consortium.invite, consortium.names[-1])
    await Vault.join(home, code, secret, fast_kdf=True)
    short = policy.sha256.hex()[:16]
    async with Vault.open(home, secret) as insurer:
        vault.contacts.add("Insurer", insurer.keys.public)
        stage.promise(await _is_refused(insurer, policy, place) == "unknown", "to the insurer the policy does not even exist")
        stage.command(f"contacts add Insurer {insurer.keys.public.hex()[:16]}…")
        stage.command(f"share {short}… --to Insurer --until 90d --purpose insurance")
        until = int(time.time()) + 90 * 86_400
        await vault.shares.share([policy.sha256], insurer.keys.public, until=until, purpose=Purpose.INSURANCE)
        stage.command(f"get {short}…             # the insurer")
        started = time.monotonic()
        await insurer.get(policy.sha256, place / "claim.pdf", purpose=Purpose.INSURANCE)
        took = time.monotonic() - started
        stage.promise(_sha256(place / "claim.pdf") == policy.sha256, f"the insurer reads it, {took:.1f} s after it asked")
        stage.command(f"revoke {short}… --from Insurer")
        await vault.shares.revoke([policy.sha256], insurer.keys.public)
        why = await _is_refused(insurer, policy, place)
        stage.promise("revoked" in why, f"a second read is refused by every node: {why}")
    stage.command(f"log {short}…")
    await asyncio.sleep(0.3)  # the refused read is the insurer's entry: other nodes than its own hear of it a moment later
    log = await vault.shares.log(policy.sha256)
    _tell_log(stage, log)
    whats = [each.what for each in log]
    stage.promise(
        whats[-4:] == ["granted", "read", "revoked", "tried to read without a right"],
        "all of it stands in the ledger, where nobody can take it out",
    )


async def _is_refused(vault: Vault, file: StoredFile, place: Path) -> str:
    """Why a vault cannot read a file; empty if it can."""
    vault.forget_tickets()
    try:
        await vault.get(file.sha256, place / "refused.pdf")
    except Absent:
        return "unknown"
    except Refused as error:
        return str(error).partition(": ")[2]
    return ""


def _tell_log(stage: _Stage, log: Iterable[Happened]) -> None:
    for each in log:
        who = each.author_name or each.author.hex()[:16]
        under = f", under grant {each.grant_index}" if each.grant_index >= 0 and each.what.startswith("read") else ""
        stage.say(
            f"   {each.index:>4}  {time.strftime('%H:%M:%S', time.localtime(each.time))}  {each.what} by {who} ({each.institution}){under}"
        )


async def _lose_half(stage: _Stage, vault: Vault, consortium: LocalConsortium, stored: list[StoredFile], folder: Path) -> None:
    victims = consortium.names[1::2]
    stage.step(f"Lose half of the nodes: SIGKILL to {', '.join(victims)}")
    stage.say(f"   $ kill -9 {' '.join(str(consortium.pid(name)) for name in victims)}")
    for name in victims:
        await asyncio.to_thread(consortium.kill, name)
    stage.command("get SHA256...")
    started = time.monotonic()
    reports = await vault.get_many([each.sha256 for each in stored], folder)
    took = time.monotonic() - started
    same = sum(
        report.path is not None and _sha256(report.path) == _sha256(each.path) == each.sha256
        for each, report in zip(stored, reports, strict=True)
    )
    stage.promise(
        same == len(stored),
        f"all {same} files came back from the other {len(consortium.names) - len(victims)} in {took:.1f} s, same SHA-256",
    )
    stage.promise(
        not any(report.recorded for report in reports), "with three of six institutions the ledger has no quorum, so nobody reads without …"
    )
    stage.say(
        "   … a reason: this vault is marked for emergencies in the roster, and has one in its home (elsewhere: get --break-glass REASON).",
        "   The nodes waited until they had heard nothing of the ledger for 10 s, and kept the signed request with the sealed reason.",
    )
    try:
        await vault.put([_another(stored[0].path, folder / "late.dcm")])
        refused = False
    except MedshardError as error:
        refused = True
        stage.say(f"   a put now says: {str(error).splitlines()[0]}")
    stage.promise(refused, "with too few institutions nothing is acknowledged that might not last")
    stage.say("   … and back up again")
    await asyncio.gather(*(asyncio.to_thread(consortium.restart, name) for name in victims))
    await _show_the_emergency(stage, vault, consortium, stored[0])


async def _show_the_emergency(stage: _Stage, vault: Vault, consortium: LocalConsortium, subject: StoredFile) -> None:
    """The nodes write down what they served, as soon as they can; this vault has not spoken to the ledger since."""
    deadline = time.monotonic() + flagged_wait_s
    stage.command(f"log {subject.sha256.hex()[:16]}…")
    while True:
        try:
            flagged = [each for each in await vault.shares.log(subject.sha256) if each.what == "read in an emergency"]
        except Unavailable:
            flagged = []  # the nodes are only just coming back
        if flagged or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.3)
    _tell_log(stage, flagged)
    stage.promise(len(flagged) == 1, "the emergency read stands flagged in the ledger, put there by the nodes that served it")
    stage.command("log --auditor auditors.key")
    key = await asyncio.to_thread(auditors.load, consortium.auditors_key, consortium.passphrase)
    reasons = {each.reason for each in await vault.shares.audit(key) if each.index == flagged[0].index}
    stage.promise(reasons == {standing_reason}, f"only the auditors read why: “{standing_reason}”")


async def _flip_a_bit(stage: _Stage, vault: Vault, consortium: LocalConsortium, subject: StoredFile, folder: Path) -> None:
    name = consortium.names[2]
    stage.step(f"Flip one bit of {subject.path.name}'s shard on the disk of {name}")
    shard = _shard_file(consortium, name, subject)
    _flip(shard, shard.stat().st_size // 2)
    stage.command(f"verify {subject.sha256.hex()[:16]}…")
    report = await vault.verify(subject.sha256)
    for holder in report.holders:
        mark, cells = "✓" if holder.state == "proven" else "✗", f", cell {holder.bad_cells[0]}" if holder.bad_cells else ""
        stage.say(f"   {mark} shard {holder.shard}  {holder.state}{cells}  {output.holder(holder.node, holder.institution)}")
    damaged = {holder.node for holder in report.holders if holder.state == "damaged"}
    stage.promise(damaged == {name} and not report.ok, "verify finds it, and says which node and which cell, without downloading a shard")
    back = folder / "despite.dcm"
    await vault.get(subject.sha256, back)
    stage.promise(
        _sha256(back) == subject.sha256, "get still gives the right bytes: every cell is checked, another node's is taken instead"
    )


async def _check_the_ledger(stage: _Stage, vault: Vault, subject: StoredFile) -> None:
    stage.step("Check the ledger's proof as an auditor would, offline")
    stage.command(f"info {subject.sha256.hex()[:16]}…")
    info = await vault.info(subject.sha256)
    manifest, inclusion = await vault.evidence(subject.sha256)
    checkpoint, entry = inclusion.verify(vault.roster)
    origin, size, root = info.checkpoint.split("\n")[:3]
    stage.say(f"   checkpoint: {origin}, {size} entries, root {root}", f"   cosigned by {', '.join(info.cosigners)}")
    named = isinstance(entry.body, Register) and entry.body.manifest_sha256 == manifest.sha256
    stage.promise(named and checkpoint.size > inclusion.index, f"entry {inclusion.index} of the ledger names this manifest's SHA-256")
    quorum = vault.roster.quorum.q
    stage.promise(len(info.cosigners) >= quorum, f"{len(info.cosigners)} cosigners, where {quorum} institutions make a quorum")
    forged = bytearray(inclusion.entry)
    forged[len(forged) // 2] ^= 1
    try:
        replace(inclusion, entry=bytes(forged)).verify(vault.roster)
        believed = True
    except MedshardError as error:
        believed = not isinstance(error, Refused)
    stage.promise(not believed, "with one bit of the entry changed, the proof is refused")


# Files and folders


@contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="medshard-demo-") as temporary:
        yield Path(temporary)


def _make_files(folder: Path) -> list[Path]:
    try:
        from pydicom.data import get_testdata_file
    except ImportError:
        raise Absent(
            "the demo puts pydicom's test files, and pydicom is not installed", hint="pip install 'medshard[dicom,node]'"
        ) from None
    (folder / "scans").mkdir(parents=True, exist_ok=True)
    made = []
    for name in scans:
        source = get_testdata_file(name, download=False)
        if source is None:
            raise Absent(f"this pydicom does not bring {name}")
        made.append(Path(shutil.copy(str(source), folder / "scans" / name)))
    policy = folder / "policy.pdf"
    policy.write_bytes(policy_pdf())
    return [*made, policy]


def policy_pdf() -> bytes:
    """One page of an insurance policy."""
    text = [b"Policy " + policy_number.encode(), b"Insured: " + insured, b"Life, 30 years, 250 000"]
    page = b"BT /F1 18 Tf 72 760 Td 26 TL " + b" ".join(b"(" + line + b") Tj T*" for line in text) + b" ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%b\nendstream" % (len(page), page),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Title (Policy %b) /Author (Demonstration Life) /CreationDate (D:20240501100000Z) >>" % policy_number.encode(),
    ]
    data, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    trailer = b"trailer\n<< /Size %d /Root 1 0 R /Info 6 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(data))
    return data + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + trailer


def _another(source: Path, copy: Path) -> Path:
    """A file like ``source``, yet not stored so far."""
    copy.write_bytes(source.read_bytes() + os.urandom(16))
    return copy


def _shard_file(consortium: LocalConsortium, name: str, subject: StoredFile) -> Path:
    """The file in which a node keeps its shard of ``subject``."""
    found = sorted((consortium.home(name) / "data" / "shards").rglob(f"*{subject.file_id.hex()}*"))
    if not found:
        raise Absent(f"{name} keeps no shard of {subject.path.name} in a file")
    return found[0]


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def _search(folder: Path, secrets: Iterable[bytes]) -> tuple[int, set[bytes]]:
    """Look for ``secrets`` in every file under ``folder``: (bytes searched, what was found)."""
    searched, found = 0, set()
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            searched += len(data)
            found |= {secret for secret in secrets if secret in data}
    return searched, found


def _sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def _hexdump(data: bytes) -> list[str]:
    rows = [data[at : at + 16] for at in range(0, len(data), 16)]
    return [f"     {row.hex(' ')}  {''.join(chr(b) if 32 <= b < 127 else '.' for b in row)}" for row in rows]


def _tell_next(stage: _Stage, folder: Path | None) -> None:
    stage.say(
        "",
        "Try next:",
        "   medshard up --dir /tmp/trial &              your own consortium",
        "   export MEDSHARD_HOME=/tmp/trial/vault",
        "   medshard put FILE_OR_FOLDER...              your own files",
        "   medshard --help                             docs/guides/clients.md says more",
    )
    if folder is not None:
        stage.say(f"   medshard up --dir {folder / 'consortium'}    the demo's consortium, with its files")
