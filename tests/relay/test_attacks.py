"""Requests of an attacker: each is refused or bounded, and harms no other client."""

import asyncio
import contextlib
import gzip
from collections import Counter

import pytest
from tornado.web import Application

import tornado_fal_proxy.relay.backend
import tornado_fal_proxy.relay.response
from tests.support.clock import Clock
from tests.support.proxy import ROUTE, Setup
from tests.support.raw_client import RawClient, call, request
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import JSON, fine, must_not_be_called
from tornado_fal_proxy import FalProxyHandler

TOKENS = "https://rest.fal.ai/tokens/"
TOO_SLOW = "The body of the request took too long to arrive."


def head(*lines: str, method: str = "POST", target: str = "https://fal.run/fal-ai/flux/dev") -> bytes:
    """Return the head of a JSON request, without its body."""
    first = (f"{method} {ROUTE} HTTP/1.1", "Host: h", f"x-fal-target-url: {target}", "content-type: application/json")
    return "\r\n".join((*first, *lines)).encode() + b"\r\n\r\n"


# Bodies that do not arrive.


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """End bodies after 0.2 s in which fewer than 1000 bytes arrived."""
    monkeypatch.setattr(tornado_fal_proxy.relay.backend, "BODY_WINDOW_S", 0.2)
    monkeypatch.setattr(tornado_fal_proxy.relay.backend, "BODY_WINDOW_BYTES", 1000)
    monkeypatch.setattr(tornado_fal_proxy.relay.backend, "BODY_SWEEP_S", 0.05)
    monkeypatch.setattr(tornado_fal_proxy.relay.response, "LINGER_S", 0.2)


SLOW: list[tuple[str, bytes, bytes]] = [
    ("no byte", head("content-length: 2"), b""),
    ("all but the last byte", head("content-length: 2") + b"{", b""),
    ("a byte now and then", head("content-length: 100000"), b" "),
    ("a chunk that does not end", head("transfer-encoding: chunked") + b"fff\r\n", b" "),
    ("chunks and no last one", head("transfer-encoding: chunked"), b"1\r\n \r\n"),
    ("the length of a chunk", head("transfer-encoding: chunked") + b"5", b""),
    ("much at first", head("content-length: 100000") + b" " * 90_000, b""),
    ("a GET's", head("content-length: 2", method="GET"), b""),
    ("a token's", head("content-length: 100", target=TOKENS), b" "),
]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(("begin", "again"), [case[1:] for case in SLOW], ids=[case[0] for case in SLOW])
@pytest.mark.gen_test
async def test_slow_body(setup: Setup, clock: Clock, begin: bytes, again: bytes) -> None:
    """A client whose body does not arrive gets 408, its slot is free at once, and its connection is closed soon."""
    port, backend = setup.proxy_and_backend(
        await setup.upstream(must_not_be_called), max_in_flight=1, allowed_endpoints=("fal-ai/flux/**",)
    )
    client = await RawClient.open(port)
    client.writer.write(begin)
    responding = asyncio.create_task(client.response())
    while not responding.done():
        client.writer.write(again)
        await clock.pass_by(0.02)
    response = await responding
    assert (response.status, response.message) == (408, TOO_SLOW)
    assert backend().slots.in_use == 0
    assert not backend()._arriving
    while not client.reader.at_eof() and client.reader.exception() is None:
        client.writer.write(again)
        await clock.pass_by(0.02)
    client.leave()


@pytest.mark.usefixtures("soon")
@pytest.mark.gen_test
async def test_slow_enough(setup: Setup, clock: Clock) -> None:
    """A body that takes many times BODY_WINDOW_S is served if enough of it arrives in each."""
    port, backend = setup.proxy_and_backend(await setup.upstream(fine))
    client = await RawClient.open(port)
    client.writer.write(head("content-length: 60000"))
    for _ in range(60):
        client.writer.write(b" " * 1000)
        await clock.pass_by(0.1)
    assert (await client.response()).status == 200
    assert not backend()._arriving
    await client.close()


@pytest.mark.usefixtures("soon")
@pytest.mark.gen_test
async def test_a_body_that_is_whole_may_wait(setup: Setup, clock: Clock) -> None:
    """A call whose body has arrived may wait longer than a slow body: for a subclass, and for fal."""

    class Slow(FalProxyHandler):
        async def post(self, *args: str, **kwargs: str) -> None:
            await asyncio.sleep(0.5)
            await super().post(*args, **kwargs)

    async def slow(exchange: Exchange) -> None:
        await exchange.body()
        await asyncio.sleep(0.5)
        await exchange.respond(200, b"{}", JSON)

    rule = (ROUTE, Slow, {"config": setup.config(await setup.upstream(slow))})
    calling = asyncio.create_task(call(setup.serve(Application([rule], log_function=lambda handler: None))))
    while not calling.done():
        await clock.pass_by(0.1)
    assert calling.result().status == 200


