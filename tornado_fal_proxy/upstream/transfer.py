"""Hold one call to fal between libcurl's callbacks on one side and the coroutine that relays on the other.

Strategy. libcurl calls :class:`Transfer` while it moves bytes: a connection is ready, a line of the head, a piece of
the body. These callbacks run inside libcurl's own code, so they only take notes, wake the coroutine that waits, and
never raise or call back into libcurl. The coroutine takes the head and then the body, piece by piece. libcurl is paused
while nothing takes the pieces. A transfer that is cancelled is removed at once.

A transfer never decides which connection it uses; the client does.
"""

from __future__ import annotations

import asyncio
import logging
from copy import copy
from typing import Protocol

import pycurl

from tornado_fal_proxy._sweep import MAX_TURN_S
from tornado_fal_proxy.errors import (
    ClientDisconnected,
    ConnectionLost,
    MalformedResponse,
    ProxyError,
    UpstreamError,
)
from tornado_fal_proxy.rules.endpoints import WMA_HOST
from tornado_fal_proxy.rules.headers import ResponseHead, parse_response_head
from tornado_fal_proxy.upstream.body import HIGH_WATER_BYTES, WINDOW_BYTES, Body
from tornado_fal_proxy.upstream.budget import BufferBudget
from tornado_fal_proxy.upstream.completeness import Truncated, completeness_for
from tornado_fal_proxy.upstream.decoding import Undecodable, decoder_for

__all__ = ["Transfer", "TransferDelegate", "secret_of"]

logger = logging.getLogger("tornado_fal_proxy")

_ALPN = b"ALPN: server "
# Limits how often a call that may be repeated is sent, with what libcurl repeats by itself. A server that refuses would
# refuse more of them too.
MAX_SENDS = 3
# Limits which part of a key is searched for in heads: fewer characters may be there by chance. fal's keys have 32 of
# their secret.
MIN_SECRET_BYTES = 16
# Limits the lines of a head. fal sends about thirty, and nginx in front takes 16 kB. libcurl takes 5,000, and to relay
# so many keeps all other calls waiting for 20 ms.
MAX_HEAD_LINES = 1000
# Limits interim responses (RFC 9110 section 15.2) to one request: more than any server sends. They bring no result, so
# without a limit a server could keep a call for ever.
MAX_INTERIM = 16


class TransferDelegate(Protocol):
    """Describe what a transfer needs of its client."""

    budget: BufferBudget

    def now(self) -> float:
        """Return the loop's time, in seconds."""

    def connected(self, transfer: Transfer, local_port: int) -> None:
        """Note that the transfer has its connection, which leaves from ``local_port``. Called inside libcurl."""

    def protocol_known(self, transfer: Transfer, http2: bool) -> None:
        """Note whether the transfer's connection speaks HTTP/2. Called inside libcurl."""

    def resume(self, transfer: Transfer) -> None:
        """Let libcurl go on where it is paused, and open its window, because the reader has caught up."""

    def open_window_soon(self, transfer: Transfer) -> None:
        """Open the window of a transfer that is not paused as soon as libcurl has returned. Called inside libcurl."""

    def abort(self, transfer: Transfer, reason: ProxyError) -> None:
        """Take the transfer out of libcurl."""


