"""The root key in the hands of several: split for custodians, asked back when it is lost, given back by each of them for itself.

    await Escrow(vault).deposit([a, b, c, d, e], threshold=3)        # while all is well
    request = await Escrow(new_vault).ask(lost_key, [a, b, c])       # from a new vault, after the loss
    await Escrow(custodian).approve(request)                         # each custodian, once it knows who asks
    root = await Escrow(new_vault).collect(request)

Law: a share, a request and an answer are each a stored file that is granted to those alone whom it is for, so every step stands in the
ledger and no node learns anything. Fewer than the threshold know nothing of the key (Shamir). What comes back is the key if it gives the
lost vault's public key, and nothing else is believed; commitments that every share carries tell who sent a wrong one. Formats:
docs/formats/escrow.md.

pycryptodome's Shamir takes secrets of 16 bytes: the root key is split as two halves, each with its own polynomial, which loses nothing.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from Crypto.Protocol.SecretSharing import Shamir

from medshard.keys import VaultKeys
from medshard.model import Description, Row
from medshard.packs import Plan, Unit
from medshard.source import Part
from medshard.vault import Vault
from medshard_protocol import canonical
from medshard_protocol.canonical import Fields
from medshard_protocol.entries import Purpose
from medshard_protocol.errors import Absent, Damaged, Malformed, Refused, Unavailable
from medshard_protocol.ids import FileId, Key, key_size

custodians_max: Final = 32
id_size: Final = 16
half: Final = 16
share_type: Final = "application/x-medshard-escrow-share"
request_type: Final = "application/x-medshard-recovery-request"
answer_type: Final = "application/x-medshard-recovery-answer"
file_bytes_max: Final = 8192
commit_label: Final = b"medshard/escrow-commitment/v1"
combinations_max: Final = 5000


@dataclass(frozen=True, slots=True)
class Share:
    """One custodian's part of a root key."""

    vault: Key  # whose root key it is
    id: bytes  # of the escrow
    threshold: int
    number: int  # from 1
    data: bytes  # two halves of 16 bytes
    commitments: tuple[bytes, ...]  # SHA-256 over each share, in order

    def to_bytes(self) -> bytes:
        """The canonical form."""
        return canonical.encode([1, self.vault, self.id, self.threshold, self.number, self.data, list(self.commitments)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Share:
        """Parse. Raises Malformed."""
        f = Fields(canonical.decode(data, bytes_max=file_bytes_max, what="escrow share"), count=7, what="escrow share")
        f.uint(least=1, most=1)
        vault, id_ = Key(f.bytes(exactly=key_size)), f.bytes(exactly=id_size)
        threshold, number = f.uint(least=2, most=custodians_max), f.uint(least=1, most=custodians_max)
        secret, commitments = f.bytes(exactly=2 * half), f.list(most=custodians_max)
        if not all(isinstance(each, bytes) and len(each) == 32 for each in commitments) or not threshold <= len(commitments) >= number:
            raise Malformed("escrow share: not a commitment for each custodian")
        return cls(vault, id_, threshold, number, secret, tuple(commitments))

    @property
    def commitment(self) -> bytes:
        """What stands for this share in the list."""
        return _commitment(self.vault, self.id, self.number, self.data)


@dataclass(frozen=True, slots=True)
class Request:
    """Somebody asks for the shares of a lost vault."""

    sha256: bytes  # of the stored request
    lost: Key
    asker: Key
    message: str
    at: int  # Unix seconds, as the asker says


@dataclass(frozen=True, slots=True)
class Collected:
    """What the custodians have given back."""

    root: bytes | None  # None while too few are right
    good: tuple[Key, ...]  # who sent a right share
    wrong: tuple[Key, ...]  # who did not
    threshold: int
    asked_at: int


def split(keys: VaultKeys, threshold: int, count: int) -> list[Share]:
    """Shares of a root key. Raises Refused for a threshold that protects nothing or can never be met."""
    if not 2 <= threshold <= count <= custodians_max:
        raise Refused(
            f"a threshold of {threshold} with {count} custodians", hint=f"It takes 2 at least, and {custodians_max} custodians at most."
        )
    halves = [Shamir.split(threshold, count, keys.root[at : at + half]) for at in (0, half)]
    id_ = os.urandom(id_size)
    data = {number: first + second for (number, first), (_, second) in zip(*halves, strict=True)}
    commitments = tuple(_commitment(keys.public, id_, number, data[number]) for number in range(1, count + 1))
    return [Share(keys.public, id_, threshold, number, data[number], commitments) for number in range(1, count + 1)]


def combine(shares: Sequence[Share], vault: Key) -> tuple[bytes | None, list[Share]]:
    """(the root key of that vault, the shares that are right), from shares of which some may be wrong.

    The key is None while no set of them gives it; then those are given that fit the commitments which most of them carry. Where as many
    carry others, nobody can tell yet, and all are given that fit their own.
    """
    by_escrow = Counter((share.id, share.threshold, share.commitments) for share in shares if share.vault == vault)
    for (id_, threshold, commitments), _ in by_escrow.most_common():
        listed = [share for share in shares if share.id == id_ and share.commitment in commitments]
        right = list({share.number: share for share in listed}.values())
        if len(right) >= threshold and (root := _root(right[:threshold], vault)) is not None:
            return root, right
    if (found := _search(shares, vault)) is not None:
        root, chosen = found
        return root, [share for share in shares if _fits(share, chosen, vault)]
    most = max(by_escrow.values(), default=0)
    likely = [share for share in shares if by_escrow[share.id, share.threshold, share.commitments] == most]
    return None, [share for share in likely if share.commitment in share.commitments]


def _fits(share: Share, chosen: Sequence[Share], vault: Key) -> bool:
    """Whether a share lies on the polynomials that go through these, which give the key."""
    others = [each for each in chosen if each.number != share.number]
    return share in chosen or (share.id == chosen[0].id and len(others) == len(chosen) and _root([*others[1:], share], vault) is not None)


def _search(shares: Sequence[Share], vault: Key) -> tuple[bytes, Sequence[Share]] | None:
    """The root key, and any set that gives it: for shares whose commitments were changed as well."""
    tried = 0
    for id_ in {share.id for share in shares}:
        mine = [share for share in shares if share.id == id_ and share.vault == vault]
        for threshold in sorted({share.threshold for share in mine}):
            for chosen in combinations(mine, threshold):
                tried += 1
                if tried > combinations_max:
                    return None
                if len({share.number for share in chosen}) == threshold and (root := _root(chosen, vault)) is not None:
                    return root, chosen
    return None


def _root(shares: Sequence[Share], vault: Key) -> bytes | None:
    root = b"".join(Shamir.combine([(share.number, share.data[at : at + half]) for share in shares]) for at in (0, half))
    return root if VaultKeys.from_root(root).public == vault else None


class Escrow:
    """Of one open vault, as owner, custodian or asker."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    # -- the owner

    async def deposit(self, custodians: Sequence[Key], threshold: int) -> bytes:
        """Split this vault's root key and grant each custodian its share; the escrow's id. Shares of earlier escrows are erased.

        Raises Refused for a threshold that makes no sense or a custodian twice, Absent for one that nobody can seal to.
        """
        if len(set(custodians)) < len(custodians) or self._vault.keys.public in custodians:
            raise Refused("each custodian is named once, and is another than this vault")
        shares = split(self._vault.keys, threshold, len(custodians))
        earlier = [row.sha256 for row in self._vault.ls() if row.media_type == share_type]
        for custodian, share in zip(custodians, shares, strict=True):
            name = b"escrow/%s/%d" % (share.id.hex().encode(), share.number)
            await self._send(share.to_bytes(), name, share_type, {"escrow-id": share.id.hex()}, custodian)
        if earlier:
            await self._vault.custody.end(earlier)
        return shares[0].id

    async def renew(self) -> int:
        """Deposit the present root key with those who have shares of one before; how many they are, and none where they have it already."""
        threshold, custodians = 0, list[Key]()
        for rows in self.deposited().values():
            shares = [Share.from_bytes(await self._vault.read(row.sha256, 0, row.size)) for row in rows]
            if any(share.vault == self._vault.keys.public for share in shares):
                return 0
            threshold = max(share.threshold for share in shares)
            custodians += [key for row in rows for key in self._vault.shares.readers_of(FileId(row.file_id))]
        if not custodians:
            return 0
        await self.deposit(list(dict.fromkeys(custodians)), threshold)
        return len(set(custodians))

    def deposited(self) -> dict[str, list[Row]]:
        """The shares of this vault's root key that are out, by escrow."""
        found: dict[str, list[Row]] = {}
        for row in self._vault.ls():
            if row.media_type == share_type:
                found.setdefault(row.attributes.get("escrow-id", ""), []).append(row)
        return found

    # -- who has lost a vault

    async def ask(self, lost: Key, custodians: Sequence[Key], message: str = "") -> bytes:
        """Ask custodians for their shares of a lost vault's key; the SHA-256 by which the request is known."""
        now = int(time.time())
        data = canonical.encode([1, lost, self._vault.keys.public, message, now, os.urandom(id_size)])
        about = {"recovery-of": lost.hex(), "recovery-at": str(now)}
        return await self._send(data, b"recovery/request-%d" % now, request_type, about, *custodians)

    async def collect(self, request: bytes) -> Collected:
        """Read the answers to a request that have come, and put the key together if enough of them are right. Raises Absent."""
        row = self._vault.row(request)
        if row is None or row.media_type != request_type:
            raise Absent("this vault has made no such request", hint="`medshard keys requests` lists those that it has.")
        asked = self._parse_request(row.sha256, await self._vault.read(row.sha256, 0, row.size))
        await self._vault.shares.sync()
        shares: list[tuple[Key, Share]] = []
        wrong: list[Key] = []
        for answer in self._received(answer_type):
            if answer.attributes.get("recovery-request") != request.hex():
                continue
            sender = Key(answer.owner)
            try:
                share = Share.from_bytes(await self._vault.read(answer.sha256, 0, min(answer.size, file_bytes_max + 1)))
                if share.vault != asked.lost:
                    raise Damaged("a share of another vault")
                shares.append((sender, share))
            except (Malformed, Damaged):
                wrong.append(sender)
        root, right = combine([share for _, share in shares], asked.lost)
        threshold = Counter(share.threshold for _, share in shares).most_common(1)[0][0] if shares else 0
        good = dict.fromkeys(sender for sender, share in shares if share in right)  # once is enough, whatever else they sent
        wrong += [sender for sender, _ in shares]
        return Collected(root, tuple(good), tuple(each for each in dict.fromkeys(wrong) if each not in good), threshold, asked.at)

    # -- a custodian

    async def requests(self) -> list[Request]:
        """Requests that others have made of this vault, and its own; the newest last."""
        await self._vault.shares.sync()
        found = []
        own = [row for row in self._vault.ls() if row.media_type == request_type]
        for row in [*own, *self._received(request_type)]:
            try:
                request = self._parse_request(row.sha256, await self._vault.read(row.sha256, 0, min(row.size, file_bytes_max + 1)))
                if request.asker == (Key(row.owner) if row.owner else self._vault.keys.public):
                    found.append(request)
            except (Malformed, Damaged):
                continue  # nothing that anybody could approve
        return sorted(found, key=lambda request: request.at)

    async def approve(self, request: bytes) -> Request:
        """Give this custodian's share to whoever asks. Raises Absent without such a request or a share, Damaged for a share that is wrong.

        Who asks is for the custodian to find out: a request proves nothing but the key that made it.
        """
        asked = next((each for each in await self.requests() if each.sha256 == request), None)
        if asked is None:
            raise Absent("there is no such request to this vault", hint="`medshard keys requests` lists them.")
        share = await self._own_share(asked.lost)
        about = {"recovery-request": request.hex()}
        await self._send(share.to_bytes(), b"recovery/answer-%d" % share.number, answer_type, about, asked.asker)
        return asked

    async def _own_share(self, lost: Key) -> Share:
        newest: tuple[int, Share] | None = None
        for row in self._received(share_type):
            if Key(row.owner) != lost:
                continue
            share = Share.from_bytes(await self._vault.read(row.sha256, 0, min(row.size, file_bytes_max + 1)))
            if share.vault != lost or share.commitment != share.commitments[share.number - 1]:
                raise Damaged("the share that was deposited here is not what its own commitments say")
            if newest is None or row.ledger_index > newest[0]:
                newest = (row.ledger_index, share)
        if newest is None:
            raise Absent("no share of that vault's key was deposited here")
        return newest[1]

    # -- parts

    def _received(self, media_type: str) -> Iterator[Row]:
        return (row for row in self._vault.ls(shared=True) if row.media_type == media_type)

    @staticmethod
    def _parse_request(sha256: bytes, data: bytes) -> Request:
        f = Fields(canonical.decode(data, bytes_max=file_bytes_max, what="recovery request"), count=6, what="recovery request")
        f.uint(least=1, most=1)
        lost, asker, message = Key(f.bytes(exactly=key_size)), Key(f.bytes(exactly=key_size)), f.text(most=500)
        return Request(sha256, lost, asker, message, f.uint(most=2**53))

    async def _send(self, data: bytes, name: bytes, media_type: str, attributes: dict[str, str], *readers: Key) -> bytes:
        """Store a small file that never lies on this disk in the clear, and grant it; its SHA-256."""
        part = Part.holding(data, name, Description(media_type, attributes))
        report = await self._vault.store(Plan((Unit(name, (part,), is_pack=False),), ()))
        if not report.stored:
            raise Unavailable("; ".join(problem.message for problem in report.problems) or "it could not be stored")
        digest = report.stored[0].sha256
        for reader in readers:
            await self._vault.shares.share([digest], reader, purpose=Purpose.OPERATIONS)
        return digest


def _commitment(vault: Key, id_: bytes, number: int, data: bytes) -> bytes:
    return hashlib.sha256(commit_label + vault + id_ + bytes([number]) + data).digest()
