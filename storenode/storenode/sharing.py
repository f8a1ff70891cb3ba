"""Routes about rights: proofs shown, keys to seal to, sealed grants, and what the ledger says of a file or a key.

Who may: anybody with a certificate of the roster asks what the ledger says, which all of its mirrors know anyway; a key to seal to comes
from its owner, a sealed grant from the author of its GRANT entry, and what was granted is told to its reader alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Final

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard_protocol.ending import Receipt, sign_receipt
from medshard_protocol.entries import Type
from medshard_protocol.errors import Absent, Damaged, Malformed, Refused
from medshard_protocol.facts import Ended, Facts, Granted
from medshard_protocol.ids import FileId, Key, Sha256, file_id_from_hex, key_from_hex, sha256_from_hex
from medshard_protocol.messages import body_type
from medshard_protocol.sharing import (
    EndedFiles,
    History,
    SealedGrant,
    SealingKey,
    Shared,
    SharedFile,
    Told,
    Vouched,
    history_entries_max,
    inclusion_bytes_max,
    pack_seen,
    shared_files_max,
    small_bytes_max,
    unpack_shown,
)
from storenode.emergency import Emergencies
from storenode.gate import Gate, cosigned_at, gate_key, wait_s
from storenode.ledger import Ledger, Published
from storenode.metrics import Metrics
from storenode.routes import Node, node_key, read_body, vouched_caller
from storenode.shardstore import Endings, Sealed

shared_room_bytes: Final = 16 * 1024 * 1024  # manifests in one answer; what finds no room is fetched by itself
obey_every_s: Final = 0.2
due_every_s: Final = 1.0  # what comes due by the cosigners' clocks is looked for so often
ended_at_once: Final = 1000  # files destroyed between two looks at the log
identities_max: Final = 1000  # in one answer
grants_looked_at_max: Final = 1024  # for one answer: a reader with many revoked grants asks again
ended_looked_at_max: Final = 1024  # for one answer, other owners' files among them

log = logging.getLogger(__name__)


def routes() -> list[web.RouteDef]:
    """All routes of this file."""
    return [
        web.post("/v1/access", post_access),
        web.put("/v1/keys", put_key),
        web.get("/v1/keys/{key}", get_key, allow_head=False),
        web.put("/v1/grants/{file}", put_grant),
        web.delete("/v1/grants/{file}/{grant}", delete_grant),
        web.get("/v1/grants", get_grants, allow_head=False),
        web.get("/v1/ledger/history/{file}", get_history, allow_head=False),
        web.get("/v1/ledger/proposals", get_proposals, allow_head=False),
        web.get("/v1/ledger/ended", get_ended, allow_head=False),
        web.get("/v1/ledger/identities", get_identities, allow_head=False),
        web.get("/v1/ledger/identities/{key}", get_identity, allow_head=False),
        web.get("/v1/ledger/passings/{key}", get_passings, allow_head=False),
        web.get("/v1/endings/{file}", get_ending, allow_head=False),
    ]


def equip(app: web.Application, node: Node, key: Ed25519PrivateKey, metrics: Metrics) -> Gate:
    """Give a node's application its gate, these routes, and the tasks behind them. ``key`` is the node's TLS key."""
    ledger = node.ledger

    async def is_appended(name: bytes) -> bool:
        return bool(await ledger.journal.find([name]))

    emergencies = Emergencies(node.config.data, lambda entry: ledger.append([entry]), is_appended, on_change=metrics.emergencies_waiting)
    gate = app[gate_key] = Gate(ledger, emergencies, metrics)
    app[sealed_key], app[endings_key], app[signer_key] = Sealed(node.store.catalog), Endings(node.store), key
    app.router.add_routes(routes())

    async def running(app: web.Application) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(emergencies.run()), asyncio.create_task(_obey(ledger, app[sealed_key], app[endings_key]))]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    app.cleanup_ctx.append(running)
    return gate


sealed_key: Final = web.AppKey("sealed", Sealed)
endings_key: Final = web.AppKey("endings", Endings)
signer_key: Final = web.AppKey("signer", Ed25519PrivateKey)


# -- tickets


async def post_access(request: web.Request) -> web.Response:
    """Take a proof that an ACCESS entry is published, from a reader whose entry has not been heard of here."""
    inclusion = unpack_shown(await read_body(request, inclusion_bytes_max))
    return _answer(pack_seen(await request.app[gate_key].show(inclusion)))


# -- keys to seal to


async def put_key(request: web.Request) -> web.Response:
    """Keep what others seal to, in its owner's word."""
    key = SealingKey.from_bytes(await read_body(request, small_bytes_max))
    if key.owner != vouched_caller(request):
        raise Refused("a key to seal to is stored by its owner alone")
    key.verify()
    await request.app[sealed_key].put_key(key.owner, key.to_bytes())
    return web.Response(status=201)


