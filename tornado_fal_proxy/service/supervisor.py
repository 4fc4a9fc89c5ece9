"""Worker processes: forked, told when to end, replaced when they die. Knows nothing of what they do.

Strategy. The parent runs no loop, makes no thread and serves nothing: it forks, waits for a signal, a child or a line
from one, and decides. What it and its workers say to each other is little:

* parent to worker: SIGTERM, finish what you have and end; SIGQUIT, end now. Both may come more than once, for service
  managers signal whole groups. SIGINT, which a terminal sends to all of them, workers leave to the parent.
* The parent is gone, however it died: a pipe whose only write end was the parent's is at its end.
* worker to parent: its number, on another pipe, once it is ready.
* Numbers for all to see, hints only, stand in memory that they share (:class:`Board`).

A worker that dies is replaced: at once, or after a delay that doubles while they die young. When
:data:`GIVE_UP_AFTER` in a row did not even get ready, another try will not help and the service ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

__all__ = ["Alone", "Board", "CannotStart", "Crew", "Ending", "Row", "Worker"]

logger = logging.getLogger("tornado_fal_proxy")

# A worker that lives shorter than this after it was ready has died young.
YOUNG_S = 1.0
# The delays before a worker is replaced when several died young: doubling from the first to the second.
LEAST_DELAY_S, MOST_DELAY_S = 0.1, 5.0
GIVE_UP_AFTER = 5
# What a worker gets beyond its own time limit before it is killed.
KILL_AFTER_S = 2.0

TO_PARENT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class CannotStart(Exception):
    """Workers die before they are ready, again and again."""


class Ending:
    """Whether a process is to end: ``asked`` to finish what it has and then end, ``now`` to drop it."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.now = asyncio.Event()

    def ask(self) -> None:
        """Finish."""
        self.asked.set()

    def insist(self) -> None:
        """Finish, or if that was said before, drop everything."""
        (self.now if self.asked.is_set() else self.asked).set()

    def cut(self) -> None:
        """Drop everything."""
        self.asked.set()
        self.now.set()


