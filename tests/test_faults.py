"""Trouble on fal's side: what the caller gets, how often the job ran, what the log says. Over both protocols."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import h2.errors
import pytest
from caller import TARGET, Answer, Caller, call
from conftest import KEY, Logs, Setup, unused_port
from upstream import Authority, Exchange, Upstream

Handler = Callable[[Exchange], Awaitable[None]]

JSON = [("content-type", "application/json")]
EVENTS = [("content-type", "text/event-stream")]
MAY_HAVE_RUN = "The job may have run: check before sending it again."

METHODS = ["GET", "POST"]


async def fine(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(200, b"{}", JSON)


# Before the answer: the request has left, and nothing useful came back.


async def resets(exchange: Exchange) -> None:
    await exchange.body()
    exchange.abort_connection()


async def closes(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.close_connection()


async def resets_stream(exchange: Exchange) -> None:
    await exchange.body()
    exchange.reset(h2.errors.ErrorCodes.INTERNAL_ERROR)


async def refuses_stream(exchange: Exchange) -> None:
    await exchange.body()
    exchange.reset(h2.errors.ErrorCodes.REFUSED_STREAM)


async def says_goaway(exchange: Exchange) -> None:
    await exchange.body()
    exchange.goaway(code=h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
    await exchange.close_connection()


async def stalls(exchange: Exchange) -> None:
    await exchange.body()


def says(data: bytes) -> Handler:
    async def garbage(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.raw(data)
        await exchange.close_connection()

    return garbage


async def has_a_bad_status(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(999_999, b"{}", JSON)


async def has_endless_headers(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(200, b"{}", [(f"x-{number}", "y" * 4000) for number in range(200)])


# Once the answer has begun.


async def breaks_off_the_result(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.start(200, JSON, length=100)
    await exchange.send(b'{"images": [')
    await asyncio.sleep(0.05)  # so that the proxy has seen the head by itself
    exchange.reset()


async def closes_in_the_result(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.start(200, JSON, length=100)
    await exchange.send(b'{"images": [')
    await exchange.close_connection()


async def stalls_in_the_result(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.start(200, JSON, length=100)
    await exchange.send(b'{"images": [')


async def sends_a_corrupt_coding(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(200, b"this is not gzip", [*JSON, ("content-encoding", "gzip")])


async def breaks_off_the_chunks(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.raw(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nzz"
    )
    await exchange.close_connection()


@dataclass
class Fault:
    """``error`` is the name in the log; ``get`` and ``post`` are the statuses, None for a connection broken off."""

    handler: Handler
    error: str
    get: int | None = 502
    post: int = 500
    protocols: tuple[str, ...] = ("h2", "http/1.1")


FAULTS = {
    "reset": Fault(resets, "ConnectionLost"),
    "close": Fault(closes, "ConnectionLost"),
    "stream reset": Fault(resets_stream, "ConnectionLost", protocols=("h2",)),
    "stream refused": Fault(refuses_stream, "ConnectionLost", protocols=("h2",)),
    "goaway": Fault(says_goaway, "ConnectionLost", protocols=("h2",)),
    "stall": Fault(stalls, "UpstreamTimeout", get=504),
    "garbage": Fault(says(b"\x00\x01\x02\r\n\r\n"), "MalformedAnswer", protocols=("http/1.1",)),
    "HTTP/0.9": Fault(says(b"<html>"), "MalformedAnswer", protocols=("http/1.1",)),
    "two digits of status": Fault(says(b"HTTP/1.1 20 OK\r\n\r\n"), "MalformedAnswer", protocols=("http/1.1",)),
    "unknown version": Fault(says(b"HTTP/9.9 200 OK\r\n\r\n"), "MalformedAnswer", protocols=("http/1.1",)),
    "head breaks off": Fault(says(b"HTTP/1.1 200 OK\r\ncontent-le"), "MalformedAnswer", protocols=("http/1.1",)),
    "only an interim answer": Fault(says(b"HTTP/1.1 103 Hint\r\n\r\n"), "ConnectionLost", protocols=("http/1.1",)),
    "endless headers": Fault(has_endless_headers, "", protocols=("http/1.1",)),
    "result breaks off": Fault(breaks_off_the_result, "ConnectionLost", get=None),
    "close in the result": Fault(closes_in_the_result, "ConnectionLost", get=None),
    "stall in the result": Fault(stalls_in_the_result, "UpstreamTimeout", get=None),
    "corrupt coding": Fault(sends_a_corrupt_coding, "MalformedAnswer"),
    "chunks break off": Fault(breaks_off_the_chunks, "", get=None, protocols=("http/1.1",)),
}


@pytest.mark.parametrize("connection", ["fresh", "reused"])
@pytest.mark.parametrize("name", list(FAULTS))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.gen_test
async def test_fault(setup: Setup, logs: Logs, protocol: str, method: str, name: str, connection: str) -> None:
    """A POST is executed once and answered 500 completely; a GET gets what may be repeated, or breaks off."""
    fault = FAULTS[name]
    if protocol not in fault.protocols:
        return
    upstream = await setup.upstream(fine, protocol)
    port = setup.proxy(upstream, idle_timeout_s=0.3)
    if connection == "reused":
        assert (await call(port, method)).status == 200
    upstream.handler = fault.handler
    upstream.exchanges.clear()
    logs.expect(rf"{method} https://fal.run/fal-ai/flux/dev: .* \({fault.error or 'MalformedAnswer|ConnectionLost'}")
    if method == "GET" and fault.get is None:
        caller = await Caller.open(port)
        await caller.send("GET")
        await caller.head()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await caller.reader.readexactly(100)
        await caller.close()
        logs.expect("the answer was broken off")
        return
    answer = await call(port, method)
    assert answer.status == (fault.get if method == "GET" else fault.post)
    assert answer.message.endswith(MAY_HAVE_RUN) == (method == "POST")
    if method == "POST":
        assert len(upstream.exchanges) == 1, "executed more than once"
        logs.expect("the job may have run")
    upstream.handler = fine
    assert (await call(port, method)).status == 200, "the next call is not harmed"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.gen_test
async def test_silence_counts_from_the_request(setup: Setup, logs: Logs, protocol: str, method: str) -> None:
    """A call that fal never answers ends after idle_timeout_s, and a POST not later than a GET."""
    port = setup.proxy(await setup.upstream(stalls, protocol), idle_timeout_s=0.8)
    logs.expect("UpstreamTimeout")
    began = time.monotonic()
    assert (await call(port, method)).status == (504 if method == "GET" else 500)
    assert 0.8 <= time.monotonic() - began < 1.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["reset", "close", "stall"])
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.gen_test
async def test_broken_event_stream(
    setup: Setup, logs: Logs, protocol: str, method: str, how: str, version: str
) -> None:
    """An event stream that breaks off at fal breaks off at the caller: it never gets a clean end."""

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, EVENTS, length=1000 if protocol == "http/1.1" else None)
        await exchange.send(b"data: 1\n\n")
        await go_on.wait()
        if how == "reset":
            exchange.reset()
        elif how == "close":
            await exchange.close_connection()

    go_on = asyncio.Event()
    upstream = await setup.upstream(answer, protocol)
    caller = await Caller.open(setup.proxy(upstream, idle_timeout_s=0.4))
    await caller.send(method, version=version)
    head = await caller.head()
    first = b"9\r\ndata: 1\n\n\r\n" if head.header("transfer-encoding") else b"data: 1\n\n"
    assert await caller.reader.readexactly(len(first)) == first
    logs.expect("the answer was broken off")
    go_on.set()
    if version == "HTTP/1.0":
        # There the end of the connection can be the end of the answer: only a reset is not.
        with pytest.raises(ConnectionResetError):
            await caller.reader.read()
    else:
        assert await caller.reader.read() == b"", "no last chunk"
    await caller.close()


# Before the request could leave.


@dataclass
class Unreachable:
    """``message`` is what the caller reads; ``status`` is the same for GET and POST, for nothing can have run."""

    error: str
    message: str
    status: int = 502


async def accepts_and_closes(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def accepts_and_waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def speaks_plain_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(100)
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    writer.close()


TLS = "The TLS connection to fal's server could not be trusted or set up."
LISTENERS = {
    "no TLS": (speaks_plain_http, Unreachable("TlsFailed", TLS)),
    "closed in the handshake": (accepts_and_closes, Unreachable("TlsFailed", TLS)),
    "hanging handshake": (accepts_and_waits, Unreachable("UpstreamTimeout", "fal's server took too long.", 504)),
}


async def assert_unreachable(port: int, logs: Logs, wanted: Unreachable) -> None:
    logs.expect(
        rf"WARNING tornado_fal_proxy: {wanted.status} \w+ https://fal.run/fal-ai/flux/dev: .*\({wanted.error}\)$"
    )
    for method in METHODS:
        answer = await call(port, method)
        assert (answer.status, answer.message) == (wanted.status, wanted.message)


@pytest.mark.parametrize("name", list(LISTENERS))
@pytest.mark.gen_test
async def test_no_handshake(setup: Setup, logs: Logs, name: str) -> None:
    """Trouble in the TLS handshake: nothing left, so the caller may repeat."""
    handler, wanted = LISTENERS[name]
    listener = await asyncio.start_server(handler, "127.0.0.1", 0)
    address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    await assert_unreachable(setup.proxy(address, connect_timeout_s=0.3), logs, wanted)
    listener.close()
    await listener.wait_closed()


@pytest.mark.gen_test
async def test_name_not_found(setup: Setup, logs: Logs) -> None:
    """A name that cannot be looked up."""
    wanted = Unreachable("NameNotFound", "The name of fal's server could not be looked up.")
    await assert_unreachable(setup.proxy("no-such-name.invalid:443"), logs, wanted)


@pytest.mark.gen_test
async def test_connection_refused(setup: Setup, logs: Logs) -> None:
    """Nobody listens."""
    wanted = Unreachable("ConnectFailed", "No connection to fal's server could be made.")
    await assert_unreachable(setup.proxy(f"127.0.0.1:{unused_port()}"), logs, wanted)


@pytest.mark.parametrize("what", ["untrusted", "wrong name", "expired"])
@pytest.mark.gen_test
async def test_certificate(
    setup: Setup, authority: Authority, logs: Logs, protocol: str, what: str, tmp_path_factory: Any
) -> None:
    """A certificate that is not good: the request, and with it the key, is never sent."""
    issuer = Authority(tmp_path_factory.mktemp("other")) if what == "untrusted" else authority
    names = ("fal.run.example", "*.example") if what == "wrong name" else ()
    upstream = await setup.upstream(fine, protocol, ssl_context=issuer.context(*names, expired=what == "expired"))
    port = setup.proxy(upstream)
    await assert_unreachable(port, logs, Unreachable("TlsFailed", TLS))
    assert upstream.exchanges == []
    assert upstream.open_connections == 0


# Pooled connections that died meanwhile.


async def pooled(setup: Setup, protocol: str, count: int) -> tuple[Upstream, int]:
    """A proxy with ``count`` pooled connections (one over HTTP/2)."""
    here: list[Exchange] = []
    all_here = asyncio.Event()

    async def together(exchange: Exchange) -> None:
        await exchange.body()
        here.append(exchange)
        if len(here) == count:
            all_here.set()
        await all_here.wait()
        await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(together, protocol)
    port = setup.proxy(upstream)
    await asyncio.gather(*(call(port, "POST") for _ in range(count)))
    assert upstream.open_connections == (1 if protocol == "h2" else count)
    upstream.handler = fine
    return upstream, port


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.gen_test
async def test_restart_of_the_upstream(setup: Setup, protocol: str, method: str) -> None:
    """Pooled connections that fal closed while they were idle cost no call."""
    upstream, port = await pooled(setup, protocol, 30)
    await upstream.close()
    await upstream.start()
    answers: list[Answer] = await asyncio.gather(*(call(port, method) for _ in range(40)))
    assert [answer.status for answer in answers] == [200] * 40
    assert len(upstream.exchanges) == 30 + 40


@pytest.mark.gen_test
async def test_dead_connections_found_out_late(setup: Setup, protocol: str) -> None:
    """A GET that is sent into dead connections is repeated, and answered, on a fresh one."""
    upstream, port = await pooled(setup, protocol, 20)
    dead = {exchange.connection_number for exchange in upstream.exchanges}

    async def resets_old(exchange: Exchange) -> None:
        await (resets if exchange.connection_number in dead else fine)(exchange)

    upstream.handler = resets_old
    answers: list[Answer] = await asyncio.gather(*(call(port, "GET") for _ in range(20)))
    assert [answer.status for answer in answers] == [200] * 20


@pytest.mark.gen_test
async def test_posts_avoid_a_suspect_pool(setup: Setup, logs: Logs, protocol: str) -> None:
    """After one connection broke, POSTs do not try their luck on the other pooled ones."""
    upstream, port = await pooled(setup, protocol, 10)
    dead = {exchange.connection_number for exchange in upstream.exchanges}

    async def resets_old(exchange: Exchange) -> None:
        await (resets if exchange.connection_number in dead else fine)(exchange)

    upstream.handler = resets_old
    logs.expect("the job may have run")
    assert (await call(port, "POST")).status == 500
    for _ in range(5):
        assert (await call(port, "POST")).status == 200


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.gen_test
async def test_closed_long_ago(setup: Setup, protocol: str, method: str) -> None:
    """A connection that fal closed while it was idle, with nothing but TLS's word for it, is used by no later call."""
    upstream = await setup.upstream(fine, protocol)
    port = setup.proxy(upstream)
    for _ in range(3):
        assert (await call(port, method)).status == 200
        await upstream.close()
        await upstream.start()
        await asyncio.sleep(1.2)  # so that no other rule keeps POSTs away
    assert (await call(port, method)).status == 200
    assert len(upstream.exchanges) == 4


