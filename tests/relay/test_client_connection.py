"""A client's connection: silent clients are closed, bytes are looked at once, and no call leaves a cycle."""

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
from tornado.http1connection import HTTP1Connection, HTTP1ServerConnection
from tornado.httpserver import _HTTPRequestContext
from tornado.httputil import HTTPServerRequest
from tornado.iostream import IOStream, StreamClosedError

from tests.support.clock import Clock
from tests.support.command_server import HEALTH, serve, serve_and_log
from tests.support.logs import Logs
from tests.support.proxy import Setup
from tests.support.raw_client import RawClient, call, request
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import EVENT_STREAM, fine, resets
from tornado_fal_proxy.relay.response import LINGER_S
from tornado_fal_proxy.service import connection, server
from tornado_fal_proxy.service.application import ProxyApplication, make_application
from tornado_fal_proxy.service.connection import MAX_LINE_BYTES, ClientStream
from tornado_fal_proxy.service.request_head import MAX_HEAD_BYTES, RequestTooLarge
from tornado_fal_proxy.service.server import Server
from tornado_fal_proxy.upstream.client import UpstreamClient


@pytest.mark.parametrize(
    ("served", "part", "limit", "status"),
    [
        (False, b"", "HEAD_TIMEOUT_S", None),
        (False, b"GET / HT", "HEAD_TIMEOUT_S", 408),
        (False, b"\r\n\r\n", "HEAD_TIMEOUT_S", None),
        (True, b"", "KEEP_ALIVE_TIMEOUT_S", None),
        (True, b"\r\n", "KEEP_ALIVE_TIMEOUT_S", None),
        (True, b"GET / HTTP/1.1\r\nHost: a\r\n", "HEAD_TIMEOUT_S", 408),
    ],
)
@pytest.mark.gen_test
async def test_silent_connections_are_closed(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, served: bool, part: bytes, limit: str, status: int | None
) -> None:
    """After its time limit a connection without a request is closed, one with a part of one answered; others are not.

    The rest of a head that comes too late is not served.
    """
    monkeypatch.setattr(server, "SWEEP_INTERVAL_S", 0.01)
    port, entries = serve_and_log(setup)
    client, other = await RawClient.open(port), await RawClient.open(port)
    for one in (client, other) if served else ():
        one.writer.write(HEALTH)
        assert (await one.response()).status == 200
    monkeypatch.setattr(server, limit, 0.05)
    client.writer.write(part)
    if status is not None:
        response = await client.response()
        assert (response.status, response.header("connection")) == (status, "close")
        assert response.message == "The head of the request took too long to arrive."
        client.writer.write(b"x-fal-a: b\r\n\r\n" + HEALTH)
    assert await client.reader.read() == b""
    assert [(entry["status"], entry["error"]) for entry in entries] == [(status, "RequestTooSlow")] * bool(status)
    if limit == "HEAD_TIMEOUT_S" and served:
        # A connection that has served a request has the longer limit until a part of a head is here.
        other.writer.write(HEALTH)
        assert (await other.response()).status == 200
    await client.close()
    await other.close()


@pytest.mark.gen_test
async def test_an_error_of_the_application_ends_one_connection(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, logs: Logs
) -> None:
    """The log has the client and the traceback, and other connections are served."""
    find_handler = ProxyApplication.find_handler

    def failing(self: ProxyApplication, request: HTTPServerRequest, **kwargs: Any) -> Any:
        if request.path == "/fails":
            raise ZeroDivisionError
        return find_handler(self, request, **kwargs)

    monkeypatch.setattr(ProxyApplication, "find_handler", failing)
    logs.expect(r"^ERROR tornado_fal_proxy: connection closed: a request of 127.0.0.1 failed\nTraceback (.*\n)*ZeroDiv")
    port = serve(setup)
    client, other = await RawClient.open(port), await RawClient.open(port)
    await client.send("GET", path="/fails")
    assert await client.reader.read() == b""
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


endless_sent: list[int] = []