async def get_key(request: web.Request) -> web.Response:
    """What others seal to, for one key's owner."""
    data = request.app[sealed_key].key(key_from_hex(request.match_info["key"]))
    if data is None:
        raise Absent("the owner of this key has stored nothing to seal to", hint="they must have opened their vault once")
    return _answer(data)


# -- sealed grants


async def put_grant(request: web.Request) -> web.Response:
    """Keep a file's key for one grant."""
    node, file_id = request.app[node_key], file_id_from_hex(request.match_info["file"])
    sealed = SealedGrant.from_bytes(await read_body(request, small_bytes_max))
    await _folded(node.ledger, lambda facts: facts.grant(sealed.grant) is not None)
    granted = _own_grant(node.ledger.state, file_id, sealed.grant, vouched_caller(request))
    if granted.revoked is not None:
        raise Refused("this grant was revoked")
    known = node.ledger.state.registration(file_id)
    if known is None or known.erased is not None:
        raise Refused("this file is erased")
    node.store.manifest(file_id)  # a sealed key is kept beside the manifest, or not here
    await request.app[sealed_key].put_grant(file_id, sealed.grant, sealed.sealed)
    return web.Response(status=201)


async def delete_grant(request: web.Request) -> web.Response:
    """Destroy a file's key for one grant, in its author's name."""
    node, file_id = request.app[node_key], file_id_from_hex(request.match_info["file"])
    grant = sha256_from_hex(request.match_info["grant"])
    _own_grant(node.ledger.state, file_id, grant, vouched_caller(request))
    if not await request.app[sealed_key].drop_grant(file_id, grant):
        raise Absent("no key of this grant is here")
    return web.Response(status=204)


async def get_grants(request: web.Request) -> web.Response:
    """What was granted to the caller, with proofs."""
    node = request.app[node_key]
    published = node.ledger.published
    if published is None:
        return _answer(Shared(b"", (), more=False).to_bytes())
    return _answer(_shared(node, request.app[sealed_key], vouched_caller(request), _after(request), published).to_bytes())


def _shared(node: Node, sealed: Sealed, reader: Key, start: int, published: Published) -> Shared:
    facts, now = node.ledger.state, cosigned_at(published.note, node.ledger.roster)
    grants = facts.grants_to(reader, start, grants_looked_at_max)
    files: list[SharedFile] = []
    room = shared_room_bytes
    for id_, granted in grants:
        if granted.index >= published.checkpoint.size:
            return Shared(published.note, tuple(files), more=False)
        if granted.revoked is not None or (granted.until and granted.until < now):
            continue
        if len(files) + len(granted.file_ids) > shared_files_max:
            return Shared(published.note, tuple(files), more=True)
        for file_id in granted.file_ids:
            one = _shared_file(node, sealed, file_id, id_, granted, published, room, now)
            if one is not None:
                files.append(one)
                room -= len(one.manifest)
    if len(grants) == grants_looked_at_max and not files:
        return _shared(node, sealed, reader, grants[-1][1].index + 1, published)
    return Shared(published.note, tuple(files), more=len(grants) == grants_looked_at_max)


def _shared_file(
    node: Node, sealed: Sealed, file_id: FileId, id_: Sha256, granted: Granted, published: Published, room: int, now: float
) -> SharedFile | None:
    journal, known = node.ledger.journal, node.ledger.state.registration(file_id)
    data = sealed.grant(file_id, id_)
    if data is None or known is None or known.is_erased(now):
        return None
    try:
        manifest = node.store.manifest(file_id)
    except (Absent, Damaged):
        return None
    grant, registration = journal.inclusion(granted.index, published), journal.inclusion(known.index, published)
    return SharedFile(file_id, grant, registration, manifest if len(manifest) <= room else b"", data)


