"""Calls that never reach fal: their responses, and the state of their connections."""

import asyncio
from collections.abc import Awaitable

import pytest
from tornado.web import Application

import tornado_fal_proxy.relay.response
from tests.support.clock import Clock
from tests.support.logs import Logs
from tests.support.proxy import ROUTE, Setup
from tests.support.raw_client import RawClient, Response, call, request
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import EVENT_STREAM, JSON, fine, must_not_be_called
from tests.support.waiting import eventually
from tornado_fal_proxy import FalProxyHandler, close_upstreams
from tornado_fal_proxy.relay.backend import backends_of
from tornado_fal_proxy.telemetry import Call

# Refusals: fal's proxy formula over the wire. Each call is answered before its body was read.

LARGE = b'{"images": "' + b"x" * 20_000 + b'"}'
POST_LINES = ["content-type: application/json"]


def raw(method: str, *lines: str, target: str | None = "https://fal.run/x") -> bytes:
    head = [f"{method} {ROUTE} HTTP/1.1", "Host: h", *([f"x-fal-target-url: {target}"] if target is not None else [])]
    return "\r\n".join([*head, *lines]).encode() + b"\r\n\r\n"


REFUSALS: dict[str, tuple[bytes, int]] = {
    **{f"verb {verb}": (raw(verb), 405) for verb in ("PUT", "DELETE", "PATCH", "OPTIONS", "BREW", "get", "TRACE")},
    "verb before target": (raw("PUT", "content-length: 5", target=None), 405),
    "no target": (raw("POST", "content-length: 5", target=None), 400),
    "empty target": (raw("GET", target=""), 400),
    "two targets": (raw("GET", "x-fal-target-url: https://fal.run/y"), 400),
    "target before type": (raw("POST", "content-length: 5", target="http://fal.run/"), 412),
    "type before size": (raw("POST", "content-length: 99999999"), 415),
    "form": (raw("POST", "content-type: application/x-www-form-urlencoded", "content-length: 5"), 415),
    "multipart": (raw("POST", "content-type: multipart/form-data; boundary=x", "content-length: 5"), 415),
    "chunked form": (raw("POST", "content-type: text/plain", "transfer-encoding: chunked"), 415),
    "encoded": (raw("POST", *POST_LINES, "content-encoding: gzip", "content-length: 5"), 415),
    "too large": (raw("POST", *POST_LINES, "content-length: 1000001"), 413),
    "much too large": (raw("POST", *POST_LINES, "content-length: 99999999999"), 413),
    "too large, asks first": (raw("POST", *POST_LINES, "content-length: 1000001", "expect: 100-continue"), 413),
}


async def refusing(setup: Setup) -> int:
    return setup.proxy(await setup.upstream(must_not_be_called), max_body_bytes=1_000_000)


@pytest.mark.parametrize("name", list(REFUSALS))
@pytest.mark.gen_test
async def test_refusal(setup: Setup, name: str) -> None:
    """A refused call is answered from its head alone, in JSON, with Allow where it is 405."""
    head, status = REFUSALS[name]
    client = await RawClient.open(await refusing(setup))
    client.writer.write(head)
    response = await client.response()
    assert response.status == status
    assert response.message
    assert response.header("allow") == ("GET, POST" if status == 405 else None)
    await client.close()


@pytest.mark.gen_test
async def test_head_is_refused_without_a_body(setup: Setup) -> None:
    """HEAD is 405 too; its response has no body, and the connection stays in step."""
    client = await RawClient.open(await refusing(setup))
    for _ in range(2):
        client.writer.write(raw("HEAD"))
        response = await client.head()
        assert (response.status, response.header("allow")) == (405, "GET, POST")
    await client.close()


@pytest.mark.parametrize("size", [1, 100_000, 20_000_000])
@pytest.mark.gen_test
async def test_response_reaches_a_client_that_still_sends(setup: Setup, size: int) -> None:
    """A client that sends all of a refused body receives the response, and may use the connection again."""
    client = await RawClient.open(await refusing(setup))
    for _ in range(2):
        await client.send("POST", b" " * size, target="https://evil.example/")
        assert (await client.response()).status == 412
    await client.close()


def chunked(size: int) -> bytes:
    return b"%x\r\n" % size + b" " * size + b"\r\n"


