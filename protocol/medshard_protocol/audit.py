"""What nodes say to each other about shards that they hold: challenges, signed answers, and signed reports for whoever asks.

Law: an answer is a statement of the holder about one cell, at one time, to one auditor, under the holder's TLS key, so that a false one
convicts it before others. A cell is vouched for by its digest and the hashes from there to the registered root, and by a tag
(``crosscheck``) that takes the whole cell to compute. The cell itself never leaves its holder: an audit is no read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medshard_protocol import canonical, merkle
from medshard_protocol.canonical import Fields
from medshard_protocol.crosscheck import tag_size_max
from medshard_protocol.errors import Malformed, Refused
from medshard_protocol.ids import FileId, Key, NodeId, file_id_size, node_id_size
from medshard_protocol.manifest import Manifest
from medshard_protocol.shards import cells_max, code_n_max, digests

version: Final = 1
answer_label: Final = b"medshard/audit-answer/v1"
report_label: Final = b"medshard/audit-report/v1"
nonce_size: Final = 32
digest_size: Final = 32
signature_size: Final = 64
challenge_bytes_max: Final = 128
answer_bytes_max: Final = 4096  # 21 hashes up to the root of the longest shard
report_bytes_max: Final = 64 * 1024  # 255 shards
inventory_items_max: Final = 1024
inventory_bytes_max: Final = inventory_items_max * 64
time_max: Final = 2**40  # seconds since 1970


class Verdict(StrEnum):
    """What one audit of one shard came to. The values are labels of a metric and stand in reports."""

    GOOD = "good"  # has the cell: its tag fits those of the others
    SAID = "said"  # says that it has the cell; there are too few tags to tell
    SLOW = "slow"  # has the cell, or says so, and took far longer than the others
    LATE = "late"  # no answer, after several tries
    REFUSED = "refused"  # will not say, or gives what is no answer
    ABSENT = "absent"  # says that it has not got the shard
    DAMAGED = "damaged"  # says that its disk has changed the shard
    WRONG = "wrong"  # says that it has the cell, and shows that it has not

    @property
    def is_bad(self) -> bool:
        """Whether the shard is not known to be there."""
        return self not in (Verdict.GOOD, Verdict.SAID, Verdict.SLOW)


class Claim(IntEnum):
    """What a holder says of its own shard."""

    HELD = 0
    ABSENT = 1
    DAMAGED = 2


@dataclass(frozen=True, slots=True)
class Challenge:
    """Which cell, by which coefficients; with a tag, or without one where the auditor has no use for it."""

    cell: int
    nonce: bytes
    tagged: bool

    def to_bytes(self) -> bytes:
        """Body of POST /v1/audit/{file}/{index}."""
        return canonical.encode([version, self.cell, self.nonce, int(self.tagged)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Challenge:
        """Parse. Raises Malformed and nothing else."""
        f = Fields(canonical.decode(data, bytes_max=challenge_bytes_max, what="challenge"), count=4, what="challenge")
        f.uint(least=version, most=version)
        return cls(f.uint(most=cells_max - 1), f.bytes(exactly=nonce_size), bool(f.uint(most=1)))


@dataclass(frozen=True, slots=True)
class Answer:
    """A holder's statement. ``digest`` and ``path`` are empty unless it claims to hold the cell; so is ``tag``, and if no more are due."""

    file_id: FileId
    shard: int
    cell: int
    nonce: bytes
    auditor: NodeId
    claim: Claim
    time: int  # Unix seconds, by the holder's clock
    digest: bytes = b""
    path: tuple[bytes, ...] = ()
    tag: bytes = b""
    signature: bytes = bytes(signature_size)

    def to_bytes(self) -> bytes:
        """The canonical form."""
        return canonical.encode([*self._body(), self.signature])

    @classmethod
    def from_bytes(cls, data: bytes) -> Answer:
        """Parse. Raises Malformed and nothing else."""
        f = Fields(canonical.decode(data, bytes_max=answer_bytes_max, what="audit answer"), count=12, what="audit answer")
        f.uint(least=version, most=version)
        file_id, shard, cell = FileId(f.bytes(exactly=file_id_size)), f.uint(most=code_n_max - 1), f.uint(most=cells_max - 1)
        nonce, auditor = f.bytes(exactly=nonce_size), NodeId(f.bytes(exactly=node_id_size))
        claim, time, digest = Claim(f.uint(most=max(Claim))), f.uint(most=time_max), f.bytes(most=digest_size)
        path, tag = tuple(f.list(most=merkle.path_hashes_max)), f.bytes(most=tag_size_max)
        if not all(isinstance(each, bytes) and len(each) == merkle.hash_size for each in path):
            raise Malformed("audit answer: a path is made of hashes")
        if claim is not Claim.HELD and (digest or path or tag):
            raise Malformed("audit answer: who has no cell can show nothing of it")
        return cls(file_id, shard, cell, nonce, auditor, claim, time, digest, path, tag, f.bytes(exactly=signature_size))

    def verify(self, origin: str, key: Key) -> None:
        """Check that the node with this TLS key said this, in this consortium. Raises Refused."""
        _verify(key, self.signature, _signed(answer_label, origin, self._body()), "audit answer")

    def leads_to_root(self, manifest: Manifest) -> bool:
        """Whether the digest is that of the registered cell. Says nothing about whether its holder has more than that."""
        if len(self.digest) != digest_size or self.shard >= manifest.layout.n:
            return False
        digest = digests[manifest.digest]
        try:
            leaf = merkle.leaf_hash(self.digest, digest)
            return merkle.root_from_path(leaf, self.cell, manifest.layout.stripes, self.path, digest) == manifest.shards[self.shard].root
        except Malformed:
            return False

    def _body(self) -> list[canonical.Value]:
        return [
            version,
            self.file_id,
            self.shard,
            self.cell,
            self.nonce,
            self.auditor,
            int(self.claim),
            self.time,
            self.digest,
            list(self.path),
            self.tag,
        ]


