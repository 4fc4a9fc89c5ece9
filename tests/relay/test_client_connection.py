"""A client's connection: heads are read faster than by Tornado with the same result, and silent clients are closed."""

import asyncio
import gc
import inspect
import os
import resource
import socket
import struct
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tornado.http1connection import HTTP1Connection, HTTP1ServerConnection
from tornado.httpserver import _HTTPRequestContext
from tornado.httputil import HTTPHeaders, HTTPInputError
from tornado.iostream import IOStream, StreamClosedError

from tests.support.clock import Clock
from tests.support.logs import Logs
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, call, request
from tests.support.scripted_upstream import Exchange, Upstream
from tests.support.stub_handlers import EVENT_STREAM
from tornado_fal_proxy import close_upstreams
from tornado_fal_proxy.service import connection, server
from tornado_fal_proxy.service.application import make_application
from tornado_fal_proxy.service.connection import ClientConnection, ClientStream, Request
from tornado_fal_proxy.service.server import Server
from tornado_fal_proxy.upstream.client import UpstreamClient

# Heads by their peculiarity.
HEADS = {
    "as clients send them": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n\r\n",
    "no header": b"GET / HTTP/1.1\r\n\r\n",
    "a header twice": b"GET / HTTP/1.1\r\nHost: a\r\nx-fal-a: 1\r\nX-Fal-A: 2\r\nhost: b\r\n\r\n",
    "an empty value": b"GET / HTTP/1.1\r\nx-fal-a:\r\nx-fal-b: \r\n\r\n",
    "white space around a value": b"GET / HTTP/1.1\r\nx-fal-a: \t 1 \t\r\n\r\n",
    "colons in a value": b"GET / HTTP/1.1\r\nx-fal-target-url: https://fal.run:443/a?b:c\r\n\r\n",
    "bytes above ASCII": b"GET / HTTP/1.1\r\nx-fal-a: \xe4\xff\r\n\r\n",
    "a long value": b"GET / HTTP/1.1\r\nx-fal-a: " + b"a" * 1000 + b"\r\n\r\n",
    "line ends before it": b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: a\n\n",
    "a bare LF among others": b"GET / HTTP/1.1\r\nHost: a\nx-fal-a: 1\r\n\r\n",
    "a bare LF at its end": b"GET / HTTP/1.1\r\nHost: a\n\r\n",
    "a bare CR": b"GET / HTTP/1.1\r\nHost: a\rx-fal-a: 1\r\n\r\n",
    "a CR before the line end": b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n",
    "a folded line": b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n",
    "a folded line with a colon": b"GET / HTTP/1.1\r\nHost: a\r\n\tx-fal-b: c\r\n\r\n",
    "a folded first line": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "no colon": b"GET / HTTP/1.1\r\nHost\r\n\r\n",
    "no name": b"GET / HTTP/1.1\r\n: a\r\n\r\n",
    "a space before the colon": b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    "NUL": b"GET / HTTP/1.1\r\nx-fal-a: \0\r\n\r\n",
    "DEL": b"GET / HTTP/1.1\r\nx-fal-a: \x7f\r\n\r\n",
}


def read(kind: type[HTTP1Connection], data: bytes) -> tuple[str, list[tuple[str, str]], dict[str, str]] | None:
    """Return the start line, the headers one by one and combined; None if the head is refused."""
    one, other = socket.socketpair()
    with one, other:
        parser = kind(IOStream(one), False)
        if isinstance(parser, Request):
            parser.client_connection = ClientConnection(parser.stream)
        try:
            start_line, headers = parser._parse_headers(data)
        except HTTPInputError:
            return None
        return start_line, list(headers.get_all()), dict(headers)


@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.gen_test
async def test_a_head_is_read_as_tornado_reads_it(name: str) -> None:
    """A head gives the same headers as with Tornado's parser, also when its lines are in the cache."""
    assert [read(Request, HEADS[name]) for _ in range(2)] == [read(HTTP1Connection, HEADS[name])] * 2


LINES = st.lists(
    st.one_of(
        st.sampled_from([b"Host: a", b"host:b", b"x-fal-a: 1", b" folded", b"", b"none", b"a\rb: c", b"a: b\nc: d"]),
        st.binary(max_size=12),
    ),
    max_size=5,
)


@given(LINES, st.sampled_from([b"\r\n\r\n", b"\n\n", b"\r\n\n", b"\n\r\n"]))
@example([b"Host: a", b""], b"\r\n\r\n")
def test_any_head_is_read_as_tornado_reads_it(lines: list[bytes], end: bytes) -> None:
    """A head made of any lines gives the same headers as with Tornado's parser."""

    async def both() -> None:
        head = b"\r\n".join([b"GET / HTTP/1.1", *lines]) + end
        assert read(Request, head) == read(HTTP1Connection, head)

    asyncio.run(both())


