"""Transfer syntaxes by what can be done with their bytes as they lie in the file.

Law: a table and nothing else.
"""

from __future__ import annotations

from typing import Final

from medshard.gateway.elements import deflated_le, explicit_be, explicit_le, implicit_le

little_endian: Final = frozenset((explicit_le, implicit_le, ""))


def in_place(syntax: str) -> bool:
    """Whether elements lie in the file as they are: all but the deflated ones."""
    return syntax != deflated_le


def native_in_place(syntax: str) -> bool:
    """Whether native frames can be given out as they lie in the file."""
    return syntax in little_endian


uncompressed: Final = little_endian | {explicit_be, deflated_le}
