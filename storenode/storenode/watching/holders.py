"""Judging evidence about holders of shards: what they signed about a cell, beside the manifest and what other holders signed.

Law: whether a manifest is the registered one is not in the file; its hash is told, and whoever has the ledger compares.
"""

from __future__ import annotations

from collections.abc import Sequence

from medshard_protocol.audit import Answer, Claim
from medshard_protocol.crosscheck import compare
from medshard_protocol.erasure import code
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.manifest import Manifest
from medshard_protocol.roster import Node, Roster
from storenode.evidence import Exhibit

Judged = tuple[bool, list[str]]


def false_cell(exhibit: Exhibit, rosters: Sequence[Roster]) -> Judged:
    """A holder that says that it has a cell, with hashes that do not lead there."""
    answer, signer, lines = _answer(exhibit, "answer", rosters)
    manifest = _manifest(exhibit, answer, lines)
    if manifest is None or signer is None:
        return False, lines
    if answer.claim is not Claim.HELD or answer.leads_to_root(manifest):
        return False, [*lines, "The hashes lead to the root that the manifest names: nothing is wrong with them."]
    return True, [
        *lines,
        f"The hashes do not lead to the root of shard {answer.shard} in this manifest: {signer.name} signed what is not so.",
    ]


def false_tag(exhibit: Exhibit, rosters: Sequence[Roster]) -> Judged:
    """A holder whose tag does not fit those of k + 1 others."""
    answer, signer, lines = _answer(exhibit, "answer", rosters)
    manifest = _manifest(exhibit, answer, lines)
    if manifest is None or signer is None:
        return False, lines
    tags, names = {answer.shard: answer.tag}, list[str]()
    for name in sorted(name for name in exhibit.documents if name.startswith("witness ")):
        witness, other, more = _answer(exhibit, name, rosters)
        question = (answer.file_id, answer.cell, answer.nonce, answer.auditor)
        if (witness.file_id, witness.cell, witness.nonce, witness.auditor) != question or len(witness.tag) != len(answer.tag):
            raise Malformed(f"evidence: {name} answers another question")
        if other is None or witness.shard in tags or other.name in (*names, signer.name):
            return False, [*lines, *more, "A witness counts once, and only if it is a node of the roster."]
        tags[witness.shard] = witness.tag
        names.append(other.name)
    layout = manifest.layout
    agreement = compare(code(layout.k, layout.n), tags) if answer.tag and max(tags) < layout.n else None
    if agreement is None or answer.shard not in agreement.wrong:
        return False, [*lines, f"The tags do not show that shard {answer.shard} is the one that is wrong."]
    fit = len(agreement.fit)
    lines.append(f"{', '.join(sorted(names))} signed tags of the same cell; {fit} of them belong together, and {layout.k} can be made up.")
    lines.append(f"The tag of {signer.name} does not belong to them: either it had not got the cell, or {fit} nodes lie together.")
    return True, lines


def _answer(exhibit: Exhibit, name: str, rosters: Sequence[Roster]) -> tuple[Answer, Node | None, list[str]]:
    answer = Answer.from_bytes(_document(exhibit, name))
    for roster in reversed(rosters):
        for node in roster.nodes:
            try:
                answer.verify(roster.origin, node.tls_key)
            except Refused:
                continue
            said = f"{node.name} of {roster.institutions[node.institution].name} signed that it holds shard {answer.shard}"
            return answer, node, [f"{said} of {answer.file_id.hex()[:16]}…, cell {answer.cell}."]
    return answer, None, [f"The document {name!r} is not signed by a node of these rosters."]


def _manifest(exhibit: Exhibit, answer: Answer, lines: list[str]) -> Manifest | None:
    if "manifest" not in exhibit.documents:
        lines.append("The manifest was too large to be kept: ask a holder for it.")
        return None
    manifest = Manifest.from_bytes(exhibit.documents["manifest"])
    if manifest.file_id != answer.file_id:
        raise Malformed("evidence: the manifest is of another file")
    lines.append(f"Its manifest has the hash {manifest.sha256.hex()}: compare it with the REGISTER entry of the file.")
    return manifest


def _document(exhibit: Exhibit, name: str) -> bytes:
    try:
        return exhibit.documents[name]
    except KeyError:
        raise Malformed(f"evidence: of kind {exhibit.kind}, and without a document {name!r}") from None
