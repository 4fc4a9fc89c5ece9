"""A scriptable upstream: an HTTPS server on loopback that can misbehave in every way.

Each request becomes an `Exchange` and a task that runs the test's handler with it. The handler answers piece by
piece, or resets, aborts, closes, or never answers: a handler that returns early leaves its exchange open.
Everything is real (sockets, TLS, ALPN, HTTP/2 flow control), because what is under test is how libcurl meets it.

Requests are parsed strictly, by h11 and h2, so that a caller that breaks HTTP is a failure of the test. Answers are
checked by nobody: HTTP/1.1 is written by hand, and h2's checks of what it sends are off. The server runs in the
loop of the test, never retries, and has no time limit of its own except for TLS handshakes.
"""

import asyncio
import datetime
import socket
import ssl
import struct
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from http.client import responses
from pathlib import Path
from typing import Any, cast

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import h11
import trustme
from hyperframe.frame import GoAwayFrame

__all__ = ["Authority", "Exchange", "Gone", "Handler", "Headers", "Upstream", "tls_server_context"]

Headers = Iterable[tuple[str | bytes, str | bytes]]

FAL_NAMES = ("fal.run", "*.fal.run", "fal.ai", "*.fal.ai", "rest.alpha.fal.ai")

BACKLOG = 4096  # a crowd of callers may arrive before the loop accepts the first (the kernel caps it at somaxconn)
WRITE_BUFFER_BYTES = 64 * 1024  # asyncio's default for TLS, 512 KiB, would hide a slow reader for longer
SLICE_BYTES = 256 * 1024  # asyncio encrypts and keeps all of one write, however large
CLOSE_GRACE_S = 0.1  # an idle pool does not answer close_notify; a caller that reads does so within milliseconds
HANDSHAKE_TIMEOUT_S = 10.0
MAX_HEAD_BYTES = 1024 * 1024  # a caller's over-long head is for the test to judge, not for h11

BODILESS = (204, 304)  # RFC 9110 section 8.6: these end with their head
RST_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, zero seconds


class Gone(ConnectionError):
    """The caller left while the handler still wanted something of it. A handler may let it pass."""


class Exchange(ABC):
    """One request, and every way to answer it.

    Header names and values go out exactly as given, so lower-case names suit both protocols. A `content-length` or
    `transfer-encoding` among them replaces the framing that would have been added. Whatever writes raises `Gone`
    once `gone` is set.
    """

    protocol: str

    def __init__(
        self, connection: "_Connection", method: str, target: bytes, authority: str, headers: list[tuple[bytes, bytes]]
    ) -> None:
        self.connection_number = connection.number
        self.number_on_connection = connection.exchanges_begun
        self.method = method
        self.target = target
        self.authority = authority
        self.headers = headers
        #: Set when the caller cancelled, or the connection ended (by whoever), before the answer was complete.
        self.gone = asyncio.Event()
        #: `loop.time()` of that.
        self.gone_at: float | None = None
        self._connection = connection
        self._received = bytearray()
        self._whole = False
        self._settled = asyncio.Event()  # the body is whole, or never will be

    def __repr__(self) -> str:
        place = f"{self.connection_number}.{self.number_on_connection}"
        return f"<Exchange {place} {self.protocol} {self.method} {self.authority} {self.target!r}>"

    def header(self, name: str) -> bytes | None:
        """The first value of the request's header of that name."""
        wanted = name.lower().encode()
        return next((value for key, value in self.headers if key.lower() == wanted), None)

    async def body(self) -> bytes:
        """The whole request body; `Gone` if it broke off. The handler itself starts as soon as the head is there."""
        await self._settled.wait()
        if not self._whole:
            raise Gone(f"{self!r}: body broke off after {len(self._received)} bytes")
        return bytes(self._received)

    @abstractmethod
    async def respond(self, status: int, body: bytes = b"", headers: Headers = ()) -> None:
        """The whole answer, in one write if it is small."""

    @abstractmethod
    async def informational(self, status: int, headers: Headers = ()) -> None:
        """An interim answer (1xx) before the real one."""

    @abstractmethod
    async def start(self, status: int, headers: Headers = (), length: int | None = None) -> None:
        """The head alone. Without `length`, HTTP/1.1 sends the body in chunks."""

    @abstractmethod
    async def send(self, data: bytes) -> None:
        """A piece of the body; returns once the caller's flow control and the socket have taken it."""

    @abstractmethod
    async def end(self, trailers: Headers = ()) -> None:
        """The end of the answer, as the framing has it. A shorter body than announced is not completed."""

    @abstractmethod
    def reset(self, code: int = h2.errors.ErrorCodes.INTERNAL_ERROR) -> None:
        """Break this exchange: RST_STREAM with `code`, or on HTTP/1.1 the same as `abort_connection`."""

    def abort_connection(self) -> None:
        """Break the whole connection with a TCP RST."""
        self._connection.reset()

    async def close_connection(self) -> None:
        """Close the connection properly (close_notify, then FIN), whatever is unfinished on it."""
        await self._connection.close(CLOSE_GRACE_S)

    def goaway(self, last_stream_id: int | None = None, code: int = 0) -> None:
        """Send GOAWAY (HTTP/2 only). Streams up to `last_stream_id`, by default all, go on; later ones are ignored."""
        raise NotImplementedError(f"{self.protocol} has no GOAWAY")

    def limit_streams(self, count: int) -> None:
        """Allow that many streams at once on this connection from now on (HTTP/2 only)."""
        raise NotImplementedError(f"{self.protocol} has no streams")

    async def raw(self, data: bytes) -> None:
        """Arbitrary bytes in place of an answer (HTTP/1.1 only); after `end` the connection serves the next request."""
        raise NotImplementedError(f"{self.protocol} is not raw bytes")

    def leave(self) -> None:
        """Note that the caller is gone."""
        self.gone.set()
        self.gone_at = asyncio.get_running_loop().time()
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


