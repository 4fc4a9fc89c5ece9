"""One process and two, both free to use all CPUs.

64 keep-alive clients repeat a short JSON POST after each response. CPU per call is that of the whole tree, with the
parent of the workers. The part of the workers' CPU that the busier one took shows how evenly the calls spread. Both
servers stay up and take turns. On a machine with two CPUs the upstream and the clients need them too, so the calls per
second are fewer than on two free CPUs, and the CPU per call is noisy: run it more than once.
"""

from __future__ import annotations

from benchmarks import measure
from benchmarks.bench import CLIENTS, Bench, Row
from benchmarks.calls import post
from benchmarks.clients import closed_loop
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer, ours_in
from benchmarks.servers import Server

ONE, TWO = "CPU per short POST, one process", "CPU per short POST, two processes"
RATE_ONE, RATE_TWO = "short POSTs per second, one process", "short POSTs per second, two processes"
BUSIER = "part of the busier of two processes"
UNITS = {ONE: "ms", TWO: "ms", RATE_ONE: "/s", RATE_TWO: "/s", BUSIER: "%"}


async def run(bench: Bench) -> list[Figure]:
    one, two = ours_in(1), ours_in(2)

    async def once(peer: Peer, server: Server) -> dict[str, float]:
        calls = [post("/bench/short", number) for number in range(CLIENTS)]
        async with bench.each_once(peer) as executed:
            parent, *workers = measure.tree(server.pid)
            before = [measure.process_cpu_s(pid) for pid in (parent, *workers)]
            executed.expected = await closed_loop(server.port, calls, bench.scale.loop_s)
            used = [measure.process_cpu_s(pid) - b for pid, b in zip((parent, *workers), before, strict=True)]
        cpu_ms, rate = sum(used) / executed.expected * 1e3, executed.expected / bench.scale.loop_s
        if peer is one:
            return {ONE: cpu_ms, RATE_ONE: rate}
        return {TWO: cpu_ms, RATE_TWO: rate, BUSIER: max(used[1:]) / sum(used[1:]) * 100}

    figures = await bench.rounds([one, two] if bench.wanted("ours") else [], once, unit="")
    return [Figure(figure.measure, figure.peer, UNITS[figure.measure], figure.values) for figure in figures]


ROW = Row(
    "processes",
    "Two processes against one, 64 keep-alive clients, all CPUs",
    run,
    (
        Target(TWO, 1.05, reference="ours", reference_measure=ONE),
        Target(BUSIER, 65),
    ),
)
