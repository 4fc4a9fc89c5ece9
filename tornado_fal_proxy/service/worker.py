"""A process that serves: its slot on the scoreboard, and the way it learns of a shutdown.

Strategy. :class:`Worker` is one of several processes and obeys its parent. :class:`SingleProcess` is the only process
of a service and obeys every signal. Both offer the same methods, and the code that serves need not distinguish them.
The protocol between parent and worker is described in :mod:`~tornado_fal_proxy.service.supervisor`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass

from tornado_fal_proxy.service.scoreboard import Scoreboard

__all__ = ["PID_FORMAT", "STOP_SIGNALS", "Shutdown", "SingleProcess", "Worker", "log_hangup", "stop_signals"]

logger = logging.getLogger("tornado_fal_proxy")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# The format of a worker's process id on the ready pipe.
PID_FORMAT = "i"


def stop_signals() -> list[signal.Signals]:
    """Return the signals that stop the service: without SIGHUP if it was ignored at the start, as nohup does."""
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def log_hangup() -> None:
    """Log that SIGHUP ends the service, which somebody may have sent to have the options read again."""
    logger.warning("SIGHUP: the service ends, because it has no file to read again (see --config), or is the sandbox")


class Shutdown:
    """The shutdown of a process, in two steps: ``requested`` is to drain, ``forced`` is to abort what is left."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()

    def request(self) -> None:
        """Drain: finish the calls in flight, then end."""
        self.requested.set()

    def escalate(self) -> None:
        """Drain, or abort if a drain was requested before."""
        (self.forced if self.requested.is_set() else self.requested).set()

    def force(self) -> None:
        """Abort all calls and end."""
        self.requested.set()
        self.forced.set()


@dataclass(frozen=True)
class _Process:
    """A process that serves, with its slot on the scoreboard."""

    slot: int
    scoreboard: Scoreboard

    def set_connections(self, connections: int | None) -> None:
        """Show the others how many connections this process has; None means that it accepts no more."""
        self.scoreboard.set_connections(self.slot, connections)

    def fewest_connections(self) -> int | None:
        """Return the least number of connections that another process has; None if there is no other."""
        return self.scoreboard.fewest_connections(self.slot)


@dataclass(frozen=True)
class SingleProcess(_Process):
    """The only process of a service, which has no parent: each step of its life calls a function."""

    on_ready: Callable[[], None]
    on_stop: Callable[[], None]
    on_alive: Callable[[], None]

    def handle_signals(self, shutdown: Shutdown, on_hangup: Callable[[], object] | None) -> None:
        """Request a shutdown at the first signal, escalate at the second. Needs a running loop.

        SIGHUP calls ``on_hangup`` instead, if there is one.
        """

        def end_at_hangup() -> None:
            log_hangup()
            shutdown.escalate()

        handlers = {signal.SIGQUIT: shutdown.force, signal.SIGHUP: on_hangup or end_at_hangup}
        for number in stop_signals():
            asyncio.get_running_loop().add_signal_handler(number, handlers.get(number, shutdown.escalate))

    def ready(self) -> None:
        """Report that calls are accepted."""
        self.on_ready()

    def heartbeat(self) -> None:
        """Report that the loop runs."""
        self.on_alive()

    def stopping(self) -> None:
        """Report that the drain begins."""
        self.on_stop()


@dataclass(frozen=True)
class Worker(_Process):
    """One of several processes, in the process itself: its slot, and its ends of the pipes to the parent.

    ``lifeline`` is at its end once the parent has ended, and ``ready_pipe`` takes the worker's process id.
    """

    lifeline: int
    ready_pipe: int

    def handle_signals(self, shutdown: Shutdown, on_hangup: Callable[[], object] | None) -> None:
        """Obey the parent's signals from now on, and drain once the parent has ended. Needs a running loop.

        SIGHUP calls ``on_hangup``, if there is one.
        """
        loop = asyncio.get_running_loop()
        if on_hangup is not None:
            loop.add_signal_handler(signal.SIGHUP, on_hangup)
        loop.add_signal_handler(signal.SIGTERM, shutdown.request)
        loop.add_signal_handler(signal.SIGQUIT, shutdown.force)

        def on_orphaned() -> None:
            loop.remove_reader(self.lifeline)
            logger.error("parent process ended: worker %d drains and ends", os.getpid())
            shutdown.request()

        loop.add_reader(self.lifeline, on_orphaned)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def ready(self) -> None:
        """Report to the parent that calls are accepted."""
        with contextlib.suppress(OSError):  # the parent has ended
            os.write(self.ready_pipe, struct.pack(PID_FORMAT, os.getpid()))

    def heartbeat(self) -> None:
        """Show the parent that the loop runs."""
        self.scoreboard.heartbeat(self.slot)

    def stopping(self) -> None:
        """Do nothing, because the parent began the drain."""

    @property
    def is_orphan(self) -> bool:
        """Return whether the parent has ended."""
        return bool(select.select([self.lifeline], [], [], 0)[0])
