"""A caller's connection, read at less cost than Tornado's own.

Strategy. Tornado's parser stays the judge of every request. But a caller's second request repeats most header lines of
its first, and other callers send the same ones: what Tornado made of a line is kept, and only the lines are put
together anew. Whatever is unusual, such as a folded line or a bare LF, goes to Tornado's parser as a whole.

Tornado gives each wait for a request a timer of its own. Here a connection only notes since when it waits, and the
server looks at all of them from time to time.
"""

from __future__ import annotations

import asyncio
import socket
from functools import lru_cache
from typing import Any

from tornado.http1connection import HTTP1Connection, HTTP1ServerConnection
from tornado.httputil import HTTPHeaders, HTTPInputError, HTTPServerConnectionDelegate
from tornado.iostream import IOStream, StreamClosedError, UnsatisfiableReadError
from tornado.log import gen_log

__all__ = ["CallerConnection", "CallerStream", "Request", "close_after"]

# Lines of callers that are kept, and the longest of them: no more than 1 MB in all.
KEPT_LINES, KEPT_LINE_BYTES = 4096, 128
# Nobody's secrets are kept.
_NOT_KEPT = ("authorization", "cookie", "proxy-authorization")


class CallerStream(IOStream):
    """A stream that sends at once whatever is written (TCP_NODELAY), and leaves no garbage."""

    def __init__(self, connection: socket.socket, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        super().set_nodelay(True)

    def close(self, exc_info: Any = False) -> None:
        """As Tornado's, which keeps an error, and with its traceback the frames that hold this stream: a cycle."""
        super().close(exc_info)
        if self.error is not None:
            self.error.__traceback__ = None

    def set_nodelay(self, value: bool) -> None:
        """Nothing. Tornado switches it on and off for each answer."""


class Request(HTTP1Connection):
    """One request on a connection, and its answer."""

    caller: CallerConnection

    @property
    def is_being_answered(self) -> bool:
        """Whether its head has come. What is answered is a connection's request no more."""
        return self._request_start_line is not None

    def _parse_headers(self, data: bytes) -> tuple[str, HTTPHeaders]:
        self.caller.waits_since = self.caller.head_since = None
        start_line, *lines = data.decode("latin1").lstrip("\r\n").split("\r\n")
        if lines[-2:] != ["", ""] or "\n" in start_line:
            return super()._parse_headers(data)
        headers = HTTPHeaders()
        fields, combined = headers._as_list, headers._combined_cache
        for line in lines[:-2]:
            field = _field(line) if len(line) <= KEPT_LINE_BYTES else _parse(line)
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
    """Close the connection after the answer to ``request``, and tell the caller so, if its head has not left yet.

    A caller whose answer's head has left may use the connection again.
    """
    if request._response_start_line is None:
        request._disconnect_on_finish = True


class CallerConnection(HTTP1ServerConnection):
    """A connection from its first request to its last. All times are the loop's.

    ``request`` is the one that is served or waited for, None before the loop's next turn; ``waits_since`` when the wait
    for it began, ``head_since`` when the server noticed that its head had begun to come; both are None while it is
    served. ``served`` tells whether there was a request before it.
    """

    request: Request | None = None
    waits_since: float | None = None
    head_since: float | None = None
    served = False

    @property
    def is_busy(self) -> bool:
        """Whether a request has come and is not answered yet."""
        return self.request is not None and self.request.is_being_answered

    @property
    def has_begun(self) -> bool:
        """Whether a part of the next request's head is here."""
        return self.waits_since is not None and self.stream._read_buffer_size > 0

    async def _server_request_loop(self, delegate: HTTPServerConnectionDelegate) -> None:
        # As Tornado's, but that it yields between two requests only when both came at once.
        loop = asyncio.get_running_loop()
        try:
            while True:
                self.request = request = Request(self.stream, False, self.params, self.context)
                request.caller = self
                self.waits_since = loop.time()
                try:
                    again = await request.read_response(delegate.start_request(self, request))
                except (StreamClosedError, UnsatisfiableReadError, asyncio.CancelledError):
                    return
                except Exception:  # noqa: BLE001  (whatever it is ends this connection, and none else)
                    gen_log.error("Uncaught exception", exc_info=True)
                    request.close()
                    return
                if not again:
                    return
                self.served = True
                if self.stream._read_buffer_size:
                    await asyncio.sleep(0)
        finally:
            delegate.on_close(self)
            self.request = None  # or each would keep the other until the next collection of garbage


@lru_cache(KEPT_LINES)
def _kept(line: str) -> tuple[str, str] | None:
    return _parse(line)


def _field(line: str) -> tuple[str, str] | None:
    return _parse(line) if line.lower().startswith(_NOT_KEPT) else _kept(line)


def _parse(line: str) -> tuple[str, str] | None:
    """What Tornado makes of a header line, None where it makes none or not one header of it."""
    headers = HTTPHeaders()
    try:
        headers.parse_line(line)
    except HTTPInputError:
        return None
    fields = list(headers.get_all())
    return fields[0] if len(fields) == 1 else None
