"""The node's answers about shards and manifests. A route parses, awaits one call of the store, returns.

Who may: any identity that a roster institution vouches for may store; a shard and a manifest belong to the key that sent them.
Readers check what they get; nothing here is trusted by them.
"""

from __future__ import annotations

import asyncio
import functools
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from aiohttp import web

from medshard_protocol import merkle
from medshard_protocol.errors import Absent, Damaged, Malformed, MedshardError, Refused
from medshard_protocol.ids import FileId, Key, NodeId, file_id_from_hex
from medshard_protocol.manifest import Manifest, manifest_bytes_max
from medshard_protocol.messages import (
    Found,
    SmallPut,
    SpanHead,
    body_type,
    bundle_bytes_max,
    cell_size_header,
    lookup_files_max,
    pack_check,
    pack_found,
    pack_outcomes,
    pack_shards,
    pack_stored,
    root_header,
    unpack_lookup,
    unpack_small_puts,
    unpack_small_reads,
)
from medshard_protocol.shards import cell_bytes_max, cells_in, check_cells, code_n_max, digests
from storenode.callers import caller
from storenode.config import Config
from storenode.gate import Gate, gate_key
from storenode.identity import Peer
from storenode.ledger import Ledger
from storenode.lending import Gone, Stalled
from storenode.shardstore import Incoming, Shard, ShardStore, StoredFile
from storenode.shardstore.store import check_size
from storenode.traffic import Traffic
from storenode.watching.inside import watch_key
from storenode.wire import Connection, body_size

thread_cells_least: Final = 2048
block_bytes: Final = 1024 * 1024  # one thread hop and one disk call for this much
send_buffer_bytes: Final = 4 * 1024 * 1024  # as far as the kernel would widen it by itself in time
paths_cells_max: Final = 64  # Merkle paths are for samples; a whole shard is checked by its digests


@dataclass(frozen=True, slots=True)
class Node:
    """What the handlers work on."""

    config: Config
    id: NodeId
    store: ShardStore
    ledger: Ledger
    traffic: Traffic = field(default_factory=Traffic)


node_key: Final = web.AppKey("node", Node)
sections_key: Final = web.AppKey("sections", dict[str, Callable[[], dict[str, object]]])  # of the status, by the parts that tell them


def routes() -> list[web.RouteDef]:
    """All routes of this file."""
    shard = r"/v1/shards/{file}/{index}"
    return [
        web.put(shard, put_shard),
        web.get(shard, get_shard, allow_head=False),
        web.head(shard, head_shard),
        web.post(shard + "/check", check_shard),
        web.put("/v1/manifests/{file}", put_manifest),
        web.get("/v1/manifests/{file}", get_manifest),
        web.post("/v1/files", put_files),
        web.post("/v1/read", read_files),
        web.post("/v1/lookup", lookup),
        web.get("/v1/status", status),
    ]


def vouched_caller(request: web.Request) -> Key:
    """The key of who asks. Raises Refused for nobody in particular, and for a key that its institution has withdrawn.

    One that this node has not heard of yet is let through: the ledger decides, and this only spares honest nodes a thief's work.
    """
    key = caller(request).key
    known = request.app[node_key].ledger.state.identity(key)
    if known is not None and known.withdrawn is not None:
        hint = "ask your institution for an invitation, and run `medshard keys rotate`"
        raise Refused(f"{known.institution} has withdrawn this key", hint=hint)
    return key


# -- in


async def put_shard(request: web.Request) -> web.Response:
    """Take one shard, streamed."""
    node, (file_id, index), owner = request.app[node_key], shard_id(request), vouched_caller(request)
    size = body_size(request)
    if size is None:
        raise Malformed("a shard is sent with its Content-Length")
    check_size(size, node.config.limits.shard_bytes_max, "a shard")
    incoming = node.store.begin(size, _cell_size(request, size))
    stall_s, connection = node.config.limits.body_stall_s, request.transport
    try:
        if isinstance(connection, Connection) and connection.body_size:
            with node.traffic.body():
                await _receive_aside(connection, incoming, stall_s)
        else:
            await _receive(request, incoming, stall_s)
        put = await node.store.commit(incoming, file_id, index, owner)
    finally:
        node.store.abandon(incoming)
    return _stored(put.root, put.created)


