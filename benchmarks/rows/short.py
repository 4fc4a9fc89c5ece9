"""Latency of a short call while long polls are held: the median of sequential calls, before and meanwhile."""

from __future__ import annotations

import statistics

from benchmarks.bench import Bench, Row
from benchmarks.calls import post
from benchmarks.clients import sequential
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer
from benchmarks.rows.polls import held

IDLE = "short POST, idle process"
BUSY = "short POST, polls held"


async def run(bench: Bench) -> list[Figure]:
    notes = {}
    values: dict[tuple[str, str], list[float]] = {}

    async def once(peer: Peer) -> None:
        bench.log(f"  {peer.name}")
        count = bench.holdable(peer, bench.scale.short_held)
        notes[peer.name] = f"{count:,} held"
        call = post("/bench/short", 0, relayed=peer.relays)

        def latency_ms(port: int) -> float:
            return statistics.median(sequential(port, call, bench.scale.sequential_calls)) * 1e3

        async with bench.running(peer, calls=count + 10) as server:
            latency_ms(server.port)
            idle = latency_ms(server.port)
            async with held(bench, peer, server, count):
                busy = latency_ms(server.port)
        values.setdefault((IDLE, peer.name), []).append(idle)
        values.setdefault((BUSY, peer.name), []).append(busy)

    for _ in range(bench.scale.memory_rounds):
        await bench.each(bench.wanted("ours", "floor", "aiohttp", "nginx"), once)
    return [Figure(*key, "ms", tuple(all_of_it), notes[key[1]]) for key, all_of_it in values.items()]


ROW = Row(
    "short",
    "Median latency of a short POST while 10,000 long polls are held",
    run,
    (Target(BUSY, 2.0, reference="ours", reference_measure=IDLE, difference=True),),
)