Handler = Callable[[Exchange], Awaitable[None]]


class Upstream:
    """The server. `start()` after `close()` listens on the same port again, as a restart does.

    `ssl_context` belongs to this server: its ALPN is set to `protocols` (none offered means HTTP/1.1).
    `handler` may be replaced at any time.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        ssl_context: ssl.SSLContext,
        protocols: Sequence[str] = ("h2", "http/1.1"),
        max_concurrent_streams: int = 100,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        if protocols:
            ssl_context.set_alpn_protocols(protocols)
        self.handler = handler
        self.max_concurrent_streams = max_concurrent_streams
        self.host = host
        self.port = port
        #: TLS connections ever completed.
        self.connections = 0
        #: Everything ever received, in order.
        self.exchanges: list[Exchange] = []
        #: What handlers raised, and where callers broke HTTP. Clear it if that was the point of the test.
        self.failures: list[BaseException] = []
        self._ssl_context = ssl_context
        self._open: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def open_connections(self) -> int:
        return len(self._open)

    async def start(self) -> None:
        """Listen, on any free port unless one was given or used before."""
        self._listener = socket.create_server((self.host, self.port), backlog=BACKLOG)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._acceptor = self._spawn(self._accept())

    async def close(self) -> None:
        """End everything without waiting for anyone; raise the first failure, if there was one."""
        self._acceptor.cancel()
        await asyncio.wait([self._acceptor])  # by then every handshake task has begun, and owns its socket
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(connection.close(grace_s=0) for connection in self._open))
        if self.failures:
            raise self.failures[0]

    def opened(self, connection: "_Connection") -> int:
        """Count a connection whose handshake is complete, and return its number."""
        self._open.add(connection)
        self.connections += 1
        return self.connections - 1

    def lost(self, connection: "_Connection") -> None:
        self._open.discard(connection)

    def received(self, exchange: Exchange) -> None:
        """Record a request and start its handler."""
        self.exchanges.append(exchange)
        self._spawn(self._handle(exchange))

    async def _accept(self) -> None:
        # Not loop.create_server(), which hides connections until their handshake is over: close() could not end those.
        loop = asyncio.get_running_loop()
        while True:
            accepted, _ = await loop.sock_accept(self._listener)
            self._spawn(self._handshake(accepted))

    async def _handshake(self, accepted: socket.socket) -> None:
        # asyncio sets this only on sockets that it made itself.
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A caller that breaks off here or refuses the certificate is a case, not a failure.
        with suppress(OSError):
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: _Connection(self, accepted),
                accepted,
                ssl=self._ssl_context,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            )

    async def _handle(self, exchange: Exchange) -> None:
        try:
            await self.handler(exchange)
        except Exception:
            if not exchange.gone.is_set():
                exchange.abort_connection()  # or the caller would wait for its time-out
            raise

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error and not isinstance(error, Gone):
            self.failures.append(error)


class _Connection(asyncio.Protocol):
    """One TLS connection: bytes in, bytes out with backpressure, and the ways to end it."""

    transport: asyncio.Transport
    number: int

    def __init__(self, upstream: Upstream, accepted: socket.socket) -> None:
        self.upstream = upstream
        self.exchanges_begun = 0
        self.unfinished: set[Exchange] = set()
        self._socket = accepted
        self._lost = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()

    def begin(self, exchange: Exchange) -> None:
        self.exchanges_begun += 1
        self.unfinished.add(exchange)
        self.upstream.received(exchange)

    def finish(self, exchange: Exchange) -> None:
        """From here on the caller may leave without being missed."""
        self.unfinished.discard(exchange)

    def leave(self) -> None:
        """Tell every unfinished exchange that its caller is gone."""
        while self.unfinished:
            self.unfinished.pop().leave()

    async def write(self, data: bytes) -> None:
        """Write, slowly enough for the caller to keep up."""
        for offset in range(0, len(data), SLICE_BYTES):
            self.transport.write(data[offset : offset + SLICE_BYTES])
            await self.drain()

    async def drain(self) -> None:
        await self._writable.wait()

    def reset(self) -> None:
        with suppress(OSError):  # the socket is closed already
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
        self.transport.abort()
        self.leave()

    async def close(self, grace_s: float) -> None:
        """Send close_notify, give the caller `grace_s` to take what was written and to answer, then send FIN."""
        if not self.transport.is_closing():  # closing a TLS transport twice disables its abort()
            self.transport.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._lost.wait()
        self.transport.abort()
        await self._lost.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self.number = self.upstream.opened(self)
        chosen = transport.get_extra_info("ssl_object").selected_alpn_protocol()
        self._codec = _H2(self, self.upstream.max_concurrent_streams) if chosen == "h2" else _H1(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._codec.receive(data)
        except (h11.RemoteProtocolError, h2.exceptions.ProtocolError) as error:
            self.upstream.failures.append(error)
            self.reset()

    def eof_received(self) -> None:
        self.leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self.upstream.lost(self)
        self._lost.set()
        self._writable.set()
        self.leave()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()


class _H1:
    """Reads HTTP/1.1 requests, one after the other.

    Each gets a fresh h11 parser: a used one starts its next request only if the answer went through it too.
    """

    def __init__(self, connection: _Connection) -> None:
        self.connection = connection
        self.parser = h11.Connection(h11.SERVER, MAX_HEAD_BYTES)
        self._exchange: _H1Exchange | None = None

    def receive(self, data: bytes) -> None:
        self.parser.receive_data(data)
        while True:
            match self.parser.next_event():
                case h11.Request() as request:
                    self._exchange = _H1Exchange(self, request)
                    self.connection.begin(self._exchange)
                case h11.Data(data=piece) if self._exchange:
                    self._exchange.receive(bytes(piece))
                case h11.EndOfMessage() if self._exchange:
                    self._exchange.receive_end()
                    return self.turn()
                case _:
                    return None

    def turn(self) -> None:
        """Go on to the next request once the current one is both received and answered."""
        received = self.parser.their_state in (h11.DONE, h11.MUST_CLOSE)
        if received and self._exchange not in self.connection.unfinished:
            early, _ = self.parser.trailing_data
            self.parser = h11.Connection(h11.SERVER, MAX_HEAD_BYTES)
            self._exchange = None
            if early:
                self.receive(early)


class _H1Exchange(Exchange):
    protocol = "http/1.1"

    def __init__(self, codec: _H1, request: h11.Request) -> None:
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
        await self._write(self._head(status, headers, _length(status, body)) + body)
        self._finish()

    async def informational(self, status: int, headers: Headers = ()) -> None:
        await self._write(_h1_head(status, _fields(headers)))

    async def start(self, status: int, headers: Headers = (), length: int | None = None) -> None:
        await self._write(self._head(status, headers, length))

    async def send(self, data: bytes) -> None:
        if self._chunked and data:  # an empty chunk would be the end
            data = b"%x\r\n%b\r\n" % (len(data), data)
        await self._write(data)

    async def end(self, trailers: Headers = ()) -> None:
        if self._chunked:
            await self._write(b"0\r\n" + _h1_fields(_fields(trailers)) + b"\r\n")
        self._finish()

    def reset(self, code: int = h2.errors.ErrorCodes.INTERNAL_ERROR) -> None:
        self.abort_connection()

    async def raw(self, data: bytes) -> None:
        await self._write(data)

    def _head(self, status: int, headers: Headers, length: int | None) -> bytes:
        fields = _fields(headers, length)
        names = {name.lower() for name, _ in fields}
        if status not in BODILESS and names.isdisjoint((b"content-length", b"transfer-encoding")):
            self._chunked = True
            fields.append((b"transfer-encoding", b"chunked"))
        self._closes |= (b"connection", b"close") in ((name.lower(), value.lower()) for name, value in fields)
        return _h1_head(status, fields)

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


class _H2:
    """One HTTP/2 connection: h2's state machine, and the exchanges by stream."""

    def __init__(self, connection: _Connection, max_concurrent_streams: int) -> None:
        self.connection = connection
        self.state = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=False,
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.state.initiate_connection()
        self._exchanges: dict[int, _H2Exchange] = {}
        self._last_stream_id: int | None = None  # once GOAWAY was sent
        # As an update, for h2 holds the caller to it only once the caller has acknowledged it.
        self.limit_streams(max_concurrent_streams)

    def receive(self, data: bytes) -> None:
        for event in self.state.receive_data(data):
            self._take(event)
        self.flush()

    def flush(self) -> None:
        self.connection.transport.write(self.state.data_to_send())

    def goaway(self, last_stream_id: int | None, code: int) -> None:
        # By hand, for h2's close_connection() forbids to finish the open streams.
        self._last_stream_id = self.state.highest_inbound_stream_id if last_stream_id is None else last_stream_id
        frame = GoAwayFrame(last_stream_id=self._last_stream_id, error_code=code)
        self.connection.transport.write(frame.serialize())

    def limit_streams(self, count: int) -> None:
        self.state.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: count})
        self.flush()

    def _take(self, event: h2.events.Event) -> None:  # noqa: C901  (one case for each kind)
        match event:
            case h2.events.RequestReceived(stream_id=stream_id):
                if self._last_stream_id is None or stream_id <= self._last_stream_id:
                    self._exchanges[stream_id] = exchange = _H2Exchange(self, event)
                    self.connection.begin(exchange)
            case h2.events.DataReceived(stream_id=stream_id, data=data, flow_controlled_length=length):
                self.state.acknowledge_received_data(length, stream_id)
                if stream_id in self._exchanges:
                    self._exchanges[stream_id].receive(data)
            case h2.events.StreamEnded(stream_id=stream_id) if stream_id in self._exchanges:
                self._exchanges[stream_id].receive_end()
            case h2.events.StreamReset(stream_id=stream_id) if stream_id in self._exchanges:
                exchange = self._exchanges[stream_id]
                if exchange in self.connection.unfinished:
                    self.connection.finish(exchange)
                    exchange.leave()
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                for exchange in self._exchanges.values():
                    exchange.window_changed.set()
            case h2.events.ConnectionTerminated():
                self.connection.leave()
                self.connection.transport.abort()