async def put_manifest(request: web.Request) -> web.Response:
    """Keep a manifest beside the shard it describes."""
    node, file_id = request.app[node_key], file_id_from_hex(request.match_info["file"])
    manifest = Manifest.from_bytes(await read_body(request, min(node.config.limits.manifest_bytes_max, manifest_bytes_max)))
    if manifest.file_id != file_id:
        raise Malformed("the manifest is of another file")
    if manifest.owner != vouched_caller(request):
        raise Refused("a manifest is stored by its owner alone")
    shard = node.store.shard(file_id)
    if shard is None:
        raise Absent("a manifest is kept beside a shard, and none of this file is here")
    if manifest.index_on(node.id) != shard.index or manifest.shards[shard.index].root != shard.root:
        raise Malformed("the manifest does not describe the shard that is stored here")
    created = await node.store.put_manifest(manifest)
    return _stored(manifest.sha256, created)


async def put_files(request: web.Request) -> web.Response:
    """Take many small shards with their manifests; each is answered for itself."""
    node, owner = request.app[node_key], vouched_caller(request)
    puts = unpack_small_puts(await read_body(request, bundle_bytes_max))

    async def one(put: SmallPut) -> MedshardError | None:
        try:
            manifest = Manifest.from_bytes(put.manifest)
            if manifest.owner != owner:
                raise Refused("a manifest is stored by its owner alone")
            if manifest.index_on(node.id) != put.index or len(put.shard) != manifest.layout.shard_size:
                raise Malformed("the manifest does not describe this shard on this node")
            await node.store.commit_small(put.shard, manifest, put.index)
        except MedshardError as error:
            return error
        return None

    return web.Response(body=pack_outcomes(await asyncio.gather(*map(one, puts))), content_type=body_type)


# -- out


async def head_shard(request: web.Request) -> web.Response:
    """Whether a shard is here, and its root."""
    node, (file_id, index) = request.app[node_key], shard_id(request)
    shard = node.store.shard_at(file_id, index)
    return web.Response(status=204, headers={root_header: shard.root.hex()})


async def get_shard(request: web.Request) -> web.StreamResponse:
    """Cells of one shard, after the digests or Merkle paths that check them."""
    node, (file_id, index) = request.app[node_key], shard_id(request)
    await request.app[gate_key].admit(caller(request).key, request.headers, (file_id,))
    shard = node.store.shard_at(file_id, index)
    cells = _span(request.query.get("cells", ""), shard)
    # A long shard's paths need all of its digests hashed: that must not stop the node's other work.
    make = functools.partial(_head, request.query.get("proof", "digests"), shard, cells)
    head = (await asyncio.to_thread(make) if shard.cells > thread_cells_least else make()).to_bytes()
    prefix = len(head).to_bytes(4, "big") + head
    start = cells.start * shard.cell_size
    end = min(cells.stop * shard.cell_size, shard.size)
    if end - start <= block_bytes:
        return web.Response(body=prefix + await node.store.fetch(shard, start, end - start), content_type=body_type)
    with node.traffic.body(), node.store.open(shard) as file:  # before the answer's head: a shard that is gone is an error
        response = web.StreamResponse(headers={"Content-Length": str(len(prefix) + end - start), "Content-Type": body_type})
        await response.prepare(request)
        await response.write(prefix)
        await _send(request, response, file, range(start, end), node.config.limits.body_stall_s)
    return response


async def _send(request: web.Request, response: web.StreamResponse, file: StoredFile, span: range, stall_s: float) -> None:
    """The bytes of a shard's file. An answer that was begun and cannot be ended breaks off."""
    connection = request.transport
    try:
        if isinstance(connection, Connection):
            _widen(connection)
            await connection.send(len(span), lambda at, room: file.read_into(span.start + at, room), stall_s)
            return
        for offset in range(span.start, span.stop, block_bytes):
            block = bytearray(min(block_bytes, span.stop - offset))
            await asyncio.to_thread(file.read_into, offset, memoryview(block))
            await response.write(block)
    except (Gone, Stalled, Damaged):
        if connection is not None:
            connection.abort()


