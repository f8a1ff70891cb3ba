"""The certificate of destruction: what was destroyed, by whose entry in the ledger, and what its holders have signed.

Law: whoever gets one trusts the genesis file alone. Entry, checkpoint and receipts are inside and are checked; what stands beside them in
words is checked against them. It names documents by hash and size, and says nothing else about them. docs/formats/ending.md.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from medshard.custody import Ended
from medshard_protocol import canonical
from medshard_protocol.checkpoint import Note, cosigners
from medshard_protocol.ending import Receipt
from medshard_protocol.entries import Entry, Erase, Retire, Type
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.ids import Sha256
from medshard_protocol.proofs import Inclusion
from medshard_protocol.roster import Roster
from medshard_protocol.rosters import Link, follow, pack_links, unpack_links

title: Final = "certificate of destruction 1"
bytes_max: Final = 256 * 1024 * 1024
words: Final = {Type.ERASE: "erased", Type.RETIRE: "retired"}


@dataclass(frozen=True, slots=True)
class Certified:
    """What a certificate shows, checked."""

    origin: str
    type: Type
    index: int  # of the entry
    author: bytes
    known_by: int  # Unix seconds: the median of the cosigners' clocks
    cosigners: tuple[str, ...]
    documents: tuple[tuple[int, bytes], ...]
    receipts: tuple[Receipt, ...]
    nodes: tuple[str, ...]  # that gave them
    missing: tuple[str, ...]  # holders without a receipt, in the word of whoever made the certificate


def make(ended: Ended, genesis_sha256: Sha256, roster: Roster, links: Sequence[Link]) -> dict[str, Any]:
    """The certificate as a JSON document."""
    names = {node.id: (node.name, roster.institutions[node.institution].name) for node in roster.nodes}
    return {
        "medshard": title,
        "log": roster.origin,
        "genesis_sha256": genesis_sha256.hex(),
        "documents": [{"sha256": sha256.hex(), "size": size} for size, sha256 in ended.documents],
        "file": ended.file_id.hex(),
        "type": words[ended.type],
        "entry": {"index": ended.inclusion.index, "inclusion": _base64(canonical.encode(ended.inclusion.to_value()))},
        "receipts": [
            {
                "node": names.get(each.node, ("", ""))[0],
                "institution": names.get(each.node, ("", ""))[1],
                "shard": each.shard,
                "keys": each.keys,
                "at": each.at,
                "receipt": _base64(each.to_bytes()),
            }
            for each in ended.receipts
        ],
        "missing": [names.get(node, (node.hex(), ""))[0] for node in ended.missing],
        "rosters": _base64(pack_links(links)),
    }


def check(data: bytes, genesis: Roster) -> Certified:
    """Check a certificate against the genesis file. Raises Malformed for what is none, Refused for what does not hold."""
    try:
        told = json.loads(data)
        if told["medshard"] != title:
            raise Malformed(f"certificate: expected {title!r}")
        inclusion = Inclusion.from_value(canonical.decode(_bytes(told["entry"]["inclusion"]), bytes_max=bytes_max, what="certificate"))
        links = unpack_links(_bytes(told["rosters"]))
        documents = tuple((int(each["size"]), bytes.fromhex(each["sha256"])) for each in told["documents"])
        receipts = tuple(Receipt.from_bytes(_bytes(each["receipt"])) for each in told["receipts"])
        said = (str(told["type"]), bytes.fromhex(told["file"]), int(told["entry"]["index"]))
        missing = tuple(str(each) for each in told["missing"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise Malformed(f"not a certificate of destruction ({type(error).__name__}: {error})") from None
    rosters = _chain(genesis, links)
    roster, entry = _verified(inclusion, rosters)
    body = entry.body
    if not isinstance(body, Erase | Retire):
        raise Refused("the entry in the certificate destroys nothing")
    if said != (words[body.type], body.file_id, inclusion.index):
        raise Refused("the certificate says something else than the entry in it")
    nodes = []
    for receipt in receipts:
        nodes.append(_signer(receipt, rosters))
        if (receipt.file_id, receipt.entry, receipt.type) != (body.file_id, inclusion.index, body.type):
            raise Refused("a receipt in the certificate is of another file or entry")
    times = sorted(cosigners(Note.from_bytes(inclusion.checkpoint), roster).items(), key=lambda item: item[1])
    names = tuple(sorted(roster.institutions[number].name for number in _institutions(roster, [node for node, _ in times])))
    return Certified(
        roster.origin,
        body.type,
        inclusion.index,
        entry.author,
        times[len(times) // 2][1],
        names,
        documents,
        receipts,
        tuple(nodes),
        missing,
    )


def _chain(genesis: Roster, links: Sequence[Link]) -> list[Roster]:
    """All rosters up to when the certificate was made, the newest first."""
    rosters = [genesis]
    for link in links:
        rosters.append(follow(rosters[-1], [link]))
    return rosters[::-1]


def _verified(inclusion: Inclusion, rosters: Sequence[Roster]) -> tuple[Roster, Entry]:
    """The entry, and the roster whose quorum published it."""
    refused: Refused | None = None
    for roster in rosters:
        try:
            return roster, inclusion.verify(roster)[1]
        except Refused as error:
            refused = refused or error
    assert refused is not None, "the genesis file is among them"
    raise refused


def _signer(receipt: Receipt, rosters: Sequence[Roster]) -> str:
    """The name of the node that gave a receipt. Raises Refused."""
    refused: Refused | None = None
    for roster in rosters:
        try:
            receipt.verify(roster)
            return roster.node(receipt.node).name
        except Refused as error:
            refused = refused or error
    assert refused is not None, "the genesis file is among them"
    raise refused


def _institutions(roster: Roster, nodes: Sequence[Any]) -> set[int]:
    return {roster.node(node).institution for node in nodes}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Malformed(f"certificate: not base64 ({error})") from None
