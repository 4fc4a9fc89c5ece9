"""HTTP/1.1: requests read by h11, responses written by hand."""

from http.client import responses
from typing import TYPE_CHECKING

import h2.errors
import h11

from tests.support.scripted_upstream.exchange import BODILESS, Exchange, Headers, content_length, header_fields

if TYPE_CHECKING:
    from tests.support.scripted_upstream.connection import Connection

__all__ = ["Http1"]

MAX_HEAD_BYTES = 1024 * 1024  # a client's over-long head is for the test to judge, not for h11


class Http1:
    """A reader of HTTP/1.1 requests, one after the other.

    Each request gets a new h11 parser: a used one starts its next request only if the response went through it too.
    """

    def __init__(self, connection: "Connection") -> None:
        self.connection = connection
        self.parser = h11.Connection(h11.SERVER, MAX_HEAD_BYTES)
        self._exchange: Http1Exchange | None = None

    def receive(self, data: bytes) -> None:
        self.parser.receive_data(data)
        while True:
            match self.parser.next_event():
                case h11.Request() as request:
                    self._exchange = Http1Exchange(self, request)
                    self.connection.begin(self._exchange)
                case h11.Data(data=piece) if self._exchange:
                    self._exchange.receive(bytes(piece))
                case h11.EndOfMessage() if self._exchange:
                    self._exchange.receive_end()
                    return self.turn()
                case _:
                    return None

    def turn(self) -> None:
        """Go on to the next request once the current one is received and answered."""
        received = self.parser.their_state in (h11.DONE, h11.MUST_CLOSE)
        if received and self._exchange not in self.connection.unfinished:
            early, _ = self.parser.trailing_data
            self.parser = h11.Connection(h11.SERVER, MAX_HEAD_BYTES)
            self._exchange = None
            if early:
                self.receive(early)


class Http1Exchange(Exchange):
    protocol = "http/1.1"

    def __init__(self, codec: Http1, request: h11.Request) -> None:
        headers = request.headers.raw_items()
        authority = next((value for name, value in request.headers if name == b"host"), b"")
        super().__init__(codec.connection, request.method.decode(), request.target, authority.decode(), headers)
        self._codec = codec
        self._chunked = False
        self._closes = (b"connection", b"close") in request.headers

    async def body(self) -> bytes:
        if self._codec.parser.they_are_waiting_for_100_continue:
            await self.informational(100)
        return await super().body()

    async def respond(self, status: int, body: bytes = b"", headers: Headers = ()) -> None:
        await self._write(self._head(status, headers, content_length(status, body)) + body)
        self._finish()

    async def informational(self, status: int, headers: Headers = ()) -> None:
        await self._write(_head_bytes(status, header_fields(headers)))

    async def start(self, status: int, headers: Headers = (), length: int | None = None) -> None:
        await self._write(self._head(status, headers, length))

    async def send(self, data: bytes) -> None:
        if self._chunked and data:  # an empty chunk would be the end
            data = b"%x\r\n%b\r\n" % (len(data), data)
        await self._write(data)

    async def end(self, trailers: Headers = ()) -> None:
        if self._chunked:
            await self._write(b"0\r\n" + _header_lines(header_fields(trailers)) + b"\r\n")
        self._finish()

    def reset(self, code: int = h2.errors.ErrorCodes.INTERNAL_ERROR) -> None:
        self.abort_connection()

    async def raw(self, data: bytes) -> None:
        await self._write(data)

    def _head(self, status: int, headers: Headers, length: int | None) -> bytes:
        fields = header_fields(headers, length)
        names = {name.lower() for name, _ in fields}
        if status not in BODILESS and names.isdisjoint((b"content-length", b"transfer-encoding")):
            self._chunked = True
            fields.append((b"transfer-encoding", b"chunked"))
        self._closes |= (b"connection", b"close") in ((name.lower(), value.lower()) for name, value in fields)
        return _head_bytes(status, fields)

    async def _write(self, data: bytes) -> None:
        self._check_present()
        await self._connection.write(data)
        self._check_present()

    def _finish(self) -> None:
        self._connection.finish(self)
        if self._closes:
            self._connection.transport.close()
        else:
            self._codec.turn()


def _head_bytes(status: int, fields: list[tuple[bytes, bytes]]) -> bytes:
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, responses.get(status, "Unknown").encode(), _header_lines(fields))


def _header_lines(fields: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"%b: %b\r\n" % field for field in fields)
