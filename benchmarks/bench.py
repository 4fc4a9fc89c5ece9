"""The common part of all rows of the benchmark: the scale, the upstream, and the peers that this machine can run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.clients import Wrong
from benchmarks.figures import Figure, Target
from benchmarks.peers import Peer, Setting
from benchmarks.servers import CannotStart, Server, Upstream, free_port, server

__all__ = ["CLIENTS", "FULL", "QUICK", "Bench", "Row", "Scale", "cpus"]

# Keep-alive clients at once, unless a row names another number: enough to keep every peer busy all the time.
CLIENTS = 64
# Open files of a server beside those of its calls: more than any peer needs for its own sockets, pipes and libraries.
SPARE_FILES = 500


@dataclass(frozen=True)
class Scale:
    """The amount that is measured. Names that end in ``_s`` are seconds."""

    rounds: int
    memory_rounds: int
    loop_s: float  # one round of a closed loop
    sequential_calls: int
    held: tuple[int, ...]
    short_held: int
    crowd: int
    crowd_poll_s: float
    slow_s: float  # how long a slow client is measured
    big_mb: int
    stuck: int
    idle_streams: int
    settle_s: float
    watch_s: float  # how long the CPU of an idle server is measured


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
# Shows that everything runs and responds correctly; its figures mean nothing.
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
    """Return the one CPU for the measured server, and the CPUs for all else; the same one on a machine with one CPU."""
    *others, last = sorted(os.sched_getaffinity(0))
    return {last}, set(others) or {last}


@dataclass
class Executions:
    """The number of calls that the upstream is expected to receive."""

    expected: int


@dataclass
class Bench:
    """One run. ``failures`` has the reason for each row and peer that could not be measured."""

    scale: Scale
    upstream: Upstream
    peers: tuple[Peer, ...]
    directory: Path
    isolated: bool
    open_files: int
    log: Callable[[str], None]
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    row: str = ""

    def wanted(self, *names: str) -> list[Peer]:
        """Return the chosen peers with those names, or all that were chosen."""
        return [peer for peer in self.peers if not names or peer.name in names]

    def fail(self, peer: Peer, reason: object) -> None:
        """Note why this row could not be measured for the peer."""
        self.failures.setdefault((self.row, peer.name), str(reason) or type(reason).__name__)
        self.log(f"  {peer.name}: {reason!r}"[:300])

    def holdable(self, peer: Peer, count: int) -> int:
        """Return how many of ``count`` calls at once the peer and the limit of open files allow."""
        files = (self.open_files - SPARE_FILES) // peer.files_per_call
        return min(count, files, peer.max_held or count)

    @asynccontextmanager
    async def running(self, peer: Peer, *, calls: int = CLIENTS) -> AsyncIterator[Server]:
        """Start the peer, on a CPU of its own unless it may use all. Raise CannotStart."""
        if peer.isolated and not self.isolated:
            raise CannotStart("it insists on https://fal.run, which needs namespaces: run as root")
        directory = Path(tempfile.mkdtemp(prefix=peer.name, dir=self.directory))
        setting = Setting(
            port=free_port(),
            upstream_port=self.upstream.port,
            directory=directory,
            ca_file=self.directory / "ca.pem",
            calls=calls,
            isolated=self.isolated,
        )
        command = peer.command(setting)
        allowed = set.union(*cpus()) if peer.everywhere else cpus()[0]
        async with server(command, peer.environment(setting), setting.port, directory / "log", allowed) as running:
            yield running

    @asynccontextmanager
    async def all_running(self, peers: Iterable[Peer]) -> AsyncIterator[dict[Peer, Server]]:
        """Start all peers that can be started, for rounds that go from one to the next."""
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
        """Check that no call is lost or sent twice: the upstream must receive as many as are expected. Raise Wrong."""
        await self.upstream.ask("stats")
        executions = Executions(expected)
        yield executions
        calls = (await self.upstream.ask("stats"))["calls"]
        if peer.relays and calls != executions.expected:
            raise Wrong(f"{executions.expected:,} responses, but {calls:,} calls of the upstream")

    async def each(self, peers: Iterable[Peer], measure: Callable[[Peer], Awaitable[None]]) -> None:
        """Await ``measure`` for one peer after the other; note a failure and go on with the next."""
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
        """Measure in interleaved rounds over servers that stay up. Return a value for each measure, peer and round."""
        values: dict[tuple[str, str], list[float]] = {}
        async with self.all_running(peers) as servers:

            async def once(peer: Peer) -> None:
                for name, value in (await measure(peer, servers[peer])).items():
                    values.setdefault((name, peer.name), []).append(value)

            for number in range(1 + self.scale.rounds):
                self.log(f"  round {number} of {self.scale.rounds}" if number else "  warming up")
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
