"""Two processes against one: not measured, for the command has no option for several processes yet."""

from __future__ import annotations

from benchmarks.bench import Bench, Row
from benchmarks.figures import Figure


async def run(bench: Bench) -> list[Figure]:
    bench.say("  not measured: the command has no option for several processes yet")
    return []


ROW = Row("processes", "Two processes on two CPUs (not measured yet)", run)
