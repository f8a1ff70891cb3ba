"""One real node behind real TLS: who gets shards, who is refused and why, and what it tells of rights."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard.tls import context_for
from medshard_protocol.entries import Access, Body, Enrol, Erase, Grant, Register, Retire, Revoke, Withdraw, sign_entry
from medshard_protocol.errors import MedshardError
from medshard_protocol.identity import client_csr, node_hostname
from medshard_protocol.ids import FileId, Key, Tag
from medshard_protocol.manifest import Manifest, ShardRef
from medshard_protocol.messages import SpanHead, cell_size_header, pack_small_reads, shard_path, unpack_error, unpack_shards
from medshard_protocol.proofs import Inclusion
from medshard_protocol.rights import Reason, reason_in
from medshard_protocol.roster import Institution as RosterInstitution
from medshard_protocol.roster import Node as RosterNode
from medshard_protocol.roster import Roster
from medshard_protocol.rosters import pack_links
from medshard_protocol.shards import Layout, digests, shard_root
from medshard_protocol.sharing import (
    EndedFiles,
    History,
    SealedGrant,
    SealingKey,
    Shared,
    Vouched,
    access_header,
    emergency_header,
    ended_path,
    grant_path,
    grants_path,
    history_path,
    identity_path,
    key_path,
    pack_emergency,
    pack_shown,
    pack_tickets,
    sealing_key_signed,
    shared_path,
    unpack_seen,
)
from storenode import gate as gate_module
from storenode.app import Parts, build
from storenode.config import Config, write_config
from storenode.following import Following
from storenode.gate import gate_key
from storenode.identity import Institution, NodeKeys, create_institution, create_node, issue_client_cert, server_ssl_context
from storenode.ledger import Ledger
from storenode.membership import Membership
from storenode.metrics import Metrics
from storenode.peers import Peers
from storenode.routes import Node
from storenode.shardstore import ShardStore
from storenode.sharing import endings_key, obey_once, sealed_key
from storenode.watching.inside import node_watch
from storenode.watching.watch import Trust
from storenode.wire import TlsSite

cell = 1000


def public(key: Ed25519PrivateKey) -> Key:
    return Key(key.public_key().public_bytes_raw())


@dataclass
class Running:
    """A node that is a whole consortium, and vaults that its institution has enrolled."""

    roster: Roster
    institution: Institution
    folder: Path
    session: aiohttp.ClientSession
    ledger: Ledger
    store: ShardStore
    metrics: Metrics
    app: web.Application
    keys: dict[str, Ed25519PrivateKey] = field(default_factory=dict)
    contexts: dict[str, object] = field(default_factory=dict)

    @property
    def node(self) -> RosterNode:
        return self.roster.nodes[0]

    def key(self, who: str) -> Key:
        return public(self.keys[who])

    async def join(self, *vaults: str) -> None:
        for who in vaults:
            key = self.keys[who] = Ed25519PrivateKey.generate()
            self.contexts[who] = context_for(self.institution.certificate, issue_client_cert(self.institution, client_csr(key)), key)
            await self.say("institution", Enrol(public(key), 0, os.urandom(16)))

    async def ask(self, who: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(
            method, self.node.url + path, data=body, headers=named, ssl=self.contexts[who], server_hostname=node_hostname(self.node.id)
        ) as response:
            return response.status, await response.read()

    async def say(self, who: str, body: Body) -> Inclusion:
        """Put an entry on the ledger, and wait until it is published."""
        key = self.institution.key if who == "institution" else self.keys[who]
        entry = sign_entry(self.roster.origin, replace(body, nonce=os.urandom(16)), public(key), key.sign)
        return (await self.ledger.append([entry]))[0]

    async def put(self, who: str = "owner", size: int = 3500) -> FileId:
        """A file of one shard, with its manifest and registration."""
        file_id, shard = FileId(os.urandom(32)), os.urandom(size)
        blake3 = digests["blake3"]
        root = shard_root([blake3(shard[at : at + cell]) for at in range(0, size, cell)], blake3)
        manifest = Manifest(
            file_id,
            Layout(1, 1, cell, size),
            "blake3",
            bytes(32),
            (ShardRef(self.node.id, root),),
            self.key(who),
            b"",
            bytes(48),
            (Tag(file_id),),
            bytes(32),
        )
        status, _ = await self.ask(who, "PUT", shard_path(file_id, 0), shard, **{cell_size_header.replace("-", "_"): str(cell)})
        assert status == 201
        status, _ = await self.ask(who, "PUT", f"/v1/manifests/{file_id.hex()}", manifest.to_bytes())
        assert status == 201
        await self.say(who, Register(file_id, manifest.sha256, b""))
        return file_id

    async def access(self, who: str, *files: FileId) -> int:
        return (await self.say(who, Access(files, 1, b"", b""))).index

    async def read(self, who: str, file_id: FileId, *places: int, **headers: str) -> tuple[int, bytes]:
        shown = {"Medshard_Access": pack_tickets(places)} if places else {}
        return await self.ask(who, "GET", shard_path(file_id, 0), **shown, **headers)

    async def refused(self, reason: Reason, who: str, file_id: FileId, *places: int, **headers: str) -> MedshardError:
        """Both ways to read are refused, with this reason, and counted."""
        before = self.metrics._denied[reason.value]
        status, body = await self.read(who, file_id, *places, **headers)
        assert (status, reason_in(str(unpack_error(status, body, "node")))) == (403, reason)
        shown = {"Medshard_Access": pack_tickets(places)} if places else {}
        status, body = await self.ask(who, "POST", "/v1/read", pack_small_reads([(file_id, 0)]), **shown, **headers)
        error = unpack_error(status, body, "node")
        assert (status, reason_in(str(error))) == (403, reason)
        assert self.metrics._denied[reason.value] == before + 2
        return error


@pytest.fixture
async def node(tmp_path: Path, unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    monkeypatch.setattr(gate_module, "enforced", True)
    monkeypatch.setattr(gate_module, "wait_s", 0.2)
    institution, doctor = create_institution("Clinic"), Ed25519PrivateKey.generate()
    home = tmp_path / "home"
    home.mkdir()
    create_node(home, institution)
    keys = NodeKeys.load(home)
    assert keys.log is not None
    url = f"https://127.0.0.1:{unused_tcp_port}"
    write_config(home, url=url, listen=f"127.0.0.1:{unused_tcp_port}", capacity_bytes=50_000_000)
    config = Config.load(home)
    roster = Roster(
        "clinic.example/log",
        keys.node_id,
        (RosterInstitution("Clinic", institution.certificate, public(institution.key)),),
        (RosterNode(keys.node_id, "one", 0, url, 50_000_000, keys.tls_key, public(keys.cosigner), public(keys.log)),),
        (1, 1, 1),
        emergency=(public(doctor),),
    )
    membership, peers, metrics = Membership(config.data, roster), Peers(roster, {}), Metrics()
    store = ShardStore(config.data, capacity=config.capacity_bytes, small_bytes_max=4096)
    ledger = Ledger.open(config.data, roster, keys.node_id, keys.cosigner, keys.log, peers)
    following = Following(membership, ledger, keys.node_id, peers)
    watch = node_watch(config.data, lambda: Trust(tuple(membership.history), pack_links(membership.links(0))), peers)
    app = build(Parts(Node(config, keys.node_id, store, ledger), membership, peers, metrics, following, watch), keys)
    await ledger.start()
    runner = web.AppRunner(app, access_log=None, lingering_time=0.2, shutdown_timeout=0.2)
    await runner.setup()
    await TlsSite(runner, *config.listen_address, server_ssl_context(roster, keys)).start()
    async with aiohttp.ClientSession() as session:
        running = Running(roster, institution, tmp_path, session, ledger, store, metrics, app)
        await running.join("owner", "reader", "other")
        running.keys["doctor"] = doctor
        running.contexts["doctor"] = context_for(institution.certificate, issue_client_cert(institution, client_csr(doctor)), doctor)
        await running.say("institution", Enrol(public(doctor), 0, b""))
        yield running
    await runner.cleanup()
    await ledger.close()
    await peers.close()
    store.close()


async def test_the_owner_reads_with_an_entry_and_nobody_without(node: Running) -> None:
    file_id = await node.put()
    await node.refused(Reason.NO_ENTRY, "owner", file_id)
    place = await node.access("owner", file_id)
    status, body = await node.read("owner", file_id, place)
    assert status == 200
    head = SpanHead.from_bytes(body[4 : 4 + int.from_bytes(body[:4], "big")])
    assert head.count == 4
    status, body = await node.ask("owner", "POST", "/v1/read", pack_small_reads([(file_id, 0)]), Medshard_Access=str(place))
    assert len(unpack_shards(body, 1)[0] or b"") == 3500


async def test_what_gives_no_shard_away_needs_no_entry(node: Running) -> None:
    file_id = await node.put()
    assert (await node.ask("reader", "HEAD", shard_path(file_id, 0)))[0] == 204
    assert (await node.ask("reader", "POST", shard_path(file_id, 0) + "/check"))[0] == 200
    assert (await node.ask("reader", "GET", f"/v1/manifests/{file_id.hex()}"))[0] == 200


async def test_an_entry_replayed_by_another_key_opens_nothing(node: Running) -> None:
    file_id = await node.put()
    place = await node.access("owner", file_id)
    await node.refused(Reason.OTHER_READER, "reader", file_id, place)


async def test_an_entry_for_another_file_opens_nothing(node: Running) -> None:
    one, two = await node.put(), await node.put()
    await node.refused(Reason.OTHER_FILE, "owner", two, await node.access("owner", one))


async def test_one_entry_opens_all_files_that_it_names(node: Running) -> None:
    files = [await node.put() for _ in range(3)]
    place = await node.access("owner", *files)
    wanted = [(file_id, 0) for file_id in files]
    status, body = await node.ask("owner", "POST", "/v1/read", pack_small_reads(wanted), Medshard_Access=str(place))
    assert status == 200
    assert all(unpack_shards(body, 3))


async def test_access_before_revocation_is_served_within_its_ticket_and_access_after_is_not(node: Running) -> None:
    file_id = await node.put()
    await node.refused(Reason.NEVER_GRANTED, "reader", file_id, await node.access("reader", file_id))
    grant = await node.say("owner", Grant((file_id,), node.key("reader"), 0, 1, b""))
    before = await node.access("reader", file_id)
    grant_id = node.ledger.state.grants_to(node.key("reader"))[0][0]
    await node.say("owner", Revoke(grant_id, b""))
    after = await node.access("reader", file_id)
    assert grant.index < before < after
    assert (await node.read("reader", file_id, before))[0] == 200
    await node.refused(Reason.REVOKED, "reader", file_id, after)


async def test_an_entry_that_is_too_old_opens_nothing(node: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = await node.put()
    place = await node.access("owner", file_id)
    monkeypatch.setattr(gate_module, "ticket_s", -1.0)
    await node.refused(Reason.EXPIRED, "owner", file_id, place)


async def test_a_grant_that_has_ended_opens_nothing(node: Running) -> None:
    file_id = await node.put()
    await node.say("owner", Grant((file_id,), node.key("reader"), 1_000_000, 1, b""))
    await node.refused(Reason.ENDED, "reader", file_id, await node.access("reader", file_id))


async def test_an_entry_that_is_not_in_the_mirror_opens_nothing(node: Running) -> None:
    file_id = await node.put()
    error = await node.refused(Reason.NOT_IN_MIRROR, "owner", file_id, 10**6)
    assert error.hint


async def test_an_erased_file_and_a_withdrawn_reader_are_shut_at_once(node: Running) -> None:
    one, two = await node.put(), await node.put()
    await node.say("owner", Grant((one, two), node.key("reader"), 0, 1, b""))
    place = await node.access("reader", one, two)
    assert (await node.read("reader", one, place))[0] == 200
    await node.say("owner", Erase(one, 0, b""))
    await node.refused(Reason.ERASED, "reader", one, place)
    await node.say("institution", Withdraw(node.key("reader"), b""))
    await node.refused(Reason.WITHDRAWN, "reader", two, place)


async def test_a_header_that_is_not_canonical_is_malformed(node: Running) -> None:
    file_id = await node.put()
    for text in ("x", "1,", "07", "2,1"):
        assert (await node.ask("owner", "GET", shard_path(file_id, 0), Medshard_Access=text))[0] == 400
    assert (await node.ask("owner", "GET", shard_path(file_id, 0), Medshard_Emergency="AAAA"))[0] == 400


# -- proofs shown


async def test_a_proof_is_taken_under_this_roster_alone(node: Running) -> None:
    file_id = await node.put()
    inclusion = await node.say("owner", Access((file_id,), 1, b"", b""))
    status, body = await node.ask("owner", "POST", "/v1/access", pack_shown(inclusion))
    assert (status, unpack_seen(body)) == (200, inclusion.index)
    unsigned = (
        inclusion.checkpoint.rpartition(b"\n\n")[0] + b"\n\n" + inclusion.checkpoint.rpartition(b"\n\n")[2].splitlines(keepends=True)[0]
    )
    for wrong, reason in (
        (replace(inclusion, checkpoint=unsigned), Reason.OLD_ROSTER),
        (replace(inclusion, index=inclusion.index - 1), Reason.FORGED),
    ):
        status, body = await node.ask("owner", "POST", "/v1/access", pack_shown(wrong))
        assert status in (400, 403)
        if status == 403:
            assert reason_in(str(unpack_error(status, body, "node"))) is reason


# -- emergencies


async def test_in_an_emergency_a_marked_identity_reads_and_is_written_down_later(node: Running) -> None:
    file_id, doctor = await node.put(), node.keys["doctor"]
    entry = sign_entry(node.roster.origin, Access((file_id,), 7, b"sealed reason", os.urandom(16)), public(doctor), doctor.sign)
    shown = {"Medshard_Emergency": pack_emergency(entry)}
    await node.refused(Reason.WITHIN_REACH, "doctor", file_id, **shown)
    assert node.ledger.published
    node.app[gate_key]._fresh_at -= 11
    assert (await node.ask("doctor", "GET", shard_path(file_id, 0), **shown))[0] == 200
    assert node.metrics._gauges["medshard_emergency_reads_waiting"] == 1
    async with asyncio.timeout(60):
        while node.ledger.state.history(file_id)[-1][0] < node.ledger.journal.head.size - 1 or len(node.ledger.state.history(file_id)) < 2:
            await asyncio.sleep(0.02)
    assert node.ledger.state.history(file_id)[-1][1]
    async with asyncio.timeout(60):
        while node.metrics._gauges["medshard_emergency_reads_waiting"]:
            await asyncio.sleep(0.02)
    assert emergency_header == "Medshard-Emergency"
    assert access_header == "Medshard-Access"


# -- keys to seal to


async def test_a_key_to_seal_to_is_kept_for_its_owner_alone(node: Running) -> None:
    def card(who: str, by: str, h: bytes) -> bytes:
        return SealingKey(node.key(who), h * 1216, node.keys[by].sign(sealing_key_signed(h * 1216))).to_bytes()

    assert (await node.ask("reader", "GET", key_path(node.key("owner"))))[0] == 404
    assert (await node.ask("owner", "PUT", "/v1/keys", card("owner", "owner", b"a")))[0] == 201
    assert (await node.ask("owner", "PUT", "/v1/keys", card("owner", "owner", b"b")))[0] == 201
    assert (await node.ask("reader", "PUT", "/v1/keys", card("owner", "owner", b"c")))[0] == 403
    assert (await node.ask("owner", "PUT", "/v1/keys", card("owner", "reader", b"c")))[0] == 403
    assert (await node.ask("reader", "GET", key_path(node.key("owner")))) == (200, card("owner", "owner", b"b"))


# -- sealed grants


async def granted(node: Running, *files: FileId, until: int = 0, sealed: bool = True) -> bytes:
    inclusion = await node.say("owner", Grant(files, node.key("reader"), until, 1, b""))
    (grant,) = [id_ for id_, each in node.ledger.state.grants_to(node.key("reader")) if each.index == inclusion.index]
    for file_id in files if sealed else ():
        assert (await node.ask("owner", "PUT", grants_path(file_id), SealedGrant(grant, b"key of " + file_id).to_bytes()))[0] == 201
    return grant


async def shared(node: Running, who: str = "reader", after: int | None = None) -> Shared:
    status, body = await node.ask(who, "GET", shared_path(after))
    assert status == 200
    return Shared.from_bytes(body)


async def test_a_reader_is_told_what_was_granted_with_proofs(node: Running) -> None:
    one, two = await node.put(), await node.put()
    await granted(node, one, two)
    told = await shared(node)
    assert [(each.file_id, each.sealed) for each in told.files] == [(one, b"key of " + one), (two, b"key of " + two)]
    for each in told.files:
        _, grant = each.grant.verify(node.roster)
        _, registration = each.registration.verify(node.roster)
        assert grant.body.reader == node.key("reader")  # type: ignore[union-attr]
        assert registration.body.file_id == each.file_id  # type: ignore[union-attr]
        assert Manifest.from_bytes(each.manifest).file_id == each.file_id
    assert not told.more
    assert (await shared(node, after=told.files[0].grant.index)).files == ()
    assert (await shared(node, "other")).files == ()


async def test_grants_come_in_pages_and_none_is_split(node: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storenode.sharing.shared_files_max", 3)
    files = [await node.put() for _ in range(5)]
    for some in ((files[0], files[1]), (files[2], files[3]), (files[4],)):
        await granted(node, *some)
    first = await shared(node)
    assert ([each.file_id for each in first.files], first.more) == (files[:2], True)
    second = await shared(node, after=first.files[-1].grant.index)
    assert ([each.file_id for each in second.files], second.more) == (files[2:], False)


async def test_a_sealed_key_comes_from_the_author_of_its_grant(node: Running) -> None:
    one, two = await node.put(), await node.put()
    grant = await granted(node, one, sealed=False)
    card = SealedGrant(grant, b"key").to_bytes()
    assert (await node.ask("other", "PUT", grants_path(one), card))[0] == 403
    assert (await node.ask("owner", "PUT", grants_path(two), card))[0] == 403
    assert (await node.ask("owner", "PUT", grants_path(one), SealedGrant(b"x" * 32, b"key").to_bytes()))[0] == 404
    assert (await node.ask("owner", "PUT", grants_path(one), card))[0] == 201
    assert (await node.ask("other", "DELETE", grant_path(one, grant)))[0] == 403
    assert (await node.ask("owner", "DELETE", grant_path(one, grant)))[0] == 204
    assert (await node.ask("owner", "DELETE", grant_path(one, grant)))[0] == 404
    assert (await shared(node)).files == ()


async def test_a_file_whose_erasure_is_dated_ahead_is_listed_as_shared_until_that_day(node: Running) -> None:
    file_id = await node.put()
    await granted(node, file_id)
    await node.say("owner", Erase(file_id, 2**40, b""))
    assert [each.file_id for each in (await shared(node)).files] == [file_id]


async def test_a_revocation_and_an_erasure_destroy_the_sealed_keys(node: Running) -> None:
    files = [await node.put() for _ in range(3)]
    first, second = await granted(node, files[0], files[1]), await granted(node, files[2])
    sealed = node.app[sealed_key]
    await node.say("owner", Erase(files[0], 0, b""))
    async with asyncio.timeout(60):
        while sealed.grant(files[0], first) is not None:
            await asyncio.sleep(0.01)
    assert sealed.grant(files[1], first) == b"key of " + files[1]
    assert (await node.ask("owner", "PUT", grants_path(files[0]), SealedGrant(first, b"key").to_bytes()))[0] == 403
    await node.say("owner", Revoke(first, b""))
    async with asyncio.timeout(60):
        while sealed.grant(files[1], first) is not None:
            await asyncio.sleep(0.01)
    assert [each.file_id for each in (await shared(node)).files] == [files[2]]
    assert (await node.ask("owner", "PUT", grants_path(files[1]), SealedGrant(first, b"key").to_bytes()))[0] == 403
    assert sealed.grant(files[2], second) is not None
    store = (node.folder / "home").rglob("store.sqlite*")
    node.store.catalog.all("PRAGMA wal_checkpoint(TRUNCATE)")
    assert not any(b"key of " + files[1] in path.read_bytes() for path in store)


async def test_what_a_crash_left_undone_is_destroyed_after_the_next_start(node: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = await node.put()
    grant = await granted(node, file_id)
    sealed = node.app[sealed_key]
    with monkeypatch.context() as broken:
        broken.setattr(type(sealed), "obey", lambda *_: asyncio.sleep(3600))
        await node.say("owner", Revoke(grant, b""))
        await asyncio.sleep(0.1)
        assert sealed.grant(file_id, grant) is not None
    assert node.ledger.state.size  # folds what was stored
    await obey_once(node.ledger, sealed, node.app[endings_key])
    assert sealed.grant(file_id, grant) is None


async def test_a_grant_that_ended_is_not_told(node: Running) -> None:
    file_id = await node.put()
    await granted(node, file_id, until=1_000_000)
    assert (await shared(node)).files == ()


# -- histories and identities


async def history(node: Running, file_id: FileId, after: int | None = None) -> History:
    status, body = await node.ask("other", "GET", history_path(file_id, after))
    assert status == 200
    return History.from_bytes(body)


async def test_a_history_tells_every_entry_with_its_proof(node: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id, another = await node.put(), await node.put()
    grant = await granted(node, file_id)
    await node.access("other", file_id, another)
    await node.say("owner", Revoke(grant, b""))
    told = await history(node, file_id)
    bodies = [inclusion.verify(node.roster)[1].body for inclusion in told.inclusions()]
    assert [type(body).__name__ for body in bodies] == ["Register", "Grant", "Access", "Revoke"]
    assert all(each.effective for each in told.entries)
    assert not told.more
    monkeypatch.setattr("storenode.sharing.history_entries_max", 3)
    first = await history(node, file_id)
    assert (first.entries, first.more) == (told.entries[:3], True)
    rest = await history(node, file_id, first.entries[-1].index)
    assert ([each.index for each in rest.entries], rest.more) == ([told.entries[3].index], False)
    assert (await history(node, FileId(bytes(32)))).entries == ()
    assert (await node.ask("other", "GET", f"/v1/ledger/history/{file_id.hex()}?after=x"))[0] == 400


async def test_an_owner_is_told_which_of_its_files_have_ended_and_only_of_those(node: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ended(who: str = "owner", after: int | None = None) -> EndedFiles:
        status, body = await node.ask(who, "GET", ended_path(after))
        assert status == 200
        return EndedFiles.from_bytes(body)

    mine, kept, theirs, another = await node.put(), await node.put(), await node.put("other"), await node.put()
    await node.say("owner", Revoke(await granted(node, kept), b""))
    retired, strange = await node.say("owner", Retire(mine, 0, b"")), await node.say("other", Erase(theirs, 0, b""))
    erased = await node.say("owner", Erase(another, 0, b""))
    told = await ended()
    assert [inclusion.verify(node.roster)[1].body.file_id for inclusion in told.entries] == [mine, another]
    assert (told.next, told.more) == (erased.index + 1, False)
    assert [each.index for each in (await ended("other")).entries] == [strange.index]
    assert (await ended("reader")).entries == (), "whom it was shared with"
    later = await ended(after=erased.index)
    assert (later.entries, later.next, later.more) == ((), erased.index + 1, False)
    monkeypatch.setattr("storenode.sharing.ended_looked_at_max", 2)  # the revocation, and the first of the owner's
    first = await ended()
    assert ([each.index for each in first.entries], first.next, first.more) == ([retired.index], retired.index + 1, True)
    rest = await ended(after=first.next - 1)
    assert ([each.index for each in rest.entries], rest.next, rest.more) == ([erased.index], erased.index + 1, True)
    monkeypatch.undo()
    monkeypatch.setattr("storenode.sharing.history_entries_max", 1)
    first = await ended()
    assert ([each.index for each in first.entries], first.next, first.more) == ([retired.index], retired.index + 1, True)
    published = node.ledger.published
    assert published is not None
    before = published._replace(checkpoint=replace(published.checkpoint, size=erased.index))
    monkeypatch.setattr(type(node.ledger), "published", before)
    assert (await ended(after=retired.index)).entries == (), "what is not published is not told"


async def test_an_identity_is_told_with_its_institution(node: Running) -> None:
    async def vouched(key: Key) -> Vouched:
        return Vouched.from_bytes((await node.ask("other", "GET", identity_path(key)))[1])

    assert (await vouched(Key(bytes(32)))).institution == ""
    known = await vouched(node.key("reader"))
    assert (known.institution, known.withdrawn) == ("Clinic", False)
    await node.say("institution", Withdraw(node.key("reader"), b""))
    assert (await vouched(node.key("reader"))).withdrawn
