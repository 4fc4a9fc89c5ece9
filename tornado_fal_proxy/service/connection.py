"""A client's connection: requests are read, one after the other, as RFC 9112 has it.

Strategy. Tornado's classes write responses, and everything that a handler meets is Tornado's. Requests are read here,
because Tornado refuses what RFC 9112 requires of a server (absolute targets, chunk extensions, trailers), searches a
head again from its beginning with every byte that comes, and answers faults without a body or not at all:

* :class:`ClientStream` finds the end of a head by looking at each byte once, and stops at too many lines.
* :mod:`~tornado_fal_proxy.service.request_head` decides about the head, :mod:`~tornado_fal_proxy.service.chunks` about
  the framing of a body in chunks.
* A request that cannot be read gets ``{"message": ...}``, and the connection is closed in a way that lets the client
  receive it. It is reported to the server, whose access log has it with its status.

Tornado gives each wait for a request a timer. Here a connection only notes since when it waits, and the server sweeps
over all connections every few seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import time
import weakref
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from functools import lru_cache, partial
from http.client import responses
from typing import Any, Protocol

from tornado.http1connection import HTTP1Connection, HTTP1ServerConnection
from tornado.httputil import (
    HTTPHeaders,
    HTTPInputError,
    HTTPMessageDelegate,
    HTTPServerConnectionDelegate,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.iostream import IOStream, StreamClosedError, UnsatisfiableReadError
from tornado.log import gen_log

from tornado_fal_proxy.rules.trusted_proxies import UNIX
from tornado_fal_proxy.service.chunks import read_chunks
from tornado_fal_proxy.service.request_head import (
    MAX_CACHED_LINE_CHARS,
    MAX_HEAD_BYTES,
    MAX_HEAD_LINES,
    MAX_REQUEST_LINE_BYTES,
    MalformedRequest,
    RequestFault,
    RequestTooLarge,
    RequestTooSlow,
    continues,
    keeps_alive,
    parse_head,
)

__all__ = ["LINGER_S", "ClientConnection", "ClientStream", "FaultHandler", "Request", "close_after"]

logger = logging.getLogger("tornado_fal_proxy")

# Limits how long the rest of a request is read and thrown away behind a response that ends the connection. Closing at
# once would reset the connection of a client that is still sending, and the client would not receive the response.
LINGER_S = 5.0
# Limits the empty lines that are skipped before a head: the one that some clients send behind a body, and 511 more. A
# client that sends more gets 400, because its flood would keep the loop reading.
MAX_SKIPPED_BYTES = 1024
# Limits a line of a body in chunks: no line of a size or a trailer is as long, and nginx takes as much.
MAX_LINE_BYTES = 4096
# Limits the work between two turns of the loop while a body is thrown away, as Tornado does for bodies that it keeps.
_YIELD_BYTES = 256 * 1024
# Limits the rest of a request that is thrown away to 25 MB a second: a client in a hurry only costs others time.
_DISCARD_PAUSE_S = 0.01

_HEAD_END = re.compile(rb"\r?\n\r?\n")
# Marks for reads whose end ClientStream finds by itself; they are compared by identity.
_HEAD, _LINE = b"\n head", b"\n line"
_NO_HEADERS = HTTPHeaders()


class ClientStream(IOStream):
    """A stream that sends at once whatever is written (TCP_NODELAY), and leaves no cycle of references.

    Line ends before a head are skipped when they arrive (RFC 9112, section 2.2), and no part of the head.
    """

    _skipped = 0  # bytes of line ends before the head
    _searched = _lines = 0  # how much of the head or line that is read has been searched, and the line ends in it

    def __init__(self, connection: socket.socket, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        super().set_nodelay(True)

    def close(self, exc_info: Any = False) -> None:
        """Close the stream and drop the error's traceback.

        Tornado's stream keeps its error, whose traceback has the frames that refer to the stream: a cycle.
        """
        super().close(exc_info)
        if self.error is not None:
            self.error.__traceback__ = None

    def set_nodelay(self, value: bool) -> None:
        """Do nothing. Tornado switches TCP_NODELAY on and off for each response."""

    def read_head(self) -> Awaitable[bytes]:
        """Return the head of a request without empty lines before it, or more of a head than may be."""
        self._searched = self._lines = self._skipped = 0
        return self.read_until(_HEAD, max_bytes=MAX_HEAD_BYTES + 1)

    def check_size(self, head: bytes) -> None:
        """Raise RequestTooLarge for what :meth:`read_head` has returned just now."""
        if self._lines > MAX_HEAD_LINES + 2:
            raise RequestTooLarge(431, f"The head of the request has more than {MAX_HEAD_LINES} header lines.")
        if len(head) > MAX_HEAD_BYTES:
            if head.find(b"\n", 0, MAX_REQUEST_LINE_BYTES + 2) == -1:
                raise RequestTooLarge(414, "The URL of the request is too long.")
            raise RequestTooLarge(431, f"The head of the request is larger than {MAX_HEAD_BYTES} bytes.")

    def read_line(self) -> Awaitable[bytes]:
        """Return a line with its LF, or more than MAX_LINE_BYTES of a line without."""
        self._searched = 0
        return self.read_until(_LINE, max_bytes=MAX_LINE_BYTES + 1)

    def _find_read_pos(self) -> int | None:
        """Return where a head or line ends, or how much of it there is when that is too much, None if more must come.

        Each byte is looked at once. Tornado's stream searches all that it has whenever a part comes.
        """
        if self._read_delimiter is _HEAD:
            return self._end_of_head()
        if self._read_delimiter is not _LINE:
            return super()._find_read_pos()
        end = self._read_buffer.find(b"\n", self._searched) + 1
        self._searched = size = len(self._read_buffer)
        return end or (size if size > MAX_LINE_BYTES else None)

    def _end_of_head(self) -> int | None:
        buffer = self._read_buffer
        if not self._searched and buffer.startswith((b"\r", b"\n")):
            size = len(buffer) - len(buffer.lstrip(b"\r\n"))
            if self._skipped + size <= MAX_SKIPPED_BYTES:
                del buffer[:size]
                self._read_buffer_size -= size
                self._skipped += size
        match = _HEAD_END.search(buffer, max(self._searched - 3, 0))
        size = len(buffer) if match is None else match.end()
        self._lines += buffer.count(b"\n", self._searched, size)
        self._searched = size
        return size if match is not None or self._lines > MAX_HEAD_LINES + 2 or size > MAX_HEAD_BYTES else None


class FaultHandler(Protocol):
    """Describe a request handler that answers faults in the body of its request."""

    def refuse(self, fault: RequestFault) -> None:
        """Respond with the fault, and report the call as refused."""


class Request(HTTP1Connection):
    """One request on a connection, and its response.

    ``headers`` is None until the head has come. ``fault_handler`` is set by a handler that answers faults in the body,
    and slow bodies, by itself.
    """

    client_connection: ClientConnection
    headers: HTTPHeaders | None = None
    fault_handler: weakref.ref[FaultHandler] | None = None
    _body_bytes = 0  # how much of the body has come
    _body_checked: tuple[float, int] | None = None  # when that was last compared, and with what; None when none comes
    _first_word = ""
    _waits_for_100 = False
    _lingering: asyncio.TimerHandle | None = None

    @property
    def has_head(self) -> bool:
        """Return whether the request's head has come; the request is being served from then on."""
        return self._request_start_line is not None

    @property
    def method(self) -> str:
        """Return the request's method, or the word in its place while the head is not understood."""
        line = self._request_start_line
        return self._first_word if line is None else line.method

    # The request.

    async def _read_message(self, delegate: HTTPMessageDelegate) -> bool:
        """Read the request, and wait for its response. Return whether another request may follow.

        Stands in the place of Tornado's.
        """
        delegated = False
        try:
            start_line, headers, length = await self._read_head()
            delegated = True
            prepared = delegate.headers_received(start_line, headers)
            if prepared is not None:
                await prepared
            if not self._read_finished:
                await self._read_whole_body(length, delegate)
                self._read_finished = True
            if self._lingering is not None:
                return False
            if not self._write_finished:
                delegated = False
                delegate.finish()
            if not self._finish_future.done() and not self.stream.closed():
                self.stream.set_close_callback(self._on_connection_close)
                await self._finish_future
            return not self.stream.closed()
        except RequestFault as exc:
            self._answer(exc.with_traceback(None))
        except HTTPInputError as exc:
            gen_log.info("Malformed HTTP message from %s: %s", self.context, exc)
            self._answer(MalformedRequest("The request is malformed."))
        finally:
            if delegated:
                delegate.on_connection_close()
            self._clear_callbacks()
        await self._discard_rest()
        return False

    async def _read_head(self) -> tuple[RequestStartLine, HTTPHeaders, int | None]:
        connection, stream = self.client_connection, self.stream
        assert isinstance(stream, ClientStream)
        data = await stream.read_head()
        if self._lingering is not None:
            raise StreamClosedError  # it came too late
        connection.waiting_since = connection.head_since = None
        try:
            stream.check_size(data)
            start_line, headers, length = parse_head(data)
        except RequestFault:
            self._first_word = data[:MAX_CACHED_LINE_CHARS].decode("latin-1").partition(" ")[0]
            raise
        self._request_start_line, self.headers = start_line, headers
        self._request_headers = _NO_HEADERS  # Tornado would only take Connection from them, as write_headers() does
        self._disconnect_on_finish = self.params.no_keep_alive or not keeps_alive(start_line, headers)
        self._waits_for_100 = continues(start_line, headers)
        self._read_finished = length == 0  # so a response at once does not end the connection
        return start_line, headers, length

    async def _read_whole_body(self, length: int | None, delegate: HTTPMessageDelegate) -> None:
        stream = self.stream
        assert isinstance(stream, ClientStream)
        if length is not None and length > self._max_body_size:
            raise RequestTooLarge(413, "The body of the request is too large.")
        if self._waits_for_100 and not self._write_finished:
            self._waits_for_100 = False
            stream.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._body_checked = asyncio.get_running_loop().time(), 0
        try:
            if length is None:
                deliver = partial(self._deliver_body, delegate)
                await read_chunks(stream, self._max_body_size, deliver, self._is_answered)
            else:
                await self._read_fixed_body(length, delegate)
        finally:
            self._body_checked = None

    async def _deliver_body(self, delegate: HTTPMessageDelegate, data: bytes) -> None:
        self._body_bytes += len(data)
        if not self._write_finished:
            waiting = delegate.data_received(data)
            if waiting is not None:
                await waiting

    def _is_answered(self) -> bool:
        return self._response_start_line is not None

    def check_body(self, now: float, window_s: float, window_bytes: int) -> None:
        """Answer a client of which less than ``window_bytes`` of a body have come in ``window_s``."""
        if self._body_checked is None or self.fault_handler is not None:
            return
        since, size = self._body_checked
        if now - since >= window_s:
            self._body_checked = now, self._body_bytes
            if self._body_bytes - size < window_bytes:
                self.fail(RequestTooSlow("The body of the request took too long to arrive."))

    # The response.

    def write_headers(
        self,
        start_line: RequestStartLine | ResponseStartLine,
        headers: HTTPHeaders,
        chunk: bytes | None = None,
    ) -> asyncio.Future[None]:
        """Write a response's head, with the date and with what becomes of the connection."""
        assert self._request_start_line is not None
        if "Date" not in headers:
            headers["Date"] = _date(int(time.time()))
        if self._request_start_line.version == "HTTP/1.0":
            if "Content-Length" not in headers and self.method != "HEAD":
                self._disconnect_on_finish = True  # only closing ends the response
            headers["Connection"] = "close" if self._disconnect_on_finish else "keep-alive"
        return super().write_headers(start_line, headers, chunk)

    def _finish_request(self, future: asyncio.Future[None] | None) -> None:
        """End the response. If the rest of the request is still on its way, throw that away before closing."""
        if self._read_finished or self._waits_for_100 or self.stream.closed():
            super()._finish_request(future)
        else:
            self._linger()

    # Faults.

    def fail(self, fault: RequestFault) -> None:
        """Answer a request whose rest is no longer waited for."""
        if self._lingering is None:
            self._answer(fault)
            self._linger()

    def _answer(self, fault: RequestFault) -> None:
        """Respond with ``fault``; abort a response that has begun."""
        self._disconnect_on_finish = True
        if self._response_start_line is not None:
            if not self._write_finished and self._expected_content_remaining != 0:
                self.stream.close()
        elif self.fault_handler is not None and (handler := self.fault_handler()) is not None:
            handler.refuse(fault)
        elif not self.stream.closed():
            body = json.dumps({"message": fault.message}).encode()
            head = (
                f"HTTP/1.1 {fault.status} {responses[fault.status]}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\nConnection: close\r\n"
                f"Date: {_date(int(time.time()))}\r\n\r\n"
            ).encode()
            self._response_start_line = ResponseStartLine("HTTP/1.1", fault.status, responses[fault.status])
            self._expected_content_remaining = 0
            self.stream.write(head if self.method == "HEAD" else head + body)
            self.client_connection.report_fault(self, fault, len(body))

    def _linger(self) -> None:
        """Write nothing more, and close the connection after LINGER_S at the latest."""
        if self._lingering is None and not self.stream.closed():
            self._lingering = asyncio.get_running_loop().call_later(LINGER_S, self.stream.close)
            self.stream.write(b"").add_done_callback(self._shut_down)  # done when all before it has left

    def _shut_down(self, written: asyncio.Future[None]) -> None:
        if written.exception() is None and not self.stream.closed():
            with contextlib.suppress(OSError):  # the client has left
                self.stream.socket.shutdown(socket.SHUT_WR)

    async def _discard_rest(self) -> None:
        """Read and throw away what comes, until the client has closed its side or LINGER_S are over."""
        self._linger()
        work = 0
        while True:
            work += len(await self.stream.read_bytes(_YIELD_BYTES, partial=True))
            if work >= _YIELD_BYTES:
                work = 0
                await asyncio.sleep(_DISCARD_PAUSE_S)

    def close(self) -> None:
        """Close the connection."""
        super().close()
        if self._lingering is not None:
            self._lingering.cancel()


