"""Run a soak from its beginning to its report.

Strategy. At rest, with a new upstream and after a call or two, the objects of the service are counted. Then come the
calls, and the objects are counted again: any more of them were left behind. The upstream is killed or closed some
times. Where there are several workers some are killed, in the first half only, because the memory of a new worker
grows. Memory is compared between the third and the last quarter, when all that is kept for later calls exists.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from soak.load import Load
from soak.processes import Service, Upstream
from soak.scenario import Scenario
from soak.upstream import CERTIFICATE
from tests.support.certificates import Authority
from tests.support.raw_client import RawClient, request

__all__ = ["Options", "soak"]

# Restarts of the upstream and kills of workers, and the seconds that pass between two of them at least.
RESTARTS, KILLS, MIN_INTERVAL_S = 12, 4, 5.0
# The time for which calls may fail after a restart or the death of a worker. POSTs avoid libcurl's pool meanwhile.
SETTLE_S = 2.0
# Samples of the memory: enough for the median of a quarter.
SAMPLES = 720
# Limit the growth of memory, whichever is more, for each process. A short soak ends before all that is kept exists.
MAX_GROWTH_KB, MAX_GROWTH = 2 * 1024, 0.03
SHORT_S, SHORT_GROWTH_KB = 300.0, 16 * 1024
# Limits the wait until all is at rest: far more than a busy machine needs.
REST_TIMEOUT_S = 120.0
# The time from a call to the count: libcurl closes some dead connections with a call, once a second, and a leading
# call is kept for hosts.HANDSHAKE_WAIT_S.
COUNT_DELAY_S = 1.1
# Counts that must be zero at rest, those that must not grow, and one that is only reported.
ZERO = ("transfers", "handles", "handlers", "requests", "connections", "streams", "in flight")
NO_MORE = ("tasks", "sockets", "other files", "garbage")
REPORTED = ("kept",)
# Limits libcurl's handles that wait for a call in a process: two pools of handles.MAX_IDLE_HANDLES.
MAX_KEPT = 2 * 512


@dataclass(frozen=True)
class Options:
    seconds: float
    rate: float
    processes: int
    seed: int


async def soak(options: Options, stop: asyncio.Event) -> tuple[list[str], list[str]]:
    """Return the report, and the problems. ``stop`` ends the calls early."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        Authority(directory).write_certificate(directory / CERTIFICATE)
        upstream = Upstream(directory)
        await upstream.start()
        service = None
        try:
            service = await Service.start(upstream.port, options.processes, directory)
            run = _Soak(options, service, upstream)
            await run.run(stop)
            report, problems = run.report(), run.problems()
            if code := await service.stop():
                problems.append(f"the service ended with exit code {code}")
            await upstream.stop()
        finally:
            await upstream.kill()
            if service is not None:
                await service.kill()
    problems += [f"log: {line}" for line in service.bad_lines]
    problems += [f"upstream: {failure}" for failure in upstream.failures]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, USERS))
    return [*report, f"CPU in all: {cpu:.0f} s, {service.log_lines} lines in the service's log"], problems


USERS = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


