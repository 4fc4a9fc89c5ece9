"""What every row of the benchmark works with: the scale, the upstream, and the peers that this machine can run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.callers import Wrong
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer, Place
from benchmarks.servers import CannotStart, Server, Upstream, free_port, server

__all__ = ["CALLERS", "FULL", "QUICK", "Bench", "Row", "Scale", "cpus"]

# Keep-alive callers at once, where a row names no other number.
CALLERS = 64
# Open files that a server needs beside those of its calls.
SPARE_FILES = 500


@dataclass(frozen=True)
class Scale:
    """How much is measured. ``*_s`` are seconds."""

    rounds: int
    memory_rounds: int
    loop_s: float  # one round of a closed loop
    sequential_calls: int
    held: tuple[int, ...]
    short_held: int
    crowd: int
    crowd_poll_s: float
    slow_s: float  # how long a slow caller is watched
    big_mb: int
    stuck: int
    idle_streams: int
    settle_s: float
    watch_s: float  # over which the CPU of what does nothing is measured


FULL = Scale(
    rounds=5,
    memory_rounds=1,
    loop_s=3.0,
    sequential_calls=400,
    held=(4_000, 10_000),
    short_held=10_000,
    crowd=4_000,
    crowd_poll_s=3,
    slow_s=10.0,
    big_mb=300,
    stuck=100,
    idle_streams=3_000,
    settle_s=3.0,
    watch_s=10.0,
)
# That everything runs and answers rightly; its figures say nothing.
QUICK = Scale(
    rounds=1,
    memory_rounds=1,
    loop_s=0.2,
    sequential_calls=10,
    held=(40,),
    short_held=40,
    crowd=40,
    crowd_poll_s=0.2,
    slow_s=0.5,
    big_mb=5,
    stuck=3,
    idle_streams=20,
    settle_s=0.1,
    watch_s=0.2,
)


def cpus() -> tuple[set[int], set[int]]:
    """The CPUs for what is measured, one, and for all else: the same where there is only one."""
    *others, last = sorted(os.sched_getaffinity(0))
    return {last}, set(others) or {last}


@dataclass
class Executions:
    """How often the upstream is expected to be called."""

    expected: int


@dataclass
class Bench:
    """One run. What could not be measured, and why, gathers in ``failures`` by row and peer."""

    scale: Scale
    upstream: Upstream
    peers: tuple[Peer, ...]
    directory: Path
    isolated: bool
    open_files: int
    say: Callable[[str], None]
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    row: str = ""

    def wanted(self, *names: str) -> list[Peer]:
        """The chosen peers of those names, or all that are chosen."""
        return [peer for peer in self.peers if not names or peer.name in names]

    def fail(self, peer: Peer, why: object) -> None:
        self.failures.setdefault((self.row, peer.name), str(why) or type(why).__name__)
        self.say(f"  {peer.name}: {why!r}"[:300])

    def holdable(self, peer: Peer, count: int) -> int:
        """How many of ``count`` calls at once the peer and the limit of open files allow."""
        files = (self.open_files - SPARE_FILES) // peer.files_per_call
        return min(count, files, peer.most_held or count)

    @asynccontextmanager
    async def running(self, peer: Peer, *, calls: int = CALLERS) -> AsyncIterator[Server]:
        """The peer, freshly started, on a CPU of its own unless it may use all. Raises CannotStart."""
        if peer.isolated and not self.isolated:
            raise CannotStart("it insists on https://fal.run, which needs namespaces")
        directory = Path(tempfile.mkdtemp(prefix=peer.name, dir=self.directory))
        place = Place(
            port=free_port(),
            upstream_port=self.upstream.port,
            directory=directory,
            ca_file=self.directory / "ca.pem",
            calls=calls,
            isolated=self.isolated,
        )
        command = peer.command(place)
        where = set.union(*cpus()) if peer.everywhere else cpus()[0]
        async with server(command, peer.environment(place), place.port, directory / "log", where) as running:
            yield running

    @asynccontextmanager
    async def all_running(self, peers: Iterable[Peer]) -> AsyncIterator[dict[Peer, Server]]:
        """Those of the peers that can be started, at once, for rounds that go from one to the next."""
        async with AsyncExitStack() as stack:
            servers = {}
            for peer in peers:
                try:
                    servers[peer] = await stack.enter_async_context(self.running(peer))
                except CannotStart as exc:
                    self.fail(peer, exc)
            yield servers

    @asynccontextmanager
    async def each_once(self, peer: Peer, expected: int = 0) -> AsyncIterator[Executions]:
        """The upstream must be called as often as is expected at the end: no call lost, or sent twice. Raises Wrong."""
        await self.upstream.ask("stats")
        executions = Executions(expected)
        yield executions
        calls = (await self.upstream.ask("stats"))["calls"]
        if peer.relays and calls != executions.expected:
            raise Wrong(f"{executions.expected:,} answers to {calls:,} calls of the upstream")

    async def each(self, peers: Iterable[Peer], measure: Callable[[Peer], Awaitable[None]]) -> None:
        """``measure`` one after the other; what fails is noted and does not stop the others."""
        for peer in peers:
            if (self.row, peer.name) in self.failures:
                continue
            try:
                await measure(peer)
            except (CannotStart, Wrong, OSError, TimeoutError) as exc:
                self.fail(peer, exc)

    async def rounds(
        self, peers: Iterable[Peer], measure: Callable[[Peer, Server], Awaitable[dict[str, float]]], *, unit: str
    ) -> list[Figure]:
        """Interleaved rounds over servers that keep running: one value for each measure, peer and round."""
        values: dict[tuple[str, str], list[float]] = {}
        async with self.all_running(peers) as servers:

            async def once(peer: Peer) -> None:
                for name, value in (await measure(peer, servers[peer])).items():
                    values.setdefault((name, peer.name), []).append(value)

            for number in range(1 + self.scale.rounds):
                self.say(f"  round {number} of {self.scale.rounds}" if number else "  warming up")
                if number == 1:
                    values.clear()
                await self.each(list(servers), once)
        failed = {peer for row, peer in self.failures if row == self.row}
        return [
            Figure(name, peer, unit, tuple(figures)) for (name, peer), figures in values.items() if peer not in failed
        ]


@dataclass(frozen=True)
class Row:
    """A part of the benchmark that can be run by itself."""

    name: str
    title: str
    run: Callable[[Bench], Awaitable[list[Figure]]]
    targets: tuple[Target, ...] = ()