@pytest.mark.usefixtures("soon")
@pytest.mark.gen_test
async def test_no_sweep_without_bodies(setup: Setup, clock: Clock) -> None:
    """A call without a body starts no sweep, and a sweep ends when all bodies have arrived."""
    port, backend = setup.proxy_and_backend(await setup.upstream(fine))
    assert (await call(port, "GET")).status == 200
    assert backend()._sweep._timer is None
    assert (await call(port)).status == 200
    assert not backend()._arriving
    await clock.pass_by(0.1)
    assert backend()._sweep._timer is None


@pytest.mark.usefixtures("soon")
@pytest.mark.gen_test
async def test_a_client_that_leaves_during_its_body_is_forgotten(setup: Setup, clock: Clock) -> None:
    """A client that leaves before its body is whole is swept no more, and its slot is free."""
    port, backend = setup.proxy_and_backend(await setup.upstream(must_not_be_called))
    client = await RawClient.open(port)
    client.writer.write(head("content-length: 2"))
    await clock.settle()
    assert (len(backend()._arriving), backend().slots.in_use) == (1, 1)
    client.leave()
    await clock.settle()
    assert (len(backend()._arriving), backend().slots.in_use) == (0, 0)


@pytest.mark.gen_test
async def test_a_token_that_is_too_large_is_refused_once(setup: Setup) -> None:
    """A token's body that is too large gets 413 alone: the rule for its content does not respond a second time."""
    port, _ = setup.proxy_and_backend(
        await setup.upstream(must_not_be_called), allowed_endpoints=("a/b",), max_body_bytes=10
    )
    client = await RawClient.open(port)
    for _ in range(2):
        client.writer.write(
            head("transfer-encoding: chunked", target=TOKENS) + b"14\r\n" + b" " * 20 + b"\r\n0\r\n\r\n"
        )
        assert (await client.response()).status == 413
    await client.close()


@pytest.mark.gen_test
async def test_a_body_that_tornado_decodes(setup: Setup) -> None:
    """In an application with decompress_request, max_body_bytes limits the decoded body."""
    upstream = await setup.upstream(fine)
    rule = (ROUTE, FalProxyHandler, {"config": setup.config(upstream, max_body_bytes=100_000)})
    application = Application([rule], log_function=lambda handler: None)
    port = setup.serve(application, decompress_request=True)
    for size, status in ((100_000, 200), (100_001, 413), (50_000_000, 413)):
        packed = gzip.compress(b" " * size)
        client = await RawClient.open(port)
        client.writer.write(head("content-encoding: gzip", f"content-length: {len(packed)}") + packed)
        assert (await client.response()).status == status
        await client.close()
    (exchange,) = upstream.exchanges
    assert (len(await exchange.body()), exchange.header("content-encoding")) == (100_000, None)


