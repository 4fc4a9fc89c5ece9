"""Event streams without events: the memory of each, and the CPU of all of them."""

from __future__ import annotations

import asyncio

from benchmarks import measure
from benchmarks.bench import Bench, Row
from benchmarks.calls import post
from benchmarks.clients import sequential, unread
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer

MEMORY = "memory per idle stream"
CPU = "CPU while all are idle"


async def run(bench: Bench) -> list[Figure]:
    values: dict[tuple[str, str, str], list[float]] = {}
    notes: dict[str, str] = {}
    count = bench.scale.idle_streams

    async def once(peer: Peer) -> None:
        bench.log(f"  {peer.name}")
        async with bench.running(peer, calls=count + 10) as server:
            await asyncio.to_thread(sequential, server.port, post("/bench/short", 0), 10)
            await asyncio.sleep(bench.scale.settle_s)
            before = measure.pss_kb(server.pid)
            clients = []
            try:
                for number in range(count):
                    # Each has its first event when this returns, and there is no second.
                    call = post("/bench/sse/idle", number)
                    clients.append(await asyncio.to_thread(unread, server.port, call))
                await asyncio.sleep(bench.scale.settle_s)
                cpu = measure.cpu_s(server.pid)
                await asyncio.sleep(bench.scale.watch_s)
                cpu = measure.cpu_s(server.pid) - cpu
                grown = measure.pss_kb(server.pid) - before
                connections = (await bench.upstream.ask("stats"))["connections"]
                notes[peer.name] = f"{connections:,} upstream connections"
            finally:
                for client in clients:
                    client.close()
        values.setdefault((MEMORY, peer.name, "kB"), []).append(grown / count)
        values.setdefault((CPU, peer.name, "%"), []).append(cpu / bench.scale.watch_s * 100)

    for _ in range(bench.scale.memory_rounds):
        await bench.each(bench.wanted("ours", "aiohttp", "express", "hono", "nginx"), once)
    return [Figure(*key, tuple(all_of_it), notes[key[1]]) for key, all_of_it in values.items()]


ROW = Row("streams", "3,000 idle event streams", run, (Target(MEMORY, 40), Target(CPU, 2.0)))