@pytest.mark.gen_test
async def test_restart_while_a_caller_does_not_read(setup: Setup, logs: Logs, protocol: str) -> None:
    """A connection whose only call is paused when fal closes it costs no other call."""

    async def answers_gets_endlessly(exchange: Exchange) -> None:
        if exchange.method == "POST":
            return await fine(exchange)
        await exchange.start(200, JSON)
        while True:
            await exchange.send(b" " * 10_000)

    upstream = await setup.upstream(answers_gets_endlessly, protocol)
    port = setup.proxy(upstream)
    stalled = await Caller.open(port, receive_buffer=16 * 1024)
    await stalled.send("GET")
    await stalled.head()
    await asyncio.sleep(0.5)
    await upstream.close()
    await upstream.start()
    await asyncio.sleep(1.5)  # so that no other rule keeps POSTs away
    assert (await call(port, "POST")).status == 200
    logs.expect("the answer was broken off")
    await stalled.reader.read()
    assert stalled.reader.at_eof()
    await stalled.close()


@pytest.mark.gen_test
async def test_goaway_between_calls(setup: Setup) -> None:
    """A graceful GOAWAY: what is in flight is answered, and later calls take a new connection."""

    async def answers_slowly(exchange: Exchange) -> None:
        await exchange.body()
        exchange.goaway()
        await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(answers_slowly, "h2")
    port = setup.proxy(upstream)
    for _ in range(5):
        assert (await call(port, "POST")).status == 200
    assert upstream.connections == 5


