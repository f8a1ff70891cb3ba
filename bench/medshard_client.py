"""A client that stays up: opens one Vault and carries out lines of JSON from standard input. Started by bench/medshard_side.py."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from medshard import Vault


async def serve(home: Path, passphrase: str) -> None:
    loop = asyncio.get_running_loop()
    async with Vault.open(home, passphrase) as vault:
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            operation, arguments = json.loads(line)
            try:
                answer = {"done": await _do(vault, operation, arguments)}
            except Exception as error:  # whatever it is, the bench has to be told, not left waiting
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)


async def _do(vault: Vault, operation: str, arguments: dict[str, Any]) -> object:
    if operation == "put":
        return await _put(vault, [Path(path) for path in arguments["paths"]])
    if operation == "get":
        await vault.get(bytes.fromhex(arguments["sha256"]), Path(arguments["target"]))
    if operation == "get_many":
        reports = await vault.get_many([bytes.fromhex(each) for each in arguments["hashes"]], Path(arguments["folder"]))
        return [str(report.path) for report in reports]
    if operation == "read":
        return (await vault.read(bytes.fromhex(arguments["sha256"]), arguments["offset"], arguments["length"])).hex()
    return operation


async def _put(vault: Vault, paths: list[Path]) -> list[str]:
    """The SHA-256 of each stored file, in the order of their paths. Anything that was not stored is an error here."""
    report = await vault.put(paths)
    lost = [problem for problem in report.problems if not problem.stored]
    if lost:
        raise RuntimeError(f"{lost[0].path.name}: {lost[0].message} (one of {len(lost)})")
    return [stored.sha256.hex() for stored in sorted(report.stored, key=lambda each: each.path)]


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), (Path(sys.argv[1]) / "passphrase").read_text().strip()))
