"""What only sends: a scanner or a drop folder that stores for a vault and can read nothing back, its own files included.

    await new(Home(folder), invitation, vault_key)
    async with opened(Home(folder)) as sender:
        report = await sender.put([Path("scan.dcm")])

Law: a sender's home holds a key to sign with and the vault's public key, and no key that opens anything stored. The keys that a put needs
besides are drawn for it, kept in memory and forgotten once it is done; the file key goes to the vault alone, as a sealed grant. Nodes
refuse a sender every read. A file is told as stored when its sealed key lies beside it. Format: docs/formats/sender.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medshard import enrolment
from medshard.durable import write_durably
from medshard.home import Home
from medshard.keys import VaultKeys
from medshard.model import Problem, Progress, PutReport, StoredFile
from medshard.packs import Plan, Unit, plan
from medshard.scratch import scratch_folder
from medshard.sealing import hkdf
from medshard.vault import OnProgress, Vault
from medshard_protocol import canonical
from medshard_protocol.errors import Absent, Malformed, Refused, Unavailable
from medshard_protocol.identity import public_key
from medshard_protocol.ids import Key, key_size
from medshard_protocol.sharing import hpke_public_size

magic: Final = "medshard/sender/v1"
file_bytes_max: Final = 4096
group_units_max: Final = 48  # as many as one GRANT entry names: what is cut off in the middle is sent again
group_bytes_max: Final = 256 * 2**20
settle_s: Final = 2.0  # a file in a watched folder that has not changed for so long is whole
again_s: Final = 15.0  # between tries while too few nodes are up

Seen: TypeAlias = tuple[int, int]  # size and time of the last change, in nanoseconds


@dataclass(frozen=True, slots=True)
class SenderKeys:
    """All that a sender has."""

    seed: bytes = field(repr=False)  # of its Ed25519 key
    vault: Key
    hpke_public: bytes  # the vault's; its owner's signature was checked

    def to_bytes(self) -> bytes:
        """The content of sender.key."""
        return canonical.encode([magic, self.seed, self.vault, self.hpke_public])

    @classmethod
    def from_bytes(cls, data: bytes) -> SenderKeys:
        """Parse. Raises Malformed."""
        f = canonical.Fields(canonical.decode(data, bytes_max=file_bytes_max, what="sender key"), count=4, what="sender key")
        if f.text(most=32) != magic:
            raise Malformed("sender key: a version this program does not know")
        return cls(f.bytes(exactly=32), Key(f.bytes(exactly=key_size)), f.bytes(exactly=hpke_public_size))

    @property
    def signing(self) -> Ed25519PrivateKey:
        """What it signs with."""
        return Ed25519PrivateKey.from_private_bytes(self.seed)

    @property
    def public(self) -> Key:
        """Its identity."""
        return public_key(self.signing)

    def derived(self, purpose: str) -> bytes:
        """A key for what lies on this machine before it is sent, and for what is remembered of it."""
        return hkdf(self.seed, b"", f"medshard/sender/v1/{purpose}".encode())

    def passing(self) -> VaultKeys:
        """Keys of a vault that is soon forgotten, in the sender's name."""
        return replace(VaultKeys.from_root(os.urandom(32)), signing=self.signing, public=self.public)


async def new(home: Home, code: str, vault: Key) -> SenderKeys:
    """Make a sender for ``vault`` with an invitation of its institution; run again, it goes on. Raises Refused where a vault lives."""
    if home.key_file.exists():
        raise Refused(f"{home.folder} holds a vault", hint="choose another --home for the sender")
    home.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if home.sender.exists():
        keys = SenderKeys.from_bytes(home.sender.read_bytes())
        if keys.vault != vault:
            raise Refused(f"{home.folder} sends for another vault", hint="choose another --home")
    else:
        keys = SenderKeys(os.urandom(32), vault, bytes(hpke_public_size))
        write_durably(home.sender, keys.to_bytes(), mode=0o600)
    write_durably(home.certificate, await enrolment.send_for(home, keys.signing, vault, code))
    with scratch_folder(home.folder) as place:
        async with Vault.opened(home, keys.passing(), place / "index.sqlite") as passing:
            keys = replace(keys, hpke_public=await passing.shares.sealing_card(vault))
    write_durably(home.sender, keys.to_bytes(), mode=0o600)
    return keys


@asynccontextmanager
async def opened(home: Home) -> AsyncIterator[Sender]:
    """The sender at ``home``. Raises Absent, or Malformed for files that are not whole."""
    try:
        keys = SenderKeys.from_bytes(home.sender.read_bytes())
    except FileNotFoundError:
        raise Absent(f"no sender at {home.folder}", hint="run `medshard sender new`") from None
    if not any(keys.hpke_public):
        raise Absent(f"the sender at {home.folder} is not finished", hint="run `medshard sender new` again, with the same invitation")
    with scratch_folder(home.folder) as place:
        async with Vault.opened(home, keys.passing(), place / "index.sqlite") as vault:

            @contextmanager
            def draw() -> Iterator[Vault]:
                with TemporaryDirectory(dir=place) as folder, vault.beside(keys.passing(), Path(folder, "index.sqlite")) as passing:
                    passing.shares.pin(keys.vault, keys.hpke_public)
                    yield passing

            with contextlib.closing(Sender(keys, draw)) as sender:
                yield sender