class _H2Exchange(Exchange):
    protocol = "h2"

    def __init__(self, codec: _H2, request: h2.events.RequestReceived) -> None:
        fields = [(bytes(name), bytes(value)) for name, value in request.headers]
        pseudo = dict(field for field in fields if field[0].startswith(b":"))
        headers = [field for field in fields if not field[0].startswith(b":")]
        authority = pseudo.get(b":authority", b"").decode()
        super().__init__(codec.connection, pseudo[b":method"].decode(), pseudo[b":path"], authority, headers)
        self.window_changed = asyncio.Event()
        self._codec = codec
        self._stream_id = request.stream_id

    async def respond(self, status: int, body: bytes = b"", headers: Headers = ()) -> None:
        self._queue_head(status, _fields(headers, _length(status, body)))
        await self._send(body, end=True)
        self._connection.finish(self)

    async def informational(self, status: int, headers: Headers = ()) -> None:
        self._queue_head(status, _fields(headers))
        await self._flush()

    async def start(self, status: int, headers: Headers = (), length: int | None = None) -> None:
        self._queue_head(status, _fields(headers, length))
        await self._flush()

    async def send(self, data: bytes) -> None:
        await self._send(data, end=False)

    async def end(self, trailers: Headers = ()) -> None:
        self._check_present()
        if fields := _fields(trailers):
            self._codec.state.send_headers(self._stream_id, fields, end_stream=True)
        else:
            self._codec.state.end_stream(self._stream_id)
        self._connection.finish(self)
        self._codec.flush()
        await self._connection.drain()

    def reset(self, code: int = h2.errors.ErrorCodes.INTERNAL_ERROR) -> None:
        self._check_present()
        self._codec.state.reset_stream(self._stream_id, code)
        self._codec.flush()
        self._connection.finish(self)

    def goaway(self, last_stream_id: int | None = None, code: int = 0) -> None:
        self._codec.goaway(last_stream_id, code)

    def limit_streams(self, count: int) -> None:
        self._codec.limit_streams(count)

    def leave(self) -> None:
        super().leave()
        self.window_changed.set()

    def _queue_head(self, status: int, fields: list[tuple[bytes, bytes]]) -> None:
        self._check_present()
        self._codec.state.send_headers(self._stream_id, [(b":status", b"%d" % status), *fields])

    async def _send(self, data: bytes, *, end: bool) -> None:
        state, rest = self._codec.state, memoryview(data)
        while True:
            self._check_present()
            size = min(len(rest), state.local_flow_control_window(self._stream_id), state.max_outbound_frame_size)
            if rest and size <= 0:
                self.window_changed.clear()
                await self._flush()
                await self.window_changed.wait()
                continue
            last = size == len(rest)
            state.send_data(self._stream_id, bytes(rest[:size]), end_stream=end and last)
            rest = rest[size:]
            await self._flush()
            if last:
                return

    async def _flush(self) -> None:
        self._codec.flush()
        await self._connection.drain()
        self._check_present()


