"""Keep the pieces of one response's body between libcurl and its reader, and decide when libcurl must pause.

Strategy. Pieces are appended on one side and taken on the other. Above ``high_water`` bytes the body is full and
libcurl pauses; when the reader has taken half of them libcurl goes on. An encoded body is decoded only as far as it is
read, because a few bytes may decode to many megabytes.

A paused HTTP/2 stream would let its server send up to 10 MB more, because libcurl opens a window of that size as soon
as data arrives. libcurl's limit of the rate (MAX_RECV_SPEED_LARGE) also limits this window. A rate that is set again
whenever the reader has caught up, before it can bind, is no limit of the rate but a window: ``window``.

This module knows neither libcurl nor the loop.
"""

from __future__ import annotations

from tornado_fal_proxy.upstream.budget import BufferBudget
from tornado_fal_proxy.upstream.completeness import Completeness, Truncated
from tornado_fal_proxy.upstream.decoding import Decoder

__all__ = ["FIRST_WINDOW_BYTES", "HIGH_WATER_BYTES", "WINDOW_BYTES", "Body"]

# Limits what waits for a reader: a piece of body has at most 16 kB, so a reader that keeps up never pauses libcurl, and
# one that does not costs little.
HIGH_WATER_BYTES = 64 * 1024
# Limits which pieces are joined: one of at least half of what libcurl reads at once is part of a large body.
BULK_BYTES = 8 * 1024
# Limits which pieces are joined while they wait for the reader, because pieces of a byte cost far more time and memory
# than the bytes in them. Joining copies up to this many bytes for each piece.
SMALL_BYTES = 1024
# Limits what a server may send of a streamed response before its client has read that far. At a round trip of 100 ms it
# allows 2.5 MB/s, and a client that stopped reading costs no more.
WINDOW_BYTES = 256 * 1024
# Limits the same for a response that is buffered until it is whole.
BUFFERED_WINDOW_BYTES = 1024 * 1024
# The window that every stream begins with (RFC 9113 section 6.9.2): a short response fits, and no frame changes it.
FIRST_WINDOW_BYTES = 64 * 1024