@pytest.mark.gen_test
async def test_size_found_out_while_reading(setup: Setup) -> None:
    """A chunked body is 413 as soon as it exceeds the limit; one that just reaches the limit passes."""
    upstream = await setup.upstream(fine)
    client = await RawClient.open(setup.proxy(upstream, max_body_bytes=1_000_000))
    for size in (500_001, 3_000_000):
        client.writer.write(raw("POST", *POST_LINES, "transfer-encoding: chunked"))
        client.writer.write(chunked(500_000) + chunked(size))
        assert (await client.response()).message == "The body is larger than this proxy accepts."
        client.writer.write(chunked(3_000_000) + b"0\r\n\r\n")
    client.writer.write(raw("POST", *POST_LINES, "transfer-encoding: chunked"))
    client.writer.write(chunked(500_000) + chunked(500_000) + b"0\r\n\r\n")
    assert (await client.response()).status == 200
    assert len(await upstream.exchanges[0].body()) == 1_000_000
    await client.close()


@pytest.mark.gen_test
async def test_lingering_ends(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection of a refused client that never sends its body is closed after LINGER_S."""
    monkeypatch.setattr(tornado_fal_proxy.relay.response, "LINGER_S", 0.1)
    client = await RawClient.open(await refusing(setup))
    client.writer.write(REFUSALS["form"][0])
    assert (await client.response()).status == 415
    assert await client.reader.read() == b""
    await client.close()


@pytest.mark.gen_test
async def test_interrupted_request(setup: Setup) -> None:
    """A client that leaves in the middle of its body causes no call, and its slot is free again."""
    upstream = await setup.upstream(must_not_be_called)
    port = setup.proxy(upstream, max_in_flight=1)
    for _ in range(3):
        client = await RawClient.open(port)
        client.writer.write(raw("POST", *POST_LINES, "content-length: 100") + b"[1, 2")
        await asyncio.sleep(0.02)
        client.leave()
        await asyncio.sleep(0.02)
    upstream.handler = fine
    assert (await call(port, "POST")).status == 200


# The connection to the client.


@pytest.mark.gen_test
async def test_pipelined_requests(setup: Setup) -> None:
    """Requests that arrive together are answered one after the other."""
    upstream = await setup.upstream(fine)
    client = await RawClient.open(setup.proxy(upstream))
    client.writer.write(request("POST") + request("GET") + raw("PUT") + request("POST"))
    assert [(await client.response()).status for _ in range(4)] == [200, 200, 405, 200]
    await client.close()


@pytest.mark.parametrize("stray", [b"\r\n", request("GET")])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.gen_test
async def test_leaving_behind_unread_bytes(setup: Setup, clock: Clock, protocol: str, stray: bytes, late: bool) -> None:
    """A client that leaves is noticed at once although unread bytes of its next request hide that from Tornado."""

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        reached.set()
        await asyncio.Event().wait()

    reached = asyncio.Event()
    upstream = await setup.upstream(respond, protocol)
    client = await RawClient.open(setup.proxy(upstream))
    client.writer.write(request("POST") + (b"" if late else stray))
    await reached.wait()
    if late:
        client.writer.write(stray)
        await clock.settle()
    client.writer.close()
    [exchange] = upstream.exchanges
    await exchange.gone.wait()
    assert len(upstream.exchanges) == 1


@pytest.mark.gen_test
async def test_http_1_0(setup: Setup) -> None:
    """HTTP/1.0: content-length and keep-alive work for whole responses and refusals."""
    upstream = await setup.upstream(fine)
    client = await RawClient.open(setup.proxy(upstream))
    for target, status in (("https://fal.run/x", 200), ("https://evil.example", 412)) * 2:
        await client.send("POST", target=target, version="HTTP/1.0", headers=["Connection: keep-alive"])
        assert (await client.response()).status == status
    await client.close()


@pytest.mark.gen_test
async def test_slow_reader_of_a_whole_response(setup: Setup, clock: Clock) -> None:
    """A client that never reads its (buffered) response is aborted after idle_timeout_s."""

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.respond(200, b" " * 7_900_000, JSON)

    upstream = await setup.upstream(respond)
    client = await RawClient.open(setup.proxy(upstream, idle_timeout_s=0.5), receive_buffer=4096)
    await client.send("POST")
    await client.head()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    for _ in range(10):
        await clock.pass_by(0.1)
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await client.reader.readexactly(7_900_000)
    client.leave()


@pytest.mark.gen_test
async def test_close_upstreams(setup: Setup, logs: Logs) -> None:
    """Calls in flight get a response when the upstreams are closed; a later call opens new connections."""
    upstream = await setup.upstream(fine)
    application = Application(
        [(ROUTE, FalProxyHandler, {"config": setup.config(upstream)})], log_function=lambda handler: None
    )
    port = setup.serve(application)
    assert (await call(port, "POST")).status == 200
    reached = asyncio.Event()

    async def hang(exchange: Exchange) -> None:
        await exchange.body()
        reached.set()

    upstream.handler = hang
    responses: dict[str, Response] = {}
    for method in ("GET", "POST"):
        reached.clear()
        waiting: Awaitable[Response] = asyncio.ensure_future(call(port, method))
        await reached.wait()
        logs.expect(f"upstream error: 50[02] {method} .*: the proxy is closing")
        close_upstreams(application)
        responses[method] = await waiting
    assert [response.status for response in responses.values()] == [502, 500]
    assert "may have run" in responses["POST"].message
    upstream.handler = fine
    assert (await call(port, "POST")).status == 200


@pytest.mark.slow
@pytest.mark.gen_test
async def test_nothing_stays(setup: Setup, protocol: str) -> None:
    """After many calls of all kinds no transfer, slot, watched client or timer is left, and handles are reused."""

    async def varied(exchange: Exchange) -> None:
        await exchange.body()
        if exchange.target == b"/stream":
            await exchange.start(200, EVENT_STREAM)
            for _ in range(3):
                await exchange.send(b"data: 1\n\n")
                await asyncio.sleep(0)
            await exchange.end()
        else:
            await exchange.respond(200, LARGE, JSON)

    upstream = await setup.upstream(varied, protocol)
    config = setup.config(upstream)
    application = Application([(ROUTE, FalProxyHandler, {"config": config})], log_function=lambda handler: None)
    port = setup.serve(application)

    async def some(number: int) -> None:
        target = "https://fal.run/" + ("stream" if number % 3 else "x")
        client = await RawClient.open(port)
        await client.send(("GET", "POST")[number % 2], target=target)
        if number % 5:
            assert (await client.response()).status == 200
        client.leave()

    for _ in range(5):
        await asyncio.gather(*map(some, range(40)))
    [backend] = backends_of(application)
    while backend.slots.in_use:
        await asyncio.sleep(0.01)
    assert not backend.client._running
    assert len(backend._watched) <= 45, "an entry for each file descriptor that was in use at once, not for each client"
    assert (backend.client._hosts.waiting, backend.client._hosts._lookups) == (0, 0)
    assert sum(map(len, backend.client._handles._idle.values())) <= 80


@pytest.mark.gen_test
async def test_close_upstreams_while_a_body_arrives(setup: Setup, logs: Logs) -> None:
    """A call whose body is still arriving gets a response at once, and may repeat it, because nothing was sent."""
    upstream = await setup.upstream(must_not_be_called)
    application = Application(
        [(ROUTE, FalProxyHandler, {"config": setup.config(upstream)})], log_function=lambda handler: None
    )
    client = await RawClient.open(setup.serve(application))
    client.writer.write(raw("POST", *POST_LINES, "content-length: 2") + b"[")
    await eventually(lambda: bool(backends_of(application)) and bool(backends_of(application)[0]._arriving))
    logs.expect("upstream error: 502 POST .*: the proxy is closing")
    close_upstreams(application)
    response = await client.response()
    assert (response.status, "may have run" in response.message) == (502, False)
    await client.close()


@pytest.mark.gen_test
async def test_close_upstreams_while_authorize_waits(setup: Setup) -> None:
    """The call of a client whose connection is closed at the end is no call that the client has left."""
    asked: list[FalProxyHandler] = []
    closed = asyncio.Event()
    ended: list[tuple[str, str, str]] = []

    class Waiting(FalProxyHandler):
        async def authorize(self, target: object) -> bool:
            asked.append(self)
            await closed.wait()
            return True

        def on_call_end(self, call: Call) -> None:
            ended.append((call.outcome, call.error, call.detail))

    rule = (ROUTE, Waiting, {"config": setup.config(await setup.upstream(must_not_be_called))})
    application = Application([rule], log_function=lambda handler: None)
    client = await RawClient.open(setup.serve(application))
    await client.send()
    await eventually(lambda: bool(asked))
    close_upstreams(application)
    asked[0]._connection.stream.close()  # as a server does that closes its connections
    closed.set()
    await eventually(lambda: bool(ended))
    assert ended == [("upstream_error", "ConnectionLost", "the proxy is closing")]
    await client.close()
