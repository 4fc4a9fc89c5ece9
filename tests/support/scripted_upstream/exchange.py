"""One request, and every way to respond to it over either protocol."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

import h2.errors

if TYPE_CHECKING:
    from tests.support.scripted_upstream.connection import Connection

__all__ = ["BODILESS", "Exchange", "Gone", "Headers", "content_length", "header_fields"]

Headers = Iterable[tuple[str | bytes, str | bytes]]

# Limits the wait of a connection that is closed for the client's close_notify: an idle pool sends none, and a client
# that reads sends it within milliseconds.
CLOSE_GRACE_S = 0.1
BODILESS = (204, 304)  # RFC 9110 section 8.6: these end with their head


class Gone(ConnectionError):
    """Report that the client left before the handler was done. A handler need not catch it."""


class Exchange(ABC):
    """One request, and every way to respond to it.

    Header names and values go out exactly as given, so lower-case names suit both protocols. A `content-length` or
    `transfer-encoding` among them replaces the framing that would have been added. Methods that write raise `Gone`
    once `gone` is set.
    """

    protocol: str

    def __init__(
        self, connection: "Connection", method: str, target: bytes, authority: str, headers: list[tuple[bytes, bytes]]
    ) -> None:
        self.connection_number = connection.number
        self.number_on_connection = connection.exchanges_begun
        self.method = method
        self.target = target
        self.authority = authority
        self.headers = headers
        #: Set when the client cancelled, or either side ended the connection, before the response was complete.
        self.gone = asyncio.Event()
        self._connection = connection
        self._received = bytearray()
        self._whole = False
        self._settled = asyncio.Event()  # the body is whole, or never will be

    def __repr__(self) -> str:
        position = f"{self.connection_number}.{self.number_on_connection}"
        return f"<Exchange {position} {self.protocol} {self.method} {self.authority} {self.target!r}>"

    def header(self, name: str) -> bytes | None:
        """Return the first value of the request's header of that name."""
        wanted = name.lower().encode()
        return next((value for key, value in self.headers if key.lower() == wanted), None)

    async def body(self) -> bytes:
        """Return the whole request body, or raise `Gone` if it is incomplete. The handler starts before that."""
        await self._settled.wait()
        if not self._whole:
            raise Gone(f"{self!r}: body incomplete after {len(self._received)} bytes")
        return bytes(self._received)

    @abstractmethod
    async def respond(self, status: int, body: bytes = b"", headers: Headers = ()) -> None:
        """Send the whole response, in one write if it is small."""

    @abstractmethod
    async def informational(self, status: int, headers: Headers = ()) -> None:
        """Send an interim response (1xx) before the real one."""

    @abstractmethod
    async def start(self, status: int, headers: Headers = (), length: int | None = None) -> None:
        """Send the head alone. Without `length`, HTTP/1.1 sends the body in chunks."""

    @abstractmethod
    async def send(self, data: bytes) -> None:
        """Send a piece of the body, and return once the client's flow control and the socket have taken it."""

    @abstractmethod
    async def end(self, trailers: Headers = ()) -> None:
        """End the response as its framing requires. A body that is shorter than announced is not filled up."""

    @abstractmethod
    def reset(self, code: int = h2.errors.ErrorCodes.INTERNAL_ERROR) -> None:
        """Break this exchange: RST_STREAM with `code`, or on HTTP/1.1 the same as `abort_connection`."""

    def abort_connection(self) -> None:
        """Break the whole connection with a TCP RST."""
        self._connection.reset()

    async def close_connection(self) -> None:
        """Close the connection properly (close_notify, then FIN), also while exchanges are unfinished."""
        await self._connection.close(CLOSE_GRACE_S)

    def goaway(self, last_stream_id: int | None = None, code: int = 0) -> None:
        """Send GOAWAY (HTTP/2 only). Streams up to `last_stream_id`, by default all, go on; later ones are ignored."""
        raise NotImplementedError(f"{self.protocol} has no GOAWAY")

    def limit_streams(self, count: int) -> None:
        """Allow that many streams at once on this connection from now on (HTTP/2 only)."""
        raise NotImplementedError(f"{self.protocol} has no streams")

    async def raw(self, data: bytes) -> None:
        """Send any bytes in place of a response (HTTP/1.1 only). After `end` the connection serves the next request."""
        raise NotImplementedError(f"{self.protocol} is not raw bytes")

    def leave(self) -> None:
        """Note that the client has left."""
        self.gone.set()
        self._settled.set()

    def receive(self, data: bytes) -> None:
        """Take a piece of the request's body."""
        self._received += data

    def receive_end(self) -> None:
        """Note that the request is whole."""
        self._whole = True
        self._settled.set()

    def _check_present(self) -> None:
        if self.gone.is_set():
            raise Gone(repr(self))


def header_fields(headers: Headers, length: int | None = None) -> list[tuple[bytes, bytes]]:
    """Return the headers as bytes, with a content-length unless they frame the body themselves."""
    fields = [(_raw(name), _raw(value)) for name, value in headers]
    framed = any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in fields)
    if length is not None and not framed:
        fields.append((b"content-length", b"%d" % length))
    return fields


def _raw(text: str | bytes) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else text


def content_length(status: int, body: bytes) -> int | None:
    """Return the content-length of a whole response, None if it has no body."""
    return None if status in BODILESS else len(body)
