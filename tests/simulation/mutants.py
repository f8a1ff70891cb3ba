# ruff: noqa: E501 - the words of a mutant stand on one line, as they do in the code
"""Planted bugs, by name: what each changes in the real code, for the simulation to find.

Law: a mutant is a few words of a function's source and what stands in their place; the product knows nothing of it. Words that are not
there any more are an error, so a mutant cannot go stale unseen. Those of which no seed can tell anything, because something else checks the
same again, are not here: they are no bugs.
"""

from __future__ import annotations
import __future__

import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Swap:
    """In ``where``, MODULE:FUNCTION or MODULE:CLASS.METHOD, put ``new`` in the place of ``old``."""

    where: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A bug."""

    says: str
    swaps: tuple[Swap, ...]


mutants: dict[str, Mutant] = {}
_changed: dict[str, str] = {}  # sources, by where they are from


def plant(name: str, says: str, *swaps: tuple[str, str, str]) -> None:
    """Describe a bug."""
    mutants[name] = Mutant(says, tuple(Swap(*swap) for swap in swaps))


def switch_on(name: str) -> None:
    """Plant this bug in the running process."""
    for swap in mutants[name].swaps:
        _swap(swap)


def _swap(swap: Swap) -> None:
    module_name, _, path = swap.where.partition(":")
    module = importlib.import_module(module_name)
    owner: Any = module
    *outer, last = path.split(".")
    for each in outer:
        owner = getattr(owner, each)
    found = inspect.getattr_static(owner, last)
    source = _changed.get(swap.where) or textwrap.dedent(inspect.getsource(getattr(found, "fget", None) or found))
    if source.count(swap.old) != 1:
        raise LookupError(f"{swap.where} says {source.count(swap.old)} times: {swap.old}")
    source = _changed[swap.where] = source.replace(swap.old, swap.new)
    made: dict[str, Any] = {}
    flags = __future__.annotations.compiler_flag
    exec(compile(source, f"<{swap.where}, changed>", "exec", flags=flags), module.__dict__, made)
    setattr(owner, last, made[last])
    if owner is module:
        _import_anew(found, made[last])


def _import_anew(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Other modules may have imported the function by its name."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old and (module.__name__.startswith(("medshard", "storenode"))):
                setattr(module, name, new)


# -- what is acknowledged is durable

_store = "storenode.shardstore.store:ShardStore"
plant("shard-not-synced", "a shard's file is not synced before its name", (
    "storenode.shardstore.incoming:Incoming.finish", "os.fsync(self._file.fileno())", "self._file.fileno()"))  # fmt: skip
plant("folder-not-synced", "the folder of a shard's file is not synced", (
    f"{_store}._settle", "_fsync_folder(final.parent)", "final.parent"))  # fmt: skip
plant("catalog-not-synced", "commits of the catalog are not synced", (
    "storenode.shardstore.catalog:_connect", "synchronous=FULL", "synchronous=OFF"))  # fmt: skip
plant("ledger-not-synced", "commits of the ledger are not synced", (
    "storenode.ledger.store:_connect", "synchronous=FULL", "synchronous=OFF"))  # fmt: skip
plant("ack-before-commit", "a shard is acknowledged before its row is committed", (
    f"{_store}._enter", "put = await self.catalog.write(change)", "put = Put(root, created=True); asyncio.ensure_future(self.catalog.write(change))"))  # fmt: skip
plant("failed-commit-acknowledged", "a commit that failed is acknowledged", (
    "storenode.shardstore.catalog:Catalog._commit", "outcomes = [(future, loop, None, error) for _, future, loop in batch]", "pass"))  # fmt: skip
plant("damaged-shard-stored-already", "a put over a damaged shard finds it stored already", (
    f"{_store}._insert", 'if row[3:] != (b"".join(incoming.digests), data):', "if False:"))  # fmt: skip
plant("error-answered-as-success", "a node answers that a small shard was stored when it was not", (
    "storenode.routes:put_files", "return error", "return None"))  # fmt: skip
plant("cosigned-before-stored", "a mirror cosigns before the entries are on its disk", (
    "storenode.ledger.mirror:Mirror.take", "await self._accept(push, checkpoint)", "asyncio.ensure_future(self._accept(push, checkpoint))"))  # fmt: skip
plant("promise-not-kept", "a mirror's promise to a new sequencer is not written down", (
    "storenode.ledger.journal:Journal.promise", "await self._write(self.store.promise, epoch, leader)", "pass"))  # fmt: skip
plant("w-off-by-one", "a small file is acknowledged with w - 1 institutions", (
    "medshard.putting:Putter._put_small", "if good >= self._code.w:", "if good >= self._code.w - 1:"), (
    "medshard.smallfiles:_enough", ">= w", ">= w - 1"))  # fmt: skip
plant("w-off-by-one-streamed", "a streamed file is acknowledged with w - 1 institutions", (
    "medshard.upload:Upload._enough", ">= self._w", ">= self._w - 1"), (
    "medshard.upload:Upload._require", "< self._w:", "< self._w - 1:"), (
    "medshard.putting:Putter._spread", "institutions(self._net, manifest, good) < self._code.w:\n        self", "institutions(self._net, manifest, good) < self._code.w - 1:\n        self"))  # fmt: skip
plant("failed-node-counts", "a node that refused a small shard counts as one that has it", (
    "medshard.smallfiles:send_all", "if error is None:", "if True:"))  # fmt: skip

# -- one history

_mirror = "storenode.ledger.mirror:Mirror"
plant("quorum-off-by-one", "a quorum is one institution too small", (
    "medshard_protocol.roster:quorum_of", "(institutions + f) // 2 + 1", "(institutions + f) // 2"))  # fmt: skip
plant("root-not-compared", "a mirror cosigns a head whose root is not that of its entries", (
    f"{_mirror}._leaves", "if frontier.root() != checkpoint.root:", "if False:"))  # fmt: skip
plant("suffix-dropped-unpublished", "a mirror drops entries for a head that is not published", (
    f"{_mirror}._replace", "if push.old_size < self.agreed or end > published.size:", "if False:"), (
    f"{_mirror}._replace", "published = self._journal.open_published(push.published)", "published = checkpoint"))  # fmt: skip
plant("behind-is-no-reason", "a mirror that is shown another end of the log takes it for its own", (
    f"{_mirror}._accept", "raise Behind(size, self.agreed)\n        if (", "return\n        if ("))  # fmt: skip
plant("no-refill", "who takes over does not take up what others have", (
    "storenode.ledger.takeover:Takeover.attempt", "await self._refill(reports, published)", "pass"))  # fmt: skip
plant("one-promise-is-enough", "who takes over asks no quorum", (
    "storenode.ledger.takeover:Takeover._promises", "enough = self._roster.has_quorum([self._node, *reports])", "enough = True"), (
    "storenode.ledger.takeover:Takeover._finds_quorum", "return self._roster.has_quorum(", "return True or self._roster.has_quorum("))  # fmt: skip
plant("epochs-begin-anew", "who takes over counts its epochs from one", (
    "storenode.ledger.takeover:Takeover.attempt", "epoch = max(self._mirror.epoch, self._seen) + 1", "epoch = 1"))  # fmt: skip
plant("published-by-two", "a sequencer publishes what two have cosigned", (
    "storenode.ledger.sequencer:Sequencer._cosigned", "if self._roster.has_quorum(round_.cosigned):", "if len(round_.cosigned) >= 2:"))  # fmt: skip
plant("mirror-left-behind", "a mirror that is behind is never brought up", (
    "storenode.ledger.pushing:Pushers._move", "peer.size = min(size, self._journal.head.size)", "pass"))  # fmt: skip
plant("tree-ahead-of-disk", "after a failed write the tree in memory keeps what the disk has not", (
    "storenode.ledger.journal:Journal.extend", "self._reload()", "pass"))  # fmt: skip
plant("appended-unpublished", "an append is answered before a quorum has cosigned it", (
    "storenode.ledger.sequencer:Sequencer.append", "if published is None or published.checkpoint.size <= max(places):", "if published is None:"))  # fmt: skip

# -- nobody reads without a right and a trace

plant("gate-open", "a read needs no ticket", (
    "storenode.gate:Gate.admit", "if enforced:", "if False:"))  # fmt: skip
plant("strange-ticket", "a ticket opens files for others than its author", (
    "storenode.gate:judge", "if entry.author != caller:", "if False:"), (
    "storenode.gate:judge", "right = facts.right_at(file_id, caller,", "right = facts.right_at(file_id, entry.author,"))  # fmt: skip
plant("no-right-needed", "whoever announces a read may read", (
    "medshard_protocol.facts:Facts.right_at", "return Refusal(Reason.REVOKED", "return Right(known.index, None, 0) if True else Refusal(Reason.REVOKED"))  # fmt: skip
plant("revoked-right-stands", "a grant that was revoked still counts", (
    "medshard_protocol.facts:Facts.right_at", "if each.revoked is None or each.revoked >= index]", "]"))  # fmt: skip
plant("any-ticket", "what a reader shows is not looked at", (
    "storenode.gate:Gate._admit_by", "if self._all_admitted(caller, places, file_ids):", "if True:"))  # fmt: skip

# -- right bytes

plant("shard-not-compared", "a small shard is taken as it comes", (
    "medshard.smallfiles:SmallReads._is_good", "if len(shard) != manifest.layout.shard_size:\n        return False\n", "return True\n"))  # fmt: skip
plant("cell-not-compared", "a streamed cell is taken as it comes", (
    "medshard.download:Download._run", "if number >= self._now and not expected(number, self._digest(stream.cell)):", "if False:"))  # fmt: skip
plant("digests-not-compared", "the digests of a shard are not compared with its root", (
    "medshard.download:Download._check_head", "if len(known) != count or shard_root(known, self._digest) != root:", "if len(known) != count:"))  # fmt: skip
plant("manifest-not-compared", "a manifest is not compared with its hash in the ledger", (
    "medshard.ledger:LedgerClient.check", "if body.manifest_sha256 != manifest.sha256:", "if False:"))  # fmt: skip
plant("one-failure-ends-a-read", "a holder that fails is not replaced", (
    "medshard.smallfiles:SmallReads._choose", "free = [i for i in range(manifest.layout.n) if", "free = [i for i in range(manifest.layout.k) if"))  # fmt: skip
plant("nonce-reused", "a file's key is used again for other bytes of the same name, size and time", (
    "medshard.putting:Putter._resume", "same = hashes == before and ", "same = "))  # fmt: skip
plant("known-by-name", "a file is stored already if one of its name, size and time is", (
    "medshard.putting:Putter._resume", "same = hashes == before and ", "same = "), (
    "medshard.putting:Putter._describe", "if roots != tuple(ref.root for ref in earlier.shards):", "if False:"))  # fmt: skip
plant("manifest-damage-unseen", "a node does not look whether its disk changed a manifest", (
    f"{_store}.manifest", "if not _is_manifest(*row):", "if False:"))  # fmt: skip

# -- everything returns to n shards, and nobody gets more than its own

_helper = "storenode.repairing.helping:Helper"
plant("move-unchecked", "a helper follows an order without a MOVE entry", (
    f"{_helper}._judge", "raise Denied(Objection(Reason.NO_MOVE, f\"entry {order.move}\"))", "from medshard_protocol.facts import Moved; moved = Moved(peer.node, order.move)"), (
    f"{_helper}._judge", "if against is None and moves.get(order.shard) != moved:", "if False:"))  # fmt: skip
plant("another's-move", "a helper follows an order under another node's MOVE entry", (
    f"{_helper}._judge", "if peer.node != moved.node or peer.node == me:", "if False:"))  # fmt: skip
plant("second-shard-given", "a node that holds a shard may take another one", (
    "medshard_protocol.repairorder:objection_to_replacement", "if others:", "if False:"), (
    "medshard_protocol.repairorder:objection_to_replacement", "if len(seen) >= max(manifest.layout.k, 2):", "if False:"))  # fmt: skip
plant("no-mask", "a helper's sum goes out as it is", (
    "medshard_protocol.repair:add", "return mask.add(total)", "return bytes(total)"))  # fmt: skip
plant("no-pair-masks", "helpers add no masks that the replacement does not know", (
    f"{_helper}._send", "Mask(accepted.seed, *accepted.secrets)", "Mask(accepted.seed)"))  # fmt: skip
plant("wrong-coefficient", "a helper multiplies by its neighbour's coefficient", (
    f"{_helper}._send", "[accepted.place]", "[accepted.place - 1]"))  # fmt: skip
plant("sum-not-compared", "a repaired shard is stored whatever its root", (
    f"{_store}._settle", "if expected is not None and shard_root(incoming.digests, digests[\"blake3\"]) != expected:", "if False:"), (
    f"{_store}._enter", "if manifest is not None and manifest.shards[index].root != root:", "if False:"))  # fmt: skip
plant("stale-shard-accepted", "a shard whose cells have changed counts as there", (
    "storenode.repairing.surveying:Surveyor.has", " and not self._node.store.bad_cells(own)", ""))  # fmt: skip
plant("bad-cells-unseen", "a look at the disk finds no bad cell", (
    f"{_store}.bad_cells", "if digest(cell) != shard.digests[first + i]", "if False"))  # fmt: skip
plant("damaged-row-in-the-way", "a catalog row that makes no sense ends the repair of its shard", (
    "storenode.repairing.repairer:Repairer.objection", "except Damaged:", "except ZeroDivisionError:"))  # fmt: skip
plant("one-set-of-helpers", "a wrong sum is not tried again with other helpers", (
    "storenode.repairing.rebuilding:Rebuilding.run", "except Damaged:", "except ZeroDivisionError:"))  # fmt: skip

# -- audits accuse nobody falsely

_answerer = "storenode.auditing.answering"
plant("rot-vouched-for", "a holder vouches for a cell that its disk has changed", (
    f"{_answerer}:show", "if not shown.leads_to_root(manifest):", "if False:"))  # fmt: skip
plant("absent-vouched-for", "a holder vouches for a shard that it has not got", (
    f"{_answerer}:Answerer._look", "except Absent:\n        return answer", "except Absent:\n        return replace(answer, claim=Claim.HELD, digest=bytes(32))"))  # fmt: skip

# -- what a quorum decided about the roster counts

plant("roster-not-followed", "a node does not go by a roster that the ledger has decided", (
    "storenode.following:Following._take_over", "self._membership.follow([self._link(state, index, roster)])", "pass"))  # fmt: skip