@lru_cache(1)
def _date(now: int) -> str:
    return formatdate(now, usegmt=True)


def peer_of(connection: Any) -> str:
    """Return the address of the connection's other end, or UNIX, also when the socket is closed."""
    context = connection.context
    return UNIX if context.address_family == socket.AF_UNIX else str(context.remote_ip)


def close_after(request: HTTP1Connection) -> None:
    """Close the connection after the response to ``request``, and announce that in the response's head.

    A client whose response's head has left already may use the connection again.
    """
    if request._response_start_line is None:
        request._disconnect_on_finish = True


class ClientConnection(HTTP1ServerConnection):
    """A connection from its first request to its last. All times are the loop's.

    ``request`` is the one that is served or waited for, None before the loop's next turn. ``waiting_since`` is when
    the wait for it began, and ``head_since`` when the server noticed that a part of its head has come; both are None
    while the request is served. ``has_served`` is whether there was a request before it. ``report_fault`` is called
    with each request that is answered here, the fault, and the length of the response's body.
    """

    request: Request | None = None
    waiting_since: float | None = None
    head_since: float | None = None
    has_served = False

    def __init__(self, *args: Any, report_fault: Callable[[Request, RequestFault, int], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.report_fault = report_fault

    @property
    def is_busy(self) -> bool:
        """Return whether a request has come whose response is not finished."""
        return self.request is not None and self.request.has_head

    @property
    def has_part_of_head(self) -> bool:
        """Return whether a part of the next request's head has come."""
        return self.waiting_since is not None and self.stream._read_buffer_size > 0

    async def _server_request_loop(self, delegate: HTTPServerConnectionDelegate) -> None:
        # Like Tornado's, except that it yields to the loop between two requests only when both came at once.
        loop = asyncio.get_running_loop()
        request = None
        try:
            while True:
                self.request = request = Request(self.stream, False, self.params, self.context)
                request.client_connection = self
                self.waiting_since = loop.time()
                try:
                    again = await request.read_response(delegate.start_request(self, request))
                except (StreamClosedError, UnsatisfiableReadError, asyncio.CancelledError):
                    return
                except Exception:  # an error of the application's, outside a handler
                    logger.exception("connection closed: a request of %s failed", self.context)
                    return
                if not again:
                    return
                self.has_served = True
                if self.stream._read_buffer_size:
                    await asyncio.sleep(0)
        finally:
            if request is not None:
                request.close()
            delegate.on_close(self)
            self.request = None  # or the two would refer to each other until the next garbage collection
