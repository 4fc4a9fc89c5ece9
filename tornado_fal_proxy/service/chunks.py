"""Read a request's body that comes in chunks (RFC 9112 section 7.1).

Strategy. Extensions and trailers are allowed, checked and ignored; nothing of a trailer becomes a header. Lines end
with CRLF and with nothing else, sizes are plain hexadecimal: everything that two servers could frame in two ways is
refused. Small chunks become one piece, because the handler keeps each piece by itself.

This module writes nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Protocol

from tornado_fal_proxy.service.request_head import MAX_HEAD_LINES, MalformedRequest, RequestTooLarge

__all__ = ["MAX_EXTENSION_BYTES", "MAX_TRAILER_BYTES", "ChunkSource", "read_chunks"]

# Limits what a client sends beside the body: no client of fal's sends any, and it costs time. As much as nginx and
# Apache take in a line, for all lines of a request together.
MAX_EXTENSION_BYTES = MAX_TRAILER_BYTES = 8192
# Limits the work between two turns of the loop, with a chunk as much work as 1 kB. Tornado's own values.
_YIELD_BYTES, _CHUNK_COST = 256 * 1024, 1024
# Limits the work on a body whose request is answered: 1 MB or 1024 chunks are read to keep the connection. Each chunk
# takes processor time, and a client could send a million of them while it gets its response.
MAX_NEEDLESS_TURNS = 4
# Limits a piece that goes to the handler: as many bytes as are read at once.
_PIECE_BYTES = 16 * 1024

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # noqa: S105  (a token of HTTP's grammar)
_QUOTED = r'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
_SIZE_LINE = re.compile(
    rf"([0-9A-Fa-f]{{1,15}})((?:[\t ]*;[\t ]*{_TOKEN}(?:[\t ]*=[\t ]*(?:{_TOKEN}|{_QUOTED}))?)*)\r\n".encode("latin-1")
)
_TRAILER = re.compile(rf"{_TOKEN}:[\t\x20-\x7e\x80-\xff]*\r\n".encode("latin-1"))


class ChunkSource(Protocol):
    """Describe what is needed of the client's stream."""

    def read_line(self) -> Awaitable[bytes]:
        """Return a line with its LF, or the beginning of a line that is too long."""

    def read_bytes(self, num_bytes: int, partial: bool = False) -> Awaitable[bytes]:
        """Return up to that many bytes, and exactly that many unless ``partial``."""


async def read_chunks(
    stream: ChunkSource,
    max_bytes: int,
    deliver: Callable[[bytes], Awaitable[None]],
    is_answered: Callable[[], bool],
) -> None:
    """Read a body to its end, and pass it on in pieces. Raise RequestFault.

    The rest of a body whose request is answered already is read to keep the connection, but not for long.
    """
    pieces = _Pieces(deliver, is_answered)
    size = extensions = 0
    while True:
        text = await pieces.read(stream.read_line())
        line = _SIZE_LINE.fullmatch(text)
        if line is None:
            if not text.endswith(b"\n"):
                break
            raise MalformedRequest("A chunk of the request's body is malformed.")
        length = int(line[1], 16)
        size += length
        extensions += len(line[2])
        if size > max_bytes:
            raise RequestTooLarge(413, "The body of the request is too large.")
        if extensions > MAX_EXTENSION_BYTES:
            break
        if length == 0:
            await _skip_trailers(stream)
            await pieces.deliver()
            return
        while length:
            data = await pieces.read(stream.read_bytes(min(length, _PIECE_BYTES), partial=True))
            length -= len(data)
            await pieces.add(data)
        if await pieces.read(stream.read_bytes(2)) != b"\r\n":
            raise MalformedRequest("A chunk of the request's body is longer than it says.")
        await pieces.count(_CHUNK_COST)
    raise RequestTooLarge(413, "The chunks of the request's body have too many extensions.")


class _Pieces:
    """The part of a body that was not delivered yet, and the work since the loop has turned."""

    def __init__(self, deliver: Callable[[bytes], Awaitable[None]], is_answered: Callable[[], bool]) -> None:
        self._deliver, self._is_answered = deliver, is_answered
        self._pending, self._work, self._needless_turns = bytearray(), 0, 0

    async def read(self, reading: Awaitable[bytes]) -> bytes:
        """Return what is read, and deliver what is here before the network is waited for."""
        if self._pending and isinstance(reading, asyncio.Future) and not reading.done():
            await self.deliver()
        return await reading

    async def add(self, data: bytes) -> None:
        """Add data, and deliver a piece that is large enough."""
        self._pending += data
        if len(self._pending) >= _PIECE_BYTES:
            await self.deliver()
        await self.count(len(data))

    async def count(self, work: int) -> None:
        """Add work, and let the loop turn when there was enough."""
        self._work += work
        if self._work >= _YIELD_BYTES:
            self._work = 0
            await asyncio.sleep(0)
            if self._is_answered():
                self._needless_turns += 1
                if self._needless_turns > MAX_NEEDLESS_TURNS:
                    raise RequestTooLarge(413, "The rest of a refused request has too many chunks.")

    async def deliver(self) -> None:
        """Deliver what is here."""
        if self._pending:
            piece = bytes(self._pending)
            self._pending.clear()
            await self._deliver(piece)


async def _skip_trailers(stream: ChunkSource) -> None:
    size = 0
    for _ in range(MAX_HEAD_LINES + 1):
        line = await stream.read_line()
        if line == b"\r\n":
            return
        size += len(line)
        if size > MAX_TRAILER_BYTES:
            break
        if not _TRAILER.fullmatch(line):
            raise MalformedRequest("A trailer of the request is malformed.")
    raise RequestTooLarge(431, "The request has too many trailers.")
