"""What the node answers over HTTP, as an OpenAPI 3.1 document at GET /v1/openapi.json, made from one table.

Law: the table has a row for each route of the application and no other; a test compares the two, so neither can be forgotten. The bodies
are canonical msgpack, which OpenAPI cannot describe: docs/formats/ is the reference, and each row says which page.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from aiohttp import web

from medshard_protocol.messages import body_type, cell_size_header, errors_by_code

path: Final = "/v1/openapi.json"
json_type: Final = "application/json"
text_type: Final = "text/plain"
bytes_type: Final = "application/octet-stream"

_hex64: Final = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_place: Final = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
_schemas: Final[dict[str, dict[str, Any]]] = {
    "file": _hex64,
    "key": _hex64,
    "grant": _hex64,
    "sha256": _hex64,
    "index": {"type": "integer", "minimum": 0, "maximum": 254},
    "name": {"type": "string", "pattern": "^(entries|[0-9]{1,2})/([x0-9/]+)(\\.p/[0-9]{1,3})?$"},
    "of": _hex64,
    "number": {"type": "integer", "minimum": 0, "maximum": 15},
    "path": {"type": "string", "pattern": "^(checkpoint|rosters|genesis\\.medshard|tile/[a-z0-9/.]+)$"},
    "start": _place,
    "end": _place,
    "after": _place,
    "cells": {"type": "string", "pattern": "^[0-9]{1,8}-[0-9]{1,8}$"},
    "proof": {"type": "string", "enum": ["digests", "paths", "none"]},
    "full": {"type": "integer", "enum": [1]},
    "roster": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
    cell_size_header: {"type": "integer", "minimum": 1, "maximum": 2**24},
    "Medshard-Access": {"type": "string", "pattern": "^[0-9]{1,19}(,[0-9]{1,19}){0,63}$"},
    "Medshard-Checkpoint": {"type": "string", "pattern": "^[A-Za-z0-9_-]{4,8000}$"},
    "Medshard-Emergency": {"type": "string", "pattern": "^[A-Za-z0-9_-]{4,4096}$"},
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One route. ``takes`` and ``gives`` are media types, "" for no body; ``good`` are the statuses that are no error."""

    method: str
    path: str
    summary: str
    page: str = "wire"
    takes: str = ""
    gives: str = body_type
    good: tuple[int, ...] = (200,)
    query: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    open: bool = False  # answers without a client certificate


_shard: Final = "/v1/shards/{file}/{index}"
_rights: Final = ("Medshard-Access", "Medshard-Checkpoint", "Medshard-Emergency")
_kept: Final = (200, 201)

