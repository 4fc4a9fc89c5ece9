"""The cost of limits on spending: CPU and latency of paid calls, and CPU of polls, with each store and without limits.

64 keep-alive clients repeat a short POST that fal bills, and then a poll of a queued job, after each response. One
client repeats the POST for its latency. Each user has a limit on jobs, on unfinished jobs and a budget, so each POST is
reserved and settled. The servers stay up and take turns. The CPU of Redis, which runs on another CPU, does not count.

The last measure is the throughput of four processes that share a file, on all CPUs, which upstream and clients need
too.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from benchmarks import measure
from benchmarks.bench import CLIENTS, Bench, Row, cpus
from benchmarks.calls import Call, poll, post
from benchmarks.clients import closed_loop, sequential
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer, find_program, ours_with
from benchmarks.servers import CannotStart, Server, free_port, server

NONE, MEMORY, SQLITE, REDIS = "no limits", "memory", "SQLite", "Redis"
FOUR = "four processes, SQLite"
RATE = f"paid calls per second, {FOUR}"
PRICES = '"**" = 0.01\n'


def cpu_of(store: str) -> str:
    """Return the name of the measure of paid calls."""
    return f"CPU per paid call, {store}"


def polls_of(store: str) -> str:
    """Return the name of the measure of polls."""
    return f"CPU per poll, {store}"


def latency_of(store: str) -> str:
    """Return the name of the measure of latency."""
    return f"latency of a paid call, {store}"


@asynccontextmanager
async def redis(bench: Bench) -> AsyncIterator[str | None]:
    """Run a Redis without files, and return its URL; None where it is not installed."""
    port = free_port()
    try:
        command = [find_program("redis-server"), f"--port {port}", "--bind 127.0.0.1", "--save", "", "--appendonly no"]
        async with server(command, os.environ, port, bench.directory / "redis.log", cpus()[1]):
            yield f"redis://127.0.0.1:{port}"
    except CannotStart as exc:
        bench.log(f"  {REDIS}: {exc}")
        yield None


async def run(bench: Bench) -> list[Figure]:
    prices = bench.directory / "prices.toml"
    prices.write_text(PRICES)
    limits = ("--jobs-per-user=900000000/day", "--unfinished-jobs-per-user=1000", "--budget-per-user=9000000/month")
    limits = (*limits, f"--prices={prices}")
    in_file = "--store=sqlite:{directory}/spending.sqlite"

    async def cpu_ms(peer: Peer, running: Server, calls: list[Call]) -> tuple[float, int]:
        async with bench.each_once(peer) as executed:
            before = measure.cpu_s(running.pid)
            executed.expected = await closed_loop(running.port, calls, bench.scale.loop_s)
            used = measure.cpu_s(running.pid) - before
        return used / executed.expected * 1e3, executed.expected

    async with redis(bench) as url:
        peers = {
            NONE: ours_with(),
            MEMORY: ours_with(*limits, "--store=memory"),
            SQLITE: ours_with(*limits, in_file),
            FOUR: replace(ours_with(*limits, in_file, "--processes=4"), everywhere=True),
        }
        if url is not None:
            peers[REDIS] = ours_with(*limits, f"--store={url}")

        async def once(peer: Peer, running: Server) -> dict[str, float]:
            (store,) = [name for name, other in peers.items() if other is peer]
            paid, executed = await cpu_ms(peer, running, [post("/bench/paid", number) for number in range(CLIENTS)])
            if store == FOUR:
                return {RATE: executed / bench.scale.loop_s}
            polls, _ = await cpu_ms(peer, running, [poll()] * CLIENTS)
            async with bench.each_once(peer, bench.scale.sequential_calls):
                latencies = sequential(running.port, post("/bench/paid", 0), bench.scale.sequential_calls)
            latency = statistics.median(latencies) * 1e3
            return {cpu_of(store): paid, polls_of(store): polls, latency_of(store): latency}

        figures = await bench.rounds(list(peers.values()) if bench.wanted("ours") else [], once, unit="ms")
    figures = [replace(figure, unit="/s") if figure.measure == RATE else figure for figure in figures]
    return sorted(figures, key=lambda figure: figure.measure)


def _target(bound: float, measure_of: Callable[[str], str], store: str, *, difference: bool = False) -> Target:
    return Target(measure_of(store), bound, reference="ours", reference_measure=measure_of(NONE), difference=difference)


ROW = Row(
    "spending",
    "Limits on spending: paid calls and polls, 64 keep-alive clients",
    run,
    (
        _target(1.25, cpu_of, SQLITE),
        _target(1.35, cpu_of, REDIS),
        *(_target(1.01, polls_of, store) for store in (SQLITE, REDIS)),
        *(_target(1.0, latency_of, store, difference=True) for store in (SQLITE, REDIS)),
        Target(RATE, 1000, at_least=True),
    ),
)
