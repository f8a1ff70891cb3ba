"""What a node says when it has destroyed what a RETIRE or ERASE entry ended: a receipt, signed with its TLS key.

A receipt is the node's word. It shows that an honest node has destroyed what it had; nothing can show that of a dishonest one.
Docs: docs/formats/ending.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medshard_protocol import canonical
from medshard_protocol.canonical import Fields
from medshard_protocol.entries import Type
from medshard_protocol.errors import Absent, Malformed, Refused
from medshard_protocol.ids import FileId, NodeId, file_id_size, node_id_size
from medshard_protocol.roster import Roster
from medshard_protocol.shards import code_n_max

version: Final = 1
signature_size: Final = 64
receipt_bytes_max: Final = 512
label: Final = b"medshard/ending-receipt/v1"
_ends: Final = (Type.RETIRE, Type.ERASE)


def endings_path(file_id: FileId) -> str:
    """Where a node tells what it has destroyed of a file."""
    return f"/v1/endings/{file_id.hex()}"


@dataclass(frozen=True, slots=True)
class Receipt:
    """One node has destroyed what it had of one file."""

    file_id: FileId
    entry: int  # index of the RETIRE or ERASE entry
    type: Type
    node: NodeId
    shard: int | None  # which it held; None if it held none
    keys: int  # how many wrapped keys went: the owner's, with the manifest, and those of grants; 0 for a RETIRE
    at: int  # when, in seconds since 1970, by the node's clock
    signature: bytes

    def to_bytes(self) -> bytes:
        """The canonical form."""
        return canonical.encode([*self._body(), self.signature])

    @classmethod
    def from_bytes(cls, data: bytes) -> Receipt:
        """Parse. Raises Malformed and nothing else. The signature is for ``verify``."""
        f = Fields(canonical.decode(data, bytes_max=receipt_bytes_max, what="receipt"), count=9, what="receipt")
        f.uint(least=version, most=version)
        file_id, entry, number = FileId(f.bytes(exactly=file_id_size)), f.uint(most=2**63 - 1), f.uint(most=255)
        if number not in _ends:
            raise Malformed("receipt: neither of a RETIRE nor of an ERASE entry")
        node, held = NodeId(f.bytes(exactly=node_id_size)), f.list(most=1)
        shard = Fields(held, count=1, what="receipt").uint(most=code_n_max - 1) if held else None
        keys, at = f.uint(most=2**32), f.uint(most=2**53)
        return cls(file_id, entry, Type(number), node, shard, keys, at, f.bytes(exactly=signature_size))

    def verify(self, roster: Roster) -> None:
        """Check that the node which is named gave this receipt in this consortium. Raises Refused."""
        try:
            key = roster.node(self.node).tls_key
            Ed25519PublicKey.from_public_bytes(key).verify(self.signature, self._signed(roster.origin))
        except Absent:
            raise Refused("the receipt is of a node that is not in the roster") from None
        except (InvalidSignature, ValueError):
            raise Refused("the receipt is not signed by the node that it names") from None

    def _body(self) -> list[canonical.Value]:
        shard: list[canonical.Value] = [] if self.shard is None else [self.shard]
        return [version, self.file_id, self.entry, int(self.type), self.node, shard, self.keys, self.at]

    def _signed(self, origin: str) -> bytes:
        name = origin.encode()
        return label + len(name).to_bytes(2, "big") + name + canonical.encode(self._body())


def sign_receipt(origin: str, receipt: Receipt, sign: Callable[[bytes], bytes]) -> Receipt:
    """The receipt with its signature. ``sign`` makes Ed25519 signatures with the node's TLS key."""
    return replace(receipt, signature=sign(receipt._signed(origin)))
