"""How many bytes a proof for an outsider has in a log of 10^8 entries. Used by bench/ledger.py.

A real consortium makes a real proof with `medshard prove`; its paths have the length of a small log's. What longer paths add is the
length of so many more hashes, so the sum is exact but for the decimal digits of the index. The tlog-proof is entry, path and cosigned
checkpoint; the whole file also shows which document was registered and which institution vouches for the owner.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from medshard import Vault
from medshard.consortium import LocalConsortium
from medshard_protocol.documentproof import DocumentProof
from medshard_protocol.tlogproof import TlogProof

entries = 10**8
text_hash_bytes = 45  # base64 of 32 bytes, and a newline
packed_hash_bytes = 34 * 4 / 3  # msgpack, then base64


def proof_bytes(institutions: int) -> dict[str, Any]:
    """Measure one, and add what a log of ``entries`` makes longer."""
    folder = Path(tempfile.mkdtemp(prefix="medshard-proof-"))
    try:
        with LocalConsortium(folder / "consortium", institutions=institutions) as consortium:
            document = folder / "policy.pdf"
            document.write_bytes(os.urandom(100_000))
            data = asyncio.run(_prove(consortium, document))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    proof = DocumentProof.from_bytes(data)
    depth = (entries - 1).bit_length()
    packed = [proof.enrolment.path, *([proof.first.path] if proof.first else [])]
    more = (depth - len(proof.register.path)) * text_hash_bytes + sum(depth - len(path) for path in packed) * packed_hash_bytes
    entry = len(base64.b64encode(proof.register.entry))
    bare = len(TlogProof(entries - 1, (bytes(32),) * depth, proof.note).to_bytes()) + entry
    return {"measured_bytes": len(data), "entries": entries, "whole_bytes": int(len(data) + more), "tlog_proof_bytes": bare}


async def _prove(consortium: LocalConsortium, document: Path) -> bytes:
    async with Vault.open(consortium.vault_home, consortium.passphrase) as vault:
        report = await vault.put([document])
        return (await vault.prove(report.stored[0].sha256))[0].to_bytes()
