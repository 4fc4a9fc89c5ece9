"""One call to fal, as libcurl's callbacks see it on one side and a coroutine on the other.

Strategy. libcurl calls :class:`Transfer` while it moves bytes: a connection is ready, a line of the head, a piece of
the body. These callbacks run inside libcurl's own code, so they only take notes, wake the coroutine that waits, and
never raise or call back into libcurl. The coroutine takes the head and then the body piece by piece. When nobody takes
the pieces libcurl is paused; when nobody wants them any more the transfer is removed at once.

Only this module and ``upstream`` know libcurl. A transfer never decides which connection it uses; that is the client's.
"""

from __future__ import annotations

import asyncio
from copy import copy
from typing import Protocol

import pycurl

from tornado_fal_proxy.decoding import Decoder, Undecodable, decoder_for
from tornado_fal_proxy.errors import (
    CallerGone,
    ConnectFailed,
    ConnectionLost,
    MalformedAnswer,
    NameNotFound,
    ProxyError,
    TlsFailed,
    UpstreamError,
    UpstreamTimeout,
)
from tornado_fal_proxy.policy import ResponseHead, parse_response_head

__all__ = ["FIRST_WINDOW_BYTES", "HIGH_WATER_BYTES", "HTTP2_STREAM_ERROR", "Owner", "Transfer", "upstream_error"]

# A piece of body is at most 16 kB, so a reader that keeps up is never paused, and one that does not costs little.
HIGH_WATER_BYTES = 64 * 1024
# A piece of at least this many bytes is part of a large body: half of what libcurl reads at once.
BULK_BYTES = 8 * 1024
# What a server may send of a streamed answer before its caller has read that far. At a round trip of 100 ms it allows
# 2.5 MB/s, and it bounds what a caller costs that stopped reading.
WINDOW_BYTES = 256 * 1024
# The same for an answer that is held until it is whole.
HELD_WINDOW_BYTES = 1024 * 1024
# The window that every stream begins with (RFC 9113 section 6.9.2): a short answer fits, and no frame need change it.
FIRST_WINDOW_BYTES = 64 * 1024

# Error numbers of libcurl (include/curl/curl.h) that pycurl gives no name.
HTTP2_STREAM_ERROR, _E_PROXY, _E_TOO_LARGE = 92, 97, 100

# What curl's error numbers mean here. One that is not listed is a broken connection, the case with the most caution.
_ERRORS: dict[int, type[UpstreamError]] = {
    pycurl.E_COULDNT_RESOLVE_HOST: NameNotFound,
    pycurl.E_COULDNT_RESOLVE_PROXY: NameNotFound,
    pycurl.E_COULDNT_CONNECT: ConnectFailed,
    _E_PROXY: ConnectFailed,
    pycurl.E_SSL_CONNECT_ERROR: TlsFailed,
    pycurl.E_PEER_FAILED_VERIFICATION: TlsFailed,
    pycurl.E_SSL_CACERT_BADFILE: TlsFailed,
    pycurl.E_SSL_CERTPROBLEM: TlsFailed,
    pycurl.E_SSL_CIPHER: TlsFailed,
    pycurl.E_SSL_ISSUER_ERROR: TlsFailed,
    pycurl.E_OPERATION_TIMEDOUT: UpstreamTimeout,
    pycurl.E_UNSUPPORTED_PROTOCOL: MalformedAnswer,
    pycurl.E_FTP_WEIRD_SERVER_REPLY: MalformedAnswer,
    _E_TOO_LARGE: MalformedAnswer,
}

_ALPN = b"ALPN: server "


def upstream_error(number: int, text: str, *, may_have_run: bool) -> UpstreamError:
    """libcurl's error as ours. The text goes to the log; it holds names and reasons, never a header."""
    return _ERRORS.get(number, ConnectionLost)(f"curl error {number}: {text}", may_have_run=may_have_run)


class Owner(Protocol):
    """What a transfer needs of its client."""

    def now(self) -> float:
        """The loop's time, in seconds."""

    def connected(self, transfer: Transfer, local_port: int) -> None:
        """The transfer has its connection, which leaves from ``local_port``. Called inside libcurl."""

    def learn(self, host: str, http2: bool) -> None:
        """``host`` speaks, or does not speak, HTTP/2. Called inside libcurl."""

    def resume(self, transfer: Transfer) -> None:
        """The reader has caught up: let libcurl go on where it is paused, and open its window."""

    def open_window_soon(self, transfer: Transfer) -> None:
        """The same for a transfer that is not paused, as soon as libcurl has returned. Called inside libcurl."""

    def abandon(self, transfer: Transfer, reason: ProxyError) -> None:
        """Take the transfer out of libcurl."""


