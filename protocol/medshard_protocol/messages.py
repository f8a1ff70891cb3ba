"""What client and node say to each other: paths, limits and bodies. Every body is canonical; every parser raises Malformed only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from medshard_protocol import canonical
from medshard_protocol.canonical import Fields, Value
from medshard_protocol.errors import (
    Absent,
    Conflict,
    Damaged,
    Full,
    Malformed,
    MedshardError,
    Refused,
    TooLarge,
    Unavailable,
)
from medshard_protocol.ids import FileId, Tag
from medshard_protocol.manifest import manifest_bytes_max
from medshard_protocol.shards import cells_max, code_n_max

version: Final = 1
bundle_bytes_max: Final = 32 * 1024 * 1024  # small shards and manifests together in one request or answer; bounds a node's memory
bundle_items_max: Final = 1024
lookup_tags_max: Final = 256
lookup_files_max: Final = 16
span_head_bytes_max: Final = cells_max * 32 + 64 * 1024  # all digests of the longest shard; a reader knows the exact count beforehand
error_chars_max: Final = 1000  # of a message, and of a hint
error_bytes_max: Final = 16 * 1024  # both of them in the longest UTF-8 fit

cell_size_header: Final = "Medshard-Cell-Size"
root_header: Final = "Medshard-Root"
body_type: Final = "application/vnd.medshard"

# One table for both directions: the node picks the status by the error's class, the client raises the class by its code.
errors_by_code: Final[dict[str, tuple[int, type[MedshardError]]]] = {
    "malformed": (400, Malformed),
    "refused": (403, Refused),
    "absent": (404, Absent),
    "conflict": (409, Conflict),
    "too-large": (413, TooLarge),
    "damaged": (422, Damaged),
    "unavailable": (503, Unavailable),
    "full": (507, Full),
}


def shard_path(file_id: FileId, index: int) -> str:
    """Where a shard lives on its node."""
    return f"/v1/shards/{file_id.hex()}/{index}"


def manifest_path(file_id: FileId) -> str:
    """Where a manifest lives on any holder."""
    return f"/v1/manifests/{file_id.hex()}"


def pack_error(error: MedshardError) -> tuple[int, bytes]:
    """(HTTP status, body) for an error."""
    for code, (status, kind) in errors_by_code.items():
        if isinstance(error, kind):
            return status, canonical.encode([version, code, str(error)[:error_chars_max], error.hint[:error_chars_max]])
    return 500, canonical.encode([version, "internal", "the node failed to answer", ""])


def unpack_error(status: int, body: bytes, where: str) -> MedshardError:
    """The error that a node answered with. Never raises: an answer that is no medshard error becomes Unavailable."""
    try:
        f = Fields(canonical.decode(body, bytes_max=error_bytes_max, what="error"), count=4, what="error")
        f.uint()
        code, message, hint = f.text(most=32), f.text(most=error_chars_max), f.text(most=error_chars_max)
    except Malformed:
        code, message, hint = "", f"answered {status}", ""
    kind = errors_by_code.get(code, (0, Unavailable))[1]
    return kind(f"{where}: {message}", hint=hint)


def _open(data: bytes, count: int, what: str, bytes_max: int = bundle_bytes_max) -> Fields:
    f = Fields(canonical.decode(data, bytes_max=bytes_max, what=what), count=count, what=what)
    if f.uint() != version:
        raise Malformed(f"{what}: a version this program does not know")
    return f


@dataclass(frozen=True, slots=True)
class SmallPut:
    """One small file's share for one node: its manifest, which shard, and the shard's bytes."""

    manifest: bytes
    index: int
    shard: bytes


def pack_small_puts(items: Sequence[SmallPut]) -> bytes:
    """Body of POST /v1/files."""
    return canonical.encode([version, [[item.manifest, item.index, item.shard] for item in items]])


def unpack_small_puts(data: bytes) -> list[SmallPut]:
    """Parse the body of POST /v1/files."""
    puts = []
    for item in _open(data, 2, "files").list(most=bundle_items_max):
        f = Fields(item, count=3, what="files")
        puts.append(SmallPut(f.bytes(most=manifest_bytes_max), f.uint(most=code_n_max), f.bytes(most=bundle_bytes_max)))
    return puts


def pack_outcomes(errors: Sequence[MedshardError | None]) -> bytes:
    """Answer to POST /v1/files: for each item an error, or nothing when it is stored durably."""
    return canonical.encode([version, [b"" if error is None else pack_error(error)[1] for error in errors]])


def unpack_outcomes(data: bytes, where: str) -> list[MedshardError | None]:
    """Parse the answer to POST /v1/files."""
    outcomes: list[MedshardError | None] = []
    for item in _open(data, 2, "outcomes").list(most=bundle_items_max):
        if not isinstance(item, bytes):
            raise Malformed("outcomes: expected bytes")
        outcomes.append(unpack_error(0, item, where) if item else None)
    return outcomes


def pack_small_reads(items: Sequence[tuple[FileId, int]]) -> bytes:
    """Body of POST /v1/read: whole small shards of many files."""
    return canonical.encode([version, [[file_id, index] for file_id, index in items]])


def unpack_small_reads(data: bytes) -> list[tuple[FileId, int]]:
    """Parse the body of POST /v1/read."""
    items = []
    for item in _open(data, 2, "read").list(most=bundle_items_max):
        f = Fields(item, count=2, what="read")
        items.append((FileId(f.bytes(exactly=32)), f.uint(most=code_n_max)))
    return items


def pack_shards(shards: Sequence[bytes | None]) -> bytes:
    """Answer to POST /v1/read, in order; None where the shard is not here."""
    return canonical.encode([version, list(shards)])


def unpack_shards(data: bytes, count: int) -> list[bytes | None]:
    """Parse the answer to POST /v1/read."""
    number, shards = canonical.decode_blobs(data, bytes_max=bundle_bytes_max * 2, what="shards")
    if number != version or len(shards) != count:
        raise Malformed("shards: not what was asked for")
    return shards


@dataclass(frozen=True, slots=True)
class Found:
    """What a node knows of one file: its manifest, and the inclusion of its REGISTER entry if that is published."""

    manifest: bytes
    inclusion: Value


def pack_lookup(tags: Sequence[Tag]) -> bytes:
    """Body of POST /v1/lookup."""
    return canonical.encode([version, list(tags)])


def unpack_lookup(data: bytes) -> list[Tag]:
    """Parse the body of POST /v1/lookup."""
    tags = _open(data, 2, "lookup").list(most=lookup_tags_max)
    if not all(isinstance(tag, bytes) and len(tag) == 32 for tag in tags):
        raise Malformed("lookup: a tag is 32 bytes")
    return [Tag(tag) for tag in tags]


def pack_found(files: Mapping[FileId, Found], answers: Sequence[Sequence[FileId]]) -> bytes:
    """Answer to POST /v1/lookup: each file once, and for each tag which of them carry it."""
    numbers = {file_id: number for number, file_id in enumerate(files)}
    return canonical.encode(
        [
            version,
            [[file.manifest, file.inclusion] for file in files.values()],
            [[numbers[file_id] for file_id in answer] for answer in answers],
        ]
    )


def unpack_found(data: bytes, count: int) -> list[list[Found]]:
    """Parse the answer to POST /v1/lookup: for each tag, its files. Manifests and inclusions are still to be parsed and checked."""
    f = _open(data, 3, "found", bundle_bytes_max * 2)
    files = [_found(item) for item in f.list(most=lookup_tags_max * lookup_files_max)]
    answers = f.list(most=lookup_tags_max)
    if len(answers) != count:
        raise Malformed("found: not what was asked for")
    return [_chosen(files, answer) for answer in answers]


def _found(item: object) -> Found:
    if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], bytes):
        raise Malformed("found: expected a manifest and an inclusion")
    return Found(item[0], item[1])


def _chosen(files: list[Found], answer: object) -> list[Found]:
    if not isinstance(answer, list) or len(answer) > lookup_files_max:
        raise Malformed("found: too many files for one tag")
    if not all(isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(files) for number in answer):
        raise Malformed("found: a file that is not in the answer")
    return [files[number] for number in answer]


@dataclass(frozen=True, slots=True)
class SpanHead:
    """What precedes cells in an answer: which cells follow, and either all digests of the shard or one Merkle path for each cell."""

    first: int
    count: int
    digests: bytes
    paths: tuple[tuple[bytes, ...], ...]

    def to_bytes(self) -> bytes:
        """The canonical form."""
        return canonical.encode([version, self.first, self.count, self.digests, [list(path) for path in self.paths]])

    @classmethod
    def from_bytes(cls, data: bytes) -> SpanHead:
        """Parse. Raises Malformed only."""
        f = _open(data, 5, "span", span_head_bytes_max)
        first, count = f.uint(most=cells_max), f.uint(most=cells_max)
        joined = f.bytes(most=cells_max * 32)
        paths = []
        for path in f.list(most=cells_max):
            if not isinstance(path, list) or len(path) > 32 or not all(isinstance(h, bytes) and len(h) == 32 for h in path):
                raise Malformed("span: not a Merkle path")
            paths.append(tuple(path))
        if len(joined) % 32:
            raise Malformed("span: digests of a wrong length")
        return cls(first, count, joined, tuple(paths))


def pack_stored(root: bytes, created: bool) -> bytes:
    """Answer to PUT of a shard or manifest: the root (or SHA-256) computed by the node, and whether anything new was stored."""
    return canonical.encode([version, root, int(created)])


def unpack_stored(data: bytes) -> bytes:
    """Parse the answer to PUT of a shard or manifest: the root that the node computed."""
    f = _open(data, 3, "stored", 1024)
    root = f.bytes(exactly=32)
    f.uint(most=1)
    return root


def pack_check(bad_cells: Sequence[int]) -> bytes:
    """Answer to POST …/check: the cells that no longer match their digests."""
    return canonical.encode([version, tuple(bad_cells[:bundle_items_max])])


def unpack_check(data: bytes) -> list[int]:
    """Parse the answer to POST …/check."""
    cells = _open(data, 2, "check").list(most=bundle_items_max)
    if not all(isinstance(cell, int) and not isinstance(cell, bool) and cell >= 0 for cell in cells):
        raise Malformed("check: expected cell numbers")
    return cells