# -- what the ledger says


async def get_history(request: web.Request) -> web.Response:
    """Every published entry that names a file."""
    ledger, file_id = request.app[node_key].ledger, file_id_from_hex(request.match_info["file"])
    return _told(ledger, ledger.state.history(file_id, _after(request), history_entries_max + 1))


async def get_proposals(request: web.Request) -> web.Response:
    """Every published proposal of a hold or a release that waits for its second person."""
    ledger, start = request.app[node_key].ledger, _after(request)
    return _told(ledger, [(place, True) for place in ledger.state.proposed() if place >= start])


async def get_ended(request: web.Request) -> web.Response:
    """The published entries that have retired or erased files of the caller, for homes of its vault that did not do it themselves."""
    ledger, caller, start = request.app[node_key].ledger, vouched_caller(request), _after(request)
    published = ledger.published
    if published is None:
        return _answer(EndedFiles(b"", (), start, more=False).to_bytes())
    facts = ledger.state
    end = min(published.checkpoint.size, facts.size)
    looked = facts.ended(start, end, ended_looked_at_max)
    own = [each.index for each in looked if each.type is not Type.REVOKE and _is_of(facts, FileId(each.id), caller)]
    told = own[:history_entries_max]
    if more := len(looked) == ended_looked_at_max or len(told) < len(own):
        end = (looked[-1].index if len(told) == len(own) else told[-1]) + 1
    entries = tuple(ledger.journal.inclusion(place, published) for place in told)
    return _answer(EndedFiles(published.note, entries, max(start, end), more).to_bytes())


def _is_of(facts: Facts, file_id: FileId, key: Key) -> bool:
    known = facts.registration(file_id)
    return known is not None and key in (known.owner, facts.heir(known.owner))


def _told(ledger: Ledger, places: Sequence[tuple[int, bool]]) -> web.Response:
    """Those of these entries that are published, with proofs, as many as one answer carries."""
    published = ledger.published
    if published is None:
        return _answer(History(b"", (), more=False).to_bytes())
    told = []
    for place, effective in places[:history_entries_max]:
        if place >= published.checkpoint.size:
            break
        inclusion = ledger.journal.inclusion(place, published)
        told.append(Told(place, inclusion.entry, inclusion.path, effective))
    more = len(places) > history_entries_max and len(told) == history_entries_max
    return _answer(History(published.note, tuple(told), more).to_bytes())


async def get_identity(request: web.Request) -> web.Response:
    """Who vouches for a key."""
    known = request.app[node_key].ledger.state.identity(key_from_hex(request.match_info["key"]))
    if known is None:
        return _answer(Vouched("", 0, 0, withdrawn=False).to_bytes())
    return _answer(Vouched(known.institution, known.roles, known.index, known.withdrawn is not None).to_bytes())


async def get_identities(request: web.Request) -> web.Response:
    """Every key that an institution vouches for, or has vouched for, as JSON; after one, where ``after`` names it."""
    facts, after = request.app[node_key].ledger.state, request.query.get("after", "")
    found = facts.identities(key_from_hex(after) if after else b"", identities_max + 1)
    told = [
        {
            "key": key.hex(), "institution": each.institution, "first": each.first, "withdrawn": each.withdrawn,
            "heir": each.heir.hex() if each.heir else None, "before": each.before.hex() if each.before else None,
            "sends": facts.sends(key), "inherits": each.inherits,
        }
        for key, each in found[:identities_max]
    ]  # fmt: skip
    return web.json_response({"identities": told, "more": len(found) > identities_max})


async def get_passings(request: web.Request) -> web.Response:
    """The published entries by which the files of a key came to whom they belong now: to its successors, to the vault that it sends for."""
    ledger, key = request.app[node_key].ledger, key_from_hex(request.match_info["key"])
    published = ledger.published
    if published is None:
        return _answer(History(b"", (), more=False).to_bytes())
    told = []
    for place in sorted(ledger.state.passings(key))[:history_entries_max]:
        if place < published.checkpoint.size:
            inclusion = ledger.journal.inclusion(place, published)
            told.append(Told(place, inclusion.entry, inclusion.path, True))
    return _answer(History(published.note, tuple(told), more=False).to_bytes())


# -- obeying


