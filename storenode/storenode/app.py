"""The node as one program: parts put together, served over TLS, stopped cleanly.

Every request passes the guard (guard.py) before it comes to a route.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sqlite3
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web
from cryptography.x509 import load_der_x509_certificate

from medshard_protocol.entries import Body, Rotate, Sender, sign_entry
from medshard_protocol.errors import Refused
from medshard_protocol.facts import Facts
from medshard_protocol.identity import certificate_key
from medshard_protocol.ids import FileId, Key
from medshard_protocol.messages import body_type
from medshard_protocol.roster import Roster
from medshard_protocol.rosters import pack_links, roster_header
from storenode import clock, heads, openapi, routes, sharing
from storenode.auditing import routes as auditing
from storenode.auditing.auditor import Auditor
from storenode.auditing.routes import audits_key
from storenode.config import Config
from storenode.doorkeeper import Doorkeeper, prepare
from storenode.draining import Draining
from storenode.evidence import evidence_in
from storenode.following import Following, roster_routes
from storenode.gate import gate_key
from storenode.genesis import check_membership, load_genesis
from storenode.guard import Guard
from storenode.identity import NodeKeys, Peer, client_contexts, server_ssl_context, trust
from storenode.join import join_routes
from storenode.ledger import Ledger, marker_name
from storenode.ledger import wire as ledger_wire
from storenode.ledger.peering import node_of
from storenode.ledger.standby import may_order, stands_by
from storenode.membership import Membership, log_folder
from storenode.metrics import Metrics, serve_metrics
from storenode.peers import Peers
from storenode.quick import Answer
from storenode.repairing import ground
from storenode.repairing import routes as repairing
from storenode.repairing.routes import repairs_key
from storenode.rotation import promote, waits
from storenode.routes import Node, node_key, sections_key
from storenode.shardstore import ShardStore
from storenode.succession import successor_routes
from storenode.timestamping import Timestamping
from storenode.watching import Watch
from storenode.watching.inside import node_watch, start, watch_key
from storenode.watching.watch import Trust
from storenode.wire import Answered, TlsSite, keepalive_s

log = logging.getLogger("storenode")
again_after_s: Final = 2.0  # what the others get to hear of a roster with our new keys, before we begin again with those
shutdown_s: Final = 30.0  # how long SIGTERM waits for uploads in flight
read_bytes: Final = 256 * 1024  # a connection reads this far ahead of its handler; the default stops and starts four times as often
sweep_every_s: Final = 600.0


@dataclass(frozen=True, slots=True)
class Parts:
    """A node's running parts, to be closed in reverse order, and the guard that knows them."""

    node: Node
    membership: Membership
    peers: Peers
    metrics: Metrics
    following: Following
    watch: Watch

    @property
    def roster(self) -> Roster:
        """Who takes part now."""
        return self.membership.roster

    @property
    def guard(self) -> Guard:
        """What every request passes."""
        return Guard(self.node.config, self.node.id, self.membership, self.metrics)


def build(parts: Parts, keys: NodeKeys) -> web.Application:
    """The web application: all routes behind the guard."""
    app = web.Application(middlewares=[parts.guard.middleware()], client_max_size=0)
    app.on_response_prepare.append(_teller(parts.membership))
    app[node_key] = parts.node
    app[watch_key] = parts.watch
    app.router.add_get("/healthz", _healthz, allow_head=False)
    genesis = parts.membership.genesis.to_bytes()

    async def get_genesis(request: web.Request) -> web.Response:
        return web.Response(body=genesis, content_type=body_type)

    app.router.add_get("/v1/genesis", get_genesis, allow_head=False)
    app.router.add_get(openapi.path, openapi.get_document, allow_head=False)
    app.router.add_routes(roster_routes(parts.membership, parts.following))
    app.router.add_routes(successor_routes(parts.membership, parts.node.ledger))
    app.router.add_routes(routes.routes())
    sharing.equip(app, parts.node, keys.node, parts.metrics)
    clock.equip(app, parts.node.config.data, parts.node.ledger)
    heads.equip(app, parts.node.ledger)
    auditor = auditing.equip(app, parts.node, keys.node, parts.peers, parts.metrics, lambda: pack_links(parts.membership.links(0)))
    repairs = repairing.equip(app, parts.node, keys.node, parts.peers, parts.metrics, auditor.missing)
    repairs.repairer.made = auditor.findings.forget
    app[sections_key] = {"repair": repairs.status, "audits": auditor.status}
    app.router.add_routes(parts.node.ledger.routes())
    app.router.add_routes(join_routes(parts.node.config, keys, _enrol(parts, keys), _vouched(parts, keys)))
    return app


def _teller(membership: Membership) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    async def tell(request: web.Request, response: web.StreamResponse) -> None:
        """Let everybody who asks know which roster this node goes by."""
        response.headers[roster_header] = str(membership.roster.number)

    return tell


