"""The connections of one process: accepted in a fair share, shed when open files run out, drained at the end.

Strategy. Workers share their listening sockets: any of them can accept a connection, and one that nobody has accepted
yet survives the death of any worker. Without more, the worker that wakes first would accept all that wait. So a worker
that has more connections than another stands back for :data:`STAND_BACK_S`; it then accepts some of those that still
wait, because nobody else did.

The kernel gives a new connection the lowest free descriptor. A connection whose descriptor is close to the limit of
open files is answered 503 and closed. Half of the files that are reserved in this way are for connections to fal: when
the other half is used up too, or accepting fails, nothing is accepted for :data:`PAUSE_S`. (A listening socket stays
readable, so trying again at once would keep the loop busy.)

To drain is to stop listening and to send every client ``connection: close`` with its next response. A connection that
has carried nothing for :data:`IDLE_GRACE_S` is closed without notice, which a client must expect at any time. One that
has carried a part of a head is closed after :data:`PART_GRACE_S`, unless the rest comes before that.

One timer sweeps over all connections. It closes those whose client sends nothing, and answers those whose client never
finishes a head or a body.

The server relays nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterable, MutableSet
from functools import partial
from typing import Any, Protocol, cast

from tornado.httpserver import HTTPServer, _HTTPRequestContext
from tornado.iostream import IOStream

from tornado_fal_proxy._sweep import Sweep, in_turns
from tornado_fal_proxy.relay.backend import BODY_WINDOW_BYTES, BODY_WINDOW_S
from tornado_fal_proxy.service.connection import ClientConnection, ClientStream, Request, close_after
from tornado_fal_proxy.service.limits import max_open_files, reserved_files
from tornado_fal_proxy.service.request_head import RequestFault, RequestTooSlow

__all__ = [
    "CLOSE_GRACE_S",
    "CLOSE_POLL_S",
    "LISTEN_BACKLOG",
    "MAX_OTHER_BODY_BYTES",
    "FaultLog",
    "Neighbours",
    "NoNeighbours",
    "Server",
    "fair_share",
]

logger = logging.getLogger("tornado_fal_proxy")

# Connections that the kernel keeps until they are accepted: a crowd that arrives at once. The kernel's own limit is
# net.core.somaxconn, 4096 by default.
LISTEN_BACKLOG = 4096
# Bytes that are read at once. Tornado's 64 kB would be cleared for each of two reads, and few requests have a thousand.
READ_BYTES = 16 * 1024
# Limits a body that no handler has asked for more of: requests beside the route need none, and it is kept whole.
MAX_OTHER_BODY_BYTES = 4096
# Time for a head, from its first part on, or from the start of a connection that never had a request: as
# long as nginx waits by default.
HEAD_TIMEOUT_S = 60.0
# Time for which a connection is kept without a request: longer than by proxies in front (nginx 60 s, Google's load
# balancer 600 s), so none of them sends a call on a connection that is being closed.
KEEP_ALIVE_TIMEOUT_S = 620.0
# Time between two sweeps over the connections: short beside the two limits above.
SWEEP_INTERVAL_S = 5.0
# Connections that are accepted in one turn of the loop. Calls in flight wait for so many, and no longer.
ACCEPT_BATCH = 128
# Time for which a worker leaves connections to others: several turns of another's loop, and nothing to a client.
STAND_BACK_S = 0.001
# Time without accepting when open files ran out, in which other calls may end; and between two log lines about it.
PAUSE_S, LOG_INTERVAL_S = 0.1, 60.0
# Time in which a client that is answered 503 must have sent its request: each such connection holds a reserved file.
SHED_S = 5.0
# Time without a request after which a drain closes a connection: a client that sends its next request within this time
# after a response still has it served.
IDLE_GRACE_S = 1.0
# The same where a part of that request's head has come: the rest, a few packets at most, may be lost and sent again
# twice, and no client can delay the end for longer.
PART_GRACE_S = 5.0
# Time for responses that are being written when the process ends, and between two checks whether they have left.
CLOSE_GRACE_S, CLOSE_POLL_S = 1.0, 0.02


class Neighbours(Protocol):
    """The connection counts of this server and of the others that listen on the same sockets."""

    def set_connections(self, connections: int | None) -> None:
        """Show the others how many connections this one has; None means that it accepts no more."""

    def fewest_connections(self) -> int | None:
        """Return the least number of connections that another has; None if there is no other."""


class NoNeighbours:
    """The neighbours of a server whose few connections need not be spread."""

    def set_connections(self, connections: int | None) -> None:
        """Show them to nobody."""

    def fewest_connections(self) -> int | None:
        """Return None."""
        return None


class FaultLog(Protocol):
    """Describe what the server needs of the application beside Tornado's interface."""

    def record_fault(self, request: Request, fault: RequestFault, sent_bytes: int) -> None:
        """Log and count a request that was answered without a handler."""