async def get_manifest(request: web.Request) -> web.Response:
    """A manifest by file id."""
    data = request.app[node_key].store.manifest(file_id_from_hex(request.match_info["file"]))
    return web.Response(body=data, content_type=body_type)


async def read_files(request: web.Request) -> web.Response:
    """Whole small shards of many files."""
    node, gate = request.app[node_key], request.app[gate_key]
    body = await read_body(request, bundle_bytes_max)
    return web.Response(body=await small_shards(node, gate, caller(request), request.headers, body), content_type=body_type)


async def small_shards(node: Node, gate: Gate, who: Peer, headers: Mapping[str, str], body: bytes) -> bytes:
    """The same, however it was asked for."""
    answers: list[bytes | None] = []
    room = bundle_bytes_max
    wanted = unpack_small_reads(body)
    await gate.admit(who.key, headers, [file_id for file_id, _ in wanted])
    for file_id, index in wanted:
        try:
            shard = node.store.shard_at(file_id, index)
            data = await node.store.fetch(shard, 0, shard.size) if shard.size <= room else None
        except MedshardError:  # absent or damaged: the others of this answer are neither
            data = None
        room -= len(data or b"")
        answers.append(data)
    return pack_shards(answers)


async def lookup(request: web.Request) -> web.Response:
    """Manifests by lookup tag, with the proof of their registration."""
    node = request.app[node_key]
    files: dict[FileId, Found] = {}
    room = bundle_bytes_max
    answers: list[list[FileId]] = []
    for tag in unpack_lookup(await read_body(request, bundle_bytes_max)):
        answers.append([])
        for file_id in node.store.files_of(tag)[:lookup_files_max]:
            if file_id not in files:
                try:
                    manifest = node.store.manifest(file_id)
                except (Absent, Damaged):  # a disk's fault here costs this file alone, and others hold its manifest too
                    continue
                room -= len(manifest)
                if room < 0:  # the client asks again for what is not in this answer
                    break
                inclusion = node.ledger.inclusion_of(file_id)
                files[file_id] = Found(manifest, None if inclusion is None else inclusion.to_value())
            answers[-1].append(file_id)
    return web.Response(body=pack_found(files, answers), content_type=body_type)


async def check_shard(request: web.Request) -> web.Response:
    """Re-read and re-hash the shard on this node's disk."""
    node, (file_id, index) = request.app[node_key], shard_id(request)
    shard = node.store.shard_at(file_id, index)
    bad = await asyncio.to_thread(node.store.bad_cells, shard)
    return web.Response(body=pack_check(bad), content_type=body_type)


async def status(request: web.Request) -> web.Response:
    """What an operator wants to know, as JSON."""
    node = request.app[node_key]
    shards, manifests = node.store.counts()
    return web.Response(
        text=json.dumps(
            {
                "node": node.id.hex(),
                "shards": shards,
                "manifests": manifests,
                "used_bytes": node.store.used,
                "capacity_bytes": node.config.capacity_bytes,
                "free_bytes": node.store.free_bytes(),
                "ledger": node.ledger.status(),
                "watch": watch.status() if (watch := request.app.get(watch_key)) else None,
                **{name: tell() for name, tell in request.app[sections_key].items()},
            }
        ),
        content_type="application/json",
    )


# -- parts


async def read_body(request: web.Request, bytes_max: int) -> bytes:
    """A whole small body, counted as it comes: ``client_max_size`` does not bound it. Raises TooLarge."""
    check_size(request.content_length or 0, bytes_max, "a body")
    if request.content.is_eof():  # all of it came with the head
        data = request.content.read_nowait()
        check_size(len(data), bytes_max, "a body")
        return data
    chunks: list[bytes] = []
    total = 0
    with _Watch(request, request.app[node_key].config.limits.body_stall_s) as watch:
        while chunk := await watch.next_chunk():
            total += len(chunk)
            check_size(total, bytes_max, "a body")
            chunks.append(chunk)
    return b"".join(chunks)


async def _receive_aside(connection: Connection, incoming: Incoming, stall_s: float) -> None:
    try:
        await connection.receive(lambda block: incoming.write([block]), stall_s)
    except Gone:
        raise Malformed("the connection ended before the whole body had come") from None
    except Stalled:
        connection.abort()
        raise web.HTTPRequestTimeout(text=f"no byte came for {stall_s:g} s") from None


