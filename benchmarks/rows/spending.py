"""CPU and latency of limits on spending.

64 keep-alive clients repeat a short JSON POST, a paid call, after each response, and then a GET of a queued job's
status, which is free. The servers are this proxy without a limit, and with a limit that nobody reaches, counted in
memory, in a SQLite file and in Redis. All stay up and take turns. Redis has none of the measured server's CPU. One more
server has four workers on all CPUs and one SQLite file, and shows how many paid calls that takes in a second.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from benchmarks import measure
from benchmarks.bench import CLIENTS, Bench, Row
from benchmarks.calls import poll, post
from benchmarks.clients import closed_loop, sequential
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer, ours_in, ours_with
from benchmarks.servers import Server, free_port

STORES = {"no limit": (), "memory": ("memory",), "SQLite": ("sqlite:{directory}/spent.sqlite",), "Redis": ("{redis}",)}
PAID, POLL, LATENCY = "CPU per paid call, ", "CPU per poll, ", "latency of a paid call, "
RATE = "paid calls a second, four workers and one SQLite file"
LIMIT = "--jobs-per-user=1000000000/day"
STATUS = "/bench/short/requests/764cabcf-b745-4b3e-ae38-1200304cf45b/status"


@contextmanager
def redis() -> Iterator[str | None]:
    """Run Redis while the block lasts, and yield its URL; None where it is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        options = [f"--port={port}", "--bind=127.0.0.1", f"--dir={directory}", "--save=", "--loglevel=warning"]
        command = [part for option in options for part in option.split("=", 1)]
        process = subprocess.Popen([program, *command], stdout=subprocess.DEVNULL)
        try:
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            process.wait()


def peers(url: str | None) -> dict[str, Peer]:
    """Return the servers by their stores."""
    found = {}
    for name, stores in STORES.items():
        if name != "Redis" or url is not None:
            options = [f"--store={store.replace('{redis}', url or '')}" for store in stores]
            found[name] = ours_with(*([LIMIT] if stores else []), *options)
    return found


async def run(bench: Bench) -> list[Figure]:
    if not bench.wanted("ours"):
        return []
    with redis() as url:
        by_store = peers(url)
        crowd = ours_in(4)
        many = replace(
            crowd,
            command=lambda setting: [
                *crowd.command(setting),
                *(LIMIT, f"--store=sqlite:{setting.directory}/spent.sqlite"),
            ],
        )

        async def once(peer: Peer, server: Server) -> dict[str, float]:
            calls = [post("/bench/short", number) for number in range(CLIENTS)]
            if peer is many:
                async with bench.each_once(peer) as executed:
                    executed.expected = await closed_loop(server.port, calls, bench.scale.loop_s)
                return {RATE: executed.expected / bench.scale.loop_s}
            (name,) = [name for name, other in by_store.items() if other is peer]
            figures = {}
            for what, some in ((PAID, calls), (POLL, [poll(STATUS)] * CLIENTS)):
                async with bench.each_once(peer) as executed:
                    before = measure.cpu_s(server.pid)
                    executed.expected = await closed_loop(server.port, some, bench.scale.loop_s)
                    used = measure.cpu_s(server.pid) - before
                figures[what + name] = used / executed.expected * 1e3
            async with bench.each_once(peer, bench.scale.sequential_calls):
                latencies = sequential(server.port, calls[0], bench.scale.sequential_calls)
            figures[LATENCY + name] = statistics.median(latencies) * 1e3
            return figures

        found = await bench.rounds([*by_store.values(), many], once, unit="ms")
        return [replace(figure, unit="1/s") if figure.measure == RATE else figure for figure in found]


ROW = Row(
    "spending",
    "CPU and latency of limits on spending, by their store",
    run,
    tuple(
        Target(what + store, ratio, reference="ours", reference_measure=what + "no limit")
        for what, store, ratio in (
            (PAID, "SQLite", 1.25),
            (PAID, "Redis", 1.35),
            (POLL, "SQLite", 1.01),
            (POLL, "Redis", 1.01),
        )
    ),
)