operations: Final = (
    Operation("GET", "/healthz", "Whether the process answers", gives=text_type, open=True),
    Operation("GET", path, "This document", gives=json_type),
    Operation("GET", "/v1/genesis", "The genesis file", "roster", open=True),
    Operation("POST", "/v1/join", "A certificate for an invitation", "invite", body_type, open=True),
    Operation("POST", "/v1/rotate", "A certificate for a key that succeeds another", "invite", body_type, open=True),
    Operation("POST", "/v1/senders", "A certificate for a key that only sends", "invite", body_type, open=True),
    Operation("POST", "/v1/certificate", "A certificate again, for a key that is enrolled", "invite", body_type, open=True),
    Operation("GET", "/v1/status", "What an operator wants to know", gives=json_type),
    # shards and manifests
    Operation("PUT", _shard, "Store a shard, streamed", takes=bytes_type, good=_kept, headers=(cell_size_header,)),
    Operation("GET", _shard, "Cells of a shard", query=("cells", "proof"), headers=_rights),
    Operation("HEAD", _shard, "Whether a shard is here", gives="", good=(204,)),
    Operation("POST", _shard + "/check", "Read a shard again and compare"),
    Operation("PUT", "/v1/manifests/{file}", "Keep a manifest beside its shard", takes=body_type, good=_kept),
    Operation("GET", "/v1/manifests/{file}", "A manifest", "manifest"),
    Operation("POST", "/v1/files", "Store many small shards with their manifests", takes=body_type),
    Operation("POST", "/v1/read", "Whole small shards of many files", takes=body_type, headers=_rights),
    Operation("POST", "/v1/lookup", "Manifests by lookup tag", takes=body_type),
    # rights
    Operation("POST", "/v1/access", "Show the proof of an ACCESS entry", "access", body_type),
    Operation("PUT", "/v1/keys", "Publish the key to seal grants to", "access", body_type, good=(*_kept, 204)),
    Operation("GET", "/v1/keys/{key}", "The key to seal grants to", "access"),
    Operation("PUT", "/v1/grants/{file}", "Keep the sealed key of a grant", "access", body_type, good=(*_kept, 204)),
    Operation("DELETE", "/v1/grants/{file}/{grant}", "Destroy the sealed key of a grant", "access", good=(200, 204)),
    Operation("GET", "/v1/grants", "What is granted to the caller", "access", query=("after",)),
    Operation("GET", "/v1/ledger/proposals", "Holds and releases that wait for a second person", "access", query=("after",)),
    Operation("GET", "/v1/endings/{file}", "A receipt for what was destroyed of a file", "ending"),
    # repair
    Operation("GET", "/v1/moves/{file}", "Which shards have moved, and to whom", "repair"),
    Operation("POST", "/v1/repair/{file}/{index}/seed", "An order to help in a repair", "repair", body_type),
    Operation("POST", "/v1/repair/{file}/{index}/keys", "The keys of all helpers of an order", "repair", body_type, good=(204,)),
    Operation("POST", "/v1/repair/{file}/{index}/sum", "The sums of an order, to the next in the line", "repair", body_type, bytes_type),
    Operation("POST", "/v1/repair/{file}", "Begin a repair; a hint, from another node", "repair", body_type, json_type, good=(200, 202)),
    Operation("GET", "/v1/repair/{file}", "How a repair goes, for the node's own operator", "repair", gives=json_type),
    Operation("DELETE", "/v1/repair/{file}", "Give a repair up, for the node's own operator", "repair", gives="", good=(204,)),
    Operation("GET", "/v1/repair", "What is to be repaired, for the node's own operator", "repair", gives=json_type),
    Operation("POST", "/v1/handover/{file}/{index}", "Offer a shard to the next node", "repair", gives="", good=(202, 204)),
    Operation("GET", "/v1/handover/{file}/{index}", "Fetch a shard that was offered and taken over", "repair", gives=bytes_type),
    Operation("GET", "/v1/sealed/{file}", "The sealed keys of a file's grants, for a node that took a shard over", "repair"),
    Operation("GET", "/v1/drain", "How far a node is with handing everything over, for its operator", "repair", gives=json_type),
    Operation("POST", "/v1/drain", "Hand everything over, or stop, for the node's own operator", "repair", body_type, json_type),
    # audits
    Operation("POST", "/v1/audit/{file}/{index}", "What this node says of a cell, to a node that audits", "audit", body_type),
    Operation("POST", "/v1/inventory", "Which of some shards are here, to another node", "audit", body_type),
    Operation("GET", "/v1/audit/{file}", "What this node's audits found of a file, signed", "audit"),
    Operation("POST", "/v1/audit", "Audit at once, for the node's own operator", "audit", body_type, json_type),
    Operation("GET", "/v1/audit", "How audits go, for the node's own operator", "audit", gives=json_type),
    # rosters
    Operation("GET", "/v1/rosters", "The chain of rosters", "roster", query=("after", "of"), open=True),
    Operation("GET", "/v1/successor", "What came after a log that has ended", "roster", query=("of",), open=True),
    Operation("GET", "/v1/rosters/votes", "Who approved what", "roster", gives=json_type),
    Operation("GET", "/v1/rosters/{sha256}", "A roster document", "roster"),
    Operation("PUT", "/v1/rosters", "Hand in a roster document, between nodes", "roster", body_type, good=_kept),
    # the log
    Operation("POST", "/v1/ledger/append", "Append entries and wait for the quorum", "ledger", body_type),
    Operation("GET", "/v1/ledger/registrations/{file}", "The proof that a file is registered", "ledger"),
    Operation("GET", "/v1/ledger/places/{file}", "Where stands what a proof for outsiders needs", "ledger"),
    Operation("GET", "/v1/ledger/history/{file}", "Every entry that names a file", "access", query=("after",)),
    Operation("GET", "/v1/ledger/ended", "Which files of the caller were retired or erased", "access", query=("after",)),
    Operation("POST", "/v1/ledger/times", "When entries were published", "access", body_type),
    Operation("GET", "/v1/ledger/identities", "All keys that institutions vouch for", "access", gives=json_type, query=("after",)),
    Operation("GET", "/v1/ledger/heads/{index}", "The oldest published head kept with this entry", "proof"),
    Operation("GET", "/v1/ledger/identities/{key}", "Who vouches for a key", "access"),
    Operation("GET", "/v1/ledger/passings/{key}", "Whose the files of a key are now, and by which entries", "access"),
    Operation("GET", "/log/checkpoint", "The newest published checkpoint", "checkpoint", gives=text_type, query=("full", "roster")),
    Operation("GET", "/log/tile/{name}", "A tile or entry bundle", "ledger", gives=bytes_type),
    Operation("GET", "/before/{number}/log/{path}", "A file of an earlier log, as it ended", "ledger", gives=bytes_type),
    # between the ledger's nodes
    Operation("POST", "/v1/ledger/mirror", "A sequencer's push", "ledger", body_type),
    Operation("POST", "/v1/ledger/hurry", "Push to the node that asks what it lacks, at once", "ledger", gives="", good=(204,)),
    Operation("GET", "/v1/ledger/ask", "How this node stands to the log", "ledger"),
    Operation("POST", "/v1/ledger/promise", "Follow a sequencer from now on", "ledger", body_type),
    Operation("POST", "/v1/ledger/forward", "Entries for the sequencer", "ledger", body_type),
    Operation("POST", "/v1/ledger/cosign", "Cosign a published checkpoint with both kinds of key", "ledger", text_type),
    Operation("GET", "/v1/ledger/entries/{start}-{end}", "Entries as this node has them", "ledger"),
)


