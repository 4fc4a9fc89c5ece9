"""Clients that stopped reading endless event streams: the memory of each, and the CPU of all of them.

Each has read the head and some bytes, and the kernel buffers little for it. Memory and CPU are measured when all are
stuck.
"""

from __future__ import annotations

import asyncio

from benchmarks import measure
from benchmarks.bench import Bench, Row
from benchmarks.calls import post
from benchmarks.clients import sequential, unread
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer

MEMORY = "memory per stopped reader"
CPU = "CPU while all are stuck"


async def run(bench: Bench) -> list[Figure]:
    values: dict[tuple[str, str, str], list[float]] = {}

    async def once(peer: Peer) -> None:
        bench.log(f"  {peer.name}")
        async with bench.running(peer, calls=bench.scale.stuck) as server:
            await asyncio.to_thread(sequential, server.port, post("/bench/short", 0), 10)
            before = measure.pss_kb(server.pid)
            clients = []
            try:
                for number in range(bench.scale.stuck):
                    call = post("/bench/sse/endless", number)
                    clients.append(await asyncio.to_thread(unread, server.port, call))
                await asyncio.sleep(bench.scale.settle_s)
                cpu = measure.cpu_s(server.pid)
                await asyncio.sleep(bench.scale.watch_s)
                cpu = measure.cpu_s(server.pid) - cpu
                grown = measure.pss_kb(server.pid) - before
            finally:
                for client in clients:
                    client.close()
        values.setdefault((MEMORY, peer.name, "MB"), []).append(grown / 1024 / bench.scale.stuck)
        values.setdefault((CPU, peer.name, "%"), []).append(cpu / bench.scale.watch_s * 100)

    for _ in range(bench.scale.memory_rounds):
        await bench.each(bench.wanted("ours", "aiohttp", "nginx"), once)
    return [Figure(*key, tuple(all_of_it)) for key, all_of_it in values.items()]


ROW = Row(
    "stuck", "100 clients that stopped reading endless event streams", run, (Target(MEMORY, 1.0), Target(CPU, 2.0))
)
