"""Canonical msgpack: the one encoding of everything that is stored, sent, hashed or signed.

Law: arrays in fixed order (no maps), shortest integers, bytes for hashes, no floats. A parser decodes, re-encodes and compares;
whatever differs is ``Malformed``, so two different byte strings never mean the same value.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import msgpack

from medshard_protocol.errors import Malformed

Value: TypeAlias = "bool | int | str | bytes | list[Value] | tuple[Value, ...] | None"

uint64_max = 2**64 - 1
nesting_max = 16  # our deepest format nests 5; a bomb of brackets must not reach the recursion limit
_plain: Final = frozenset((bytes, str, bool, type(None)))


def encode(value: Value) -> bytes:
    """Encode ``value`` canonically. Raises TypeError for a map, a float or anything else that has no canonical form."""
    _check(value, 0)
    packed: bytes = msgpack.packb(value, use_bin_type=True, strict_types=False)
    return packed


def decode(data: bytes | bytearray | memoryview, *, bytes_max: int, what: str) -> Any:
    """Decode canonical ``data`` of at most ``bytes_max`` bytes. ``what`` names it in the error. Raises Malformed only."""
    if len(data) > bytes_max:
        raise Malformed(f"{what}: {len(data)} bytes, more than the {bytes_max} allowed")
    try:
        value = msgpack.unpackb(data, raw=False, use_list=True, strict_map_key=True)
        again = encode(value)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException, msgpack.StackError) as error:
        raise Malformed(f"{what}: not canonical msgpack ({error})") from None
    if again != data:
        raise Malformed(f"{what}: not in canonical form")
    return value


def decode_blobs(data: bytes, *, bytes_max: int, what: str) -> tuple[int, list[bytes | None]]:
    """Decode ``[number, [bytes or nil, …]]`` with a number below 128, as ``decode`` would, without building it again. Raises Malformed."""
    if len(data) > bytes_max:
        raise Malformed(f"{what}: {len(data)} bytes, more than the {bytes_max} allowed")
    try:
        value = msgpack.unpackb(data, raw=False, use_list=True, strict_map_key=True)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException, msgpack.StackError) as error:
        raise Malformed(f"{what}: not canonical msgpack ({error})") from None
    match value:
        case [int(number), list(blobs)] if type(number) is int and 0 <= number < 128:
            pass
        case _:
            raise Malformed(f"{what}: expected a number and an array of bytes")
    # Only these kinds are here, and each has one shortest form, which is the canonical one: all is in it if nothing is longer.
    size = 3 if len(blobs) < 16 else 5 if len(blobs) < 1 << 16 else 7
    for blob in blobs:
        if blob is not None and type(blob) is not bytes:
            raise Malformed(f"{what}: expected bytes")
        size += 1 if blob is None else len(blob) + (2 if len(blob) < 1 << 8 else 3 if len(blob) < 1 << 16 else 5)
    if size != len(data):
        raise Malformed(f"{what}: not in canonical form")
    return number, blobs


def _check(value: object, depth: int) -> None:
    kind = type(value)
    if kind in _plain:
        return
    if kind is list or kind is tuple:
        if value and depth >= nesting_max:
            raise TypeError("nested too deep")
        for item in value:  # type: ignore[attr-defined]
            if type(item) not in _plain:
                _check(item, depth + 1)
    elif isinstance(value, int):
        if not -(2**63) <= value <= uint64_max:
            raise TypeError("integer out of range")
    elif isinstance(value, list | tuple) and not isinstance(value, msgpack.ExtType):  # a tuple to Python, and not one of our values
        _check(list(value), depth)
    elif not isinstance(value, str | bytes):
        raise TypeError(f"no canonical form for {kind.__name__}")


class Fields:
    """Take the items of one decoded array in order, each checked. Every method raises Malformed and nothing else."""

    def __init__(self, value: object, *, count: int, what: str) -> None:
        if not isinstance(value, list) or len(value) != count:
            raise Malformed(f"{what}: expected an array of {count} items")
        self._items = iter(value)
        self._what = what

    def uint(self, *, most: int = uint64_max, least: int = 0) -> int:
        """Take an integer with ``least <= value <= most``."""
        value = next(self._items)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise Malformed(f"{self._what}: expected an integer from {least} to {most}")
        return value

    def bytes(self, *, exactly: int | None = None, most: int | None = None) -> bytes:
        """Take bytes of a given length, or of at most a given length."""
        value = next(self._items)
        if not isinstance(value, bytes):
            raise Malformed(f"{self._what}: expected bytes")
        if exactly is not None and len(value) != exactly:
            raise Malformed(f"{self._what}: expected {exactly} bytes, got {len(value)}")
        if most is not None and len(value) > most:
            raise Malformed(f"{self._what}: {len(value)} bytes, more than the {most} allowed")
        return value

    def text(self, *, most: int) -> str:
        """Take text of at most ``most`` characters."""
        value = next(self._items)
        if not isinstance(value, str) or len(value) > most:
            raise Malformed(f"{self._what}: expected text of at most {most} characters")
        return value

    def list(self, *, most: int) -> list[Any]:
        """Take an array of at most ``most`` items, unchecked inside."""
        value = next(self._items)
        if not isinstance(value, list) or len(value) > most:
            raise Malformed(f"{self._what}: expected an array of at most {most} items")
        return value
