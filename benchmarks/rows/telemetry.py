"""CPU of the access log and of the metrics for a relayed short POST.

64 keep-alive clients repeat a short JSON POST after each response. The servers are this proxy without either, with the
access log (to a file), with the metrics, and with both. All stay up and take turns.
"""

from __future__ import annotations

from benchmarks import measure
from benchmarks.bench import CLIENTS, Bench, Row
from benchmarks.calls import post
from benchmarks.clients import closed_loop
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer, ours_with
from benchmarks.servers import Server

NEITHER = "CPU per short POST, neither"
LOG = "CPU per short POST, access log"
METRICS = "CPU per short POST, metrics"
BOTH = "CPU per short POST, access log and metrics"

OPTIONS = {
    NEITHER: (),
    LOG: ("--log-level=info",),
    METRICS: ("--admin-port=0",),
    BOTH: ("--log-level=info", "--admin-port=0"),
}


async def run(bench: Bench) -> list[Figure]:
    peers = {measure_name: ours_with(*options) for measure_name, options in OPTIONS.items()}

    async def once(peer: Peer, server: Server) -> dict[str, float]:
        (name,) = [name for name, other in peers.items() if other is peer]
        calls = [post("/bench/short", number) for number in range(CLIENTS)]
        async with bench.each_once(peer) as executed:
            before = measure.cpu_s(server.pid)
            executed.expected = await closed_loop(server.port, calls, bench.scale.loop_s)
            used = measure.cpu_s(server.pid) - before
        return {name: used / executed.expected * 1e3}

    return await bench.rounds(list(peers.values()) if bench.wanted("ours") else [], once, unit="ms")


ROW = Row(
    "telemetry",
    "CPU per relayed short POST with an access log, and with metrics",
    run,
    (Target(METRICS, 1.05, reference="ours", reference_measure=NEITHER),),
)
