"""One TLS connection: bytes in, bytes out with backpressure, and the ways to end it."""

import asyncio
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import h2.exceptions
import h11

from tests.support.scripted_upstream.exchange import Exchange
from tests.support.scripted_upstream.http1 import Http1
from tests.support.scripted_upstream.http2 import Http2

if TYPE_CHECKING:
    from tests.support.scripted_upstream.server import Upstream

__all__ = ["Connection"]

WRITE_BUFFER_BYTES = 64 * 1024  # asyncio's default for TLS, 512 KiB, would hide a slow reader for longer
SLICE_BYTES = 256 * 1024  # asyncio encrypts and keeps all of one write, however large
RST_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, zero seconds


class Connection(asyncio.Protocol):
    """The protocol of one connection, which chooses its codec when the handshake is over."""

    transport: asyncio.Transport
    number: int

    def __init__(self, upstream: "Upstream", accepted: socket.socket) -> None:
        self.upstream = upstream
        self.exchanges_begun = 0
        self.unfinished: set[Exchange] = set()
        self._socket = accepted
        self._lost = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()

    def begin(self, exchange: Exchange) -> None:
        """Count a new exchange and run its handler."""
        self.exchanges_begun += 1
        self.unfinished.add(exchange)
        self.upstream.received(exchange)

    def finish(self, exchange: Exchange) -> None:
        """Note that the exchange is complete: the client may leave from now on."""
        self.unfinished.discard(exchange)

    def leave(self) -> None:
        """End every unfinished exchange, because the client has left."""
        while self.unfinished:
            self.unfinished.pop().leave()

    async def write(self, data: bytes) -> None:
        """Write no faster than the client reads."""
        for offset in range(0, len(data), SLICE_BYTES):
            self.transport.write(data[offset : offset + SLICE_BYTES])
            await self.drain()

    async def drain(self) -> None:
        await self._writable.wait()

    def reset(self) -> None:
        """Abort the connection with a TCP RST."""
        with suppress(OSError):  # the socket is closed already
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
        self.transport.abort()
        self.leave()

    async def close(self, grace_s: float) -> None:
        """Send close_notify, give the client `grace_s` to read what was written and to respond, then send FIN."""
        if not self.transport.is_closing():  # closing a TLS transport twice disables its abort()
            self.transport.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._lost.wait()
        self.transport.abort()
        await self._lost.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self.number = self.upstream.opened(self)
        chosen = transport.get_extra_info("ssl_object").selected_alpn_protocol()
        self._codec = Http2(self, self.upstream.max_concurrent_streams) if chosen == "h2" else Http1(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._codec.receive(data)
        except (h11.RemoteProtocolError, h2.exceptions.ProtocolError) as error:
            self.upstream.failures.append(error)
            self.reset()

    def eof_received(self) -> None:
        self.leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self.upstream.lost(self)
        self._lost.set()
        self._writable.set()
        self.leave()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()
