"""The parent of several worker processes: forks them, passes signals on, replaces those that die.

Strategy. The parent runs no loop, starts no thread and serves nothing: it forks, waits for a signal, a child's end or
a message from a child, and decides. Parent and workers exchange little:

* Parent to worker: SIGTERM means drain and end, SIGQUIT means abort and end. Both may come more than once, because
  service managers signal whole groups. SIGINT, which a terminal sends to all of them, only the parent obeys. SIGHUP
  means to read the options again, as the parent has just done.
* The parent has ended, whatever the cause: a pipe, the lifeline, of which only the parent had the write end is at its
  end.
* Worker to parent: its process id on another pipe, the ready pipe, once it accepts calls.
* Numbers that everyone may read are on the :class:`~tornado_fal_proxy.service.scoreboard.Scoreboard`.

A worker that dies is replaced: at once, or after a delay that doubles while workers die early. After
:data:`MAX_FAILED_STARTS` in a row that did not even become ready, another try will not help and the service ends.

A worker that hangs is killed. The parent checks the heartbeats at regular times and counts the checks that find no new
one, and not the time since the last: when parent and workers were stopped together, or the machine was, that time is
long and the parent may be the first to go on.

The supervisor never imports what the workers do: it is given their main function.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tornado_fal_proxy.service.scoreboard import Scoreboard
from tornado_fal_proxy.service.worker import PID_FORMAT, STOP_SIGNALS, Worker, log_hangup, stop_signals

__all__ = ["CannotStartWorkers", "Supervisor"]

logger = logging.getLogger("tornado_fal_proxy")

# The life, once ready, below which a worker's death is early and its replacement delayed. A fault in the code or the
# environment shows at once; a worker that has served for a second is likely to serve again.
EARLY_DEATH_S = 1.0
# Bounds of the delay before a worker is replaced that died early. It doubles from the first, which is hardly noticed,
# to the second, at which restarts cost next to nothing.
MIN_DELAY_S, MAX_DELAY_S = 0.1, 5.0
# Starts that may fail in a row before the service ends. The delays between so many add up to 1.5 seconds: a
# short lack of memory may pass, and a wrong setup is still reported soon.
MAX_FAILED_STARTS = 5
# The part of --worker-timeout-s after which a worker without a heartbeat is shown as one that accepts no calls: five
# heartbeats are late by then, and the numbers are right for some seconds before the worker is replaced.
SILENT_PART = 0.5
# Time that a worker gets beyond its own limit before it is killed: enough to close what it has on a busy machine.
KILL_AFTER_S = 2.0


class CannotStartWorkers(Exception):
    """Workers end before they are ready, again and again."""


@dataclass
class _Child:
    """A worker that has not ended, as the parent sees it."""

    slot: int
    ready_at: float | None = None
    last_heartbeat: int = 0
    missed: int = 0  # checks in a row that found no new heartbeat
    hung: bool = False


@dataclass
class Supervisor:
    """``size`` workers and the parent's life. ``worker_main`` runs in each worker and returns its exit code.

    ``on_ready`` is called when all workers are ready for the first time, unless the shutdown began before that.
    ``on_stop`` is called when the shutdown begins. ``on_hangup`` is called at SIGHUP, which is passed on to the workers
    where it returns True. Without it SIGHUP is a signal to stop.

    Every ``check_s`` seconds, which is also the time between a worker's heartbeats, the parent checks them and calls
    ``on_alive``. A worker without a heartbeat for ``worker_timeout_s`` is killed. If that is 0 nobody is, and
    ``on_alive`` is called only if each worker that is ready sends heartbeats.
    """

    size: int
    worker_main: Callable[[Worker], int]
    on_ready: Callable[[], None]
    on_stop: Callable[[], None]
    end_timeout_s: float
    worker_timeout_s: float
    check_s: float | None
    on_alive: Callable[[], None]
    on_hangup: Callable[[], bool] | None = None
    _children: dict[int, _Child] = field(default_factory=dict)
    _due: dict[int, float] = field(default_factory=dict)  # slots without a worker, and when they get one
    _failed_starts: int = 0  # in a row
    _delay_s: float = 0.0  # before the latest replacement
    _last_end: str = ""
    _was_ready: bool = False
    _stopping: bool = False
    _kill_at: float = 0.0
    _all_clean: bool = True

    def run(self) -> bool:
        """Run until all workers have ended. Return whether each ended with code 0 after the shutdown began.

        Raise CannotStartWorkers.
        """
        self.scoreboard = Scoreboard(self.size, self.worker_timeout_s * SILENT_PART or None)
        self._lifeline, lifeline_end = os.pipe()
        self._ready_pipe, self._ready_pipe_end = os.pipe()
        os.set_blocking(self._ready_pipe, False)
        with _signals_as_bytes() as signals:
            self._parents_pipes = (lifeline_end, self._ready_pipe, *signals)
            now = time.monotonic()
            self._due = dict.fromkeys(range(self.size), now)
            next_check = now
            while self._children or self._due:
                self._start_due()
                if self.check_s is not None and time.monotonic() >= next_check:
                    next_check = time.monotonic() + self.check_s
                    self._check_heartbeats(self.check_s)
                readable, _, _ = select.select([signals[0], self._ready_pipe], [], [], self._select_timeout(next_check))
                if self._ready_pipe in readable:
                    self._read_ready_pipe()
                if signals[0] in readable:
                    for number in set(os.read(signals[0], 4096)):
                        self._on_signal(number)
                self._reap()
                if self._stopping and time.monotonic() > self._kill_at:
                    self._kill_at = time.monotonic() + KILL_AFTER_S
                    self._signal_all(signal.SIGKILL)
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise CannotStartWorkers(
                f"{self._failed_starts} worker processes in a row ended before they were ready ({self._last_end})"
            )
        return self._all_clean

    def _select_timeout(self, next_check: float) -> float | None:
        """Return the seconds until there is something to do without a message; None if only a message brings it."""
        times = list(self._due.values())
        if self.check_s is not None:
            times.append(next_check)
        if self._stopping:
            times.append(self._kill_at)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _check_heartbeats(self, check_s: float) -> None:
        """Count the checks that each worker has missed, and kill those that hang."""
        max_missed = math.ceil(self.worker_timeout_s / check_s)
        for pid, child in self._children.items():
            heartbeat = self.scoreboard.last_heartbeat(child.slot)
            child.missed = child.missed + 1 if heartbeat == child.last_heartbeat else 0
            child.last_heartbeat = heartbeat
            if max_missed and child.missed >= max_missed and not child.hung:
                child.hung = True
                self.scoreboard.count_hang(child.slot)
                logger.error(
                    "worker hung: process %d is killed, no heartbeat for %g s (--worker-timeout-s)",
                    *(pid, self.worker_timeout_s),
                )
                os.kill(pid, signal.SIGKILL)
        if max_missed or all(child.missed < 2 for child in self._children.values() if child.ready_at is not None):
            self.on_alive()

    # Workers start.

    def _start_due(self) -> None:
        for slot, at in list(self._due.items()):
            if at <= time.monotonic() and slot in self._due:  # a start that fails may stop the service
                del self._due[slot]
                self._start(slot)

    def _start(self, slot: int) -> None:
        self.scoreboard.count_start(slot)
        # The parent's signal handlers must not run in the child; handle_signals() unblocks the signals there.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._run_worker(slot)
        except OSError as exc:  # no memory, or too many processes
            self._last_end = f"fork: {exc.strerror}"
            self._schedule_replacement(slot, None)
        else:
            self._children[pid] = _Child(slot)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _run_worker(self, slot: int) -> None:
        """Run the worker in the forked process. Does not return."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            # One that comes before handle_signals() waits: the parent may have read new options since it forked.
            signal.signal(signal.SIGHUP, signal.SIG_IGN if self.on_hangup is None else signal.SIG_DFL)
            for number in (signal.SIGTERM, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            for pipe in self._parents_pipes:
                os.close(pipe)
            code = self.worker_main(Worker(slot, self.scoreboard, self._lifeline, self._ready_pipe_end))
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else 1
        except BaseException:  # nothing of the parent's may run here
            logger.critical("worker failed: process %d ends with exit code 1", os.getpid(), exc_info=True)
        finally:
            logging.shutdown()
            os._exit(code)

    def _read_ready_pipe(self) -> None:
        for (pid,) in struct.iter_unpack(PID_FORMAT, os.read(self._ready_pipe, 4096)):
            if pid in self._children:
                self._children[pid].ready_at = time.monotonic()
                self._failed_starts = 0
        if self._was_ready or self._stopping or self._due:
            return
        if all(child.ready_at for child in self._children.values()):
            self._was_ready = True
            self.on_ready()

    # Workers end.

    def _reap(self) -> None:
        """Collect the exit codes of workers that have ended, and replace those workers."""
        for pid, child in list(self._children.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del self._children[pid]
            self.scoreboard.clear(child.slot)
            code = os.waitstatus_to_exitcode(status)
            if self._stopping:
                self._all_clean &= code == 0
                continue
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            self._last_end = f"the last {how}"
            logger.error("worker replaced: process %d ended %s", pid, how)
            self._schedule_replacement(child.slot, child.ready_at)

    def _schedule_replacement(self, slot: int, ready_at: float | None) -> None:
        """Decide when the slot gets a new worker, or stop after too many failed starts."""
        now = time.monotonic()
        self._failed_starts += ready_at is None
        is_early = ready_at is None or now - ready_at < EARLY_DEATH_S
        self._delay_s = min(max(2 * self._delay_s, MIN_DELAY_S), MAX_DELAY_S) if is_early else 0.0
        self._due[slot] = now + self._delay_s
        if self._failed_starts >= MAX_FAILED_STARTS:
            self._stop()

    # The service ends.

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGCHLD:
            return
        if number == signal.SIGHUP and self.on_hangup is not None:
            if not self._stopping and self.on_hangup():
                self._signal_all(signal.SIGHUP)
            return
        if number == signal.SIGHUP:
            log_hangup()
        abort = self._stopping or number == signal.SIGQUIT
        self._stop()
        if abort:
            self._signal_all(signal.SIGQUIT)

    def _stop(self) -> None:
        """Drain all workers and start no more."""
        if not self._stopping:
            self._stopping = True
            self._kill_at = time.monotonic() + self.end_timeout_s + KILL_AFTER_S
            self._due.clear()
            self.on_stop()
            self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self._children:  # no other process can have one of these ids before waitpid() returned it
            os.kill(pid, number)


@contextlib.contextmanager
def _signals_as_bytes() -> Iterator[tuple[int, int]]:
    """Open a pipe from which the number of each signal that arrives can be read. Restore the handlers at the end."""
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)
    numbers = [*stop_signals(), signal.SIGCHLD]
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