class Authority:
    """A certificate authority of the test's own; callers trust it by `ca_file`, which is made in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._ca = trustme.CA()
        self.ca_file = str(directory / "ca.pem")
        self._ca.cert_pem.write_to_path(self.ca_file)

    def context(self, *names: str, expired: bool = False) -> ssl.SSLContext:
        """A server's context, with a fresh certificate for `names` (by default fal's)."""
        yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        return tls_server_context(self._ca.issue_cert(*names or FAL_NAMES, not_after=yesterday if expired else None))

    def write_certificate(self, path: Path) -> None:
        """Key and certificate of a server of fal's, for another process."""
        self._ca.issue_cert(*FAL_NAMES).private_key_and_cert_chain_pem.write_to_path(str(path))


def tls_server_context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    """A server's context that presents `certificate` and asks callers for none."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    return context


def _fields(headers: Headers, length: int | None = None) -> list[tuple[bytes, bytes]]:
    """Headers as bytes, plus a content-length unless they frame the body themselves."""
    fields = [(_raw(name), _raw(value)) for name, value in headers]
    framed = any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in fields)
    if length is not None and not framed:
        fields.append((b"content-length", b"%d" % length))
    return fields


def _raw(text: str | bytes) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else text


def _length(status: int, body: bytes) -> int | None:
    return None if status in BODILESS else len(body)


def _h1_head(status: int, fields: list[tuple[bytes, bytes]]) -> bytes:
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, responses.get(status, "Unknown").encode(), _h1_fields(fields))


def _h1_fields(fields: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"%b: %b\r\n" % field for field in fields)