def _wanted() -> list[signal.Signals]:
    """The signals that end a service. SIGHUP, of a terminal that has gone, only if nobody (nohup) had it ignored."""
    return [n for n in TO_PARENT if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


@dataclass(frozen=True)
class Row:
    """What a worker shows of itself. ``connections`` is None while it takes none."""

    connections: int | None
    in_flight: int
    upstream_connections: int


class Board:
    """A few numbers of each worker, for all to see. Nothing is locked: they are hints, a moment old at best."""

    _CONNECTIONS, _BEAT, _IN_FLIGHT, _UPSTREAM, _STARTS, _COLUMNS = range(6)

    def __init__(self, rows: int) -> None:
        self._cells = memoryview(mmap.mmap(-1, 8 * self._COLUMNS * rows)).cast("q")
        self._rows = range(0, self._COLUMNS * rows, self._COLUMNS)
        for row in range(rows):
            self.clear(row)

    def clear(self, row: int) -> None:
        """That worker has gone."""
        self._cells[self._rows[row] + self._CONNECTIONS] = -1
        for column in (self._BEAT, self._IN_FLIGHT, self._UPSTREAM):
            self._cells[self._rows[row] + column] = 0

    def count_start(self, row: int) -> None:
        """That worker is started, once more perhaps."""
        self._cells[self._rows[row] + self._STARTS] += 1

    def restarts(self) -> int:
        """How many workers took the place of one that ended."""
        return sum(max(self._cells[at + self._STARTS] - 1, 0) for at in self._rows)

    def occupy(self, row: int, connections: int | None) -> None:
        """How many connections it has; None: it takes no more."""
        self._cells[self._rows[row] + self._CONNECTIONS] = -1 if connections is None else connections

    def show(self, row: int, *, in_flight: int, upstream_connections: int) -> None:
        self._cells[self._rows[row] + self._IN_FLIGHT] = in_flight
        self._cells[self._rows[row] + self._UPSTREAM] = upstream_connections

    def fewest(self, row: int) -> int | None:
        """The least number of connections that another than ``row`` has; None when no other takes any."""
        own = self._rows[row]
        others = [n for at in self._rows if at != own and (n := self._cells[at + self._CONNECTIONS]) >= 0]
        return min(others, default=None)

    def rows(self) -> list[Row]:
        """All that they show."""
        rows = []
        for at in self._rows:
            connections = self._cells[at + self._CONNECTIONS]
            rows.append(
                Row(
                    None if connections < 0 else connections,
                    self._cells[at + self._IN_FLIGHT],
                    self._cells[at + self._UPSTREAM],
                )
            )
        return rows

    def beat(self, row: int) -> None:
        """That worker's loop turns."""
        self._cells[self._rows[row] + self._BEAT] = time.monotonic_ns()

    def age_s(self, row: int) -> float:
        """Seconds since its last beat."""
        return (time.monotonic_ns() - self._cells[self._rows[row] + self._BEAT]) / 1e9


@dataclass(frozen=True)
class _OnBoard:
    """A process that serves, with its row on the board."""

    row: int
    board: Board

    def occupy(self, connections: int | None) -> None:
        self.board.occupy(self.row, connections)

    def fewest(self) -> int | None:
        return self.board.fewest(self.row)


@dataclass(frozen=True)
class Alone(_OnBoard):
    """The one process of a service: what a :class:`Worker` is, without parent and others."""

    on_ready: Callable[[], None]
    on_stop: Callable[[], None]
    on_alive: Callable[[], None]

    def end_as_told(self, ending: Ending) -> None:
        """The first signal asks, the second insists. Call it in the running loop."""
        loop = asyncio.get_running_loop()
        for number in _wanted():
            loop.add_signal_handler(number, ending.cut if number == signal.SIGQUIT else ending.insist)

    def ready(self) -> None:
        self.on_ready()

    def alive(self) -> None:
        self.on_alive()

    def stopping(self) -> None:
        self.on_stop()


@dataclass(frozen=True)
class Worker(_OnBoard):
    """What a worker knows of itself: its row on the board, and the pipes to its parent."""

    parent_gone: int
    news: int

    def alive(self) -> None:
        self.board.beat(self.row)

    def ready(self) -> None:
        """Tell the parent."""
        with contextlib.suppress(OSError):  # it has gone
            os.write(self.news, struct.pack("i", os.getpid()))

    def stopping(self) -> None:
        """The parent knows."""

    @property
    def is_orphan(self) -> bool:
        """Whether the parent has gone."""
        return bool(select.select([self.parent_gone], [], [], 0)[0])

    def end_as_told(self, ending: Ending) -> None:
        """Obey the parent from now on, and end when it has gone. Call it in the running loop."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, ending.ask)
        loop.add_signal_handler(signal.SIGQUIT, ending.cut)

        def orphaned() -> None:
            loop.remove_reader(self.parent_gone)
            logger.error("worker %d: the parent process has gone", os.getpid())
            ending.ask()

        loop.add_reader(self.parent_gone, orphaned)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_PARENT)


@dataclass
class _Child:
    """A living worker, as the parent knows it."""

    row: int
    ready_at: float | None = None


@dataclass
class Crew:
    """The workers of a service, and the parent's life. ``live`` is a worker's: it returns the exit code.

    ``on_ready`` is called when all are ready for the first time, ``on_stop`` when the service begins to end, and
    ``on_alive`` every ``alive_s`` seconds if each worker's last beat is younger than twice that.
    """

    size: int
    live: Callable[[Worker], int]
    on_ready: Callable[[], None]
    on_stop: Callable[[], None]
    end_timeout_s: float
    alive_s: float | None = None
    on_alive: Callable[[], None] = lambda: None
    _children: dict[int, _Child] = field(default_factory=dict)
    _due: dict[int, float] = field(default_factory=dict)  # rows without a worker, and when they get one
    _failed: int = 0  # starts in a row
    _young: int = 0  # deaths in a row
    _told_ready: bool = False
    _stopping: bool = False
    _cut: bool = False
    _kill_at: float = 0.0
    _clean: bool = True
    _why: str = ""

    def run(self) -> bool:
        """Until all has ended; whether every worker ended with 0 when it was asked to.

        Raises CannotStart when workers cannot be started.
        """
        self.board = Board(self.size)
        self._lifeline, lifeline_end = os.pipe()
        self._news, self._news_end = os.pipe()
        os.set_blocking(self._news, False)
        with _signals_as_bytes() as signals:
            self._pipes = (lifeline_end, self._news, *signals)
            now = time.monotonic()
            self._due = dict.fromkeys(range(self.size), now)
            next_alive = now
            while self._children or self._due:
                self._start_due()
                if self.alive_s is not None and time.monotonic() >= next_alive:
                    next_alive = time.monotonic() + self.alive_s
                    self._tell_alive(2 * self.alive_s)
                readable, _, _ = select.select([signals[0], self._news], [], [], self._patience(next_alive))
                if self._news in readable:
                    self._hear_news()
                if signals[0] in readable:
                    for number in set(os.read(signals[0], 4096)):
                        self._on_signal(number)
                self._bury()
                if self._stopping and time.monotonic() > self._kill_at:
                    self._kill_at = time.monotonic() + KILL_AFTER_S
                    self._signal_all(signal.SIGKILL)
        if self._failed >= GIVE_UP_AFTER:
            raise CannotStart(f"{self._failed} worker processes in a row ended before they were ready; {self._why}")
        return self._clean

    def _patience(self, next_alive: float) -> float | None:
        """How long nothing is to be done."""
        times = list(self._due.values())
        if self.alive_s is not None:
            times.append(next_alive)
        if self._stopping:
            times.append(self._kill_at)
        return max(0.0, min(times) - time.monotonic()) if times else None

    # Births.

    def _start_due(self) -> None:
        for row, at in list(self._due.items()):
            if at <= time.monotonic():
                del self._due[row]
                self._start(row)

    def _start(self, row: int) -> None:
        self.board.count_start(row)
        # The parent's handlers must not run in the child; end_as_told() lets the signals in again.
        signal.pthread_sigmask(signal.SIG_BLOCK, TO_PARENT)
        try:
            pid = os.fork()
            if pid == 0:
                self._be_a_worker(row)
        except OSError as exc:  # no memory, or too many processes
            self._why = f"fork: {exc.strerror}"
            self._count_death(row, None)
        else:
            self._children[pid] = _Child(row)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_PARENT)

    def _be_a_worker(self, row: int) -> None:
        """In the child. Does not return."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            for number in (signal.SIGTERM, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            for pipe in self._pipes:
                os.close(pipe)
            code = self.live(Worker(row, self.board, self._lifeline, self._news_end))
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else 1
        except BaseException:  # nothing of the parent's may run here
            logger.critical("a worker failed", exc_info=True)
        finally:
            logging.shutdown()
            os._exit(code)

    def _hear_news(self) -> None:
        for (pid,) in struct.iter_unpack("i", os.read(self._news, 4096)):
            if pid in self._children:
                self._children[pid].ready_at = time.monotonic()
                self._failed = 0
        if not self._told_ready and not self._due and all(child.ready_at for child in self._children.values()):
            self._told_ready = True
            self.on_ready()

    # Deaths.

    def _bury(self) -> None:
        for pid, child in list(self._children.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del self._children[pid]
            self.board.clear(child.row)
            code = os.waitstatus_to_exitcode(status)
            if self._stopping:
                self._clean &= code == 0
                continue
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            self._why = f"the last {how}"
            logger.error("worker %d ended %s and is replaced", pid, how)
            self._count_death(child.row, child.ready_at)

    def _count_death(self, row: int, ready_at: float | None) -> None:
        now = time.monotonic()
        self._failed += ready_at is None
        self._young = self._young + 1 if ready_at is None or now - ready_at < YOUNG_S else 0
        delay = min(LEAST_DELAY_S * 2 ** (self._young - 1), MOST_DELAY_S) if self._young else 0.0
        self._due[row] = now + delay
        if self._failed >= GIVE_UP_AFTER:
            self._stop()

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGCHLD:
            return
        if self._stopping or number == signal.SIGQUIT:
            self._stop()
            self._signal_all(signal.SIGQUIT)
        else:
            self._stop()

    def _stop(self) -> None:
        """Let all workers finish; no more are started."""
        if not self._stopping:
            self._stopping = True
            self._kill_at = time.monotonic() + self.end_timeout_s + KILL_AFTER_S
            self._due.clear()
            self.on_stop()
            self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self._children:  # none of these was waited for, so the number is still its own
            os.kill(pid, number)

    def _tell_alive(self, limit_s: float) -> None:
        living = [child for child in self._children.values() if child.ready_at is not None]
        if all(self.board.age_s(child.row) < limit_s for child in living):
            self.on_alive()


@contextlib.contextmanager
def _signals_as_bytes() -> Iterator[tuple[int, int]]:
    """A pipe that carries the number of each signal that comes."""
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)
    numbers = [*_wanted(), signal.SIGCHLD]
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    try:
        yield readable, writable
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(readable)
        os.close(writable)