@pytest.mark.gen_test
async def test_one_stream_at_a_time(setup: Setup) -> None:
    """A server that allows one stream on a connection gets more connections, and every call an answer."""
    upstream = await setup.upstream(fine, "h2", max_concurrent_streams=1)
    port = setup.proxy(upstream)
    for _ in range(3):
        answers: list[Answer] = await asyncio.gather(*(call(port, method) for method in METHODS * 10))
        assert [answer.status for answer in answers] == [200] * 20


@pytest.mark.gen_test
async def test_change_of_protocol(setup: Setup, authority: Authority) -> None:
    """fal's server speaks HTTP/2, after a restart HTTP/1.1, then HTTP/2: no call is lost or lined up."""
    first = await setup.upstream(fine, "h2")
    port = setup.proxy(first)
    await asyncio.gather(*(call(port, "POST") for _ in range(5)))
    for protocol in ("http/1.1", "h2"):
        await first.close()
        here: list[Exchange] = []
        all_here = asyncio.Event()

        async def together(exchange: Exchange, here: list[Exchange] = here, all_here: asyncio.Event = all_here) -> None:
            await exchange.body()
            here.append(exchange)
            if len(here) == 10:
                all_here.set()
            await all_here.wait()
            await exchange.respond(200, b"{}", JSON)

        first = Upstream(together, ssl_context=authority.context(), protocols=[protocol], port=first.port)
        await first.start()
        answers: list[Answer] = await asyncio.gather(*(call(port, method) for method in METHODS * 5))
        assert [answer.status for answer in answers] == [200] * 10
        assert {exchange.protocol for exchange in here} == {protocol}
    await first.close()


@pytest.mark.gen_test
async def test_log_of_trouble(setup: Setup, logs: Logs) -> None:
    """The log names method, target without query, curl's reason and ours; neither it nor the answer has the key."""
    port = setup.proxy(f"127.0.0.1:{unused_port()}")
    logs.expect(
        r"^WARNING tornado_fal_proxy: 502 POST https://fal.run/fal-ai/flux/dev: curl error 7: .* \(ConnectFailed\)$"
    )
    answer = await call(port, "POST", target=TARGET + "?fal_webhook=https://secret.example/")
    assert KEY not in str(answer)
    assert not [line for line in logs.lines if "secret.example" in line]
