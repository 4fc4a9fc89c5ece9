"""Throughput of one large response to a GET, read as fast as it arrives."""

from __future__ import annotations

import asyncio

from benchmarks.bench import Bench, Row
from benchmarks.calls import get
from benchmarks.clients import read_big
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer
from benchmarks.servers import Server

MEASURE = "throughput of a large response"


async def run(bench: Bench) -> list[Figure]:
    size = bench.scale.big_mb

    async def once(_peer: Peer, server: Server) -> dict[str, float]:
        call = get(f"/bench/big?mb={size}")
        return {MEASURE: size / await asyncio.to_thread(read_big, server.port, call, size * 1_000_000)}

    return await bench.rounds(bench.wanted("ours", "aiohttp", "hono", "nginx"), once, unit="MB/s")


ROW = Row(
    "throughput",
    "Throughput of one 300 MB response, fast reader",
    run,
    (Target(MEASURE, 0.4, reference="nginx", at_least=True),),
)
