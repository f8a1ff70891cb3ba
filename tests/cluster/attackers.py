"""Nodes that misbehave: the real program with its answers and pushes bent, as a file in its home tells it while it runs.

    python attackers.py HOME        runs the node of that home; HOME/misbehave.json is read again for each request and each push

    {"answers": [{"path": REGEX, "do": NAME, …}], "pushes": [{"to": NODE NAME, "do": NAME}]}

An empty or missing file makes an honest node, so one process serves many attacks. Whatever a rule does not name stays as it is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp import web

from medshard_protocol import merkle
from medshard_protocol.canonical import decode, encode
from medshard_protocol.checkpoint import Checkpoint, Note, log_verifier
from medshard_protocol.entries import Entry
from medshard_protocol.errors import MedshardError, Unavailable
from medshard_protocol.ids import NodeId
from medshard_protocol.merkle import sha256
from medshard_protocol.messages import pack_error
from medshard_protocol.proofs import unpack_append

Rule = dict[str, Any]
rules_name = "misbehave.json"


class Rules:
    """What this node is to do wrong at the moment."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def of(self, kind: str) -> list[Rule]:
        try:
            return json.loads((self.home / rules_name).read_text()).get(kind, [])
        except FileNotFoundError:
            return []


# -- answers: each takes rule, request body, answer body; gives the answer to send in its place


def flip(rule: Rule, asked: bytes, answer: bytes) -> bytes:
    """Flip one bit."""
    at = rule.get("at", 10)
    return answer[:at] + bytes([answer[at] ^ 1]) + answer[at + 1 :]


def forge(rule: Rule, asked: bytes, answer: bytes) -> bytes:
    """Change a hash in every proof."""

    def bent(value: Any) -> Any:
        if isinstance(value, list):
            if value and all(isinstance(item, bytes) and len(item) == 32 for item in value):
                return [bytes(32), *value[1:]]
            return [bent(item) for item in value]
        return value

    return encode(bent(decode(answer, bytes_max=len(answer), what="answer")))


def other_note(rule: Rule, asked: bytes, answer: bytes) -> bytes:
    """Put another note into an answer to append."""
    value = decode(answer, bytes_max=len(answer), what="answer")
    return encode([value[0], Path(rule["file"]).read_bytes(), *value[2:]])


def unavailable(rule: Rule, asked: bytes, answer: bytes) -> bytes:
    """Say that it does not work at the moment."""
    raise Unavailable("try again later")


def refuse_author(rule: Rule, asked: bytes, answer: bytes) -> bytes:
    """Turn one author's entries away, and nobody else's. Needs ``"before": true``."""
    if any(Entry.from_bytes(data).author.hex() == rule["author"] for data in unpack_append(asked)):
        raise Unavailable("too much to do")
    return answer


answers: dict[str, Callable[[Rule, bytes, bytes], bytes]] = {
    "flip": flip,
    "forge": forge,
    "other-note": other_note,
    "unavailable": unavailable,
    "refuse-author": refuse_author,
}


def misbehaving(rules: Rules) -> Any:
    @web.middleware
    async def middleware(request: web.Request, handler: Callable[..., Any]) -> web.StreamResponse:
        rule = next((rule for rule in rules.of("answers") if re.search(rule["path"], request.path)), None)
        if rule is None or request.path == "/v1/ledger/mirror":
            return await handler(request)
        if rule["do"] == "folder":
            file = Path(rule["folder"]) / request.path.removeprefix("/log/")
            return web.Response(body=file.read_bytes()) if file.exists() else await handler(request)
        try:
            if rule.get("before"):
                asked = await request.read() if request.can_read_body else b""
                request.content.unread_data(asked)
                answers[rule["do"]](rule, asked, b"")
                return await handler(request)
            response = await handler(request)
            if response.status != 200:
                return response
            body = answers[rule["do"]](rule, b"", response.body)
        except MedshardError as error:
            status, body = pack_error(error)
            return web.Response(status=status, body=body)
        return web.Response(body=body, content_type=response.content_type)

    return middleware


# -- pushes


class Sequencer:
    """Bends what the sequencer tells single mirrors."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.journal: Any = None

    def install(self) -> None:
        from storenode.genesis import load_genesis
        from storenode.identity import NodeKeys
        from storenode.ledger import channel, journal, wire

        roster, keys = load_genesis(self.rules.home), NodeKeys.load(self.rules.home)
        ask, made = channel.Channel.ask, journal.Journal.__init__

        def noticing(this: Any, *values: Any, **more: Any) -> None:
            made(this, *values, **more)
            self.journal = this

        async def bent(this: Any, body: bytes, timeout_s: float) -> tuple[int, bytes]:
            name = roster.node(NodeId(this._node)).name
            rule = next((rule for rule in self.rules.of("pushes") if rule["to"] == name), None)
            if rule is None:
                return await ask(this, body, timeout_s)
            if rule["do"] == "drop":
                raise Unavailable("lost on the way")
            return await ask(this, self.forked(wire.Push.from_bytes(body), roster, keys), timeout_s)

        journal.Journal.__init__ = noticing  # type: ignore[method-assign]
        channel.Channel.ask = bent  # type: ignore[method-assign]

    def forked(self, push: Any, roster: Any, keys: Any) -> bytes:
        """Another history: the last entry is one that never was."""
        if not push.entries:
            return push.to_bytes()  # type: ignore[no-any-return]
        entries = (*push.entries[:-1], b"an entry that never was")
        leaves = [merkle.leaf_hash(entry, sha256) for entry in (*self.journal.entries(0, push.old_size), *entries)]
        text = Checkpoint(roster.origin, len(leaves), merkle.root(leaves, sha256)).text()
        signature = log_verifier(roster, keys.node_id).sign(text, keys.log.sign)
        return replace(push, entries=entries, signed=Note(text, (signature,)).to_bytes()).to_bytes()  # type: ignore[no-any-return]


def main(home: Path) -> int:
    """Run the node, bent."""
    from storenode import app
    from storenode.cli import main as storenode

    rules = Rules(home)
    build = app.build

    def bent_build(*values: Any, **more: Any) -> web.Application:
        built = build(*values, **more)
        built.middlewares.append(misbehaving(rules))
        return built

    app.build = bent_build
    app.quick_ways = lambda *parts: {}  # every answer passes what bends it
    Sequencer(rules).install()
    return storenode(["--home", str(home), "run"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
