"""Drive libcurl's multi interface from the event loop, and notice idle connections that fal has closed.

Strategy. :class:`CurlLoop` keeps Tornado's :class:`~tornado.curl_httpclient.CurlAsyncHTTPClient` and replaces how it
waits: sockets wait in a :class:`~tornado_fal_proxy.upstream.poller.Poller`, timers are rounded up so that thousands of
transfers wake together, and a crowd of new handles makes libcurl run once.

A paid call that is written to a pooled connection which fal has closed meanwhile is lost, because it must not be sent
again. libcurl checks a pooled connection at most once a second, so the idle ones are watched here as well.

No transfer and no rule of the relay is known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import time
from collections.abc import Iterable
from typing import Any

import pycurl
from tornado.curl_httpclient import CurlAsyncHTTPClient

from tornado_fal_proxy._sweep import MAX_TURN_S
from tornado_fal_proxy.upstream.poller import Poller

__all__ = ["CurlLoop"]

logger = logging.getLogger("tornado_fal_proxy")

# Limits how exactly libcurl is woken. It wakes each transfer once a second: in steps of this many milliseconds
# thousands of them wake together. Nothing that libcurl times (connecting, trying the next address) needs to be more
# exact. Steps of 20 ms cost twice as much.
TIMER_STEP_MS = 100
# Limits how late libcurl notices that bytes have ended an idle connection over HTTP/2. It answers a wrong frame with
# GOAWAY, reads nothing more, and would look at the connection again after a second.
SECOND_LOOK_S = 0.02
# Limits how often the kernel is asked which idle connections were closed: less often than calls come under load.
REFRESH_INTERVAL_S = 0.001


class CurlLoop(CurlAsyncHTTPClient):
    """Run libcurl on the current asyncio loop. A subclass may override the methods that begin with ``on_idle``."""

    def initialize(self) -> None:  # type: ignore[override]
        """Begin to wait for libcurl's sockets. Needs a running loop."""
        self._loop = asyncio.get_running_loop()
        self._run_is_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._refresh_at = 0.0
        self._unserved: set[int] = set()  # sockets that were ready when a turn was over
        self._poller = Poller() if hasattr(select, "epoll") else None
        if self._poller is not None:
            self._loop.add_reader(self._poller.fileno(), self._serve_sockets)
        super().initialize()

    def connections(self) -> int:
        """Count the connections that are open, as far as that can be known: 0 without epoll."""
        return 0 if self._poller is None else self._poller.count()

    def on_idle_closed(self, local_ports: Iterable[int]) -> None:
        """Handle that the peer has closed idle connections, which leave from these ports."""

    def on_idle_bytes(self, local_port: int) -> None:
        """Handle that bytes have come on the idle connection that leaves from this port."""

    def refresh_idle(self, now: float) -> None:
        """Ask the kernel which idle connections were closed, before a new call may get one of them."""
        if self._poller is not None and now >= self._refresh_at:
            self._refresh_at = now + REFRESH_INTERVAL_S
            self._ready_sockets()

    def run_soon(self) -> None:
        """Let libcurl act in the loop's next turn."""
        if not self._run_is_due:
            self._run_is_due = True
            self._loop.call_soon(self._run)

    def close(self) -> None:
        """Close all connections, and stop waiting."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        super().close()
        if self._poller is not None:
            self._loop.remove_reader(self._poller.fileno())
            self._poller.close()

    # Sockets.

    def _handle_socket(self, event: int, fd: int, multi: Any, data: Any) -> None:
        """Register or forget a socket of libcurl's (SOCKETFUNCTION, as Tornado names it)."""
        if self._poller is None:
            super()._handle_socket(event, fd, multi, data)
        else:
            if self._poller.register(event, fd):
                self._loop.call_later(SECOND_LOOK_S, self._look_again, fd)

    def _look_again(self, fd: int) -> None:
        if not self._is_closed:
            self._act(fd, pycurl.CSELECT_IN)
            self._finish_pending_requests()

    def _serve_sockets(self) -> None:
        """Let libcurl act on the sockets that are ready, for MAX_TURN_S.

        The kernel reports the others again in the loop's next turn. They come first then.
        """
        active = self._ready_sockets()
        if self._unserved:
            active.sort(key=lambda item: item[0] not in self._unserved)
            self._unserved = set()
        ends = time.perf_counter() + MAX_TURN_S
        for n, (fd, action) in enumerate(active, 1):
            self._act(fd, action)
            if n < len(active) and time.perf_counter() >= ends:
                self._unserved = {fd for fd, _ in active[n:]}
                break
        if active:
            self._finish_pending_requests()

    def _ready_sockets(self) -> list[tuple[int, int]]:
        """Return the sockets on which libcurl has to act, and report the idle ones that were closed."""
        assert self._poller is not None
        active, closed, unread = self._poller.ready()
        ports = set()
        for fd in closed:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as duplicate:
                ports.add(duplicate.getsockname()[1])
                # libcurl 8.23 takes an HTTP/2 connection that TLS has ended for alive until both sides have closed it.
                # No response can come on this one any more.
                duplicate.shutdown(socket.SHUT_WR)
        if ports:
            self.on_idle_closed(ports)
        for fd in unread:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as duplicate:
                self.on_idle_bytes(duplicate.getsockname()[1])
        return active

    def _act(self, fd: int, action: int) -> None:
        try:
            self._multi.socket_action(fd, action)
        except pycurl.error as exc:
            logger.error("libcurl: the multi interface failed: %s", exc)

    # Timers.

    def _set_timeout(self, msecs: int) -> None:
        """Run libcurl in so many milliseconds, never if below zero (TIMERFUNCTION, as Tornado names it).

        Each added handle asks for zero, and of a crowd's requests in one turn of the loop one is enough. A timer that
        runs already and is early enough stays, because libcurl says then what comes next.
        """
        if msecs == 0:
            self.run_soon()
        elif msecs > 0:
            at = self._loop.time() + max(msecs, TIMER_STEP_MS) / 1000
            if self._timer is not None:
                if self._timer.when() <= at:
                    return
                self._timer.cancel()
            self._timer = self._loop.call_at(at, self._handle_timeout)

    def _run(self) -> None:
        self._run_is_due = False
        if not self._is_closed:
            self._act(pycurl.SOCKET_TIMEOUT, 0)
            self._finish_pending_requests()

    def _handle_timeout(self) -> None:
        self._timer = None
        if not self._is_closed:
            super()._handle_timeout()
