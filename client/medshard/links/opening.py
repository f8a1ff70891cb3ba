"""Opening a link without a vault: ask its manifest, fetch what it lists, open it with the link's key.

Law: whoever serves a link is not believed: what does not open with the link's key is Damaged. Names from outside never leave the folder.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from medshard.durable import write_durably
from medshard.links import jwe
from medshard.links.model import Link, documents_max
from medshard_protocol.errors import Absent, Conflict, Malformed, Refused, Unavailable

timeout_s: Final = 60.0
manifest_bytes_max: Final = 4 * 1024 * 1024
document_bytes_max: Final = 768 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Fetched:
    """One document of a link."""

    path: Path
    size: int
    media_type: str


async def fetch(
    link: Link, folder: Path, passcode: str | None = None, *, recipient: str = "medshard", overwrite: bool = False
) -> list[Fetched]:
    """Write every document of a link into ``folder``. Raises Absent for one that has ended, Refused for a wrong passcode (its hint says how
    many tries are left), Conflict for a name that is taken, Unavailable, Malformed or Damaged.
    """
    if link.until and time.time() >= link.until:
        raise Absent("this link has expired", hint="ask whoever gave it to you for another")
    if link.passcode and passcode is None:
        raise Refused("this link needs a passcode", hint="set MEDSHARD_LINK_PASSCODE, or run the command on a terminal")
    try:
        async with asyncio.timeout(None), aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session:
            listed = await _manifest(session, link, passcode, recipient)
            folder.mkdir(parents=True, exist_ok=True)
            return [each async for each in _documents(session, link, listed, folder, overwrite)]
    except (aiohttp.ClientError, ssl.SSLError, TimeoutError) as error:
        raise Unavailable(f"{urlsplit(link.url).netloc}: {error or 'no answer'}", hint="is this machine online? try again later") from None


async def _manifest(session: aiohttp.ClientSession, link: Link, passcode: str | None, recipient: str) -> list[dict[str, Any]]:
    asked = {"recipient": recipient} | ({"passcode": passcode} if passcode is not None else {})
    async with session.post(link.url, json=asked, allow_redirects=False) as response:
        data = await _bounded(response, manifest_bytes_max)
        if response.status == 401:
            raise Refused("that is not the link's passcode", hint=_tries(_json(data).get("remainingAttempts")))
        if response.status == 404:
            why = _json(data).get("error", "")
            raise Absent(str(why)[:200] or "this link opens nothing any more", hint="ask whoever gave it to you for another")
        if response.status != 200:
            raise Unavailable(f"{urlsplit(link.url).netloc} answered {response.status}", hint="try again later")
    listed = _json(data).get("files")
    if not isinstance(listed, list) or len(listed) > documents_max or not all(isinstance(each, dict) for each in listed):
        raise Malformed("what serves the link gives no list of documents")
    return listed


async def _documents(
    session: aiohttp.ClientSession, link: Link, listed: list[dict[str, Any]], folder: Path, overwrite: bool
) -> AsyncIterator[Fetched]:
    taken: set[str] = set()
    for number, each in enumerate(listed, 1):
        if isinstance(each.get("embedded"), str):
            data = each["embedded"].encode()
        elif isinstance(each.get("location"), str) and urlsplit(each["location"]).scheme in ("https", "http"):
            async with session.get(each["location"], allow_redirects=False) as response:
                data = await _bounded(response, document_bytes_max)
                if response.status != 200:
                    raise Unavailable(f"document {number} of the link: answered {response.status}", hint="open the link again")
        else:
            raise Malformed(f"document {number} of the link has no place")
        plain, media_type = await asyncio.to_thread(jwe.open_, link.key, data)
        name = _name(each.get("name"), number, media_type)
        while name in taken:
            name = f"{number}-{name}"
        taken.add(name)
        path = folder / name
        if path.exists() and not overwrite and path.read_bytes() != plain:
            raise Conflict(f"{path} exists already", hint="name another folder with -o, or say --force")
        await asyncio.to_thread(write_durably, path, plain)
        yield Fetched(path, len(plain), media_type)


def _name(told: object, number: int, media_type: str) -> str:
    """A plain file name, whatever was told."""
    name = re.sub(r"[\x00-\x1f\x7f/\\:]+", "_", told).strip(". ")[-200:] if isinstance(told, str) else ""
    endings = {"application/pdf": ".pdf", "application/dicom": ".dcm", "application/json": ".json"}
    return name or f"document-{number}{endings.get(media_type, '')}"


def _tries(left: object) -> str:
    """What to do after a wrong passcode, by what whoever serves the link says is left."""
    if not isinstance(left, int):
        return "compare it with what you were told"
    if left <= 0:
        return "that was the last try: the link is locked; ask whoever gave it to you for another"
    return f"{left} {'try is' if left == 1 else 'tries are'} left; then the link is locked"


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise Malformed("what serves the link gives no answer that could be read") from None
    return found if isinstance(found, dict) else {}


async def _bounded(response: aiohttp.ClientResponse, most: int) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > most:
            raise Malformed("a longer answer than there can be")
    return bytes(data)
