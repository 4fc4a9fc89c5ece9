"""Growth of memory for one client that reads slowly, or not at all.

The figure is the peak of resident memory above that of the process before. A short call goes first, because libraries
that are loaded with the first call would count as growth. Short calls go by meanwhile, too: a proxy in which calls
share an upstream connection must read that connection for them, and may then buffer the data of the slow client.
"""

from __future__ import annotations

import asyncio
import contextlib

from benchmarks import measure
from benchmarks.bench import Bench, Row
from benchmarks.calls import post
from benchmarks.clients import read_big, sequential, unread
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer

SLOW = "growth, large response read at 5 MB/s"
BOMB = "growth, gzip bomb unread"
ENDLESS = "growth, endless event stream unread"
RATE = 5e6
PAUSE_S = 0.1


async def run(bench: Bench) -> list[Figure]:
    values: dict[tuple[str, str], list[float]] = {}
    seconds = bench.scale.slow_s
    size = bench.scale.big_mb

    async def read_slowly(port: int) -> None:
        call = post(f"/bench/big?mb={size}", 0)
        await asyncio.to_thread(read_big, port, call, size * 1_000_000, rate=RATE, seconds=seconds)

    async def leave_unread(port: int, path: str) -> None:
        with contextlib.closing(await asyncio.to_thread(unread, port, post(path, 0))):
            await asyncio.sleep(seconds)

    async def call_meanwhile(port: int) -> None:
        while True:
            await asyncio.to_thread(sequential, port, post("/bench/short", 0), 5)
            await asyncio.sleep(PAUSE_S)

    cases = {
        SLOW: read_slowly,
        BOMB: lambda port: leave_unread(port, "/bench/bomb"),
        ENDLESS: lambda port: leave_unread(port, "/bench/sse/endless"),
    }

    async def once(peer: Peer) -> None:
        bench.log(f"  {peer.name}")
        for name, case in cases.items():
            async with bench.running(peer) as server:
                await asyncio.to_thread(sequential, server.port, post("/bench/short", 0), 10)
                peak = measure.Peak(server.pid)
                passing_by = asyncio.create_task(call_meanwhile(server.port))
                try:
                    await case(server.port)
                finally:
                    passing_by.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await passing_by
                values.setdefault((name, peer.name), []).append(peak.growth_mb())

    for _ in range(bench.scale.memory_rounds):
        await bench.each(bench.wanted("ours", "aiohttp", "express", "hono", "nginx"), once)
    return [Figure(*key, "MB", tuple(all_of_it)) for key, all_of_it in values.items()]


ROW = Row(
    "growth",
    "Growth of memory (peak) for one client that reads slowly or not at all",
    run,
    tuple(Target(name, 16) for name in (SLOW, BOMB, ENDLESS)),
)