@pytest.mark.gen_test
async def test_secrets_are_not_cached() -> None:
    """Lines that authorize a client are parsed each time."""
    connection._cached.cache_clear()
    for name in (b"Authorization", b"cookie", b"Proxy-Authorization"):
        read(Request, b"GET / HTTP/1.1\r\n" + name + b": secret\r\n\r\n")
    assert connection._cached.cache_info().currsize == 0
    read(Request, HEADS["as clients send them"])
    assert connection._cached.cache_info().currsize == 2


class NoNeighbours:
    def set_connections(self, connections: int | None) -> None:
        pass

    def fewest_connections(self) -> int | None:
        return None


def serve(setup: Setup, upstream: Upstream | None = None, listener: socket.socket | None = None, **fields: Any) -> int:
    """Serve with the service's own server in the loop of the test, in front of ``upstream`` or of none."""
    application = make_application(setup.config(upstream or "127.0.0.1:1", **fields), "/api/fal/proxy")
    listener = listener or socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    running = Server(application)
    running.listen_on([listener], NoNeighbours(), application.shed)

    async def close() -> None:
        running.stop()
        close_upstreams(application)
        await running.close_all_connections()

    setup._closers.append(close)
    return int(listener.getsockname()[1])


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    ("served", "part", "limit"),
    [
        (False, b"", "HEAD_TIMEOUT_S"),
        (False, b"GET / HT", "HEAD_TIMEOUT_S"),
        (True, b"", "KEEP_ALIVE_TIMEOUT_S"),
        (True, b"GET / HTTP/1.1\r\nHost: a\r\n", "HEAD_TIMEOUT_S"),
    ],
)
@pytest.mark.gen_test
async def test_silent_connections_are_closed(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, served: bool, part: bytes, limit: str
) -> None:
    """After its time limit a connection without a request, or with a part of one, is closed; others are not."""
    monkeypatch.setattr(server, "SWEEP_INTERVAL_S", 0.01)
    port = serve(setup)
    client, other = await RawClient.open(port), await RawClient.open(port)
    for one in (client, other) if served else ():
        one.writer.write(HEALTH)
        assert (await one.response()).status == 200
    monkeypatch.setattr(server, limit, 0.05)
    client.writer.write(part)
    assert await client.reader.read() == b""
    if limit == "HEAD_TIMEOUT_S" and served:
        # A connection that has served a request has the longer limit until a part of a head is here.
        other.writer.write(HEALTH)
        assert (await other.response()).status == 200
    await client.close()
    await other.close()


class CountingListener(socket.socket):
    """A listener that counts the attempts to accept a connection."""

    accepts = 0

    def accept(self) -> Any:
        self.accepts += 1
        return super().accept()


@contextmanager
def no_more_files() -> Iterator[None]:
    """Keep this process from opening another file."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest_free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.gen_test
async def test_a_failed_accept_is_retried_later(setup: Setup, clock: Clock, logs: Logs) -> None:
    """The server does not retry at once, because the socket stays readable and the loop would do nothing else."""
    listener = CountingListener()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = serve(setup, listener=listener)
    client = socket.create_connection(("127.0.0.1", port))
    logs.expect("cannot accept connections: Too many open files, with 0 connections and a limit of [0-9]+ open files")
    with client:
        with no_more_files():
            await clock.settle()
            assert listener.accepts == 1
            for tries in (2, 3):
                await clock.pass_by(server.PAUSE_S)
                assert listener.accepts == tries
        client.sendall(HEALTH)
        await clock.pass_by(server.PAUSE_S)
        client.setblocking(False)
        assert (await asyncio.get_running_loop().sock_recv(client, 1000)).startswith(b"HTTP/1.1 200 ")
    assert len(logs.lines) == 1


@pytest.mark.gen_test
async def test_a_request_costs_no_timer(setup: Setup) -> None:
    """One timer of the server sweeps over all connections; Tornado's server would start one for each head."""
    running = Server(make_application(setup.config("127.0.0.1:1"), "/api/fal/proxy"))
    assert running.conn_params.header_timeout is None
    assert running.conn_params.chunk_size == running.read_chunk_size == server.READ_BYTES


@pytest.mark.gen_test
async def test_a_call_may_take_longer_than_a_head(setup: Setup, monkeypatch: pytest.MonkeyPatch, logs: Any) -> None:
    """The limits of a head do not end a request that is served."""
    monkeypatch.setattr(server, "SWEEP_INTERVAL_S", 0.01)
    monkeypatch.setattr(server, "HEAD_TIMEOUT_S", 0.03)
    monkeypatch.setattr(server, "KEEP_ALIVE_TIMEOUT_S", 0.03)
    client = await RawClient.open(serve(setup))
    client.writer.write(request(body=b"{}")[:-1])
    await asyncio.sleep(0.2)
    client.writer.write(b"}")
    logs.expect("No connection|could not be made|ConnectFailed|ConnectionLost")
    assert (await client.response()).status == 502
    await client.close()