@lru_cache
def document() -> dict[str, Any]:
    """The OpenAPI document."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "medshard storage node", "version": "1", "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": paths,
        "components": {"securitySchemes": {"certificate": {"type": "mutualTLS"}}},
    }


async def get_document(_request: web.Request) -> web.Response:
    """Answer with the document."""
    return web.Response(text=json.dumps(document()), content_type=json_type)


def _described(operation: Operation) -> dict[str, Any]:
    bytes_ = {"schema": {"type": "string", "format": "binary"}}
    told: dict[str, Any] = {
        "summary": operation.summary,
        "description": f"Bodies: docs/formats/{operation.page}.md",
        "parameters": [_parameter(name, "path") for name in _names(operation.path)]
        + [_parameter(name, "query") for name in operation.query]
        + [_parameter(name, "header") for name in operation.headers],
        "security": [] if operation.open else [{"certificate": []}],
        "responses": {},
    }
    if operation.takes:
        told["requestBody"] = {"required": True, "content": {operation.takes: bytes_}}
    for status in operation.good:
        content = {"content": {operation.gives: bytes_}} if operation.gives and status != 204 else {}
        told["responses"][str(status)] = {"description": "done", **content}
    for code, (status, _) in errors_by_code.items():
        told["responses"][str(status)] = {"description": code, "content": {body_type: bytes_}}
    for status, meaning in ((405, "no such method"), (408, "the body stood still"), (415, "Content-Encoding")):
        told["responses"][str(status)] = {"description": meaning, "content": {text_type: bytes_}}
    return told


def _names(path: str) -> list[str]:
    return [part.partition("}")[0] for part in path.split("{")[1:]]


def _parameter(name: str, where: str) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path" or name == cell_size_header, "schema": _schemas[name]}
