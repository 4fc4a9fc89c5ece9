"""The server: it listens, completes handshakes, and runs the test's handler for each request."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from tests.support.scripted_upstream.connection import Connection
from tests.support.scripted_upstream.exchange import Exchange, Gone

__all__ = ["Handler", "Upstream"]

BACKLOG = 4096  # a crowd of clients may arrive before the loop accepts the first (the kernel caps it at somaxconn)
HANDSHAKE_TIMEOUT_S = 10.0

Handler = Callable[[Exchange], Awaitable[None]]


class Upstream:
    """The server. `start()` after `close()` listens on the same port, as a restart does.

    `ssl_context` belongs to this server: its ALPN is set to `protocols` (none offered means HTTP/1.1).
    `handler` may be replaced at any time.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        ssl_context: ssl.SSLContext,
        protocols: Sequence[str] = ("h2", "http/1.1"),
        max_concurrent_streams: int = 100,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        if protocols:
            ssl_context.set_alpn_protocols(protocols)
        self.handler = handler
        self.max_concurrent_streams = max_concurrent_streams
        self.host = host
        self.port = port
        #: TLS connections ever completed.
        self.connections = 0
        #: All requests ever received, in order.
        self.exchanges: list[Exchange] = []
        #: Exceptions of handlers, and violations of HTTP by clients. A test that causes them clears this.
        self.failures: list[BaseException] = []
        self._ssl_context = ssl_context
        self._open: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def open_connections(self) -> int:
        return len(self._open)

    async def start(self) -> None:
        """Listen, on any free port unless one was given or used before."""
        self._listener = socket.create_server((self.host, self.port), backlog=BACKLOG)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._acceptor = self._spawn(self._accept())

    async def close(self) -> None:
        """End everything without waiting for clients; raise the first failure, if there was one."""
        self._acceptor.cancel()
        await asyncio.wait([self._acceptor])  # by then every handshake task has begun, and owns its socket
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(connection.close(grace_s=0) for connection in self._open))
        if self.failures:
            raise self.failures[0]

    def opened(self, connection: "Connection") -> int:
        """Count a connection whose handshake is complete, and return its number."""
        self._open.add(connection)
        self.connections += 1
        return self.connections - 1

    def lost(self, connection: "Connection") -> None:
        self._open.discard(connection)

    def received(self, exchange: Exchange) -> None:
        """Record a request and start its handler."""
        self.exchanges.append(exchange)
        self._spawn(self._handle(exchange))

    async def _accept(self) -> None:
        # Not loop.create_server(), which hides connections until their handshake is over: close() could not end them.
        loop = asyncio.get_running_loop()
        while True:
            accepted, _ = await loop.sock_accept(self._listener)
            self._spawn(self._handshake(accepted))

    async def _handshake(self, accepted: socket.socket) -> None:
        # asyncio sets this only on sockets that it made itself.
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A client that leaves here or refuses the certificate is a case of a test, not a failure.
        with suppress(OSError):
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: Connection(self, accepted),
                accepted,
                ssl=self._ssl_context,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            )

    async def _handle(self, exchange: Exchange) -> None:
        try:
            await self.handler(exchange)
        except Exception:
            if not exchange.gone.is_set():
                exchange.abort_connection()  # otherwise the client would wait for its time-out
            raise

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error and not isinstance(error, Gone):
            self.failures.append(error)