class Body:
    """Hold the pieces of one body. A subclass fills it with :meth:`put` and implements :meth:`resume`.

    ``complete`` is true when all of the body has arrived. ``high_water`` is the number of bytes above which the body is
    full. ``paused`` is true from a piece that was refused until the reader has caught up. ``peer_closed`` says that the
    server has closed the connection: the rest of the body is then taken however slow the reader is. ``window`` is the
    number of bytes that the server may send ahead. ``received`` counts all bytes that came, encoded. ``decoder`` and
    ``completeness`` are set once the head is known.
    Every byte that is here is counted in ``budget``.
    """

    __slots__ = (
        "_budget",
        "_buffered",
        "_chunks",
        "_decoded",
        "_opened_at",
        "_taken",
        "complete",
        "completeness",
        "decoder",
        "high_water",
        "paused",
        "peer_closed",
        "received",
        "window",
    )

    def __init__(self, budget: BufferBudget | None = None) -> None:
        self._budget = budget or BufferBudget()
        self.high_water = HIGH_WATER_BYTES
        self.window = FIRST_WINDOW_BYTES
        self.complete = False
        self.paused = False
        self.peer_closed = False
        self.received = 0
        self.decoder: Decoder | None = None
        self.completeness: Completeness | None = None
        self._chunks: list[bytes] = []
        self._decoded: list[bytes] = []  # pieces that were taken to measure or check the body, and not read yet
        self._buffered = 0
        self._opened_at = 0  # what was received when the window was opened last
        self._taken = 0

    def resume(self) -> None:
        """Let the server send more: the reader has caught up."""
        raise NotImplementedError

    # For the writer.

    @property
    def is_full(self) -> bool:
        """Tell whether a piece must be refused until the reader has caught up."""
        buffered = self._buffered
        return (
            buffered >= self.high_water or (buffered >= HIGH_WATER_BYTES and self._budget.exhausted)
        ) and not self.peer_closed

    def put(self, data: bytes) -> bool:
        """Append a piece, small ones joined. Return whether ``window`` was enlarged and must be opened."""
        size = len(data)
        if self._chunks and len(self._chunks[-1]) + size <= SMALL_BYTES:
            self._chunks[-1] += data
        else:
            self._chunks.append(data)
        self._buffered += size
        self.received += size
        self._budget.add(size)
        buffering = self.high_water > HIGH_WATER_BYTES
        if self.window != FIRST_WINDOW_BYTES and not (
            buffering and self.received - self._opened_at >= BUFFERED_WINDOW_BYTES // 2
        ):
            return False
        self._opened_at = self.received
        self.window = BUFFERED_WINDOW_BYTES if buffering else WINDOW_BYTES
        return True

    # For the reader.

    @property
    def size(self) -> int:
        """Count the bytes that are here and were not read."""
        return self._buffered + sum(map(len, self._decoded))

    @property
    def has_more(self) -> bool:
        """Tell whether :meth:`next_piece` has something to do."""
        return bool(self._chunks) or (self.decoder is not None and self.decoder.has_more)

    def next_piece(self) -> bytes:
        """Return the next piece of what is here, as it came or as it was decoded.

        Return ``b""`` when nothing is here, and also when a piece that is here decodes to nothing: ``has_more`` tells
        which. One call takes one piece, so its time is bounded. Raise Undecodable.
        """
        decoder = self.decoder
        if decoder is None:
            return self._pop() if self._chunks else b""
        if not self.has_more:
            return b""
        piece = decoder.decode(b"" if decoder.has_more else self._pop(), HIGH_WATER_BYTES)
        if self.completeness is not None:
            self.completeness.feed(piece)
        return piece

    def check_end(self) -> None:
        """Raise Undecodable or Truncated where a body that was read to its end is not whole."""
        if self.decoder is not None:
            self.decoder.end()
        if self.completeness is not None and not self.completeness.is_complete:
            raise Truncated("its content ends too early")

    def read_rest_of_line(self, chunk: bytes) -> bytes:
        """Return ``chunk`` and the pieces behind it that are here and were cut off in the middle of a line."""
        while self._chunks and self.decoder is None and not chunk.endswith((b"\n", b"\r")):
            chunk += self._pop()
        return chunk

    def read_rest(self, chunk: bytes) -> bytes:
        """Return ``chunk``, joined with the pieces behind it that are here if it is large enough to be one of many.

        The result has up to about ``HIGH_WATER_BYTES``. Small pieces are joined by :meth:`put` alone.
        """
        if len(chunk) < BULK_BYTES or self.decoder is not None:
            return chunk
        pieces, size = [chunk], len(chunk)
        while self._chunks and size < HIGH_WATER_BYTES:
            pieces.append(self._pop())
            size += len(pieces[-1])
        return b"".join(pieces)

    def take(self) -> list[bytes]:
        """Return, in pieces, all that is here and was not read of a body that is complete. They count no more."""
        pieces = self._decoded + self._chunks
        self.discard()
        return pieces

    def pop_back(self) -> bytes:
        """Return the first piece that was taken to measure or check the body, ``b""`` where there is none."""
        if not self._decoded:
            return b""
        piece = self._decoded.pop(0)
        self._budget.remove(len(piece))
        return piece

    def discard(self) -> None:
        """Forget all pieces."""
        self._budget.remove(self.size)
        self._buffered = 0
        self._chunks.clear()
        self._decoded.clear()

    def _pop(self) -> bytes:
        chunk = self._chunks.pop(0)
        size = len(chunk)
        self._buffered -= size
        self._taken += size
        self._budget.remove(size)
        if self.completeness is not None and self.decoder is None:
            self.completeness.feed(chunk)
        if self.paused:
            if self._buffered <= self.high_water // 2:
                self.paused = False
                self.resume()
        elif self._taken >= WINDOW_BYTES // 2:
            self._taken = 0
            self.resume()
        return chunk
