"""The connections of one process: taken fairly, shed when open files run out, and drained at the end.

Strategy. Workers share their listening sockets, so that a connection waits for whoever is there to take it, and one
that nobody has taken yet survives the death of any worker. Left alone, the worker that wakes first takes all that wait.
So a worker that has more connections than another stands back for :data:`STAND_BACK_S`; whatever still waits then
nobody else wanted, and it takes some of it.

The kernel gives a new connection the lowest free descriptor. One that gets a number close to the limit of open files is
answered 503 and closed. Half of what is kept back so is for connections to fal: when the other half is taken too, or
accepting fails, nothing is accepted for :data:`PAUSE_S`. (To try at once would keep the loop busy, for a listening
socket stays readable.)

To drain is to stop listening and to tell every caller ``connection: close`` with its next answer. A connection that has
carried nothing for :data:`IDLE_GRACE_S` is closed without a word, which its caller must expect at any time.

One timer looks at all connections: a caller that says nothing, or never comes to the end of a head, is closed.

It relays nothing and answers nothing by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import sys
from collections.abc import Callable, Iterable, MutableSet
from typing import Any, Protocol, cast

from tornado.httpserver import HTTPServer, _HTTPRequestContext
from tornado.iostream import IOStream

from tornado_fal_proxy.connection import CallerConnection, CallerStream, close_after

__all__ = ["LISTEN_BACKLOG", "Places", "Server", "open_files", "reserve"]

logger = logging.getLogger("tornado_fal_proxy")

# A crowd that arrives at once waits here for its turn; the kernel caps it at net.core.somaxconn.
LISTEN_BACKLOG = 4096
# What is read at once. Tornado's 64 kB are cleared for each of two reads, and a request has less than a thousand bytes.
READ_BYTES = 16 * 1024
# How long a head may take from when a part of it is here, or on a connection that never had a request.
HEAD_TIMEOUT_S = 60.0
# How long a connection is kept without a request: longer than proxies in front keep theirs (nginx 60 s, Google's load
# balancer 600 s), so that none of them sends a call to one that is being closed.
KEPT_TIMEOUT_S = 620.0
LOOK_AT_CALLERS_S = 5.0
# Accepted in one turn of the loop, so that calls in flight get theirs.
ACCEPT_BATCH = 128
# Several turns of another worker's loop, and nothing to a caller.
STAND_BACK_S = 0.001
# How long to accept nothing when that failed for want of files, and how often to log it.
PAUSE_S, LOG_INTERVAL_S = 0.1, 60.0
# Of the files that may be open a sixteenth, within bounds, is not for callers.
LEAST_RESERVE, MOST_RESERVE, RESERVED_PART = 16, 256, 16
# How long a connection that is answered 503 may take to send its request.
SHED_S = 5.0
# A caller that sends its next request this long after an answer, when draining has begun, still has it served.
IDLE_GRACE_S = 1.0
# How long answers that are being written when the process ends may take, and how often connections are looked at.
CLOSE_GRACE_S, CLOSE_POLL_S = 1.0, 0.02


class Places(Protocol):
    """What a server must know of the others that listen on the same sockets."""

    def occupy(self, connections: int | None) -> None:
        """Tell them how many connections this one has; None when it takes no more."""

    def fewest(self) -> int | None:
        """The least number that any of the others has, None when there is no other."""


class Server(HTTPServer):
    """An HTTP server of one worker."""

    _places: Places
    _shed: MutableSet[IOStream]
    _look: asyncio.TimerHandle | None = None

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        super().initialize(*args, **{"chunk_size": READ_BYTES} | kwargs)
        self.conn_params.header_timeout = None  # see _look_at_callers
        self._serve_below = open_files() - reserve(open_files())
        self._accept_below = open_files() - reserve(open_files()) // 2
        self._listeners: list[socket.socket] = []
        self._return: asyncio.TimerHandle | None = None
        self._log_again_at = 0.0
        self._open = 0

    # Connections come.

    def listen_on(self, sockets: Iterable[socket.socket], places: Places, shed: MutableSet[IOStream]) -> None:
        """Take connections from ``sockets`` from now on. Those put into ``shed`` the application must answer 503."""
        self._listeners += sockets
        self._places, self._shed = places, shed
        self._places.occupy(self._open)
        self._listen()

    def _listen(self) -> None:
        for listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._on_waiting, listener)

    def _on_waiting(self, listener: socket.socket) -> None:
        allowed = fair_share(self._open, self._places.fewest())
        if allowed > 0:
            self._accept(listener, allowed)
        else:
            self._stand_back(STAND_BACK_S, self._take_what_still_waits)

    def _stand_back(self, seconds: float, then: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener)
        if self._return is not None:
            self._return.cancel()
        self._return = loop.call_later(seconds, then)

    def _take_what_still_waits(self) -> None:
        self._listen()
        for listener in self._listeners:
            self._accept(listener, 1 + self._open // 4)

    def _accept(self, listener: socket.socket, count: int) -> None:
        """Take up to ``count`` of the connections that wait."""
        for _ in range(count):
            try:
                connection, address = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as exc:
                self._log_shedding(f"cannot accept connections: {exc.strerror}")
                self._stand_back(PAUSE_S, self._listen)
                return
            stream = CallerStream(
                connection, max_buffer_size=self.max_buffer_size, read_chunk_size=self.read_chunk_size
            )
            if connection.fileno() >= self._serve_below:
                self._log_shedding("too few open files are left: new connections are answered 503")
                self._shed.add(stream)
                asyncio.get_running_loop().call_later(SHED_S, stream.close)
            self.handle_stream(stream, address)
            if connection.fileno() >= self._accept_below:
                self._stand_back(PAUSE_S, self._listen)
                return

    def _log_shedding(self, what: str) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._log_again_at:
            self._log_again_at = now + LOG_INTERVAL_S
            logger.error("%s; %d connections, limit of open files %d", what, self._open, open_files())

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        self._open += 1
        self._tell()
        context = _HTTPRequestContext(stream, address, self.protocol, self.trusted_downstream)
        connection = CallerConnection(stream, self.conn_params, context)
        self._connections.add(connection)
        connection.start_serving(self)
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(LOOK_AT_CALLERS_S, self._look_at_callers)

    def on_close(self, server_conn: object) -> None:
        super().on_close(server_conn)
        self._open -= 1
        self._tell()

    def _look_at_callers(self) -> None:
        """Close the connections of those who do not speak, or too slowly."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self._callers):
            if connection.waits_since is None:
                continue
            if connection.has_begun and connection.head_since is None:
                connection.head_since = now
            since, limit = connection.waits_since, KEPT_TIMEOUT_S if connection.served else HEAD_TIMEOUT_S
            if connection.head_since is not None:
                since, limit = connection.head_since, HEAD_TIMEOUT_S
            if now - since > limit:
                connection.stream.close()
        self._look = loop.call_later(LOOK_AT_CALLERS_S, self._look_at_callers) if self._open else None

    @property
    def _callers(self) -> set[CallerConnection]:
        return cast(set[CallerConnection], self._connections)

    def _tell(self) -> None:
        if self._listeners:
            self._places.occupy(self._open)

    # And go.

    @property
    def in_flight(self) -> int:
        """Connections that carry a request."""
        return sum(connection.is_busy for connection in self._callers)

    def stop(self) -> None:
        """Take what waits to be accepted, and listen no longer."""
        super().stop()
        listeners, self._listeners = self._listeners, []
        if not listeners:
            return
        self._places.occupy(None)
        if self._return is not None:
            self._return.cancel()
        for listener in listeners:
            asyncio.get_running_loop().remove_reader(listener)
            self._accept(listener, LISTEN_BACKLOG)
            listener.close()

    async def drain(self) -> None:
        """Return when the last connection has gone. Call :meth:`stop` first."""
        self.conn_params.no_keep_alive = True  # for requests that come from here on
        for connection in self._callers:
            if connection.is_busy and connection.request is not None:
                close_after(connection.request)
        idle_since: dict[object, float] = {}
        while self._open:
            await asyncio.sleep(CLOSE_POLL_S)
            now = asyncio.get_running_loop().time()
            for connection in list(self._callers):
                if connection.is_busy or connection.stream.closed():
                    idle_since.pop(connection, None)
                elif (
                    now - idle_since.setdefault(connection, now) >= IDLE_GRACE_S
                    and not connection.has_begun
                    and not _has_unread(connection.stream)
                ):
                    connection.stream.close()

    async def end(self) -> None:
        """Close all connections, as soon as what handlers write now has left or CLOSE_GRACE_S are over."""
        for _ in range(round(CLOSE_GRACE_S / CLOSE_POLL_S)):
            await asyncio.sleep(CLOSE_POLL_S)
            if not any(connection.stream.writing() for connection in self._callers):
                break
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.close_all_connections(), CLOSE_GRACE_S)


def fair_share(mine: int, fewest: int | None) -> int:
    """How many connections a worker that has ``mine`` may take while another has ``fewest``.

    A quarter more than that one, and one: a crowd is then taken in a few turns of each.
    """
    return ACCEPT_BATCH if fewest is None else min(1 + fewest + fewest // 4 - mine, ACCEPT_BATCH)


def _has_unread(stream: IOStream) -> bool:
    """Whether bytes of the caller's wait in the kernel: a request that has just come."""
    try:
        return bool(stream.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False


def open_files() -> int:
    """How many files this process may have open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def reserve(files: int) -> int:
    """How many of them callers do not get: for connections to fal, name look-ups, and 503s."""
    return min(max(files // RESERVED_PART, LEAST_RESERVE), MOST_RESERVE)