async def stream(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.start(200, [("content-type", "text/event-stream")])
    await exchange.send(b"data: 1\n\n")
    await exchange.gone.wait()


async def silent(exchange: Exchange) -> None:
    await exchange.gone.wait()


async def answered(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(200, b"{}")


async def broken(exchange: Exchange) -> None:
    await exchange.body()
    exchange.abort_connection()


endless_sent: list[int] = []


async def endless(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.start(200, EVENT_STREAM)
    endless_sent.append(0)
    while True:
        await exchange.send(b"data: \n\n" * 1000)
        endless_sent[-1] += 1


CALLS: dict[str, tuple[Any, str]] = {
    "answered": (answered, "response"),
    "left in its body": (silent, "part"),
    "left with much unread": (endless, "unread"),
    "left by the proxy, because it does not read": (endless, "stalled"),
    "left while it waits": (silent, "leave"),
    "left while it streams": (stream, "head"),
    "failed": (broken, "response"),
}


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("how", list(CALLS))
@pytest.mark.gen_test
async def test_no_call_leaves_a_cycle(
    setup: Setup, clock: Clock, protocol: str, how: str, method: str, logs: Logs
) -> None:
    """All objects of a call and its connection are freed with them, without a garbage collection."""
    handler, end = CALLS[how]
    upstream = await setup.upstream(handler, protocol)
    port = serve(setup, upstream, idle_timeout_s=0.3 if end == "stalled" else 900)
    if how == "failed":
        logs.expect("ConnectionLost")

    async def one() -> None:
        known = len(upstream.exchanges)
        client = await RawClient.open(port, receive_buffer=16 * 1024)
        if end == "part":
            client.writer.write(request("POST", b"x" * 1000)[:-1])
            await clock.settle()
        else:
            await client.send(method)
        if end == "leave":
            await clock.until(lambda: len(upstream.exchanges) > known)
        elif end != "part":
            await (client.response() if end == "response" else client.head())
        if end in ("unread", "stalled"):
            await clock.until_still(lambda: endless_sent[-1])
        if end == "stalled":
            await clock.pass_by(1)
        client.leave()
        if how.startswith("left") and end != "part":
            await upstream.exchanges[-1].gone.wait()

    await one()
    await clock.settle()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            await one()
        await clock.settle()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        ours = {type(thing).__name__ for thing in gc.garbage if type(thing).__module__.startswith("tornado_fal_proxy")}
        assert ours == set()
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.gen_test
async def test_a_connection_that_is_reset_leaves_no_cycle() -> None:
    """A stream that finds the reset while it writes is freed without a garbage collection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        stream: IOStream | None = ClientStream(listener.accept()[0])
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    assert stream is not None
    with pytest.raises(StreamClosedError):
        await stream.write(b"a")
    assert isinstance(stream.error, ConnectionResetError)
    gone = weakref.ref(stream)
    gc.disable()
    try:
        stream = None
        await asyncio.sleep(0)
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.gen_test
async def test_an_idle_handle_keeps_no_call(setup: Setup, protocol: str) -> None:
    """A handle of libcurl's that waits for its next call keeps neither the last one nor the decoder of its response."""
    port = serve(setup, await setup.upstream(answered, protocol))
    for method in ("GET", "POST"):
        assert (await call(port, method)).status == 200
    clients = [thing for thing in gc.get_objects() if type(thing) is UpstreamClient and not thing._shut]
    idle = [handle for client in clients for handles in client._handles._idle.values() for handle in handles]
    assert len(idle) == 2
    assert [kept for handle in idle for kept in gc.get_referents(handle) if hasattr(kept, "__self__")] == []


def test_private_names_of_tornado() -> None:
    """The methods that are overridden or called have these parameters, and headers are kept in these two dicts."""
    assert list(inspect.signature(HTTP1Connection._parse_headers).parameters) == ["self", "data"]
    assert list(inspect.signature(HTTP1ServerConnection._server_request_loop).parameters) == ["self", "delegate"]
    assert list(inspect.signature(_HTTPRequestContext.__init__).parameters) == [
        *("self", "stream", "address", "protocol", "trusted_downstream")
    ]
    headers = HTTPHeaders({"a": "1"})
    assert (headers._as_list, headers._combined_cache) == ({"A": ["1"]}, {"A": "1"})
