"""Memory of a process that has just started and has served no call."""

from __future__ import annotations

import asyncio

from benchmarks import measure
from benchmarks.bench import Bench, Row
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer

MEASURE = "idle memory"


async def run(bench: Bench) -> list[Figure]:
    values: dict[str, list[float]] = {}

    async def once(peer: Peer) -> None:
        async with bench.running(peer) as server:
            await asyncio.sleep(bench.scale.settle_s)
            values.setdefault(peer.name, []).append(measure.pss_kb(server.pid) / 1024)

    for _ in range(bench.scale.memory_rounds):
        await bench.each(bench.wanted(), once)
    return [Figure(MEASURE, peer, "MB", tuple(all_of_it)) for peer, all_of_it in values.items()]


ROW = Row("idle", "Memory (PSS) of the idle process before any call", run, (Target(MEASURE, 45),))