def member_keys(config: Config) -> tuple[Membership, NodeKeys]:
    """Open the chain of rosters, put keys in place that it has begun to list, and check that this node is in it. Raises Refused if not."""
    membership = Membership(config.data, load_genesis(config.home))
    keys = promote(config.home, membership.roster)
    check_membership(membership.last_with(keys.node_id), keys)
    return membership, keys


def _open_ledger(config: Config, membership: Membership, keys: NodeKeys, peers: Peers) -> Ledger:
    genesis, marker = membership.genesis, keys.folder / marker_name
    roster = membership.last_with(keys.node_id)
    return Ledger.open(
        log_folder(config.data, genesis),
        genesis,
        keys.node_id,
        keys.cosigner,
        keys.log,
        peers,
        roster=roster,
        documents=membership.document,
        engine=config.ledger_engine,
        standby=stands_by(roster, keys.node_id, config.sequencer),
        marker=marker.with_name(f"{marker_name}-{len(genesis.before)}") if genesis.before else marker,
        pq_key=keys.cosigner_pq,
        line=membership.line,
        evidence=config.data,
    )


async def serve(config: Config) -> bool:
    """Run a node until SIGTERM or SIGINT; then finish what is in flight. True if it is to begin again at once, with new keys."""
    membership, keys = member_keys(config)
    peers = Peers(membership.roster, client_contexts(membership.roster, keys))
    metrics = Metrics()
    store = ShardStore(
        config.data, capacity=config.capacity_bytes, small_bytes_max=config.limits.small_shard_bytes_max, on_fsync=metrics.fsync
    )
    ledger = _open_ledger(config, membership, keys, peers)
    for name, der in (("node", keys.certificate), ("institution", keys.ca_certificate)):
        metrics.certificate(name, load_der_x509_certificate(der).not_valid_after_utc.timestamp())
    stamping = Timestamping(ledger, keys.node, config.timestamp)
    following = Following(membership, ledger, keys.node_id, peers)
    log_at = log_folder(config.data, membership.genesis)
    watch = node_watch(config.data, lambda: Trust(tuple(membership.history), pack_links(membership.links(0))), peers, log=log_at)
    parts = Parts(Node(config, keys.node_id, store, ledger), membership, peers, metrics, following, watch)
    app = build(parts, keys)
    draining = Draining(app)
    prepare()
    doorkeeper = Doorkeeper(app)
    runner = web.AppRunner(
        app,
        access_log=log,
        access_log_class=Answered,
        shutdown_timeout=shutdown_s,
        keepalive_timeout=keepalive_s,
        lingering_time=2,
        read_bufsize=read_bytes,
        auto_decompress=False,  # nothing is inflated, not even of a body that the guard refuses for its Content-Encoding
    )
    await runner.setup()
    server = runner.server
    assert server is not None  # set up a line above
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    tasks = [asyncio.create_task(_sweep(parts)), asyncio.create_task(doorkeeper.watch(lambda: server.connections))]
    again, site = False, None
    try:
        if not await _done(ledger.start(), stopping):  # a million entries without a snapshot take half a minute and more
            return False
        context = server_ssl_context(membership.roster, keys)
        membership.on_change(_adopter(parts, keys, context, stopping))
        site = TlsSite(runner, *config.listen_address, context)
        site.quick = quick_ways(parts, app, draining, doorkeeper)
        await site.start()
        await following.start()
        stamping.start()
        app[repairs_key].start()
        tasks.append(start(watch, config.limits.watch_every_s, parts.node.traffic.lull))
        auditor = app[audits_key].auditor
        auditor.start()
        _look_for_less_garbage()
        async with serve_metrics(config, metrics, lambda: _gauge(parts, auditor)):
            log.info("ready", extra={"listen": config.listen, "node": keys.node_id.hex(), "roster": membership.roster.number})
            _tell_if_gone(parts)
            _tell_if_alone(parts.roster)
            if config.sequencer is False and stands_by(parts.roster, keys.node_id, None):
                log.warning("config.toml says that this node does not stand by to order the ledger's entries: see to it that two others do")
            await stopping.wait()
            again = waits(config.home, membership.roster)
            log.info("beginning again, with new keys" if again else "stopping")
    finally:
        for task in tasks:
            task.cancel()
        await stamping.close()
        await following.close()
        await app[repairs_key].close()
        if site is not None:
            site.quick = {}
        await draining.wait(shutdown_s)
        await runner.cleanup()
        if site is not None:
            site.close()
        await ledger.close()
        await peers.close()
        store.close()
    return again


