"""Callers that cost little, for they share the machine with what they measure.

Each is one connection that speaks HTTP/1.1 as bytes. Many at once are asyncio protocols; one alone, whose latency or
throughput counts, is a blocking socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Sequence

from benchmarks.calls import BLOCK_BYTES, Call

__all__ = ["Caller", "Wrong", "closed_loop", "open_callers", "read_big", "sequential", "unread"]

HOST = "127.0.0.1"
HEAD_END = b"\r\n\r\n"
RECEIVE_BYTES = 1 << 20
TIMEOUT_S = 60.0


class Wrong(Exception):
    """An answer is not what it must be."""


class Reader:
    """Takes one answer after the other from what arrives on a connection."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> tuple[int, bytes] | None:
        """Status and body as soon as the answer is whole."""
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
            raise Wrong(f"an answer of unknown length: {head[:200]!r}")
        self._buffer = b""
        return int(head[9:12]), body


def _unchunk(data: bytes) -> bytes | None:
    """The body in a whole chunked one, None while the last chunk is missing."""
    if not data.endswith(b"0\r\n\r\n"):
        return None
    body = b""
    while True:
        size, _, rest = data.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return body
        body, data = body + rest[:length], rest[length + 2 :]


def check(call: Call, answer: tuple[int, bytes]) -> None:
    if answer != (200, call.answer):
        raise Wrong(f"status {answer[0]}, body {answer[1][:300]!r}")


class Caller(asyncio.Protocol):
    """One connection that sends ``call`` when it is made, and calls ``on_answer`` after each right answer."""

    def __init__(self, call: Call, on_answer: Callable[[Caller], None]) -> None:
        self.call = call
        self.answered_at = 0.0
        self.error = ""
        self.ended = False
        self._on_answer = on_answer
        self._reader = Reader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.send()

    def send(self) -> None:
        self._transport.write(self.call.request)

    def data_received(self, data: bytes) -> None:
        try:
            if (answer := self._reader.feed(data)) is None:
                return
            check(self.call, answer)
        except Wrong as exc:
            self.fail(str(exc))
            return
        self.answered_at = time.perf_counter()
        self._on_answer(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended and not self.answered_at:
            self.fail(f"connection lost: {exc}")

    def fail(self, error: str) -> None:
        if not self.ended:
            self.error = error
            self.close()
            self._on_answer(self)

    def close(self) -> None:
        self.ended = True
        self._transport.abort()


async def open_callers(port: int, calls: Sequence[Call], on_answer: Callable[[Caller], None]) -> list[Caller]:
    """Connect all at once and send their calls. One that cannot connect is a caller with an error."""
    loop = asyncio.get_running_loop()

    async def connect(call: Call) -> Caller:
        caller = Caller(call, on_answer)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await loop.create_connection(lambda: caller, HOST, port)
        except OSError as exc:
            caller.ended, caller.error = True, f"{type(exc).__name__}: {exc}"
            on_answer(caller)
        return caller

    return await asyncio.gather(*map(connect, calls))


async def closed_loop(port: int, calls: Sequence[Call], seconds: float) -> int:
    """Each caller sends its call again as soon as it is answered. The number of right answers; raises Wrong."""
    count = 0
    end = time.perf_counter() + seconds
    running = len(calls)
    failures: list[str] = []
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_answer(caller: Caller) -> None:
        nonlocal count, running
        if caller.error:
            failures.append(caller.error)
        else:
            count += 1
            if caller.answered_at < end:
                caller.send()
                return
            caller.close()
        running -= 1
        if running == 0 and not over.done():
            over.set_result(None)

    await open_callers(port, calls, on_answer)
    async with asyncio.timeout(seconds + TIMEOUT_S):
        await over
    if failures:
        raise Wrong(f"{len(failures)} of {len(calls)} callers failed, one with: {failures[0]}")
    return count


def connect(port: int, *, receive_buffer: int | None = None) -> socket.socket:
    """A blocking connection. A small ``receive_buffer`` keeps what a caller leaves unread out of the kernel."""
    connected = socket.socket()
    if receive_buffer is not None:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connected.settimeout(TIMEOUT_S)
    connected.connect((HOST, port))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


def sequential(port: int, call: Call, count: int) -> list[float]:
    """The latencies in seconds of ``count`` calls, one after the other on one connection. Raises Wrong."""
    latencies = []
    with contextlib.closing(connect(port)) as caller:
        for _ in range(count):
            reader = Reader()
            start = time.perf_counter()
            caller.sendall(call.request)
            while (answer := reader.feed(_receive(caller))) is None:
                pass
            latencies.append(time.perf_counter() - start)
            check(call, answer)
    return latencies


def _receive(caller: socket.socket) -> bytes:
    data = caller.recv(RECEIVE_BYTES)
    if not data:
        raise Wrong("the connection was closed")
    return data


def unread(port: int, call: Call, *, receive_buffer: int = 16 * 1024) -> socket.socket:
    """A caller that has read the head and the first bytes of a stream, and now reads no more. Raises Wrong."""
    caller = connect(port, receive_buffer=receive_buffer)
    caller.sendall(call.request)
    start = b""
    while HEAD_END not in start or start.endswith(HEAD_END):
        start += caller.recv(1024) or b""
        if not start:
            raise Wrong("the connection was closed")
    if not start.startswith(b"HTTP/1.1 200"):
        raise Wrong(f"answer {start[:200]!r}")
    return caller


def read_big(port: int, call: Call, size: int, *, rate: float | None = None, seconds: float | None = None) -> float:
    """Read a body of ``size`` bytes of upstream.mjs's pattern; the seconds it took. Raises Wrong.

    ``rate`` is how many bytes are read in a second, None for as many as come. After ``seconds`` the caller leaves.
    """
    buffer = memoryview(bytearray(RECEIVE_BYTES if rate is None else BLOCK_BYTES))
    with contextlib.closing(connect(port)) as caller:
        start = time.perf_counter()
        caller.sendall(call.request)
        head = b""
        while not head.endswith(HEAD_END):
            head += caller.recv(1) or b""
        if f"content-length: {size}".encode() not in head.lower():
            body: _Body = _Chunked(size)
        else:
            body = _Body(size)
        while not body.complete:
            if seconds is not None and time.perf_counter() - start > seconds:
                return seconds
            count = caller.recv_into(buffer)
            if not count:
                raise Wrong(f"the body ended after {body.received} of {size} bytes")
            body.take(buffer[:count])
            if rate is not None and (early := start + body.received / rate - time.perf_counter()) > 0:
                time.sleep(early)
        return time.perf_counter() - start


class _Body:
    """A body of known length. The first and the last byte of each piece must be what belongs in their place."""

    def __init__(self, size: int) -> None:
        self.received = 0
        self._size = size

    @property
    def complete(self) -> bool:
        return self.received >= self._size

    def take(self, data: memoryview) -> None:
        for place, byte in ((self.received, data[0]), (self.received + len(data) - 1, data[-1])):
            if byte != place // BLOCK_BYTES % 251:
                raise Wrong(f"byte {place} is {byte}")
        self.received += len(data)


class _Chunked(_Body):
    """The same in chunks."""

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
            # Between two chunks: CR LF (but for the first), the size in hexadecimal, CR LF.
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