class _Soak:
    """The course of a soak, and its findings."""

    def __init__(self, options: Options, service: Service, upstream: Upstream) -> None:
        self.options, self.service, self.upstream = options, service, upstream
        self.load = Load(service, options.seed, upstream.trouble)
        self.memory_kb: list[int] = []
        self.restarts = self.kills = 0
        self._over = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        await self._call_each_process()
        self.before = await self._at_rest()
        began, cpu = time.monotonic(), self.service.cpu_s()
        async with asyncio.TaskGroup() as others:
            for other in (self._sample, self._restart, self._kill_workers):
                others.create_task(other())
            await self.load.run(self.options.rate, self.options.seconds, stop)
            self._over.set()
        self.seconds, self.service_cpu_s = time.monotonic() - began, self.service.cpu_s() - cpu
        self.after = await self._at_rest(self.before)

    async def _still_running_in(self, seconds: float) -> bool:
        """Wait so long and return True, or return False as soon as the calls are over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), seconds)
        return not self._over.is_set()

    async def _sample(self) -> None:
        while await self._still_running_in(self.options.seconds / SAMPLES):
            self.memory_kb.append(self.service.memory_kb())

    async def _restart(self) -> None:
        """Kill the upstream, or close it properly, in turn."""
        while await self._still_running_in(max(self.options.seconds / RESTARTS, MIN_INTERVAL_S)):
            await self.upstream.restart((signal.SIGKILL, signal.SIGTERM)[self.restarts % 2], SETTLE_S)
            self.restarts += 1

    async def _kill_workers(self) -> None:
        dice, seconds = random.Random(self.options.seed), self.options.seconds
        half = time.monotonic() + seconds / 2
        while self.options.processes > 1 and await self._still_running_in(max(seconds / 2 / KILLS, MIN_INTERVAL_S)):
            if (now := time.monotonic()) > half:
                return
            self.upstream.trouble.append((now, now + SETTLE_S))
            os.kill(dice.choice(self.service.serving()), signal.SIGKILL)
            self.kills += 1

    async def _call_each_process(self) -> None:
        """Make calls on so many connections that each process that serves gets some."""
        clients = [await RawClient.open(self.service.port) for _ in range(8 * self.options.processes)]
        for client in clients:
            client.writer.write(request("GET", target=f"https://fal.run{Scenario('plain', 0).path}"))
            await client.response()
        for client in clients:
            await client.close()

    async def _at_rest(self, expected: dict[str, int] | None = None) -> dict[str, int]:
        """Return the counts with a new upstream and without calls. Count again while they are not as ``expected``.

        A worker that meets a slow handshake makes a second connection to fal, and keeps it. So each count has an
        upstream of its own.
        """
        until = time.monotonic() + REST_TIMEOUT_S
        while True:
            await self.upstream.restart(signal.SIGTERM, SETTLE_S)
            await asyncio.sleep(SETTLE_S)
            await self._call_each_process()
            await asyncio.sleep(COUNT_DELAY_S)
            found = await self.service.counts()
            if not _leftovers(expected or found, found) or time.monotonic() > until:
                return found

    def problems(self) -> list[str]:
        load, executed, processes = self.load, self.upstream.executed, self.options.processes
        problems = _leftovers(self.before, self.after)
        if self.after["kept"] > MAX_KEPT * processes:
            problems.append(f"{self.after['kept']} of libcurl's handles are kept")
        if load.bad:
            problems += [f"{load.bad} calls did not end as they must, among them:", *load.details]
        if twice := [number for number, times in executed.items() if times > 1]:
            problems.append(f"{len(twice)} POSTs ran more than once, the first of call {min(twice) // 10}")
        if ran := [number for number in load.to_repeat if executed[number]]:
            problems.append(
                f"{len(ran)} POSTs that ran were answered as if they had not run, the first of call {min(ran) // 10}"
            )
        third, last = self._quarter_kb(2), self._quarter_kb(3)
        short = self.options.seconds < SHORT_S
        limit = max((SHORT_GROWTH_KB if short else MAX_GROWTH_KB) * processes, MAX_GROWTH * third)
        if last - third > limit:
            problems.append(f"memory grew by {last - third:.0f} kB in the last quarter, above the limit of {limit:.0f}")
        return problems

    def report(self) -> list[str]:
        load, before, after, executed = self.load, self.before, self.after, self.upstream.executed.total()
        return [
            f"{load.made} calls in {self.seconds:.0f} s, {load.max_at_once} at once at most",
            f"{executed} POSTs ran, {self.restarts} restarts of the upstream, {self.kills} workers killed",
            *(f"  {kind:<21}{_counted(ends)}" for kind, ends in load.ended.items()),
            "at rest, before and after:",
            *(f"  {name:<21}{before[name]}, {after[name]}" for name in (*ZERO, *NO_MORE, *REPORTED)),
            f"memory, median of each quarter: {', '.join(f'{self._quarter_kb(n) / 1024:.1f} MB' for n in range(4))}",
            f"CPU of the service: {self.service_cpu_s:.0f} s, {self.service_cpu_s / self.seconds:.0%} of one",
        ]

    def _quarter_kb(self, number: int) -> float:
        size = len(self.memory_kb) // 4
        return statistics.median(self.memory_kb[number * size : (number + 1) * size] or [0])


def _leftovers(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return [f"{after[name]} {name} are left at rest" for name in ZERO if after[name]] + [
        f"{name}: {after[name]} at rest, and {before[name]} before" for name in NO_MORE if after[name] > before[name]
    ]


def _counted(ends: dict[str, int]) -> str:
    return ", ".join(f"{end}: {count}" for end, count in sorted(ends.items()))
