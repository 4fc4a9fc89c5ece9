"""A client's connection, read at less cost than by Tornado's own classes.

Strategy. Tornado's parser still decides about every request. But a client's second request repeats most header lines
of its first, and other clients send the same lines: what Tornado made of a line is cached, and a head is put together
from these results. A head with anything unusual, such as a folded line or a bare LF, goes to Tornado's parser as a
whole.

Tornado gives each wait for a request a timer. Here a connection only notes since when it waits, and the server sweeps
over all connections every few seconds.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable
from functools import lru_cache
from typing import Any

from tornado.http1connection import HTTP1Connection, HTTP1ServerConnection
from tornado.httputil import HTTPHeaders, HTTPInputError, HTTPServerConnectionDelegate
from tornado.iostream import IOStream, StreamClosedError, UnsatisfiableReadError
from tornado.log import gen_log

__all__ = ["ClientConnection", "ClientStream", "Request", "close_after"]

# Header lines in the cache, and the longest of them: no more than 1 MB in all, whatever clients send.
MAX_CACHED_LINES, MAX_CACHED_LINE_BYTES = 4096, 128
# Limits the line ends that are skipped before a head: the one that some clients send behind a body, and 510 more. A
# client that sends more gets 400, or its flood would keep the loop reading.
MAX_SKIPPED_BYTES = 1024
# Headers that are never cached, because they carry clients' secrets.
_SECRET_HEADERS = ("authorization", "cookie", "proxy-authorization")


class ClientStream(IOStream):
    """A stream that sends at once whatever is written (TCP_NODELAY), and leaves no cycle of references.

    Line ends before a head are skipped when they arrive (RFC 9112, section 2.2), and no part of the head.
    """

    _skipped = 0

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

    def read_until_regex(self, regex: bytes, max_bytes: int | None = None) -> Awaitable[bytes]:
        """Read a head. Tornado reads nothing else in this way."""
        self._skipped = 0
        return super().read_until_regex(regex, max_bytes)

    def _find_read_pos(self) -> int | None:
        if self._read_regex is not None and self._read_buffer.startswith((b"\r", b"\n")):
            count = self._read_buffer_size - len(self._read_buffer.lstrip(b"\r\n"))
            self._skipped += count
            if self._skipped <= MAX_SKIPPED_BYTES:
                self._consume(count)
        return super()._find_read_pos()


class Request(HTTP1Connection):
    """One request on a connection, and its response."""

    client_connection: ClientConnection

    @property
    def has_head(self) -> bool:
        """Return whether the request's head has come; the request is being served from then on."""
        return self._request_start_line is not None

    def _parse_headers(self, data: bytes) -> tuple[str, HTTPHeaders]:
        self.client_connection.waiting_since = self.client_connection.head_since = None
        start_line, *lines = data.decode("latin1").lstrip("\r\n").split("\r\n")
        if lines[-2:] != ["", ""] or "\n" in start_line:
            return super()._parse_headers(data)
        headers = HTTPHeaders()
        fields, combined = headers._as_list, headers._combined_cache
        for line in lines[:-2]:
            field = _field(line) if len(line) <= MAX_CACHED_LINE_BYTES else _parse(line)
            if field is None:
                return super()._parse_headers(data)
            name, value = field
            if name in fields:
                fields[name].append(value)
                combined.pop(name, None)
            else:
                fields[name] = [value]
                combined[name] = value
        return start_line, headers


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
    while the request is served. ``has_served`` is whether there was a request before it.
    """

    request: Request | None = None
    waiting_since: float | None = None
    head_since: float | None = None
    has_served = False

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
        try:
            while True:
                self.request = request = Request(self.stream, False, self.params, self.context)
                request.client_connection = self
                self.waiting_since = loop.time()
                try:
                    again = await request.read_response(delegate.start_request(self, request))
                except (StreamClosedError, UnsatisfiableReadError, asyncio.CancelledError):
                    return
                except Exception:  # noqa: BLE001  (an exception of any kind ends this connection, and no other)
                    gen_log.error("Uncaught exception", exc_info=True)
                    request.close()
                    return
                if not again:
                    return
                self.has_served = True
                if self.stream._read_buffer_size:
                    await asyncio.sleep(0)
        finally:
            delegate.on_close(self)
            self.request = None  # or the two would refer to each other until the next garbage collection


@lru_cache(MAX_CACHED_LINES)
def _cached(line: str) -> tuple[str, str] | None:
    return _parse(line)


def _field(line: str) -> tuple[str, str] | None:
    return _parse(line) if line.lower().startswith(_SECRET_HEADERS) else _cached(line)


def _parse(line: str) -> tuple[str, str] | None:
    """Return the header that Tornado makes of a line, None if it refuses the line or makes of it no single header."""
    headers = HTTPHeaders()
    try:
        headers.parse_line(line)
    except HTTPInputError:
        return None
    fields = list(headers.get_all())
    return fields[0] if len(fields) == 1 else None
