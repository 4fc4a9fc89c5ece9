"""Clients that cost little CPU, because they share the machine with the servers that they measure.

Each is one connection that sends and parses the bytes of HTTP/1.1. Many at once are asyncio protocols; a single one,
whose latency or throughput counts, is a blocking socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Sequence

from benchmarks.calls import BLOCK_BYTES, Call

__all__ = ["Client", "Wrong", "closed_loop", "open_clients", "read_big", "sequential", "unread"]

HOST = "127.0.0.1"
HEAD_END = b"\r\n\r\n"
RECEIVE_BYTES = 1 << 20
TIMEOUT_S = 60.0


class Wrong(Exception):
    """A result is not the expected one."""


class Reader:
    """A parser of one response after the other, from the bytes that arrive on a connection."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> tuple[int, bytes] | None:
        """Return status and body as soon as the response is complete, None before."""
        buffer = self._buffer = self._buffer + data if self._buffer else data
        end = buffer.find(HEAD_END)
        if end < 0:
            return None
        head = buffer[:end].lower()
        body: bytes | None
        mark = head.find(b"\r\ncontent-length:")
        if mark >= 0:
            length = int(head[mark + 17 :].split(b"\r\n", 1)[0])
            body = buffer[end + 4 : end + 4 + length]
            if len(body) < length:
                return None
        elif b"\r\ntransfer-encoding: chunked" in head:
            body = _unchunk(buffer[end + 4 :])
            if body is None:
                return None
        else:
            raise Wrong(f"a response of unknown length: {head[:200]!r}")
        self._buffer = b""
        return int(head[9:12]), body


def _unchunk(data: bytes) -> bytes | None:
    """Return the body of a chunked response, None while the last chunk is missing."""
    if not data.endswith(b"0\r\n\r\n"):
        return None
    body = b""
    while True:
        size, _, rest = data.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return body
        body, data = body + rest[:length], rest[length + 2 :]


def check(call: Call, response: tuple[int, bytes]) -> None:
    """Raise Wrong unless the response is the expected one."""
    if response != (200, call.response):
        raise Wrong(f"status {response[0]}, body {response[1][:300]!r}")


