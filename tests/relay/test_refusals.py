"""What clients get whose calls never reach fal, and what becomes of their connections."""

import asyncio
from collections.abc import Awaitable

import pytest
from tornado.web import Application

import tornado_fal_proxy.handler
from tests.support.logs import Logs
from tests.support.proxy import ROUTE, Setup
from tests.support.raw_client import RawClient, Response, call, request
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import EVENT_STREAM, JSON, fine, must_not_be_called
from tornado_fal_proxy import FalProxyHandler, close_upstreams

# Refusals: the formula over the wire. Each is answered before its body was read.

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
    caller = await RawClient.open(await refusing(setup))
    caller.writer.write(head)
    answer = await caller.response()
    assert answer.status == status
    assert answer.message
    assert answer.header("allow") == ("GET, POST" if status == 405 else None)
    await caller.close()


@pytest.mark.gen_test
async def test_head_is_refused_without_a_body(setup: Setup) -> None:
    """HEAD is 405 as well; its answer has no body, and the connection stays in step."""
    caller = await RawClient.open(await refusing(setup))
    for _ in range(2):
        caller.writer.write(raw("HEAD"))
        answer = await caller.head()
        assert (answer.status, answer.header("allow")) == (405, "GET, POST")
    await caller.close()


@pytest.mark.parametrize("size", [1, 100_000, 20_000_000])
@pytest.mark.gen_test
async def test_answer_reaches_a_caller_that_still_sends(setup: Setup, size: int) -> None:
    """A caller that sends all of its refused body reads the answer, and may use the connection again."""
    caller = await RawClient.open(await refusing(setup))
    for _ in range(2):
        await caller.send("POST", b" " * size, target="https://evil.example/")
        assert (await caller.response()).status == 412
    await caller.close()


def chunked(size: int) -> bytes:
    return b"%x\r\n" % size + b" " * size + b"\r\n"


@pytest.mark.gen_test
async def test_size_found_out_while_reading(setup: Setup) -> None:
    """A chunked body that grows too large is 413 as soon as it does; one of just the limit passes."""
    upstream = await setup.upstream(fine)
    caller = await RawClient.open(setup.proxy(upstream, max_body_bytes=1_000_000))
    for size in (500_001, 3_000_000):
        caller.writer.write(raw("POST", *POST_LINES, "transfer-encoding: chunked"))
        caller.writer.write(chunked(500_000) + chunked(size))
        assert (await caller.response()).message == "The body is larger than this proxy accepts."
        caller.writer.write(chunked(3_000_000) + b"0\r\n\r\n")
    caller.writer.write(raw("POST", *POST_LINES, "transfer-encoding: chunked"))
    caller.writer.write(chunked(500_000) + chunked(500_000) + b"0\r\n\r\n")
    assert (await caller.response()).status == 200
    assert len(await upstream.exchanges[0].body()) == 1_000_000
    await caller.close()


