from collections.abc import Sequence

from _typeshed import ReadableBuffer, WriteableBuffer

def matmul(
    matrix: bytes,
    inputs: Sequence[ReadableBuffer],
    outputs: Sequence[WriteableBuffer],
    path: int = -1,
    accumulate: bool = False,
) -> None: ...
def paths() -> tuple[str, ...]: ...