def quick_ways(parts: Parts, app: web.Application, draining: Draining, doorkeeper: Doorkeeper) -> Mapping[bytes, Answer]:
    """What is answered below aiohttp where it can be, by the first line of its request."""
    node, gate = parts.node, app[gate_key]

    async def read(who: Peer, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        return 200, await routes.small_shards(node, gate, who, headers, body)

    async def push(who: Peer, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        return await node.ledger.take(body, node_of(who))

    async def append(who: Peer, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        return await node.ledger.append_packed(body)

    works = {"/v1/read": read, ledger_wire.path: push, "/v1/ledger/append": append}
    return {f"POST {path} HTTP/1.1".encode(): parts.guard.quick("POST", path, work, draining, doorkeeper) for path, work in works.items()}


def _look_for_less_garbage() -> None:
    """What is there by now stays, and requests leave no cycles to speak of: a fortieth of a read's processor time went into looking."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 20, 20)


async def _done(work: Coroutine[Any, Any, None], stopping: asyncio.Event) -> bool:
    """Do it; False if the node was told to stop meanwhile."""
    task, told = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    await asyncio.wait({task, told}, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if task.done():
        task.result()
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


def _adopter(parts: Parts, keys: NodeKeys, context: ssl.SSLContext, stopping: asyncio.Event) -> Callable[[Roster], None]:
    """Go by a new roster from this moment on, in every part of the node."""

    def adopt(roster: Roster) -> None:
        trust(context, roster)
        parts.peers.adopt(roster, client_contexts(roster, keys))
        parts.node.ledger.adopt(roster)
        _tell_if_gone(parts)
        _tell_if_alone(roster)
        if waits(parts.node.config.home, roster):
            asyncio.get_running_loop().call_later(again_after_s, stopping.set)

    return adopt


def _tell_if_gone(parts: Parts) -> None:
    if not parts.membership.lists(parts.node.id):
        log.warning("this node is not in roster %d: it takes nothing any more and serves reads only", parts.roster.number)


def _tell_if_alone(roster: Roster) -> None:
    able = [roster.node(node).name for node in may_order(roster)]
    if len(able) < 2 <= len(roster.institutions):
        log.warning(
            "only one institution's nodes (%s) can order the ledger's entries: while they are down nothing is stored and nothing read; "
            "give a node of another institution a log key (storenode rotate makes one)",
            able[0] if able else "none",
        )


async def _healthz(request: web.Request) -> web.Response:
    return web.Response(text="ok\n")


def _enrol(parts: Parts, keys: NodeKeys) -> Callable[[Body], Awaitable[None]]:
    async def enrol(body: Body) -> None:
        """Put the institution's word for a key on the ledger; returns when a quorum has cosigned it."""
        ca = keys.ca
        if ca is None:
            raise Refused("this node does not keep its institution's CA key", hint="ask for an invitation of the node that does")
        if _stands(parts.node.ledger.state, body):
            return
        author = Key(ca.public_key().public_bytes_raw())
        await parts.node.ledger.append([sign_entry(parts.roster.origin, body, author, ca.sign)])

    return enrol


def _stands(facts: Facts, body: Body) -> bool:
    """Whether a successor or a sender was enrolled by an earlier try."""
    known = facts.identity(body.key) if isinstance(body, Rotate | Sender) else None
    if known is None:
        return False
    return known.before == body.old if isinstance(body, Rotate) else isinstance(body, Sender) and known.heir == body.vault


def _vouched(parts: Parts, keys: NodeKeys) -> Callable[[Key], bool]:
    def vouched(key: Key) -> bool:
        """Whether this node's institution vouches for a key, by this node's own mirror."""
        facts = parts.node.ledger.state
        known, own = facts.vouched_at(key, facts.size), facts.roster.institution_of(certificate_key(keys.ca_certificate))
        return known is not None and own is not None and known.institution == own.name

    return vouched


def _gauge(parts: Parts, auditor: Auditor) -> None:
    shards, manifests = parts.node.store.counts()
    parts.metrics.stored(shards, manifests, parts.node.store.used, parts.node.store.free_bytes())
    parts.metrics.ledger(parts.node.ledger.status())
    parts.metrics.roster(parts.roster.number)
    parts.metrics.findings(Counter(each.verdict for each in auditor.findings.bad()), len(auditor.findings.silent()))
    parts.metrics.evidence(evidence_in(parts.node.config.data).counts(), parts.watch.active())


async def _sweep(parts: Parts) -> None:
    """Delete what was never registered in time, now and then."""
    limit = parts.node.config.limits.sweep_after_s

    def registered(file_id: FileId) -> bool:
        known = parts.node.ledger.state.registration(file_id)
        # What came in after the file had ended, from a client that was slow, goes as what was never registered does.
        return known is not None and not ground.has_ended(parts.node.ledger, known)

    while True:
        await asyncio.sleep(min(sweep_every_s, max(limit / 4, 0.5)))
        # Measured by the ledger as this node knows it: a mirror that was away for days must not take registered shards for forgotten ones.
        known_until = parts.node.ledger.published_at()
        if known_until is None or parts.node.ledger.state.frozen is not None:  # what an ended log still lists is all that there is of it
            continue
        try:
            swept = await parts.node.store.sweep(registered, limit, known_until)
            swept += await asyncio.to_thread(parts.node.store.sweep_orphans, limit)
        except (OSError, sqlite3.Error):
            log.exception("sweep failed")
            continue
        if swept:
            parts.metrics.swept(swept)
            log.info("swept", extra={"shards": swept})
