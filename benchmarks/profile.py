"""The CPU of a relayed short POST by function, in microseconds for each call, beside a handler that relays nothing.

``python -m benchmarks.profile`` runs both under a sampling profiler (``sampler/``), one after the other, with 64
keep-alive clients, and prints the time of each function with all that it calls. Python 3.11 or newer, Linux. The kernel
counts CPU in ticks, so a run of ten seconds has some thousand samples: differences of a few percent mean nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.bench import CLIENTS, FULL, Bench, cpus
from benchmarks.calls import post
from benchmarks.clients import closed_loop
from benchmarks.peers import FLOOR, OURS, PEERS, Peer, Setting
from benchmarks.servers import make_certificates, upstream

SAMPLER = Path(__file__).parent / "sampler"
SECONDS, WARM_UP_S = 10.0, 1.0
# The least time of a function that is printed: below this it is noise.
MIN_US = 4.0


@dataclass(frozen=True)
class Sampled(Peer):
    """A peer that the sampler runs in."""

    samples: str = ""

    def environment(self, setting: Setting) -> Mapping[str, str]:
        given = super().environment(setting)
        return {**given, "SAMPLES": self.samples, "PYTHONPATH": f"{SAMPLER}{os.pathsep}{given['PYTHONPATH']}"}


async def profile(bench: Bench, peer: Peer, samples: Path) -> dict[str, float]:
    """Return the microseconds of CPU for each call, by function."""
    sampled = Sampled(peer.name, peer.title, peer.command, relays=peer.relays, isolated=False, samples=str(samples))
    async with bench.running(sampled) as server:
        calls = [post("/bench/short", number, relayed=peer.relays) for number in range(CLIENTS)]
        await closed_loop(server.port, calls, WARM_UP_S)
        os.kill(server.pid, signal.SIGUSR1)
        before = measure.cpu_s(server.pid)
        count = await closed_loop(server.port, calls, SECONDS)
        cpu_us = (measure.cpu_s(server.pid) - before) / count * 1e6
        os.kill(server.pid, signal.SIGUSR2)
        while not (samples.exists() and samples.read_text().endswith("\n")):
            await asyncio.sleep(0.1)
    by_function: Counter[str] = Counter()
    total = 0
    for line in samples.read_text().splitlines():
        stack, _, number = line.rpartition("\t")
        total += int(number)
        for name in set(stack.split(";")):
            by_function[name] += int(number)
    return {name: number / total * cpu_us for name, number in by_function.items()}


async def main() -> None:
    """Profile both servers and print the table."""
    os.sched_setaffinity(0, cpus()[1])
    with tempfile.TemporaryDirectory(prefix="profile") as name:
        directory = Path(name)
        make_certificates(directory)
        with upstream(directory, 0, cpus()[1]) as started:
            bench = Bench(FULL, started, PEERS, directory, isolated=False, open_files=0, log=sys.stderr.write)
            relay = await profile(bench, OURS, directory / "ours")
            floor = await profile(bench, FLOOR, directory / "floor")
    sys.stdout.write("relay    floor    function, with all that it calls (us for each call)\n")
    for function in sorted({*relay, *floor}, key=lambda name: -max(relay.get(name, 0), floor.get(name, 0))):
        if max(relay.get(function, 0), floor.get(function, 0)) >= MIN_US:
            sys.stdout.write(f"{relay.get(function, 0):7.1f}  {floor.get(function, 0):7.1f}  {function}\n")


if __name__ == "__main__":
    asyncio.run(main())