@pytest.mark.gen_test
async def test_a_preflight_has_no_endless_body(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preflight is answered at once, and its body is read for LINGER_S only."""
    monkeypatch.setattr(tornado_fal_proxy.relay.response, "LINGER_S", 0.1)
    port, _ = setup.proxy_and_backend("127.0.0.1:1", allowed_origins=("https://a.example",))
    preflight = ("origin: https://a.example", "access-control-request-method: POST")
    client = await RawClient.open(port)
    for lines in ((), ("content-length: 2",), ()):
        client.writer.write(head(*preflight, *lines, method="OPTIONS") + (b"{}" if lines else b""))
        response = await client.head()
        assert (response.status, response.header("access-control-allow-origin")) == (204, "https://a.example")
    client.writer.write(head(*preflight, "transfer-encoding: chunked", method="OPTIONS"))
    assert (await client.head()).status == 204
    assert await client.reader.read() == b""
    await client.close()


# Heads.


@pytest.mark.gen_test
async def test_slow_heads(setup: Setup, clock: Clock) -> None:
    """An HTTPServer's idle_connection_timeout limits the time of a head, as docs/embed.md says, and of no response."""

    async def slow(exchange: Exchange) -> None:
        await exchange.body()
        await asyncio.sleep(0.6)
        await exchange.respond(200, b"{}", JSON)

    rule = (ROUTE, FalProxyHandler, {"config": setup.config(await setup.upstream(slow))})
    application = Application([rule], log_function=lambda handler: None)
    port = setup.serve(application, idle_connection_timeout=0.3)
    for begin in (b"", b"GET /", request("GET")[:-2]):
        client = await RawClient.open(port)
        client.writer.write(begin)
        await clock.settle()
        await clock.pass_by(0.2)
        assert not client.reader.at_eof()
        await clock.pass_by(0.2)
        assert await client.reader.read() == b""
        await client.close()
    calling = asyncio.create_task(call(port))
    while not calling.done():
        await clock.pass_by(0.1)
    assert calling.result().status == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_heads_beyond_64_kilobytes(setup: Setup, method: str) -> None:
    """A head of more than 64 kB closes the connection, because Tornado reads no more of a head."""
    port, backend = setup.proxy_and_backend(await setup.upstream(fine))
    assert (await call(port, method, headers=[f"cookie: {'x' * 60_000}"])).status == 200
    for lines in ([f"cookie: {'x' * 70_000}"], ["a: b"] * 20_000):
        client = await RawClient.open(port)
        with contextlib.suppress(ConnectionError):
            await client.send(method, headers=lines)
            assert await client.reader.read() == b""
        await client.close()
    assert backend().slots.in_use == 0


# The target, further lines of the head, and the response's status.
LARGE_HEADS: list[tuple[str, list[str], int]] = [
    ("https://fal.run/" + "a" * 7984, ["x-fal-a: " + "b" * 8000], 200),
    ("https://fal.run/" + "a" * 7984, ["x-fal-a: " + "b" * 90] * 60, 200),
    ("https://fal.run/", ["x-fal-a: b"] * 62, 200),
    ("https://fal.run/", ["cookie: a=b"] * 3000, 200),
    ("https://fal.run/", ["x-fal-a: b"] * 65, 431),
    ("https://fal.run/", [f"x-app-fal-{number}: b" for number in range(2000)], 431),
    ("https://fal.run/", [f"x-fal-{number}: b" for number in range(4000)], 431),
    ("https://fal.run/", ["user-agent: " + "b" * 60_000], 431),
    ("https://fal.run/", ["accept: " + "b" * 100] * 500, 431),
    ("https://fal.run/" + "a" * 60_000, [], 412),
    ("https://fal.run/?" + "%41" * 20_000, [], 412),
]


@pytest.mark.gen_test
async def test_a_large_head_breaks_no_shared_connection(setup: Setup) -> None:
    """No head is so large that fal closes its connection, which other clients share."""
    go_on = asyncio.Event()

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        if exchange.header("x-fal-wait"):
            await go_on.wait()
        await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(respond, "h2")
    port, _ = setup.proxy_and_backend(upstream)
    waiting = asyncio.create_task(call(port, headers=["x-fal-wait: 1"]))
    while not upstream.exchanges:
        await asyncio.sleep(0.001)
    for target, lines, status in LARGE_HEADS:
        for method in ("GET", "POST"):
            response = await call(port, method, target=target, headers=lines)
            assert response.status == status
            assert status == 200 or response.message
    go_on.set()
    assert (await waiting).status == 200
    assert upstream.connections == 1


@pytest.mark.slow
@pytest.mark.gen_test
async def test_clients_that_do_not_read_stop_no_others(setup: Setup, clock: Clock) -> None:
    """Clients that share a connection to fal are served while others on it do not read and their streams are full."""
    sent: Counter[Exchange] = Counter()
    stalled: set[Exchange] = set()

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        if exchange.target != b"/endless":
            return await exchange.respond(200, b"x" * 500_000, JSON)
        await exchange.start(200, [("content-type", "text/event-stream")])
        while sent[exchange] < 20_000_000:
            if sent[exchange] == 200_000:
                stalled.add(exchange)
            await exchange.send(b"data: " + b"x" * 10_000 + b"\n\n")
            sent[exchange] += 10_000
        raise AssertionError("20 MB went to a client that does not read")

    upstream = await setup.upstream(respond, "h2")
    port, backend = setup.proxy_and_backend(upstream)
    clients = [await RawClient.open(port, receive_buffer=4096) for _ in range(60)]
    for client in clients:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(target="https://fal.run/endless")
    await clock.until(lambda: len(stalled) == len(clients))
    await clock.until_still(lambda: sum(sent.values()))
    for method in ("GET", "POST"):
        assert (await call(port, method, target="https://fal.run/short")).status == 200
    assert upstream.connections == 1
    for client in clients:
        client.leave()
    await clock.until(lambda: not backend().slots.in_use)