async def _receive(request: web.Request, incoming: Incoming, stall_s: float) -> None:
    pending: list[bytes] = []
    held = 0
    loop = asyncio.get_running_loop()
    with _Watch(request, stall_s) as watch:
        while chunk := await watch.next_chunk():
            pending.append(chunk)
            held += len(chunk)
            if held < block_bytes:
                continue
            await loop.run_in_executor(None, incoming.write, pending)
            pending, held = [], 0
    if incoming.temporary is None:
        incoming.write(pending)
    elif pending:
        await loop.run_in_executor(None, incoming.write, pending)


class _Watch:
    """Cuts a body that stands still. One timer for the whole body: one for each chunk would cost more than the chunk."""

    def __init__(self, request: web.Request, stall_s: float) -> None:
        self._request = request
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._moved_at = self._loop.time()
        self._timer = self._loop.call_later(stall_s, self._look)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    async def next_chunk(self) -> bytes:
        """The next bytes, empty at the end. Raises HTTPRequestTimeout when none came for ``stall_s``."""
        try:
            chunk = await self._request.content.readany()
        except TimeoutError:
            self._request.protocol.force_close()
            raise web.HTTPRequestTimeout(text=f"no byte came for {self._stall_s:g} s") from None
        self._moved_at = self._loop.time()
        return chunk

    def _look(self) -> None:
        left = self._moved_at + self._stall_s - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self._request.content.set_exception(TimeoutError())  # wakes whoever waits for the next chunk


def _widen(connection: Connection) -> None:
    """Let the kernel take a whole block at once: a fifth of the CPU of a large answer is waking up to give it the rest.

    Where it does not allow so much (net.core.wmem_max), asking would only stop it from widening by itself.
    """
    if _kernel_allows() >= send_buffer_bytes:
        connection.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)


@functools.cache
def _kernel_allows() -> int:
    try:
        return int(Path("/proc/sys/net/core/wmem_max").read_text())
    except (OSError, ValueError):
        return 0  # not Linux


def _head(proof: str, shard: Shard, cells: range) -> SpanHead:
    if proof == "digests":
        return SpanHead(cells.start, len(cells), b"".join(shard.digests), ())
    if proof == "none":
        return SpanHead(cells.start, len(cells), b"", ())
    if proof != "paths" or len(cells) > paths_cells_max:
        raise Malformed(f"proof is digests, none, or paths for at most {paths_cells_max} cells")
    digest = digests["blake3"]
    leaves = [merkle.leaf_hash(cell, digest) for cell in shard.digests]
    return SpanHead(cells.start, len(cells), b"", tuple(map(tuple, merkle.inclusion_paths(leaves, cells, digest))))


def _span(text: str, shard: Shard) -> range:
    if not text:
        return range(shard.cells)
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and len(text) < 24):
        raise Malformed("cells are asked for as FIRST-LAST")
    cells = range(int(first), int(last) + 1)
    if not cells or cells.stop > shard.cells:
        raise Malformed(f"the shard has cells 0 to {shard.cells - 1}")
    return cells


def shard_id(request: web.Request) -> tuple[FileId, int]:
    """The file and index that a path names. Raises Malformed."""
    index = request.match_info["index"]
    if not (index.isdecimal() and len(index) <= 3 and int(index) < code_n_max):
        raise Malformed("a shard's index is a number below 255")
    return file_id_from_hex(request.match_info["file"]), int(index)


def _cell_size(request: web.Request, size: int) -> int:
    text = request.headers.get(cell_size_header, "")
    if not (text.isdecimal() and len(text) <= 8 and 1 <= int(text) <= cell_bytes_max) or size < 1:
        raise Malformed(f"{cell_size_header} is a number from 1 to {cell_bytes_max}, and a shard is not empty")
    check_cells(cells_in(size, int(text)), int(text))
    return int(text)


def _stored(root: bytes, created: bool) -> web.Response:
    return web.Response(status=201 if created else 200, body=pack_stored(root, created), content_type=body_type)
