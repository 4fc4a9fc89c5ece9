"""A few numbers of each worker in memory that all processes of the service share.

Strategy. The parent makes the memory before it forks. Each worker has a slot and writes only there; everyone reads.
Nothing is locked, because the numbers are hints: where to leave connections to another worker, what the metrics show,
whether a worker's loop still runs. A number may be a moment old. A worker that has sent no heartbeat for a while is
shown as one that accepts no calls.
"""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass

__all__ = ["Scoreboard", "WorkerLife", "WorkerStats"]


@dataclass(frozen=True)
class WorkerStats:
    """The numbers of one worker. ``connections`` is None while the worker accepts none.

    ``down`` are the hosts whose calls go to a backup, as bits that :mod:`~tornado_fal_proxy.upstream.failover` makes.
    """

    connections: int | None
    in_flight: int
    upstream_connections: int
    down: int = 0
    buffered_bytes: int = 0


@dataclass(frozen=True)
class WorkerLife:
    """The life of one worker's slot. ``age_s`` is the time since its worker started, None for a single process.

    ``restarts`` counts the workers that replaced one that ended, and ``hangs`` those that were killed because they
    hung. A worker is ``silent`` while its last heartbeat is too old.
    """

    age_s: float | None
    restarts: int
    hangs: int
    silent: bool


class Scoreboard:
    """Shared numbers of ``size`` workers, each in its slot from 0 on.

    A worker whose last heartbeat is older than ``silent_after_s`` is silent; with None there are no heartbeats.
    """

    _CONNECTIONS, _HEARTBEAT, _IN_FLIGHT, _UPSTREAM, _DOWN, _BUFFERED = range(6)  # of the worker in the slot
    _STARTS, _STARTED_AT, _HANGS, _LOST_LINES, _COLUMNS = range(6, 11)  # of all that were there

    def __init__(self, size: int, silent_after_s: float | None = None) -> None:
        self._silent_after_s = silent_after_s
        self._cells = memoryview(mmap.mmap(-1, 8 * self._COLUMNS * size)).cast("q")
        self._offsets = range(0, self._COLUMNS * size, self._COLUMNS)
        self._turn_ns = memoryview(mmap.mmap(-1, 8)).cast("q")  # the only cell that all workers write
        for slot in range(size):
            self.clear(slot)

    def clear(self, slot: int) -> None:
        """Forget the numbers of a worker that has ended."""
        self._cells[self._offsets[slot] + self._CONNECTIONS] = -1
        for column in (self._HEARTBEAT, self._IN_FLIGHT, self._UPSTREAM, self._DOWN, self._BUFFERED):
            self._cells[self._offsets[slot] + column] = 0

    def count_start(self, slot: int) -> None:
        """Count one more worker that is started in this slot."""
        self._cells[self._offsets[slot] + self._STARTS] += 1
        self._cells[self._offsets[slot] + self._STARTED_AT] = time.monotonic_ns()

    def restarts(self) -> int:
        """Return how many workers were started in place of one that ended."""
        return sum(max(self._cells[offset + self._STARTS] - 1, 0) for offset in self._offsets)

    def count_hang(self, slot: int) -> None:
        """Count one more worker of this slot that is killed because it hangs."""
        self._cells[self._offsets[slot] + self._HANGS] += 1

    def hangs(self) -> int:
        """Return how many workers were killed because they hung."""
        return sum(self._cells[offset + self._HANGS] for offset in self._offsets)

    def count_lost_lines(self, slot: int, count: int) -> None:
        """Count lines of the log that this slot's worker has lost."""
        self._cells[self._offsets[slot] + self._LOST_LINES] += count

    def lost_lines(self) -> int:
        """Return how many lines of the log were lost."""
        return sum(self._cells[offset + self._LOST_LINES] for offset in self._offsets)

    def set_connections(self, slot: int, connections: int | None) -> None:
        """Set how many connections of clients a worker has; None means that it accepts no more."""
        self._cells[self._offsets[slot] + self._CONNECTIONS] = -1 if connections is None else connections

    def update(
        self, slot: int, *, in_flight: int, upstream_connections: int, down: int = 0, buffered_bytes: int = 0
    ) -> None:
        """Set how many calls, connections to fal and buffered bytes a worker has, and which hosts are down for it."""
        self._cells[self._offsets[slot] + self._IN_FLIGHT] = in_flight
        self._cells[self._offsets[slot] + self._UPSTREAM] = upstream_connections
        self._cells[self._offsets[slot] + self._DOWN] = down
        self._cells[self._offsets[slot] + self._BUFFERED] = buffered_bytes

    def fewest_connections(self, slot: int) -> int | None:
        """Return the least number of connections that a worker in another slot has; None if no other accepts any."""
        own = self._offsets[slot]
        others = [
            count
            for offset in self._offsets
            if offset != own and (count := self._cells[offset + self._CONNECTIONS]) >= 0 and not self._is_silent(offset)
        ]
        return min(others, default=None)

    def _is_silent(self, offset: int) -> bool:
        """Tell whether the worker's last heartbeat is too old. One that has just started has sent none."""
        if self._silent_after_s is None or not (last := self._cells[offset + self._HEARTBEAT]):
            return False
        return time.monotonic_ns() - last > self._silent_after_s * 1e9

    def workers(self) -> list[WorkerStats]:
        """Return the numbers of all workers, by slot. A silent worker has none, because its own are out of date."""
        return [
            WorkerStats(None, 0, 0)
            if self._is_silent(offset)
            else WorkerStats(
                None if (connections := self._cells[offset + self._CONNECTIONS]) < 0 else connections,
                self._cells[offset + self._IN_FLIGHT],
                self._cells[offset + self._UPSTREAM],
                self._cells[offset + self._DOWN],
                self._cells[offset + self._BUFFERED],
            )
            for offset in self._offsets
        ]

    def lives(self) -> list[WorkerLife]:
        """Return what became of each slot's workers."""
        now_ns = time.monotonic_ns()
        return [
            WorkerLife(
                (now_ns - started) / 1e9 if (started := self._cells[offset + self._STARTED_AT]) else None,
                max(self._cells[offset + self._STARTS] - 1, 0),
                self._cells[offset + self._HANGS],
                self._is_silent(offset),
            )
            for offset in self._offsets
        ]

    def take_turn(self, interval_s: float) -> bool:
        """Return whether no worker has taken a turn in the last ``interval_s``, and take it then."""
        now_ns = time.monotonic_ns()
        if self._turn_ns[0] and now_ns - self._turn_ns[0] < interval_s * 1e9:
            return False
        self._turn_ns[0] = now_ns
        return True

    def heartbeat(self, slot: int) -> None:
        """Note that the worker's loop runs now."""
        self._cells[self._offsets[slot] + self._HEARTBEAT] = time.monotonic_ns()

    def last_heartbeat(self, slot: int) -> int:
        """Return the time of the worker's last heartbeat, which differs from that of any other; 0 if there was none."""
        return self._cells[self._offsets[slot] + self._HEARTBEAT]