class Transfer:
    """One call to fal. Made by ``UpstreamClient.start``; read by one coroutine at a time.

    Every method that waits raises an UpstreamError when fal fails, and CallerGone after :meth:`cancel`. ``head`` is
    None until it is known; ``complete`` is true when all of the body has arrived; ``high_water`` is the number of bytes
    of body after which libcurl is paused until they are read; :data:`HIGH_WATER_BYTES` for what is streamed.
    """

    __slots__ = (
        "_arrived",
        "_buffered",
        "_chunks",
        "_decoded",
        "_decoder",
        "_failure",
        "_head_lines",
        "_held",
        "_owner",
        "_retried",
        "_taken",
        "_waiter",
        "complete",
        "curl",
        "fresh",
        "head",
        "high_water",
        "host",
        "leads",
        "looks_up",
        "may_have_left",
        "paused",
        "pool",
        "port",
        "remains",
        "repeatable",
        "started",
        "touched",
        "uploaded",
        "window",
    )

    def __init__(
        self, owner: Owner, curl: pycurl.Curl, pool: list[pycurl.Curl] | None, *, host: str, repeatable: bool
    ) -> None:
        self.curl: pycurl.Curl | None = curl  # None once libcurl is done with it
        self.pool = pool
        self.host = host
        self.repeatable = repeatable
        self.high_water = HIGH_WATER_BYTES
        self.head: ResponseHead | None = None
        self.complete = False
        self.paused = False
        # For the client.
        self.may_have_left = False
        self.leads = False
        self.looks_up = False
        self.started = False  # libcurl has it
        self.port = 0  # of our end of its connection
        self.remains = False  # fal has closed that: what is there is all that comes, and is taken
        self.fresh = False
        self.window = FIRST_WINDOW_BYTES
        self.touched = owner.now()
        self.uploaded = 0
        self._owner = owner
        self._failure: ProxyError | None = None
        self._head_lines: list[bytes] = []
        self._chunks: list[bytes] = []
        self._decoder: Decoder | None = None
        self._decoded: list[bytes] = []  # what a hold found out, and nobody has read
        self._arrived = 0  # since the window was opened last
        self._buffered = 0
        self._held = False
        self._retried = False
        self._taken = 0
        self._waiter: asyncio.Future[None] | None = None

    # For the coroutine that relays.

    async def read_head(self) -> ResponseHead:
        """The answer's head, as soon as it is known."""
        while self.head is None:
            await self._wait()
        return self.head

    async def hold(self) -> bool:
        """Wait until the body is whole: True. False as soon as it turns out to be larger than ``high_water``."""
        self._held = True
        while not self.complete and not self.paused:
            await self._wait()
        self._held = False
        most = self.high_water
        self.window, self.high_water = WINDOW_BYTES, HIGH_WATER_BYTES
        return self.complete and (self._decoder is None or self._decode_whole(most))

    async def read(self) -> bytes:
        """The next piece of the body as it came from libcurl, or as it was decoded; ``b""`` at its end."""
        if self._decoded:
            return self._decoded.pop(0)
        while not (piece := self._next()):
            if self.complete:
                return b""
            await self._wait()
        return piece

    def read_rest_of_line(self, chunk: bytes) -> bytes:
        """``chunk`` and the pieces behind it that are here already and that libcurl cut off in the middle of a line."""
        while self._chunks and self._decoder is None and not chunk.endswith((b"\n", b"\r")):
            chunk += self._pop()
        return chunk

    def read_rest(self, chunk: bytes) -> bytes:
        """``chunk`` and, where it is so large that libcurl may have cut it off, the pieces behind it that are here.

        Up to about ``HIGH_WATER_BYTES``. What was sent in small pieces is passed on in these.
        """
        if len(chunk) < BULK_BYTES or self._decoder is not None:
            return chunk
        pieces, size = [chunk], len(chunk)
        while self._chunks and size < HIGH_WATER_BYTES:
            pieces.append(self._pop())
            size += len(pieces[-1])
        return b"".join(pieces)

    def take(self) -> bytes:
        """All that has arrived and was not read, of a body that is complete; of one that is encoded, after a hold."""
        if self._decoder is not None:
            return b"".join(self._decoded)
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        return data

    def cancel(self) -> None:
        """End the transfer now: libcurl closes the connection or resets the stream before this returns."""
        self._owner.abandon(self, CallerGone())
        self._chunks.clear()
        self._decoded.clear()

    def _next(self) -> bytes:
        """The next piece of what is here, ``b""`` when nothing is."""
        decoder = self._decoder
        if decoder is None:
            return self._pop() if self._chunks else b""
        try:
            while decoder.has_more or self._chunks:
                if piece := decoder.decode(b"" if decoder.has_more else self._pop(), HIGH_WATER_BYTES):
                    return piece
            if self.complete:
                decoder.end()
        except Undecodable as exc:
            raise MalformedAnswer(
                f"the body is not in its content-encoding: {exc}", may_have_run=not self.repeatable
            ) from None
        return b""

    def _decode_whole(self, most: int) -> bool:
        """Whether all of the body, which is here, has at most that many bytes."""
        size = 0
        while piece := self._next():
            self._decoded.append(piece)
            size += len(piece)
            if size > most:
                return False
        return True

    def _pop(self) -> bytes:
        chunk = self._chunks.pop(0)
        self._buffered -= len(chunk)
        self._taken += len(chunk)
        if self.paused:
            if self._buffered <= self.high_water // 2:
                self.paused = False
                self.touched = self._owner.now()
                self._owner.resume(self)
        elif self._taken >= WINDOW_BYTES // 2:
            self._taken = 0
            self._owner.resume(self)
        return chunk

    async def _wait(self) -> None:
        if self._failure is not None:
            # Not the one that is kept: its traceback would hold frames that hold this transfer, a cycle for each call.
            raise copy(self._failure)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # For libcurl.

    def on_connected(self, _remote_ip: str, _local_ip: str, _remote_port: int, local_port: int) -> int:
        """PREREQFUNCTION: a connection is ready and the request is about to be written to it.

        libcurl sends a request again by itself when a reused connection dies before the answer. A second time is
        allowed only to what may be repeated.
        """
        if self.may_have_left and not self.repeatable:
            return pycurl.PREREQFUNC_ABORT
        self.may_have_left = True
        self.port = local_port
        self._owner.connected(self, local_port)
        return pycurl.PREREQFUNC_OK

    def on_debug(self, kind: int, text: bytes) -> None:
        """DEBUGFUNCTION, of a call that leads: which protocol the handshake chose."""
        if kind == pycurl.INFOTYPE_TEXT and text.startswith(_ALPN):
            self._owner.learn(self.host, text.rstrip().endswith(b" h2"))

    def on_header(self, line: bytes) -> None:
        """HEADERFUNCTION: a line of the head, or of the trailers, which are not passed on."""
        if len(line) > 2 or line not in (b"\r\n", b"\n"):
            self._head_lines.append(line)
            return
        lines, self._head_lines = self._head_lines, []
        if self.head is not None or not self.may_have_left:
            return  # trailers, or what an egress proxy answered to CONNECT
        self.touched = self._owner.now()
        try:
            head = parse_response_head(lines)
        except MalformedAnswer as exc:
            self._failure = MalformedAnswer(exc.detail, may_have_run=not self.repeatable)
        else:
            if head.status < 200:
                return  # an interim answer (RFC 9110 section 15.2): the final one follows
            if head.coding:
                self._decoder = decoder_for(head.coding)
                if self._decoder is None:
                    head.headers.append(("content-encoding", head.coding))
            self.head = head
            if head.event_stream:
                self.high_water = HIGH_WATER_BYTES
            self._owner.learn(self.host, head.protocol == "2")
        self._wake()

    def on_body(self, data: bytes) -> int | None:
        """WRITEFUNCTION: a piece of the body."""
        if self.curl is None or self._failure is not None:
            return None  # nobody wants it any more
        if self._buffered >= self.high_water and not self.remains:
            self.paused = True
            self._wake()
            return pycurl.WRITEFUNC_PAUSE
        self.touched = self._owner.now()
        self._chunks.append(data)
        self._buffered += len(data)
        self._arrived += len(data)
        holding = self.high_water > HIGH_WATER_BYTES
        if self.window == FIRST_WINDOW_BYTES or (holding and self._arrived >= HELD_WINDOW_BYTES // 2):
            self._arrived = 0
            self.window = HELD_WINDOW_BYTES if holding else WINDOW_BYTES
            self._owner.open_window_soon(self)
        if not self._held:
            self._wake()
        return None

    # For the client.

    def end(self, failure: ProxyError | None) -> None:
        """The transfer is over. What has arrived can still be read, and then the failure is raised."""
        if self._failure is None:
            self._failure = failure
            self.complete = failure is None
        self._wake()

    def may_retry(self, failure: UpstreamError) -> bool:
        """Whether to send it once more, on a new connection: only what broke in the pool and cannot run twice."""
        if self._retried or self.head is not None or self._head_lines or not isinstance(failure, ConnectionLost):
            return False
        self._retried = self.repeatable or not self.may_have_left
        return self._retried
