"""Latency of sequential short POSTs.

One client with a blocking socket, whose own part of the latency is small. The figure is the median of each round.
"""

from __future__ import annotations

import statistics

from benchmarks.bench import Bench, Row
from benchmarks.calls import post
from benchmarks.clients import sequential
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer
from benchmarks.servers import Server

MEASURE = "latency of a short POST"


async def run(bench: Bench) -> list[Figure]:
    async def once(peer: Peer, server: Server) -> dict[str, float]:
        call = post("/bench/short", 0, relayed=peer.relays)
        async with bench.each_once(peer, bench.scale.sequential_calls):
            latencies = sequential(server.port, call, bench.scale.sequential_calls)
        return {MEASURE: statistics.median(latencies) * 1e3}

    return await bench.rounds(bench.wanted(), once, unit="ms")


ROW = Row(
    "latency", "Median latency of sequential short POSTs, one client", run, (Target(MEASURE, 1.8, reference="floor"),)
)
