"""One parser, or all of them, under atheris (libFuzzer) in a process of its own: python -m tests.fuzz.parsers NAME FOLDER SECONDS

Law: the table of parsers and what they must keep is tests/protocol/test_fuzz_parsers.py; here is only another source of bytes, led by which
lines of our code they reach. Half of the changes are libFuzzer's own, half know msgpack. Exit code 0 if nothing was found in the time.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["medshard_protocol", "medshard", "storenode"]):
    from tests.protocol.test_fuzz_parsers import Parser, check, mutate, table

everything = "all"
input_bytes_max = 4096


def corpus_file(name: str) -> Path:
    """Where the inputs of a parser are checked in, one a line in hex."""
    return Path(__file__).parent / "corpus" / f"{name}.txt"


def corpus(name: str) -> list[bytes]:
    """The inputs that once reached something new."""
    path = corpus_file(name)
    return [bytes.fromhex(line) for line in path.read_text().splitlines()] if path.exists() else []


def chosen(name: str, data: bytes) -> tuple[Parser, bytes]:
    """The parser for an input; with ``everything`` its first byte chooses."""
    if name != everything:
        return table()[name], data
    names = sorted(table())
    return table()[names[data[0] % len(names)]] if data else table()[names[0]], data[1:]


def main(name: str, folder: Path, seconds: int) -> None:
    """Fuzz for so long, from the inputs in ``folder`` and into it."""
    folder.mkdir(exist_ok=True)
    for number, each in enumerate(sorted(table())):
        for place, data in enumerate([*table()[each].seeds, *corpus(each)]):
            if name == everything:
                (folder / f"{number}-{place}").write_bytes(bytes([number]) + data)
            elif each == name:
                (folder / str(place)).write_bytes(data)

    def one(data: bytes) -> None:
        parser, rest = chosen(name, data)
        check(parser, rest)

    def change(data: bytes, size_max: int, seed: int) -> bytes:
        if seed % 2:
            return bytes(atheris.Mutate(data, size_max))
        head, rest = (data[:1], data[1:]) if name == everything else (b"", data)
        return (head + mutate(random.Random(seed), rest))[:size_max]

    options = [
        f"-max_total_time={seconds}",
        f"-max_len={input_bytes_max}",
        f"-artifact_prefix={folder}/",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], str(folder), *options], one, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