def sign_answer(origin: str, answer: Answer, sign: Callable[[bytes], bytes]) -> Answer:
    """Sign a statement with the holder's TLS key."""
    return replace(answer, signature=sign(_signed(answer_label, origin, answer._body())))


# -- reports


@dataclass(frozen=True, slots=True)
class Result:
    """What a node found of one shard. Times are Unix seconds."""

    shard: int
    node: NodeId
    verdict: Verdict
    since: int  # the first of this run of good, or of bad, results
    checked: int  # the last of them
    times: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a node's audits last found of a file, signed with its TLS key."""

    file_id: FileId
    auditor: NodeId
    time: int
    results: tuple[Result, ...]
    signature: bytes = bytes(signature_size)

    def to_bytes(self) -> bytes:
        """Answer to GET /v1/audit/{file}."""
        return canonical.encode([*self._body(), self.signature])

    @classmethod
    def from_bytes(cls, data: bytes) -> Report:
        """Parse. Raises Malformed and nothing else."""
        f = Fields(canonical.decode(data, bytes_max=report_bytes_max, what="audit report"), count=6, what="audit report")
        f.uint(least=version, most=version)
        file_id, auditor = FileId(f.bytes(exactly=file_id_size)), NodeId(f.bytes(exactly=node_id_size))
        time, results = f.uint(most=time_max), tuple(_result(item) for item in f.list(most=code_n_max))
        if [each.shard for each in results] != sorted({each.shard for each in results}):
            raise Malformed("audit report: shards ascend, each once")
        return cls(file_id, auditor, time, results, f.bytes(exactly=signature_size))

    def verify(self, origin: str, key: Key) -> None:
        """Check that the node with this TLS key said this, in this consortium. Raises Refused."""
        _verify(key, self.signature, _signed(report_label, origin, self._body()), "audit report")

    def _body(self) -> list[canonical.Value]:
        rows: list[canonical.Value] = [
            [each.shard, each.node, each.verdict.value, each.since, each.checked, each.times] for each in self.results
        ]
        return [version, self.file_id, self.auditor, self.time, rows]


def sign_report(origin: str, report: Report, sign: Callable[[bytes], bytes]) -> Report:
    """Sign a report with the auditor's TLS key."""
    return replace(report, signature=sign(_signed(report_label, origin, report._body())))


def _result(item: object) -> Result:
    f = Fields(item, count=6, what="audit report")
    shard, node, verdict = f.uint(most=code_n_max - 1), NodeId(f.bytes(exactly=node_id_size)), f.text(most=16)
    if verdict not in set(Verdict):
        raise Malformed("audit report: a verdict this program does not know")
    return Result(shard, node, Verdict(verdict), f.uint(most=time_max), f.uint(most=time_max), f.uint(least=1, most=2**32))


# -- other bodies


def audit_path(file_id: FileId) -> str:
    """Where a node tells what its audits found of a file; below it, where it is challenged."""
    return f"/v1/audit/{file_id.hex()}"


def pack_inventory(items: Sequence[tuple[FileId, int]]) -> bytes:
    """Body of POST /v1/inventory: shards that the caller wants to know about."""
    return canonical.encode([version, [[file_id, shard] for file_id, shard in items]])


def unpack_inventory(data: bytes) -> list[tuple[FileId, int]]:
    """Parse the body of POST /v1/inventory."""
    f = Fields(canonical.decode(data, bytes_max=inventory_bytes_max, what="inventory"), count=2, what="inventory")
    f.uint(least=version, most=version)
    items = []
    for item in f.list(most=inventory_items_max):
        each = Fields(item, count=2, what="inventory")
        items.append((FileId(each.bytes(exactly=file_id_size)), each.uint(most=code_n_max - 1)))
    return items


def pack_held(held: Sequence[bool]) -> bytes:
    """Answer to POST /v1/inventory: for each shard a byte, 1 if it is there."""
    return canonical.encode([version, bytes(held)])


def unpack_held(data: bytes, count: int) -> list[bool]:
    """Parse the answer to POST /v1/inventory for so many shards."""
    f = Fields(canonical.decode(data, bytes_max=inventory_items_max + 16, what="inventory"), count=2, what="inventory")
    f.uint(least=version, most=version)
    held = f.bytes(exactly=count)
    if max(held, default=0) > 1:
        raise Malformed("inventory: a shard is there or not")
    return [each == 1 for each in held]


# -- parts


def _signed(label: bytes, origin: str, body: list[canonical.Value]) -> bytes:
    name = origin.encode()
    return label + len(name).to_bytes(2, "big") + name + canonical.encode(body)


def _verify(key: Key, signature: bytes, message: bytes, what: str) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise Refused(f"the {what} is not signed by the node that it is said to be from") from None