async def endless(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.start(200, EVENT_STREAM)
    endless_sent.append(0)
    while True:
        await exchange.send(b"data: \n\n" * 1000)
        endless_sent[-1] += 1


CALLS: dict[str, tuple[Any, str]] = {
    "with a response": (fine, "response"),
    "left in its body": (silent, "part"),
    "left with much unread": (endless, "unread"),
    "left by the proxy, because it does not read": (endless, "stalled"),
    "left while it waits": (silent, "leave"),
    "left while it streams": (stream, "head"),
    "failed": (resets, "response"),
    "refused": (resets, "refused"),
}
# How much time must pass until no timer is left that would keep a handler, and how a refused call differs.
PASSES: dict[str, float] = {"stalled": 1, "refused": LINGER_S}
ARGUMENTS: dict[str, dict[str, Any]] = {"refused": {"target": None}}
# On a busy machine the time passes before all buffers on the way are full.
MAY_BE_LOGGED = {"stalled": "UpstreamTimeout"}


@pytest.mark.slow
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
    logs.allow(MAY_BE_LOGGED.get(end, "^$"))

    async def one() -> None:
        known = len(upstream.exchanges)
        client = await RawClient.open(port, receive_buffer=16 * 1024)
        if end == "part":
            client.writer.write(request("POST", b"x" * 1000)[:-1])
            await clock.settle()
        else:
            await client.send(method, **ARGUMENTS.get(end, {}))
        if end == "leave":
            await clock.until(lambda: len(upstream.exchanges) > known)
        elif end != "part":
            await (client.response() if end == "response" else client.head())
        if end in ("unread", "stalled"):
            await clock.until_still(lambda: endless_sent[-1])
        if end in PASSES:
            await clock.pass_by(PASSES[end])
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
    port = serve(setup, await setup.upstream(fine, protocol))
    for method in ("GET", "POST"):
        assert (await call(port, method)).status == 200
    clients = [thing for thing in gc.get_objects() if type(thing) is UpstreamClient and not thing._shut]
    idle = [handle for client in clients for handles in client._handles._idle.values() for handle in handles]
    assert len(idle) == 2
    assert [kept for handle in idle for kept in gc.get_referents(handle) if hasattr(kept, "__self__")] == []


@pytest.mark.parametrize("size", [1, 7, 1400, 20_000])
@pytest.mark.gen_test
async def test_each_byte_of_a_head_is_searched_once(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A head or a line that comes in many parts costs as much as one that comes at once."""
    searched = 0

    class Counting:
        def search(self, buffer: bytearray, start: int) -> Any:
            nonlocal searched
            searched += len(buffer) - start
            return real.search(buffer, start)

    real: Any = connection._HEAD_END
    monkeypatch.setattr(connection, "_HEAD_END", Counting())
    one, other = socket.socketpair()
    with one, other:
        stream = ClientStream(one)
        reading = stream.read_head()
        sent = b"GET / HTTP/1.1\r\nHost: a\r\na: " + b"b" * 40_000 + b"\r\n\r\n"
        for start in range(0, len(sent), size):
            other.send(sent[start : start + size])
            if size > 1 or start % 50 == 0:  # all that is there is read at once
                await asyncio.sleep(0)
        assert await reading == sent
        stream.close()
    assert len(sent) <= searched <= 2 * len(sent)


@pytest.mark.parametrize("part", [b"a", b"a" * 500])
@pytest.mark.gen_test
async def test_what_is_too_long_is_not_waited_for(part: bytes) -> None:
    """A head or a line without end is given back when it is longer than may be, and no more of it is read."""
    for head in (True, False):
        one, other = socket.socketpair()
        with one, other:
            stream = ClientStream(one)
            reading = stream.read_head() if head else stream.read_line()
            limit = MAX_HEAD_BYTES if head else MAX_LINE_BYTES
            for n in range(0, limit + 1, len(part)):
                other.send(part)
                if len(part) > 1 or n % 50 == 0:
                    await asyncio.sleep(0)
            if head:
                with pytest.raises(RequestTooLarge):
                    stream.check_size(await reading)
            assert limit < len(await reading) <= limit + 2 * len(part) + stream.read_chunk_size
            stream.close()


def test_private_names_of_tornado() -> None:
    """The methods that are overridden or called have these parameters, and the attributes that are used exist."""
    parameters: dict[Any, list[str]] = {
        HTTP1Connection._read_message: ["self", "delegate"],
        HTTP1Connection._read_fixed_body: ["self", "content_length", "delegate"],
        HTTP1Connection._deliver_body: ["self", "delegate", "data"],
        HTTP1Connection._finish_request: ["self", "future"],
        HTTP1Connection._on_connection_close: ["self"],
        HTTP1Connection._clear_callbacks: ["self"],
        HTTP1Connection.write_headers: ["self", "start_line", "headers", "chunk"],
        HTTP1ServerConnection._server_request_loop: ["self", "delegate"],
        _HTTPRequestContext.__init__: ["self", "stream", "address", "protocol", "trusted_downstream"],
        IOStream._find_read_pos: ["self"],
        IOStream.read_until: ["self", "delimiter", "max_bytes"],
    }
    for function, names in parameters.items():
        assert list(inspect.signature(function).parameters) == names
    one, other = socket.socketpair()
    with one, other:

        async def attributes() -> set[str]:
            stream = IOStream(one)
            return {*vars(stream), *vars(HTTP1Connection(stream, False)), *vars(_HTTPRequestContext(stream, (), None))}

        assert asyncio.run(attributes()) >= {
            *("_read_delimiter", "_read_buffer", "_read_buffer_size", "_read_finished", "_write_finished"),
            *("_finish_future", "_disconnect_on_finish", "_request_start_line", "_request_headers"),
            *("_response_start_line", "_expected_content_remaining", "_max_body_size"),
            *("address_family", "remote_ip"),
        }