class Sender:
    """Of one open home. ``draw`` makes a vault with keys of its own over the connections that there are."""

    def __init__(self, keys: SenderKeys, draw: Callable[[], AbstractContextManager[Vault]]) -> None:
        self.keys = keys
        self._draw = draw
        self._begun: list[tuple[Vault, ExitStack]] = []  # with what they were cut off in: it goes on under the keys that it began with

    def close(self) -> None:
        """Forget what was begun."""
        for _, stack in self._begun:
            stack.close()
        self._begun.clear()

    async def store(self, planned: Plan, progress: OnProgress | None = None) -> PutReport:
        """As ``put``, where the caller has decided what is sealed together. For several at a time."""
        return await self._send(planned, progress)

    async def put(
        self,
        paths: Sequence[Path],
        *,
        tags: Mapping[str, str] | None = None,
        policy_number: str | None = None,
        progress: OnProgress | None = None,
    ) -> PutReport:
        """As ``Vault.put``, for the vault that this sends for. What was told as stored is its own and readable there."""
        attributes = {f"tag:{key}": value for key, value in (tags or {}).items()}
        if policy_number is not None:
            attributes["policy-number"] = policy_number
        return await self._send(plan([Path(path) for path in paths], attributes), progress)

    async def watch(self, folder: Path, tell: Callable[[PutReport], None], *, keep: Path | None = None) -> None:
        """Send what is put into a folder, for ever. A file leaves it once it is stored: for good, or for the same place below ``keep``.

        A file counts as whole when it has not changed for ``settle_s``. One that cannot be stored stays, and is tried again when it
        changes; while too few nodes are up, all are.
        """
        before: dict[Path, Seen] = {}
        left: dict[Path, Seen] = {}
        while True:
            now = await asyncio.to_thread(_look, folder)
            whole = {path for path, seen in now.items() if before.get(path) == seen and left.get(path) != seen}
            before, pause_s = now, settle_s
            if whole:
                try:
                    report = await self._send(await asyncio.to_thread(plan, [folder], {}, only=whole))
                except Unavailable as error:
                    report = PutReport((), tuple(Problem(path, str(error), stored=False) for path in sorted(whole)))
                    pause_s = again_s
                else:
                    left = {problem.path: now[problem.path] for problem in report.problems if not problem.stored and problem.path in now}
                for stored in report.stored:
                    await asyncio.to_thread(_leave, stored.path, now[stored.path], folder, keep)
                tell(report)
            await asyncio.sleep(pause_s)

    async def _send(self, planned: Plan, progress: OnProgress | None = None) -> PutReport:
        stored: list[StoredFile] = []
        problems: list[Problem] = list(planned.problems)
        total, before = sum(unit.size for unit in planned.units), 0
        for group in _groups(planned.units):
            more = _shifted(progress, before, total) if progress else None
            with self._passing() as vault:
                report = await vault.store(Plan(tuple(group), ()), more)
                problems += report.problems
                if report.stored:
                    await vault.shares.share_objects([each.file_id for each in report.stored], self.keys.vault)
                    stored += report.stored
            before += sum(unit.size for unit in group)
        return PutReport(tuple(stored), tuple(problems))

    @contextmanager
    def _passing(self) -> Iterator[Vault]:
        """A vault to put with: one that was cut off in its work, or else a new one. It is forgotten when it has done its work."""
        vault, stack = self._begun.pop() if self._begun else self._drawn()
        try:
            yield vault
        except BaseException:
            self._begun.append((vault, stack))
            raise
        stack.close()

    def _drawn(self) -> tuple[Vault, ExitStack]:
        with ExitStack() as stack:
            return stack.enter_context(self._draw()), stack.pop_all()


def _look(folder: Path) -> dict[Path, Seen]:
    """The files below a folder but for hidden ones, each with size and time of its last change."""
    found: dict[Path, Seen] = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(root, name) for name in names if not name.startswith(".")):
            with contextlib.suppress(OSError):  # it has just gone
                if path.is_file() and not path.is_symlink():
                    found[path] = path.stat().st_size, path.stat().st_mtime_ns
    return found


def _leave(path: Path, seen: Seen, folder: Path, keep: Path | None) -> None:
    """Take a file that was stored out of its folder, unless it has changed since. Raises OSError."""
    if (path.stat().st_size, path.stat().st_mtime_ns) != seen:
        return
    if keep is None:
        path.unlink()
        return
    target = keep / path.relative_to(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, target)


def _shifted(progress: OnProgress, before: int, total: int) -> OnProgress:
    return lambda p: progress(Progress(before + p.done_bytes, total, p.phase, p.path))


def _groups(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    group: list[Unit] = []
    size = 0
    for unit in units:
        if group and (len(group) == group_units_max or size + unit.size > group_bytes_max):
            yield group
            group, size = [], 0
        group.append(unit)
        size += unit.size
    if group:
        yield group
