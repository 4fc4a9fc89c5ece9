"""CPU per relayed short POST.

64 keep-alive clients repeat a short JSON POST after each response. The figure is the user and system time of the
server's processes, divided by the number of responses. All servers stay up and take turns.
"""

from __future__ import annotations

from benchmarks import measure
from benchmarks.bench import CLIENTS, Bench, Row
from benchmarks.calls import post
from benchmarks.clients import closed_loop
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer
from benchmarks.servers import Server

MEASURE = "CPU per short POST"


async def run(bench: Bench) -> list[Figure]:
    async def once(peer: Peer, server: Server) -> dict[str, float]:
        calls = [post("/bench/short", number, relayed=peer.relays) for number in range(CLIENTS)]
        async with bench.each_once(peer) as executed:
            before = measure.cpu_s(server.pid)
            executed.expected = await closed_loop(server.port, calls, bench.scale.loop_s)
            used = measure.cpu_s(server.pid) - before
        return {MEASURE: used / executed.expected * 1e3}

    return await bench.rounds(bench.wanted(), once, unit="ms")


ROW = Row(
    "cpu",
    "CPU (user and system) per relayed short POST, 64 keep-alive clients",
    run,
    (
        Target(MEASURE, 1.25, reference="floor"),
        Target(MEASURE, 1.0, reference="aiohttp"),
        Target(MEASURE, 0.5, reference="express"),
        Target(MEASURE, 0.5, reference="hono"),
    ),
)
