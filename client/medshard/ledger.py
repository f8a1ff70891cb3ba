"""The ledger as a vault sees it: hand in entries, take back proofs, believe nothing that is not proved.

Every answer is checked against the pinned roster: quorum of cosigning institutions, inclusion proof recomputed to the root, and
that the entry is the very one that was handed in.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from medshard.keys import VaultKeys
from medshard.transport import Net
from medshard_protocol.checkpoint import Checkpoint, open_published
from medshard_protocol.entries import Access, Body, Entry, Purpose, Register, access_files_max, nonce_size, sign_entry
from medshard_protocol.errors import Damaged, MedshardError, Refused, Unavailable
from medshard_protocol.ids import FileId, NodeId
from medshard_protocol.manifest import Manifest
from medshard_protocol.proofs import Inclusion, pack_append, unpack_appended, unpack_registration
from medshard_protocol.roster import Node

append_timeout_s: Final = 10.0
hedge_after_s: Final = 1.0  # a frozen node must not cost more than the takeover does
nodes_asked_max: Final = 4  # each of them finds whoever orders entries by now
follow_pauses_s: Final = (0.0, 0.3, 0.6)  # a node that lies about a quorum costs this long
entries_max: Final = 256  # in one request
seen_max: Final = 512  # notes of some 3 KB each
turns_for_others: Final = 2  # what was begun asks in the first, and its tasks send in the second

Answered = Callable[[Sequence[Inclusion], Mapping[NodeId, bytes]], None]


class LedgerClient:
    """Entries in the name of one vault."""

    def __init__(self, net: Net, keys: VaultKeys) -> None:
        self._net = net
        self._keys = keys
        self.newest = b""  # the newest cosigned checkpoint that was verified
        self._vouchers: tuple[bytes, Mapping[NodeId, bytes]] = b"", {}
        self.reached = 0  # the size of the log as this vault has made it grow: an answer of less is out of date
        self._answered: NodeId | None = None  # which node took the last entries
        self._seen: dict[bytes, Checkpoint] = {}  # checkpoints whose signatures were verified: one serves many files
        self._seen_under = net.roster

    async def register(self, manifests: Sequence[Manifest]) -> list[Inclusion]:
        """Put these files on the ledger; returns when each is in a quorum-cosigned checkpoint, with the proofs, verified."""
        return await self._append([Register(m.file_id, m.sha256, os.urandom(nonce_size)) for m in manifests])

    async def announce(self, file_ids: Sequence[FileId], purpose: Purpose = Purpose.UNSPECIFIED) -> list[Inclusion]:
        """Say that these files are about to be read."""
        distinct = list(dict.fromkeys(file_ids))
        groups = [tuple(distinct[at : at + access_files_max]) for at in range(0, len(distinct), access_files_max)]
        return await self._append([Access(group, purpose, b"", os.urandom(nonce_size)) for group in groups])

    async def append(self, bodies: Sequence[Body]) -> list[Inclusion]:
        """Sign these and put them on the ledger; the proofs, verified. Raises what the ledger says against them, or Unavailable."""
        return await self._append(bodies)

    async def append_signed(self, entries: Sequence[Entry], answered: Answered | None = None) -> list[Inclusion]:
        """Put entries of this vault on the ledger that were signed before; those that are there already stay where they are.

        ``answered`` is told of proofs that are not verified yet, for what can begin meanwhile, and of the vouchers that came with them.
        If the log has ended and another goes on from it, they are signed anew for that one: what was taken is in the inclusions.
        """
        try:
            return await self._submit_all([entry.to_bytes() for entry in entries], answered)
        except Refused:
            await self._net.follow()
            if not self._signed_before(entries):
                raise
            return await self._submit_all([self.sign(entry.body).to_bytes() for entry in entries])

    def sign(self, body: Body) -> Entry:
        """An entry in the name of this vault, for this log."""
        return sign_entry(self._net.roster.origin, body, self._keys.public, self._keys.signing.sign)

    def verified(self, inclusion: Inclusion) -> Entry:
        """The entry that ``inclusion`` proves to stand in the ledger. Raises Malformed or Refused."""
        return self._verify(inclusion)

    def published(self, note: bytes) -> Checkpoint:
        """The checkpoint in a note, if a quorum cosigned it. Raises Malformed or Refused."""
        known = self._seen_now().get(note)
        return known if known is not None else open_published(note, self._net.roster)

    async def registration(self, file_id: FileId) -> Inclusion | None:
        """The proof of a file's registration from any node that has it; None when none knows the file."""
        for node in self._by_preference():
            try:
                answer = await self._net.call(node, "GET", f"/v1/ledger/registrations/{file_id.hex()}", timeout_s=3.0, ok=(200,))
                inclusion = unpack_registration(answer)
                await self._remember(inclusion)
                return inclusion
            except MedshardError:
                continue
        return None

    def check(self, manifest: Manifest, inclusion: Inclusion) -> None:
        """Raise Refused, Malformed or Damaged unless ``inclusion`` proves that ``manifest`` is what its owner registered."""
        entry = self._verify(inclusion)
        body = entry.body
        if not isinstance(body, Register) or body.file_id != manifest.file_id or entry.author != manifest.owner:
            raise Refused("the ledger's proof is of another entry")
        if body.manifest_sha256 != manifest.sha256:
            raise Damaged("the manifest is not the one whose hash is on the ledger")

    def _signed_before(self, entries: Sequence[Entry]) -> bool:
        """Whether this vault signed these for a log from which the present one goes on. What it signed for a strange log stays that."""
        origins = [each.origin for each in self._net.roster.before]
        return bool(origins) and all(
            entry.author == self._keys.public and any(_signed_for(entry, origin) for origin in origins) for entry in entries
        )

    async def _append(self, bodies: Sequence[Body]) -> list[Inclusion]:
        return await self.append_signed([self.sign(body) for body in bodies])

    async def _submit_all(self, entries: list[bytes], answered: Answered | None = None) -> list[Inclusion]:
        proofs: list[Inclusion] = []
        for at in range(0, len(entries), entries_max):
            proofs += await self._submit(entries[at : at + entries_max], answered)
            self.reached = max(self.reached, self.published(proofs[-1].checkpoint).size)
        return proofs

    async def _submit(self, entries: list[bytes], answered: Answered | None) -> list[Inclusion]:
        """Hand entries in at one node, and at another one as well when that takes long: an entry handed in twice stands in the log once."""
        body, failures = pack_append(entries), list[str]()
        nodes = iter(self._by_preference()[:nodes_asked_max])
        asking: dict[asyncio.Task[bytes], Node] = {}
        deadline = asyncio.get_running_loop().time() + append_timeout_s
        try:
            while True:
                left = deadline - asyncio.get_running_loop().time()
                node = next(nodes, None) if left > 0 else None
                if node is not None:
                    call = self._net.call(node, "POST", "/v1/ledger/append", body, timeout_s=left)
                    asking[asyncio.create_task(call)] = node
                if not asking:
                    break
                done, _ = await asyncio.wait(asking, timeout=None if node is None else hedge_after_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    node = asking.pop(task)
                    try:
                        proofs = await self._proved(entries, task.result(), answered)
                    except Unavailable as error:
                        failures.append(str(error))
                    else:
                        self._answered = node.id
                        return proofs
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        raise Unavailable(
            f"the ledger did not take the entry ({'; '.join(failures)})",
            hint="a quorum of the institutions' nodes must be up, and one that may order entries; see `medshard doctor`",
        )

    async def _proved(self, entries: list[bytes], answer: bytes, answered: Answered | None) -> list[Inclusion]:
        proofs, vouchers = unpack_appended(answer, entries)
        if answered is not None:
            answered(proofs, vouchers)
            for _ in range(turns_for_others):
                await asyncio.sleep(0)
        for inclusion in proofs:
            await self._remember(inclusion)
        self._vouchers = proofs[-1].checkpoint, vouchers
        return list(proofs)

    def vouchers(self, note: bytes) -> Mapping[NodeId, bytes]:
        """What came with this checkpoint for the nodes that will be shown it; nothing but for the newest."""
        return self._vouchers[1] if note == self._vouchers[0] else {}

    async def _remember(self, inclusion: Inclusion) -> None:
        """Verify a proof from a node; where it does not hold, the quorum may be one of a roster that this vault has not followed yet.

        The nodes hear of a change within a moment of each other, so those that are asked may be just behind the one that answered.
        """
        for pause in follow_pauses_s:
            try:
                self._verify(inclusion)
                break
            except Refused:
                await asyncio.sleep(pause)
                await self._net.follow()
        else:
            self._verify(inclusion)
        self.newest = inclusion.checkpoint

    def _verify(self, inclusion: Inclusion) -> Entry:
        return inclusion.verify(self._net.roster, self._seen_now())[1]

    def _seen_now(self) -> dict[bytes, Checkpoint]:
        """What was verified under the present roster: a checkpoint of an earlier quorum proves nothing any more."""
        if len(self._seen) >= seen_max or self._seen_under is not self._net.roster:
            self._seen.clear()
            self._seen_under = self._net.roster
        return self._seen

    def _by_preference(self) -> list[Node]:
        roster = self._net.roster
        first = self._answered or roster.sequencer
        return sorted(roster.nodes, key=lambda node: (self._net.health.is_suspect(node.id), node.id != first))


def _signed_for(entry: Entry, origin: str) -> bool:
    try:
        entry.verify(origin)
    except Refused:
        return False
    return True
