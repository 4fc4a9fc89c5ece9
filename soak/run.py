"""A soak from its beginning to its report.

Strategy. At rest, that is with a new upstream and after a call or two, the service is looked at; then come the calls,
and the same is done again. What it has then and had not before was left behind. The upstream is killed, or closed, some
times; of several workers some are killed, in the first half, for a new one has to grow again. Memory is compared
between the third and the last quarter: by then what is kept for later calls is there.
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
from soak.upstream import CERTIFICATE
from soak.wish import Wish
from tests.support.certificates import Authority
from tests.support.raw_client import RawClient, request

__all__ = ["Options", "soak"]

RESTARTS, KILLS, LEAST_BETWEEN_S = 12, 4, 5.0
# So long after a restart, or the death of a worker, calls may fail; and POSTs avoid libcurl's pool.
SETTLE_S = 2.0
# Of memory: enough for the median of a quarter.
SAMPLES = 720
# What memory may grow by, whichever is more; for each process. A short soak is over before all that is kept is there.
MOST_GROWTH_KB, MOST_GROWTH = 2 * 1024, 0.03
SHORT_S, SHORT_GROWTH_KB = 300.0, 16 * 1024
# How long it may take until all is at rest.
REST_S = 120.0
# After each call libcurl closes some of what has died, once a second. A call that leads is known for
# hosts.HANDSHAKE_WAIT_S.
LOOK_S = 1.1
# What must be none when nobody calls; what must be as it was before; and what is told beside it.
NONE = ("transfers", "handles", "handlers", "requests", "connections", "streams", "in flight")
AS_BEFORE = ("tasks", "sockets", "other files", "garbage")
TOLD = ("kept",)
# libcurl's handles that wait for a call in a process: two pools of upstream.IDLE_HANDLES.
MOST_KEPT = 2 * 512


@dataclass(frozen=True)
class Options:
    seconds: float
    rate: float
    processes: int
    seed: int


async def soak(options: Options, stop: asyncio.Event) -> tuple[list[str], list[str]]:
    """The report, and what was wrong. ``stop`` ends the calls early."""
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
    problems += [f"the log says: {line}" for line in service.noted]
    problems += [f"the upstream complains: {failure}" for failure in upstream.failures]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, WHO))
    return [*report, f"CPU in all: {cpu:.0f} s; lines of the service's log: {service.log_lines}"], problems


WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


class _Soak:
    """The course of a soak, and what is found."""

    def __init__(self, options: Options, service: Service, upstream: Upstream) -> None:
        self.options, self.service, self.upstream = options, service, upstream
        self.load = Load(service, options.seed, upstream.trouble)
        self.memory_kb: list[int] = []
        self.restarts = self.kills = 0
        self._over = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        await self._touch()
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
        """Wait so long; False as soon as the calls are over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), seconds)
        return not self._over.is_set()

    async def _sample(self) -> None:
        while await self._still_running_in(self.options.seconds / SAMPLES):
            self.memory_kb.append(self.service.memory_kb())

    async def _restart(self) -> None:
        """The upstream is killed or closes properly, in turn."""
        while await self._still_running_in(max(self.options.seconds / RESTARTS, LEAST_BETWEEN_S)):
            await self.upstream.restart((signal.SIGKILL, signal.SIGTERM)[self.restarts % 2], SETTLE_S)
            self.restarts += 1

    async def _kill_workers(self) -> None:
        dice, seconds = random.Random(self.options.seed), self.options.seconds
        half = time.monotonic() + seconds / 2
        while self.options.processes > 1 and await self._still_running_in(max(seconds / 2 / KILLS, LEAST_BETWEEN_S)):
            if (now := time.monotonic()) > half:
                return
            self.upstream.trouble.append((now, now + SETTLE_S))
            os.kill(dice.choice(self.service.serving()), signal.SIGKILL)
            self.kills += 1

    async def _touch(self) -> None:
        """Calls to each process that serves."""
        callers = [await RawClient.open(self.service.port) for _ in range(8 * self.options.processes)]
        for caller in callers:
            caller.writer.write(request("GET", target=f"https://fal.run{Wish('plain', 0).path}"))
            await caller.response()
        for caller in callers:
            await caller.close()

    async def _at_rest(self, wanted: dict[str, int] | None = None) -> dict[str, int]:
        """What there is when nobody calls and the upstream is new; looked at again while it is not what is wanted."""
        await self.upstream.restart(signal.SIGTERM, SETTLE_S)
        until = time.monotonic() + REST_S
        await asyncio.sleep(SETTLE_S)
        while True:
            await self._touch()
            await asyncio.sleep(LOOK_S)
            found = await self.service.counts()
            if not _left(wanted or found, found) or time.monotonic() > until:
                return found

    def problems(self) -> list[str]:
        load, executed, processes = self.load, self.upstream.executed, self.options.processes
        problems = _left(self.before, self.after)
        if self.after["kept"] > MOST_KEPT * processes:
            problems.append(f"{self.after['kept']} of libcurl's handles are kept")
        if load.bad:
            problems += [f"{load.bad} calls did not end as they must, among them:", *load.noted]
        if twice := [number for number, times in executed.items() if times > 1]:
            problems.append(f"{len(twice)} POSTs ran more than once, the first of call {min(twice) // 10}")
        if ran := [number for number in load.to_repeat if executed[number]]:
            problems.append(f"{len(ran)} POSTs that ran were answered as if they had not: call {min(ran) // 10}")
        third, last = self._quarter_kb(2), self._quarter_kb(3)
        short = self.options.seconds < SHORT_S
        most = max((SHORT_GROWTH_KB if short else MOST_GROWTH_KB) * processes, MOST_GROWTH * third)
        if last - third > most:
            problems.append(f"memory grew by {last - third:.0f} kB in the last quarter, and {most:.0f} is the most")
        return problems

    def report(self) -> list[str]:
        load, before, after, executed = self.load, self.before, self.after, self.upstream.executed.total()
        return [
            f"{load.made} calls in {self.seconds:.0f} s, {load.most_at_once} at once at most",
            f"{executed} POSTs ran; {self.restarts} restarts of the upstream; {self.kills} workers killed",
            *(f"  {kind:<21}{_counted(ends)}" for kind, ends in load.ended.items()),
            "at rest, before and after:",
            *(f"  {name:<21}{before[name]}, {after[name]}" for name in (*NONE, *AS_BEFORE, *TOLD)),
            f"memory, median of each quarter: {', '.join(f'{self._quarter_kb(n) / 1024:.1f} MB' for n in range(4))}",
            f"CPU of the service: {self.service_cpu_s:.0f} s, {self.service_cpu_s / self.seconds:.0%} of one",
        ]

    def _quarter_kb(self, number: int) -> float:
        size = len(self.memory_kb) // 4
        return statistics.median(self.memory_kb[number * size : (number + 1) * size] or [0])


def _left(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return [f"{after[name]} {name} are left when nobody calls" for name in NONE if after[name]] + [
        f"{name}: {after[name]} when nobody calls, and {before[name]} before"
        for name in AS_BEFORE
        if after[name] != before[name]
    ]


def _counted(ends: dict[str, int]) -> str:
    return ", ".join(f"{end}: {count}" for end, count in sorted(ends.items()))