class Server(HTTPServer):
    """The HTTP server of one process. Its application has the method of :class:`FaultLog`."""

    _neighbours: Neighbours
    _shed: MutableSet[IOStream]

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        super().initialize(*args, **{"chunk_size": READ_BYTES, "max_body_size": MAX_OTHER_BODY_BYTES} | kwargs)
        self.conn_params.header_timeout = None  # _end_silent keeps the time
        limit = max_open_files()
        self._serve_below = limit - reserved_files(limit)
        self._accept_below = limit - reserved_files(limit) // 2
        self._listeners: list[socket.socket] = []
        self._resume: asyncio.TimerHandle | None = None
        self._log_again_at = 0.0
        self._open = 0
        self._sweep = Sweep(SWEEP_INTERVAL_S, self._end_silent)

    # Connections come.

    def listen_on(self, sockets: Iterable[socket.socket], neighbours: Neighbours, shed: MutableSet[IOStream]) -> None:
        """Accept connections from ``sockets`` from now on. The application must answer 503 on those put into ``shed``.

        Needs a running loop.
        """
        self._listeners += sockets
        self._neighbours, self._shed = neighbours, shed
        self._neighbours.set_connections(self._open)
        self._listen()

    def _listen(self) -> None:
        for listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._on_waiting, listener)

    def _on_waiting(self, listener: socket.socket) -> None:
        allowed = fair_share(self._open, self._neighbours.fewest_connections())
        if allowed > 0:
            self._accept(listener, allowed)
        else:
            self._stand_back(STAND_BACK_S, self._accept_leftovers)

    def _stand_back(self, seconds: float, then: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener)
        if self._resume is not None:
            self._resume.cancel()
        self._resume = loop.call_later(seconds, then)

    def _accept_leftovers(self) -> None:
        self._listen()
        for listener in self._listeners:
            self._accept(listener, 1 + self._open // 4)

    def _accept(self, listener: socket.socket, count: int) -> None:
        """Accept up to ``count`` of the connections that wait."""
        for _ in range(count):
            try:
                connection, address = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as exc:
                self._log_shortage(f"cannot accept connections: {exc.strerror}")
                self._stand_back(PAUSE_S, self._listen)
                return
            stream = ClientStream(
                connection, max_buffer_size=self.max_buffer_size, read_chunk_size=self.read_chunk_size
            )
            if connection.fileno() >= self._serve_below:
                self._log_shortage("too few open files are left: new connections are answered 503")
                self._shed.add(stream)
                asyncio.get_running_loop().call_later(SHED_S, stream.close)
            self.handle_stream(stream, address)
            if connection.fileno() >= self._accept_below:
                self._stand_back(PAUSE_S, self._listen)
                return

    def _log_shortage(self, event: str) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._log_again_at:
            self._log_again_at = now + LOG_INTERVAL_S
            logger.error(
                "%s, with %d connections and a limit of %d open files (raise LimitNOFILE in systemd or ulimit -n)",
                *(event, self._open, max_open_files()),
            )

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        """Serve a connection that was accepted."""
        self._open += 1
        self._show_connections()
        context = _HTTPRequestContext(stream, address, self.protocol, self.trusted_downstream)
        connection = ClientConnection(stream, self.conn_params, context, report_fault=self._report_fault)
        self._connections.add(connection)
        connection.start_serving(self)
        self._sweep.start()

    def _report_fault(self, request: Request, fault: RequestFault, sent_bytes: int) -> None:
        cast(FaultLog, self.request_callback).record_fault(request, fault, sent_bytes)

    def on_close(self, server_conn: object) -> None:
        """Forget a connection that was closed."""
        super().on_close(server_conn)
        self._open -= 1
        self._show_connections()

    def _end_silent(self) -> bool:
        """End connections whose client sends nothing, or a request too slowly. Return whether any are open."""
        in_turns(list(self._clients), partial(_end_if_silent, asyncio.get_running_loop().time()))
        return self._open > 0

    @property
    def _clients(self) -> set[ClientConnection]:
        return cast(set[ClientConnection], self._connections)

    def _show_connections(self) -> None:
        if self._listeners:
            self._neighbours.set_connections(self._open)

    # Connections go.

    @property
    def in_flight(self) -> int:
        """Return how many connections carry a request."""
        return sum(connection.is_busy for connection in self._clients)

    def stop(self) -> None:
        """Accept what waits to be accepted, then listen no longer."""
        super().stop()
        listeners, self._listeners = self._listeners, []
        if not listeners:
            return
        self._neighbours.set_connections(None)
        if self._resume is not None:
            self._resume.cancel()
        for listener in listeners:
            asyncio.get_running_loop().remove_reader(listener)
            self._accept(listener, LISTEN_BACKLOG)
            listener.close()

    async def drain(self) -> None:
        """Wait until the last connection is closed. Call :meth:`stop` first."""
        self.conn_params.no_keep_alive = True  # for requests that come from here on
        for connection in self._clients:
            if connection.is_busy and connection.request is not None:
                close_after(connection.request)
        idle_since: dict[object, float] = {}
        while self._open:
            await asyncio.sleep(CLOSE_POLL_S)
            now = asyncio.get_running_loop().time()
            for connection in list(self._clients):
                if connection.is_busy or connection.stream.closed():
                    idle_since.pop(connection, None)
                    continue
                grace_s = PART_GRACE_S if connection.has_part_of_head else IDLE_GRACE_S
                if now - idle_since.setdefault(connection, now) >= grace_s and not _has_unread(connection.stream):
                    connection.stream.close()

    async def close(self) -> None:
        """Close all connections as soon as everything written to them has left, after CLOSE_GRACE_S at the latest."""
        for _ in range(round(CLOSE_GRACE_S / CLOSE_POLL_S)):
            await asyncio.sleep(CLOSE_POLL_S)
            if not any(connection.stream.writing() for connection in self._clients):
                break
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.close_all_connections(), CLOSE_GRACE_S)

    async def end(self) -> None:
        """Serve the requests that have come, or come within CLOSE_GRACE_S on open connections, and close them all."""
        self.stop()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.drain(), CLOSE_GRACE_S)
        await self.close_all_connections()


