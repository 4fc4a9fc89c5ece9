"""Memory per held long poll, and the connections that carry them.

The server is started and its memory measured. Then long POSTs are opened in batches until the upstream holds all of
them, and the growth of memory is divided by their number. Last the upstream responds, and every response is checked.
"""

from __future__ import annotations

import asyncio

from benchmarks import measure
from benchmarks.bench import FULL, Bench, Row
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer
from benchmarks.rows.polls import held


def name(count: int) -> str:
    """Return the name of the measure for that number of polls."""
    return f"memory per poll, {count:,} held"


async def run(bench: Bench) -> list[Figure]:
    memory: dict[tuple[str, str], list[float]] = {}
    notes: dict[tuple[str, str], str] = {}

    async def once(peer: Peer) -> None:
        tried = set()
        for limit in bench.scale.held:
            count = bench.holdable(peer, limit)
            if count in tried:
                continue
            tried.add(count)
            bench.log(f"  {peer.name}: {count:,}")
            async with bench.running(peer, calls=count + 10) as server:
                await asyncio.sleep(bench.scale.settle_s)
                before = measure.pss_kb(server.pid)
                async with held(bench, peer, server, count):
                    await asyncio.sleep(bench.scale.settle_s)
                    growth = measure.pss_kb(server.pid) - before
                    connections = (await bench.upstream.ask("stats"))["connections"]
            memory.setdefault((name(limit), peer.name), []).append(growth / count)
            only = f"only {count:,} held; " if count < limit else ""
            notes[name(limit), peer.name] = f"{only}{connections:,} upstream connections" if peer.relays else ""

    for _ in range(bench.scale.memory_rounds):
        await bench.each(bench.wanted(), once)
    return [Figure(*key, "kB", tuple(values), notes[key]) for key, values in memory.items()]


ROW = Row(
    "held",
    "Memory (PSS over the idle process) per held long poll",
    run,
    tuple(
        target
        for count in FULL.held
        for target in (Target(name(count), 0.45, reference="nginx"), Target(name(count), 18))
    ),
)