async def _obey(ledger: Ledger, sealed: Sealed, endings: Endings) -> None:
    """Destroy what published entries end, for as long as the node runs."""
    published = asyncio.Event()
    published.set()  # what happened before the start counts
    ledger.journal.on_published.append(lambda *_: published.set())
    loop, obeyed, look_at = asyncio.get_running_loop(), tuple[int, ...](), 0.0
    while True:
        await published.wait()
        published.clear()
        state = ledger.journal.folding.state
        ended = tuple(map(state.count, (Type.REVOKE, Type.RETIRE, Type.ERASE)))
        if ended == obeyed and loop.time() < look_at:  # most entries end nothing
            if state.size < ledger.journal.head.size:
                published.set()
            await asyncio.sleep(obey_every_s)
            continue
        checked = ledger.journal.checked
        covered = checked is not None and checked.checkpoint.size >= state.size  # else what was counted may not be published yet
        obeyed, look_at = ended if covered else (), loop.time() + due_every_s
        try:
            done = await obey_once(ledger, sealed, endings)
        except Exception:  # the disk may be full today and have room tomorrow; keys that should be gone must not stay for that
            log.exception("what was revoked or erased could not be destroyed")
            done = False
        if not done:
            published.set()
        await asyncio.sleep(obey_every_s)


async def obey_once(ledger: Ledger, sealed: Sealed, endings: Endings) -> bool:
    """Destroy what published entries have ended since the last time, and what has come due. False if some of them are not folded yet."""
    published, done = ledger.journal.checked, sealed.obeyed()  # or every head would be verified here at once, by nodes that nobody asks
    facts = ledger.journal.folding.state
    if published is None:
        return True
    end = min(published.checkpoint.size, facts.size)
    ended = facts.ended(done, end)
    if ended:
        destroyed = await sealed.obey(ended, [_due(facts, each) for each in ended], end)
        log.info("grants ended", extra={"keys": destroyed, "entries": len(ended)})
    gone = await endings.destroy_due(int(cosigned_at(published.note, ledger.roster)), ended_at_once)
    if gone:
        log.info("retired and erased files destroyed", extra={"files": gone})
    return end == published.checkpoint.size and gone < ended_at_once


def _due(facts: Facts, ended: Ended) -> int:
    """When a file may go: its owner dates that, and a date ahead of the cosigners' clocks is waited for."""
    known = None if ended.type is Type.REVOKE else facts.registration(FileId(ended.id))
    return 0 if known is None else known.ended_at


async def get_ending(request: web.Request) -> web.Response:
    """The receipt for what this node has destroyed of a file."""
    node, file_id = request.app[node_key], file_id_from_hex(request.match_info["file"])
    gone = request.app[endings_key].of(file_id)
    if gone is None:
        raise Absent("no entry that this node has obeyed ends this file", hint="try again in a moment")
    if gone.at is None:
        raise Absent("the entry that ends this file is not due yet, or its shard is just being destroyed", hint="try again in a moment")
    unsigned = Receipt(file_id, gone.place, gone.type, node.id, gone.shard, gone.keys, gone.at, b"")
    return _answer(sign_receipt(node.ledger.roster.origin, unsigned, request.app[signer_key].sign).to_bytes())


# -- parts


async def _folded(ledger: Ledger, true: Callable[[Facts], bool]) -> None:
    """Wait a little for an entry that is on its way here."""
    if not true(ledger.state):
        ledger.hurry()
    with suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            while not true(ledger.state):
                await ledger.journal.news.wait()


def _own_grant(facts: Facts, file_id: FileId, grant: Sha256, author: Key) -> Granted:
    granted = facts.grant(grant)
    if granted is None:
        raise Absent("this node knows no such grant", hint="try again in a moment")
    if author not in (granted.author, facts.heir(granted.author)):
        raise Refused("a sealed key is stored and deleted by the grant's author alone")
    if file_id not in granted.file_ids:
        raise Refused("the grant is of other files")
    return granted


def _after(request: web.Request) -> int:
    """The first place that is asked for."""
    text = request.query.get("after", "")
    if not text:
        return 0
    if not (text.isdecimal() and len(text) <= 19):
        raise Malformed("after is a place in the log")
    return min(int(text) + 1, 2**63 - 1)


def _answer(body: bytes) -> web.Response:
    return web.Response(body=body, content_type=body_type)