@pytest.mark.gen_test
async def test_lingering_ends(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused caller that never sends its body is closed after LINGER_S, and costs nothing meanwhile."""
    monkeypatch.setattr(tornado_fal_proxy.handler, "LINGER_S", 0.1)
    caller = await RawClient.open(await refusing(setup))
    caller.writer.write(REFUSALS["form"][0])
    assert (await caller.response()).status == 415
    assert await caller.reader.read() == b""
    await caller.close()


@pytest.mark.gen_test
async def test_interrupted_request(setup: Setup) -> None:
    """A caller that leaves in the middle of its body costs no call, and its place is free again."""
    upstream = await setup.upstream(must_not_be_called)
    port = setup.proxy(upstream, max_in_flight=1)
    for _ in range(3):
        caller = await RawClient.open(port)
        caller.writer.write(raw("POST", *POST_LINES, "content-length: 100") + b"[1, 2")
        await asyncio.sleep(0.02)
        caller.leave()
        await asyncio.sleep(0.02)
    upstream.handler = fine
    assert (await call(port, "POST")).status == 200


# The connection to the caller.


@pytest.mark.gen_test
async def test_pipelined_requests(setup: Setup) -> None:
    """Requests that arrive together are answered one after the other."""
    upstream = await setup.upstream(fine)
    caller = await RawClient.open(setup.proxy(upstream))
    caller.writer.write(request("POST") + request("GET") + raw("PUT") + request("POST"))
    assert [(await caller.response()).status for _ in range(4)] == [200, 200, 405, 200]
    await caller.close()


@pytest.mark.parametrize("stray", [b"\r\n", request("GET")])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.gen_test
async def test_leaving_behind_unread_bytes(setup: Setup, protocol: str, stray: bytes, late: bool) -> None:
    """A caller that leaves is noticed although bytes of its wait unread, which hide that from Tornado."""

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        reached.set()
        await asyncio.Event().wait()

    reached = asyncio.Event()
    upstream = await setup.upstream(answer, protocol)
    caller = await RawClient.open(setup.proxy(upstream))
    caller.writer.write(request("POST") + (b"" if late else stray))
    await reached.wait()
    if late:
        caller.writer.write(stray)
        await asyncio.sleep(0.02)
    left_at = asyncio.get_running_loop().time()
    caller.writer.close()
    [exchange] = upstream.exchanges
    await exchange.gone.wait()
    assert exchange.gone_at is not None
    assert exchange.gone_at - left_at < 0.05
    assert len(upstream.exchanges) == 1


@pytest.mark.gen_test
async def test_http_1_0(setup: Setup) -> None:
    """HTTP/1.0: content-length and keep-alive work for whole answers and refusals."""
    upstream = await setup.upstream(fine)
    caller = await RawClient.open(setup.proxy(upstream))
    for target, status in (("https://fal.run/x", 200), ("https://evil.example", 412)) * 2:
        await caller.send("POST", target=target, version="HTTP/1.0", headers=["Connection: keep-alive"])
        assert (await caller.response()).status == status
    await caller.close()


@pytest.mark.gen_test
async def test_slow_reader_of_a_whole_answer(setup: Setup) -> None:
    """A caller that never takes its (held) answer is cut off after idle_timeout_s."""

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.respond(200, b" " * 7_900_000, JSON)

    upstream = await setup.upstream(answer)
    caller = await RawClient.open(setup.proxy(upstream, idle_timeout_s=0.5), receive_buffer=4096)
    await caller.send("POST")
    await caller.head()
    caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(1.5)
    caller.writer.transport.resume_reading()  # type: ignore[attr-defined]
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await caller.reader.readexactly(7_900_000)
    caller.leave()


@pytest.mark.gen_test
async def test_close_upstreams(setup: Setup, logs: Logs) -> None:
    """Closing answers what is in flight; a later call opens new connections."""
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
    answers: dict[str, Response] = {}
    for method in ("GET", "POST"):
        reached.clear()
        waiting: Awaitable[Response] = asyncio.ensure_future(call(port, method))
        await reached.wait()
        logs.expect(f"{method} .*: the proxy is closing")
        close_upstreams(application)
        answers[method] = await waiting
    assert [answer.status for answer in answers.values()] == [502, 500]
    assert "may have run" in answers["POST"].message
    upstream.handler = fine
    assert (await call(port, "POST")).status == 200


@pytest.mark.gen_test
async def test_nothing_stays(setup: Setup, protocol: str) -> None:
    """After many calls of all kinds no transfer, place, watched caller or timer is left, and handles are reused."""

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
        caller = await RawClient.open(port)
        await caller.send(("GET", "POST")[number % 2], target=target)
        if number % 5:
            assert (await caller.response()).status == 200
        caller.leave()

    for _ in range(5):
        await asyncio.gather(*map(some, range(40)))
    [backend] = tornado_fal_proxy.handler._backends[application].values()
    while backend.client.in_flight:
        await asyncio.sleep(0.01)
    assert not backend.client._running
    assert len(backend._callers) <= 45, "an entry for a file descriptor that was in use at once, not for each caller"
    assert (backend.client._hosts.waiting, backend.client._hosts._looking_up) == (0, 0)
    assert sum(map(len, backend.client._handles.values())) <= 80


@pytest.mark.gen_test
async def test_close_upstreams_while_a_body_arrives(setup: Setup, logs: Logs) -> None:
    """A call whose body was still arriving is told that nothing was sent."""
    upstream = await setup.upstream(must_not_be_called)
    application = Application(
        [(ROUTE, FalProxyHandler, {"config": setup.config(upstream)})], log_function=lambda handler: None
    )
    caller = await RawClient.open(setup.serve(application))
    caller.writer.write(raw("POST", *POST_LINES, "content-length: 2") + b"[")
    while not tornado_fal_proxy.handler._backends.get(application):
        await asyncio.sleep(0.001)
    close_upstreams(application)
    logs.expect("502 POST .*: the proxy is closing")
    caller.writer.write(b"]")
    answer = await caller.response()
    assert (answer.status, "may have run" in answer.message) == (502, False)
    await caller.close()