def _end_if_silent(now: float, connection: ClientConnection) -> None:
    """End a connection whose client sends nothing, or a request too slowly."""
    request = connection.request
    if connection.waiting_since is None:
        if request is not None:
            request.check_body(now, BODY_WINDOW_S, BODY_WINDOW_BYTES)
        return
    if connection.has_part_of_head and connection.head_since is None:
        connection.head_since = now
    if connection.head_since is not None and request is not None:
        if now - connection.head_since > HEAD_TIMEOUT_S:
            request.fail(RequestTooSlow("The head of the request took too long to arrive."))
    elif now - connection.waiting_since > (KEEP_ALIVE_TIMEOUT_S if connection.has_served else HEAD_TIMEOUT_S):
        connection.stream.close()


def fair_share(mine: int, fewest: int | None) -> int:
    """Return how many connections a worker that has ``mine`` may accept while another has ``fewest``.

    It may come to a quarter and one more than that other has: a crowd is then accepted in a few turns of each.
    """
    return ACCEPT_BATCH if fewest is None else min(1 + fewest + fewest // 4 - mine, ACCEPT_BATCH)


def _has_unread(stream: IOStream) -> bool:
    """Return whether bytes of the client's wait in the kernel: a request that has just come."""
    try:
        return bool(stream.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False
