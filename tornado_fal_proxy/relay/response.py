"""Send a response to the client: fal's, whole or as a stream, or one of the proxy's own.

Strategy. A response leaves in one of three ways:

* whole, in one write with ``content-length``
* as a stream: the head at once, then each piece as it came, and libcurl is paused while the client does not read. A
  stream that breaks upstream is aborted here, and never ended cleanly.
* as ``{"message": ...}``, the form of every response that the proxy makes by itself, whatever the application's
  settings or base classes say about errors

Each call ends once, and is then reported to :meth:`RelayResponse.on_call_end`. This module decides nothing about a
request: :class:`~tornado_fal_proxy.handler.FalProxyHandler` does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
import traceback
import weakref
from collections.abc import Container
from http.client import responses
from typing import Any

from tornado.http1connection import HTTP1Connection
from tornado.httputil import HTTPHeaders
from tornado.web import HTTPError, RequestHandler

from tornado_fal_proxy.config import ProxyConfig
from tornado_fal_proxy.errors import ClientDisconnected, MethodNotAllowed, ProxyError, UpstreamError
from tornado_fal_proxy.rules.cors import CORS_PREFIX, CorsRules, vary
from tornado_fal_proxy.rules.headers import ResponseHead
from tornado_fal_proxy.rules.target import TARGET_HEADER
from tornado_fal_proxy.spending.calls import SpendingCall
from tornado_fal_proxy.telemetry import REQUEST_ID, Call
from tornado_fal_proxy.upstream.budget import BufferBudget
from tornado_fal_proxy.upstream.transfer import Transfer

__all__ = ["RelayResponse", "describe_exception", "split_utf8"]

logger = logging.getLogger("tornado_fal_proxy")

# Limits how long the rest of a refused request's body is read and thrown away. Closing at once would reset the
# connection of a client that is still sending, and the client would never receive the response.
LINGER_S = 5.0
# Keep a response from being a page in the operator's origin, should a browser ever show one: its type is not guessed,
# and it runs nothing.
_TYPE_OPTIONS, _NO_SNIFF = "X-Content-Type-Options", "nosniff"
_SECURITY_POLICY, _SANDBOXED = "Content-Security-Policy", "sandbox"
_OWN_NAMES = frozenset({REQUEST_ID.lower(), _TYPE_OPTIONS.lower(), _SECURITY_POLICY.lower(), "vary"})


class RelayResponse(RequestHandler):
    """Write responses of a relayed call. A subclass sets up the state with :meth:`_begin_response`."""

    _config: ProxyConfig
    _cors: CorsRules | None
    _budget: BufferBudget | None
    _spent: SpendingCall | None
    #: The facts of this call so far, for logs; see :meth:`on_call_end`.
    call: Call

    def _begin_response(self, config: ProxyConfig, cors: CorsRules | None) -> None:
        self._config, self._cors = config, cors
        self._budget = None
        self._spent = None  # what follows a call that is counted
        self._responded = False  # the proxy's own response, or none, is all that follows
        self._streaming = False
        self._ended = False
        self._linger: asyncio.TimerHandle | None = None
        self.call = Call(self.request.method or "", self.request.headers.get(REQUEST_ID))
        self._add_own_headers()  # for responses that are the subclass's own
        self._watch_disconnect()

    def _watch_disconnect(self) -> None:
        """Call :meth:`_on_disconnect` when the client leaves, whatever a subclass makes of ``on_connection_close``.

        Tornado calls that method of the instance while it reads the body, and the callback later. A weak reference,
        because a strong one would make each handler a cycle.
        """
        reference = weakref.ref(self)

        def on_connection_close() -> None:
            handler = reference()
            if handler is not None:
                handler._on_disconnect()

        self.on_connection_close = on_connection_close  # type: ignore[method-assign]
        self._connection.set_close_callback(on_connection_close)

    # Fal's response.

    def clear(self) -> None:
        """Reset the response as Tornado's does, but without Server, Date and Content-Type, which the target sets."""
        self._headers = HTTPHeaders()
        self.set_default_headers()
        self._write_buffer = []
        self._status_code, self._reason = 200, responses[200]

    def _copy_head(self, head: ResponseHead) -> None:
        self._write_buffer = []  # what a function of the operator's has written is no part of the target's response
        self.set_status(head.status, responses.get(head.status, "Unknown"))
        # parse_response_head has checked names and values. The target's headers win over the application's.
        headers = self._headers
        names = set()
        fields = head.headers
        if withheld := self._config.withheld:
            fields = [field for field in fields if field[0] not in withheld]
        for name, value in fields:
            if name in names:
                headers.add(name, value)
            else:
                names.add(name)
                headers[name] = value
        if self._spent is not None:
            for name, value in self._spent.limit_fields(head):
                headers[name] = value
        if self._cors is not None or not names.isdisjoint(_OWN_NAMES):  # else they stand since the beginning
            self._add_own_headers(names)

    async def _write_whole(self, head: ResponseHead, body: bytes) -> None:
        if self._spent is not None:
            self._spent.tap(body)
            await self._spent.complete(head)
        self.call.sent_bytes = len(body)
        if not head.has_body:
            # finish() alone would remove headers that describe the representation, such as a 304's content-type.
            self.flush(include_footers=True)
        if body:
            self._headers["Content-Length"] = str(len(body))  # finish() would take longer to find it
        await self._delivered(self.finish(body or None), len(body))

    async def _write_stream(self, head: ResponseHead, transfer: Transfer, length: int | None) -> None:
        """Write the body piece by piece. ``length`` is its size in bytes where that is known."""
        if length is not None:
            self.set_header("Content-Length", length)
        if head.streams:
            self._headers["X-Accel-Buffering"] = "no"  # nginx buffers by default, and removes this header again
        self._streaming = True
        self._connection.stream.set_nodelay(True)
        await self._delivered(self.flush())
        spent = self._spent
        undecoded = b""
        while chunk := await transfer.read():
            if head.streams:
                # @fal-ai/client decodes each chunk by itself and breaks where a character is cut in two.
                chunk, undecoded = split_utf8(undecoded + transfer.read_rest_of_line(chunk))
            else:
                chunk = transfer.read_rest(chunk)
            if chunk:
                if spent is not None:
                    spent.tap(chunk)
                self.call.sent_bytes += len(chunk)
                self.write(chunk)
                await self._delivered(self.flush(), len(chunk))
        if undecoded:
            self.call.sent_bytes += len(undecoded)
            self.write(undecoded)
        if spent is not None:
            await spent.complete(head)
        self._streaming = False
        await self._delivered(self.finish())
        if self.request.version == "HTTP/1.0" and length is None:
            # Only closing ends such a response, and Tornado keeps the connection if the client asked for keep-alive.
            self._connection.close()

    async def _delivered(self, written: asyncio.Future[None], size: int = 0) -> None:
        """Wait while the client's end is full. Raise ClientDisconnected after ``idle_timeout_s`` without a byte.

        The ``size`` bytes that were written count as buffered until they have left.
        """
        stream = self._connection.stream
        if not stream.writing():
            return
        if self._budget is not None:
            self._budget.add(size)
        try:
            while True:
                sent = stream._total_write_done_index
                await asyncio.wait((written,), timeout=self._config.idle_timeout_s)
                if written.done() or stream._total_write_done_index == sent:
                    break
        finally:
            if self._budget is not None:
                self._budget.remove(size)
        if not written.done():
            self._abort(ClientDisconnected("the client stopped reading"))
            raise ClientDisconnected
        written.result()
        if stream.closed() and stream._total_write_done_index < stream._total_write_index:
            raise ClientDisconnected  # Tornado reports this write as done too

    # Responses of the proxy's own.

    def _release(self) -> None:
        """Give back what the call holds of others. A subclass may override it."""

    def _refuse(self, error: ProxyError) -> None:
        """Respond with ``error``, and keep the connection open until the client can have received it."""
        level = logging.ERROR if error.status == 500 else logging.INFO
        if not isinstance(error, UpstreamError):
            detail = error.detail or error.message
            logger.log(level, "refused: %d %s: %s", error.status, self.request.method, detail, extra=self._extra)
        self._respond(error.status, error.message, error.headers, error)

    def _respond(
        self,
        status: int,
        message: str,
        headers: tuple[tuple[str, str], ...] = (),
        error: BaseException | None = None,
    ) -> None:
        self._responded = True
        self._release()
        super().clear()
        self.set_status(status)
        for name, value in (*headers, *(() if self._spent is None else self._spent.limit_fields(None))):
            self.set_header(name, value)
        self._add_own_headers()
        self.set_header("Content-Type", "application/json")
        body = json.dumps({"message": message}).encode()
        self.call.sent_bytes = len(body)
        self.call.mark_first_byte()
        self._end_call(error)
        self._send(body)

    def _send(self, body: bytes) -> None:
        """Finish a response of the proxy's own, while the request may still be arriving."""
        self._write_buffer = []
        if self.request._body_future.done() or "Expect" in self.request.headers:
            self.finish(body or None)
            return
        # The response is complete with this. finish() would close the connection now, whether a body is on its way or
        # not; it follows when the body was read and thrown away, or after LINGER_S.
        if body:
            self.set_header("Content-Length", len(body))
            self.write(body)
        self.flush()
        self._linger = asyncio.get_running_loop().call_later(LINGER_S, self._end_linger)
        self.request._body_future.add_done_callback(self._end_linger)

    def _end_linger(self, body_is_read: asyncio.Future[None] | None = None) -> None:
        if body_is_read is not None and body_is_read.exception() is not None:
            return  # the client has left
        if not self._finished:
            self.finish()
        if self._linger is not None:
            self._linger.cancel()  # the timer and the handler would keep each other
            self._linger = None

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        """Answer an exception (an HTTPError of a subclass or of Tornado, or a bug) as fal's SDKs expect it."""
        exception = kwargs.get("exc_info", (None, None, None))[1]
        if self._streaming:
            self._abort(exception)
        elif not self._responded:
            reason = exception.reason if isinstance(exception, HTTPError) else None
            headers = MethodNotAllowed.headers if status_code == 405 else ()
            self._respond(status_code, reason or responses.get(status_code, "Unknown"), headers, exception)

    # Headers of the proxy's own.

    def _add_own_headers(self, from_target: Container[str] = ()) -> None:
        """Set what every response of the route says: its id, and that no cache may use it for another target."""
        headers = self._headers
        headers[REQUEST_ID] = self.call.request_id
        headers[_TYPE_OPTIONS] = _NO_SNIFF
        if "content-security-policy" in from_target:
            headers.add(_SECURITY_POLICY, _SANDBOXED)  # a browser applies both
        else:
            headers[_SECURITY_POLICY] = _SANDBOXED
        if self._cors is not None:
            self._add_cors_headers(self._cors)
        elif "Vary" in headers:
            self._set_vary(TARGET_HEADER)
        else:
            headers["Vary"] = TARGET_HEADER

    def _add_cors_headers(self, cors: CorsRules) -> None:
        """Set which pages may read the response, and remove what the target says about that."""
        for name in [name for name in self._headers if name.lower().startswith(CORS_PREFIX)]:
            del self._headers[name]
        for name, value in cors.response_headers(self._origin()):
            self._headers[name] = value
        self._set_vary("Origin", TARGET_HEADER)

    def _set_vary(self, *names: str) -> None:
        first, *more = vary(self._headers.get_list("Vary"), *names)
        self._headers["Vary"] = first
        for line in more:
            self._headers.add("Vary", line)

    def _origin(self) -> str | None:
        origins = self.request.headers.get_list("Origin")
        return origins[0] if len(origins) == 1 else None

    # Ends.

    def _on_disconnect(self) -> None:
        """Handle that the client has left. A subclass extends it."""
        try:
            type(self).on_connection_close(self)  # the application's, or Tornado's
        except Exception as exc:  # noqa: BLE001  (the call must be cancelled whatever the application does)
            logger.error("on_connection_close: %s", describe_exception("on_connection_close", exc), extra=self._extra)
        RequestHandler.on_connection_close(self)  # again, in case the application's did not call it
        self._end_disconnected()

    def _abort(self, error: BaseException | None) -> None:
        """Close the connection in a way that the client cannot take what it has for a complete response."""
        self._end_call(error)
        connection = self._connection
        if self.request.version == "HTTP/1.0" and not connection.stream.closed():
            # Here a clean close may mark a complete response. A reset does not.
            connection.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def _end_disconnected(self) -> None:
        """End the call of a client that has left."""
        error = self._reason_to_disconnect()
        self.set_status(error.status)  # for logs; the client never receives it
        self._end_call(error)

    def _reason_to_disconnect(self) -> ProxyError:
        """Return why the client's connection is closed. A subclass may override it."""
        return ClientDisconnected()

    def _end_call(self, error: BaseException | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        self.call.finish(self._status_code, error)
        try:
            self.on_call_end(self.call)
        except Exception as exc:  # noqa: BLE001  (a response must not depend on what is reported of it)
            logger.error("on_call_end: %s", describe_exception("on_call_end", exc), extra=self._extra)

    def on_call_end(self, call: Call) -> None:
        """Receive each call once, when it is over: override it for logs and metrics. It must not block.

        The client has its response, or has left, or is sent the last of a refusal.
        """

    # Decisions of ours that the application's settings do not change.

    def check_xsrf_cookie(self) -> None:
        """Accept every request: fal's SDKs send no token, and no cross-site form can send ``x-fal-target-url``."""

    def compute_etag(self) -> None:
        """Return None: the response is the target's, and so is its validator."""

    def check_etag_header(self) -> bool:
        """Return False: only the target may answer 304."""
        return False

    # Helpers.

    @property
    def _connection(self) -> HTTP1Connection:
        connection = self.request.connection
        assert isinstance(connection, HTTP1Connection)  # the only kind that Tornado has
        return connection

    @property
    def _extra(self) -> dict[str, str]:
        """Return what formatters may show beside a log message."""
        return {"request_id": self.call.request_id}


def describe_exception(name: str, exc: Exception) -> str:
    """Return what to log of an exception of the operator's code: not its text, which may hold anything."""
    return f"{name} raised {type(exc).__name__}\n{''.join(traceback.format_tb(exc.__traceback__)).rstrip()}"


def split_utf8(data: bytes) -> tuple[bytes, bytes]:
    """Return ``data`` without a character that is cut off at its end, and that cut-off part (0 to 3 bytes)."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte < 0x80:
            break
        if 0xC0 <= byte < 0xF8:  # the first byte of a character of 2, 3 or 4 bytes
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            if needed > back:
                return data[:-back], data[-back:]
            break
    return data, b""
