"""The server: it listens, encrypts, and follows the script for each request."""

import asyncio
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Self, TypeVar, cast

from tests.support.bad_upstream.codecs import Http1, Http2
from tests.support.bad_upstream.script import SETTINGS, Do, Request, Script, fine, frame

__all__ = ["BadUpstream"]

RST_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, zero seconds
# Limits the turns of the loop in which the proxy takes what was written: one to see it, others to pass it on.
TURNS = 4
T = TypeVar("T")


class BadUpstream:
    """The server. Use it with ``async with``; ``script`` may be replaced at any time."""

    def __init__(self, context: ssl.SSLContext, protocol: str, greeting: bytes | None = None) -> None:
        context.set_alpn_protocols([protocol])
        self.script: Script | None = None
        #: What replaces ``script`` as soon as a request is about to get that.
        self.next_script: Script | None = None
        #: Whether the proxy gets each step by itself, or several at once.
        self.apart = False
        #: All requests ever seen, in order.
        self.requests: list[Request] = []
        self.connections = 0
        self.responded, self.next = asyncio.Event(), asyncio.Event()
        self.context, self.protocol = context, protocol
        self.greeting = greeting
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[_Connection] = set()
        self._busy = 0
        self._failures: list[Exception] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in list(self._open):
            connection.transport.abort()
        await self._server.wait_closed()
        self._failures += [result for result in results if isinstance(result, Exception)]
        if self._failures:
            raise self._failures[0]

    @property
    def address(self) -> str:
        return "{}:{}".format(*self._server.sockets[0].getsockname())

    async def turn(self) -> None:
        """Let the proxy, in the same loop, take what was written."""
        for _ in range(TURNS):
            await asyncio.sleep(0)

    async def scripts_are_over(self) -> None:
        """Wait until each script was followed to its end, or waits for the next request."""
        while self._busy:
            await asyncio.sleep(0)
        await self.turn()

    def opened(self, connection: "_Connection") -> None:
        self._open.add(connection)
        self.connections += 1

    def lost(self, connection: "_Connection") -> None:
        self._open.discard(connection)

    def received(self, connection: "_Connection", request: Request) -> None:
        """Note a request, and follow the script unless one waits for this request."""
        self.requests.append(request)
        if connection.again is not None:
            connection.again.set_result(request)
            connection.again = None
            return
        script = self.script if connection.http2 == (self.protocol == "h2") else None
        if self.next_script is not None:
            self.script, self.next_script = self.next_script, None
        task = asyncio.create_task(self._follow(connection, request, script or fine(request)))
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._failures.append(error)

    async def _follow(self, connection: "_Connection", request: Request, script: Script) -> None:
        self._busy += 1
        try:
            if script[0] is not Do.EARLY:
                await request.whole.wait()
            for step in script:
                if step is Do.AGAIN:
                    request = await self._at_rest(connection.next_request())
                elif isinstance(step, Do):
                    await self._do(connection, step)
                else:
                    connection.write(step if isinstance(step, bytes) else step(request.stream))
                if self.apart:
                    connection.flush()
                    await self.turn()
            connection.flush()
        finally:
            self._busy -= 1

    async def _do(self, connection: "_Connection", step: Do) -> None:
        connection.flush()
        match step:
            case Do.TURN:
                await self.turn()
            case Do.RESPONDED:
                await self._at_rest(self.responded.wait())
            case Do.NEXT:
                await self._at_rest(self.next.wait())
            case Do.CLOSE | Do.CLOSE_NOTIFY:
                connection.close_notify()
                if step is Do.CLOSE:
                    connection.transport.write_eof()
            case Do.FIN:
                connection.transport.write_eof()
            case Do.RESET:
                connection.reset()

    async def _at_rest(self, event: Awaitable[T]) -> T:
        """Wait for what is not the upstream's own."""
        self._busy -= 1
        try:
            return await event
        finally:
            self._busy += 1


class _Connection(asyncio.Protocol):
    """One TLS connection, encrypted in memory. Written bytes leave with :meth:`flush`, at the latest at a Do."""

    transport: asyncio.Transport
    again: asyncio.Future[Request] | None = None
    http2 = False

    def __init__(self, upstream: BadUpstream) -> None:
        self._upstream = upstream
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = upstream.context.wrap_bio(self._in, self._out, server_side=True)
        self._take: Callable[[bytes], None] | None = None
        self._ended = False

    def write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest and not self._ended:
            rest = rest[self._tls.write(rest) :]
        if self._upstream.apart:
            self.flush()

    def flush(self) -> None:
        if self._out.pending:
            content = self._out.read()
            if not self.transport.is_closing():  # else the peer has left, which is no failure
                self.transport.write(content)

    async def next_request(self) -> Request:
        """Wait for a request to which the running script responds too."""
        self.flush()
        self.again = asyncio.get_running_loop().create_future()
        request = await self.again
        await request.whole.wait()
        return request

    def close_notify(self) -> None:
        self._ended = True  # what is written from now on gets lost
        with suppress(ssl.SSLError):  # the peer's own has not come yet
            self._tls.unwrap()
        self.flush()

    def reset(self) -> None:
        raw = cast(socket.socket, self.transport.get_extra_info("socket"))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._upstream.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream.lost(self)

    def data_received(self, data: bytes) -> None:
        self._in.write(data)
        try:
            if self._take is None:
                self._begin()
            while content := self._tls.read(65536):
                assert self._take is not None
                self._take(content)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:  # the peer has closed, or does not trust the certificate
            self.transport.close()
        self.flush()

    def _begin(self) -> None:
        self._tls.do_handshake()
        self.http2 = self._tls.selected_alpn_protocol() == "h2"
        greeting = self._upstream.greeting
        if greeting is None:
            greeting = frame(SETTINGS, 0, stream=0)(0) if self.http2 else b""
        self.write(greeting)
        received = partial(self._upstream.received, self)
        codec = Http2(received, self.write) if self.http2 else Http1(received)
        self._take = codec.receive
