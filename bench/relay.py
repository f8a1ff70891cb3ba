"""A relay that stands before a node and lets bytes through slowly: `python -m bench.relay PORT NODE_PORT RATE DELAY_S`.

RATE is in bytes a second, each way and for all connections together; every piece comes DELAY_S late. It looks at nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

PIECE_BYTES = 64 * 1024


class Relay:
    def __init__(self, port: int, rate: float, delay_s: float) -> None:
        self._port = port
        self._rate = rate
        self._delay_s = delay_s
        self._free_at = {"up": 0.0, "down": 0.0}

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._port, limit=PIECE_BYTES)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._copy("up", reader, back), self._copy("down", there, writer))

    async def _copy(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                now = loop.time()
                self._free_at[way] = max(self._free_at[way], now) + len(piece) / self._rate
                await asyncio.sleep(self._free_at[way] - now + self._delay_s)
                writer.write(piece)
                await writer.drain()
        writer.close()


async def main(port: int, node_port: int, rate: float, delay_s: float) -> None:
    relay = Relay(node_port, rate, delay_s)
    server = await asyncio.start_server(relay.connected, "127.0.0.1", port, limit=PIECE_BYTES)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