class Client(asyncio.Protocol):
    """One connection that sends ``call`` when it is open.

    It calls ``on_response`` after each expected response, and once with ``error`` set if it fails.
    """

    def __init__(self, call: Call, on_response: Callable[[Client], None]) -> None:
        self.call = call
        self.responded_at = 0.0
        self.error = ""
        self.closed = False
        self._on_response = on_response
        self._reader = Reader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.send()

    def send(self) -> None:
        self._transport.write(self.call.request)

    def data_received(self, data: bytes) -> None:
        try:
            if (response := self._reader.feed(data)) is None:
                return
            check(self.call, response)
        except Wrong as exc:
            self.fail(str(exc))
            return
        self.responded_at = time.perf_counter()
        self._on_response(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed and not self.responded_at:
            self.fail(f"connection lost: {exc}")

    def fail(self, error: str) -> None:
        if not self.closed:
            self.error = error
            self.close()
            self._on_response(self)

    def close(self) -> None:
        self.closed = True
        self._transport.abort()


async def open_clients(port: int, calls: Sequence[Call], on_response: Callable[[Client], None]) -> list[Client]:
    """Connect all at once and send their calls. A client that cannot connect is returned with its error."""
    loop = asyncio.get_running_loop()

    async def connect(call: Call) -> Client:
        client = Client(call, on_response)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await loop.create_connection(lambda: client, HOST, port)
        except OSError as exc:
            client.closed, client.error = True, f"{type(exc).__name__}: {exc}"
            on_response(client)
        return client

    return await asyncio.gather(*map(connect, calls))


async def closed_loop(port: int, calls: Sequence[Call], seconds: float) -> int:
    """Let each client repeat its call after each response. Return the number of expected responses, or raise Wrong."""
    count = 0
    end = time.perf_counter() + seconds
    running = len(calls)
    failures: list[str] = []
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_response(client: Client) -> None:
        nonlocal count, running
        if client.error:
            failures.append(client.error)
        else:
            count += 1
            if client.responded_at < end:
                client.send()
                return
            client.close()
        running -= 1
        if running == 0 and not over.done():
            over.set_result(None)

    await open_clients(port, calls, on_response)
    async with asyncio.timeout(seconds + TIMEOUT_S):
        await over
    if failures:
        raise Wrong(f"{len(failures)} of {len(calls)} clients failed, the first with: {failures[0]}")
    return count


def connect(port: int, *, receive_buffer: int | None = None) -> socket.socket:
    """Return a blocking connection. With a small ``receive_buffer`` the kernel keeps few bytes that are not read."""
    connected = socket.socket()
    if receive_buffer is not None:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connected.settimeout(TIMEOUT_S)
    connected.connect((HOST, port))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


def sequential(port: int, call: Call, count: int) -> list[float]:
    """Return the latencies in seconds of ``count`` calls, one after the other on one connection. Raise Wrong."""
    latencies = []
    with contextlib.closing(connect(port)) as client:
        for _ in range(count):
            reader = Reader()
            start = time.perf_counter()
            client.sendall(call.request)
            while (response := reader.feed(_receive(client))) is None:
                pass
            latencies.append(time.perf_counter() - start)
            check(call, response)
    return latencies


def _receive(client: socket.socket) -> bytes:
    data = client.recv(RECEIVE_BYTES)
    if not data:
        raise Wrong("the connection was closed")
    return data


def unread(port: int, call: Call, *, receive_buffer: int = 16 * 1024) -> socket.socket:
    """Return a client that has read the head and the first bytes of a stream, and reads no more. Raise Wrong."""
    client = connect(port, receive_buffer=receive_buffer)
    client.sendall(call.request)
    start = b""
    while HEAD_END not in start or start.endswith(HEAD_END):
        start += client.recv(1024) or b""
        if not start:
            raise Wrong("the connection was closed")
    if not start.startswith(b"HTTP/1.1 200"):
        raise Wrong(f"response {start[:200]!r}")
    return client


def read_big(port: int, call: Call, size: int, *, rate: float | None = None, seconds: float | None = None) -> float:
    """Read a body of ``size`` bytes of upstream.mjs's pattern, and return the seconds it took. Raise Wrong.

    ``rate`` is how many bytes are read in a second, None for as many as arrive. The client disconnects after
    ``seconds``.
    """
    buffer = memoryview(bytearray(RECEIVE_BYTES if rate is None else BLOCK_BYTES))
    with contextlib.closing(connect(port)) as client:
        start = time.perf_counter()
        client.sendall(call.request)
        head = b""
        while not head.endswith(HEAD_END):
            head += client.recv(1) or b""
        if f"content-length: {size}".encode() not in head.lower():
            body: _Body = _Chunked(size)
        else:
            body = _Body(size)
        while not body.complete:
            if seconds is not None and time.perf_counter() - start > seconds:
                return seconds
            count = client.recv_into(buffer)
            if not count:
                raise Wrong(f"the body ended after {body.received} of {size} bytes")
            body.take(buffer[:count])
            if rate is not None and (early := start + body.received / rate - time.perf_counter()) > 0:
                time.sleep(early)
        return time.perf_counter() - start


class _Body:
    """A body of known length. The first and the last byte of each piece must be those of the pattern."""

    def __init__(self, size: int) -> None:
        self.received = 0
        self._size = size

    @property
    def complete(self) -> bool:
        return self.received >= self._size

    def take(self, data: memoryview) -> None:
        for offset, byte in ((self.received, data[0]), (self.received + len(data) - 1, data[-1])):
            if byte != offset // BLOCK_BYTES % 251:
                raise Wrong(f"byte {offset} is {byte}")
        self.received += len(data)


class _Chunked(_Body):
    """The same body in chunks."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._left = 0  # of the chunk
        self._framing = b""
        self._last = False

    @property
    def complete(self) -> bool:
        return self._last

    def take(self, data: memoryview) -> None:
        while data:
            if self._left:
                piece, data = data[: self._left], data[self._left :]
                self._left -= len(piece)
                super().take(piece)
                continue
            # Between two chunks: CR LF (except before the first), the size in hexadecimal, CR LF.
            self._framing += bytes(data[:1])
            data = data[1:]
            if self._framing.endswith(b"\r\n") and len(self._framing) > 2:
                self._left = int(self._framing, 16)
                self._last = self._left == 0
                self._framing = b""
                if self._last:
                    if self.received != self._size:
                        raise Wrong(f"the body ended after {self.received} of {self._size} bytes")
                    return