class Transfer(Body):
    """Receive one response of fal's. Made by ``UpstreamClient.start``; read by one coroutine at a time.

    Every method that waits raises an UpstreamError when fal fails, and ClientDisconnected after :meth:`cancel`.
    ``head`` is None until it is known. The other attributes belong to the client: ``may_have_been_sent`` says that the
    request may have left, ``leads`` that other calls wait for its handshake, ``resolving`` that it occupies a place of
    the name lookup, ``started`` that libcurl has it, ``fresh_connect`` that it avoids pooled connections,
    ``http1_only`` that it takes no connection over HTTP/2, and ``forbids_reuse`` that its connection serves no other
    call. ``last_progress_at`` is the loop's time when a byte moved last. ``upload_bytes`` is the size of a request body
    that takes several writes, of which ``uploaded`` have left; 0 when all of it has. ``secret`` is the part of the
    key that is searched for in heads. ``first_host`` is the usual host of a call that goes to a backup, else None.
    ``fits_in_a_record`` says that the request is small enough for one record of TLS, which leaves whole or not at all.
    """

    __slots__ = (
        "_buffering",
        "_delegate",
        "_failure",
        "_head_lines",
        "_interim",
        "_negotiated_http1",
        "_retried",
        "_sends",
        "_turn_ends",
        "_waiter",
        "client",
        "curl",
        "first_host",
        "fits_in_a_record",
        "forbids_reuse",
        "fresh_connect",
        "head",
        "host",
        "http1_only",
        "last_progress_at",
        "leads",
        "local_port",
        "may_have_been_sent",
        "pool",
        "repeatable",
        "resolving",
        "secret",
        "started",
        "upload_bytes",
        "uploaded",
    )

    def __init__(
        self,
        delegate: TransferDelegate,
        curl: pycurl.Curl,
        pool: list[pycurl.Curl] | None,
        *,
        host: str,
        repeatable: bool,
        client: str = "",
    ) -> None:
        super().__init__(delegate.budget)
        self.curl: pycurl.Curl | None = curl  # None once libcurl is done with it
        self.pool = pool
        self.host = host
        self.first_host: str | None = None
        self.fits_in_a_record = False
        self.client = client
        self.repeatable = repeatable
        self.head: ResponseHead | None = None
        self.may_have_been_sent = False
        self.leads = False
        self.resolving = False
        self.started = False
        self.local_port = 0
        self.fresh_connect = False
        self.secret = b""
        self.http1_only = False
        self.forbids_reuse = False
        self.last_progress_at = delegate.now()
        self.upload_bytes = 0
        self.uploaded = 0
        self._interim = 0
        self._negotiated_http1 = False
        self._turn_ends = 0.0
        self._delegate = delegate
        self._failure: ProxyError | None = None
        self._head_lines: list[bytes] = []
        self._buffering = False
        self._retried = False
        self._sends = 0
        self._waiter: asyncio.Future[None] | None = None

    # For the coroutine that relays.

    async def read_head(self) -> ResponseHead:
        """Return the response's head as soon as it is known."""
        while self.head is None:
            await self._wait()
        return self.head

    async def buffer_whole(self) -> bool:
        """Wait until the body is whole and return True, or False as soon as it is larger than ``high_water``.

        A body without a declared length is read whole only where HTTP itself, or its content, tells its end.
        """
        self._buffering = True
        while not self.complete and not self.paused:
            await self._wait()
        self._buffering = False
        max_bytes = self.high_water
        self.window, self.high_water = WINDOW_BYTES, HIGH_WATER_BYTES
        if not self.complete:
            return False
        return (self.decoder is None and self.completeness is None) or await self._is_within(max_bytes)

    async def _is_within(self, max_bytes: int) -> bool:
        """Decode and check a body that has arrived. Return whether it has at most ``max_bytes``."""
        size = 0
        pieces = []
        while piece := await self._read_next():
            pieces.append(piece)
            self._budget.add(len(piece))
            size += len(piece)
            if size > max_bytes or (size > HIGH_WATER_BYTES and self._budget.exhausted):
                break
        self._decoded = pieces
        return not piece

    async def read(self) -> bytes:
        """Return the next piece of the body as it came from libcurl, or as it was decoded; ``b""`` at its end."""
        return self.pop_back() or await self._read_next()

    async def _read_next(self) -> bytes:
        while True:
            if self._delegate.now() > self._turn_ends:
                if self._turn_ends:
                    await asyncio.sleep(0)
                self._turn_ends = self._delegate.now() + MAX_TURN_S
            if piece := self.next_piece():
                return piece
            if self.has_more:
                continue
            if self.complete:
                self.check_end()
                return b""
            await self._wait()
            self._turn_ends = 0.0

    def cancel(self) -> None:
        """Cancel the call: libcurl closes the connection or resets the stream before this returns."""
        self._delegate.abort(self, ClientDisconnected())
        self.discard()

    def next_piece(self) -> bytes:
        """Return the next piece, as :meth:`Body.next_piece` does. Raise MalformedResponse."""
        try:
            return super().next_piece()
        except Undecodable as exc:
            detail = _undecodable(exc)
        raise MalformedResponse(detail, may_have_run=not self.repeatable)

    def check_end(self) -> None:
        """Raise MalformedResponse or ConnectionLost where the body must not end here."""
        error: type[UpstreamError]
        try:
            return super().check_end()
        except Undecodable as exc:
            error, detail = MalformedResponse, _undecodable(exc)
        except Truncated as exc:
            error, detail = ConnectionLost, f"the body is not whole: {exc}"
        raise error(detail, may_have_run=not self.repeatable)

    def resume(self) -> None:
        """Let libcurl go on."""
        self.last_progress_at = self._delegate.now()
        self._delegate.resume(self)

    async def _wait(self) -> None:
        if self._failure is not None:
            # A copy, because the traceback of the one that is kept would hold frames that hold this transfer: a cycle.
            raise copy(self._failure)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    @property
    def _has_response(self) -> bool:
        """Tell whether a part of a response has come."""
        return bool(self.head or self._head_lines or self._interim or self._failure)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # For libcurl.

    def on_connected(self, _remote_ip: str, _local_ip: str, _remote_port: int, local_port: int) -> int:
        """Allow or refuse that the request is written to a connection that is ready (PREREQFUNCTION).

        libcurl sends a request again by itself when a reused connection dies before the response, or when the server
        refuses the stream. Only a call that may be repeated is allowed that, and only before a response has begun: a
        second one would be appended to the first.
        """
        if self.may_have_been_sent and (not self.repeatable or self._has_response or self._sends >= MAX_SENDS):
            return pycurl.PREREQFUNC_ABORT
        self.may_have_been_sent = True
        self._sends += 1
        self.local_port = local_port
        self._delegate.connected(self, local_port)
        return pycurl.PREREQFUNC_OK

    def on_debug(self, kind: int, text: bytes) -> None:
        """Note which protocol the handshake of a leading call chose (DEBUGFUNCTION)."""
        if kind == pycurl.INFOTYPE_TEXT and text.startswith(_ALPN):
            self._negotiated_http1 = not text.rstrip().endswith(b" h2")
            self._delegate.protocol_known(self, not self._negotiated_http1)

    def on_header(self, line: bytes) -> None:
        """Take a line of the head, or of the trailers, which are not passed on (HEADERFUNCTION)."""
        if len(line) > 2 or line not in (b"\r\n", b"\n"):
            self._head_lines.append(line)
            return
        lines, self._head_lines = self._head_lines, []
        if self.head is not None:
            return  # trailers
        self.last_progress_at = self._delegate.now()
        if len(lines) > MAX_HEAD_LINES:
            self._fail(f"a head of more than {MAX_HEAD_LINES} lines")
            return
        if self.secret and self.secret in b"".join(lines):
            lines = self._drop_secret(lines)
        try:
            head = parse_response_head(lines)
        except MalformedResponse as exc:
            self._fail(exc.detail)
            return
        if head.status == 101:
            self._fail("101, but no upgrade was requested")
        elif self._negotiated_http1 and head.protocol == "2":
            self._fail("HTTP/2 on a connection for HTTP/1.1")
        elif head.status >= 200:
            self._begin_body(head)
        else:  # an interim response: the final one follows
            self._interim += 1
            if self._interim > MAX_INTERIM:
                self._fail(f"more than {MAX_INTERIM} interim responses")

    def _drop_secret(self, lines: list[bytes]) -> list[bytes]:
        """Return the lines of a head without those that have the key, which must not reach a client or the log."""
        fields = [line for line in lines[1:] if self.secret not in line]
        dropped = len(lines) - 1 - len(fields)
        logger.warning("key in a response: %s has sent it back, in %d headers that were dropped", self.host, dropped)
        return [lines[0].replace(self.secret, b"***"), *fields]

    def _begin_body(self, head: ResponseHead) -> None:
        decoder = decoder_for(head.coding) if head.coding else None
        if head.coding and decoder is None:
            head.headers.append(("content-encoding", head.coding))
        elif head.has_body and head.declared != 0:
            self.decoder = decoder
            if not head.framed:
                self.completeness = completeness_for(head.content_type)
        if self.host == WMA_HOST:  # its response may stay open for as long as the session, whatever its type
            head = head._replace(streams=True)
        self.head = head
        if head.streams:
            self.high_water = HIGH_WATER_BYTES
        self._delegate.protocol_known(self, head.protocol == "2")
        self._wake()

    def _fail(self, detail: str) -> None:
        self._failure = MalformedResponse(detail, may_have_run=not self.repeatable)
        self._wake()

    def on_body(self, data: bytes) -> int | None:
        """Take a piece of the body, or pause libcurl (WRITEFUNCTION)."""
        if self.curl is None or self._failure is not None:
            return None  # the call is over: drop the piece
        if self.head is None:
            self._fail("a body without a head")
            return None
        if self.is_full:
            self.paused = True
            self._wake()
            return pycurl.WRITEFUNC_PAUSE
        self.last_progress_at = self._delegate.now()
        if self.put(data):
            self._delegate.open_window_soon(self)
        if not self._buffering:
            self._wake()
        return None

    # For the client.

    @property
    def in_session(self) -> bool:
        """Return whether this is the response to a signal of realtime video, which may stay open without a byte."""
        return self.head is not None and self.host == WMA_HOST

    def without_secret(self, text: str) -> str:
        """Return a text of libcurl's, which may quote a header, without the key."""
        return text.replace(self.secret.decode("latin-1"), "***") if self.secret else text

    def end(self, failure: ProxyError | None) -> None:
        """End the transfer. Pieces that have arrived can still be read; then the failure is raised."""
        if self._failure is None:
            self._failure = failure
            self.complete = failure is None
        self._wake()

    def may_retry(self, failure: UpstreamError) -> bool:
        """Tell whether to send it once more on a new connection: it broke in the pool and cannot run twice."""
        if self._retried or self._has_response or not isinstance(failure, ConnectionLost):
            return False
        self._retried = self.repeatable or not self.may_have_been_sent
        return self._retried


def _undecodable(exc: Undecodable) -> str:
    return f"the body is not in its content-encoding: {exc}"


def secret_of(headers: list[bytes]) -> bytes:
    """Return the part of the key that may be shown nowhere, or all of the key where that part is short."""
    line = headers[0] if headers else b""
    if not line.startswith(b"authorization:"):
        return b""
    key = line.rpartition(b" ")[2]
    secret = key.rpartition(b":")[2]
    if len(secret) < MIN_SECRET_BYTES:
        secret = key
    return secret if len(secret) >= MIN_SECRET_BYTES else b""
