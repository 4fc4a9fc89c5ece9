"""What an attacker sends, or has fal send, and what comes of it: an answer that says no, and nothing for others."""

import asyncio
import base64
import contextlib
import gc
import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from caller import ROUTE, Caller, call, request
from conftest import KEY, Logs, Setup
from running import Running, eventually
from tornado.web import Application
from upstream import Exchange

import tornado_fal_proxy.handler
from tornado_fal_proxy import FalProxyHandler
from tornado_fal_proxy.handler import _Backend

JSON = [("content-type", "application/json")]
TOKENS = "https://rest.fal.ai/tokens/"
TOO_SLOW = "The body of the request took too long to arrive."


async def fine(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(200, b'{"ok": 1}', JSON)


async def must_not_be_called(exchange: Exchange) -> None:
    raise AssertionError(f"{exchange} reached fal")


def serve(setup: Setup, upstream: Any, **fields: Any) -> tuple[int, Callable[[], _Backend]]:
    """The proxy on a port, and what tells its backend."""
    rule = (ROUTE, FalProxyHandler, {"config": setup.config(upstream, **fields)})
    application = Application([rule], log_function=lambda handler: None)

    def backend() -> _Backend:
        [backend] = tornado_fal_proxy.handler._backends[application].values()
        return backend

    return setup.serve(application), backend


def head(*lines: str, method: str = "POST", target: str = "https://fal.run/fal-ai/flux/dev") -> bytes:
    """The head of a JSON request, without its body."""
    first = (f"{method} {ROUTE} HTTP/1.1", "Host: h", f"x-fal-target-url: {target}", "content-type: application/json")
    return "\r\n".join((*first, *lines)).encode() + b"\r\n\r\n"


# Bodies that do not come.


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies are given up after 0.2 s in which less than 1000 bytes came."""
    monkeypatch.setattr(tornado_fal_proxy.handler, "BODY_WINDOW_S", 0.2)
    monkeypatch.setattr(tornado_fal_proxy.handler, "BODY_WINDOW_BYTES", 1000)
    monkeypatch.setattr(tornado_fal_proxy.handler, "BODY_SWEEP_S", 0.05)
    monkeypatch.setattr(tornado_fal_proxy.handler, "LINGER_S", 0.2)


SLOW: list[tuple[str, bytes, bytes]] = [
    ("nothing of it", head("content-length: 2"), b""),
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
async def test_slow_body(setup: Setup, begin: bytes, again: bytes) -> None:
    """A caller whose body does not come gets 408, its place is free at once, and its connection is closed soon."""
    port, backend = serve(
        setup, await setup.upstream(must_not_be_called), max_in_flight=1, allowed_endpoints=("fal-ai/flux/**",)
    )
    caller = await Caller.open(port)
    caller.writer.write(begin)

    async def drip() -> None:
        with contextlib.suppress(ConnectionError):
            while again:
                caller.writer.write(again)
                await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    answer = await caller.answer()
    assert (answer.status, answer.message) == (408, TOO_SLOW)
    assert backend().client.in_flight == 0
    assert not backend().arriving
    with contextlib.suppress(ConnectionError):
        assert await caller.reader.read() == b""
    dripping.cancel()
    await caller.close()


@pytest.mark.usefixtures("soon")
@pytest.mark.gen_test
async def test_slow_enough(setup: Setup) -> None:
    """A body that takes long but keeps coming is served, though it takes many times what it is given up after."""
    port, backend = serve(setup, await setup.upstream(fine))
    caller = await Caller.open(port)
    caller.writer.write(head("content-length: 60000"))
    for _ in range(60):
        caller.writer.write(b" " * 1000)
        await asyncio.sleep(0.015)
    assert (await caller.answer()).status == 200
    assert not backend().arriving
    await caller.close()


@pytest.mark.usefixtures("soon")
@pytest.mark.gen_test
async def test_a_body_that_is_whole_may_wait(setup: Setup) -> None:
    """For a subclass that takes its time, and for fal."""

    class Slow(FalProxyHandler):
        async def post(self, *args: str, **kwargs: str) -> None:
            await asyncio.sleep(0.5)
            await super().post(*args, **kwargs)

    async def slow(exchange: Exchange) -> None:
        await exchange.body()
        await asyncio.sleep(0.5)
        await exchange.respond(200, b"{}", JSON)

    rule = (ROUTE, Slow, {"config": setup.config(await setup.upstream(slow))})
    port = setup.serve(Application([rule], log_function=lambda handler: None))
    assert (await call(port)).status == 200


@pytest.mark.usefixtures("soon")
@pytest.mark.gen_test
async def test_nobody_is_looked_at_who_sends_no_body(setup: Setup) -> None:
    """And where all bodies have come nothing is done any more."""
    port, backend = serve(setup, await setup.upstream(fine))
    assert (await call(port, "GET")).status == 200
    assert backend()._sweep is None
    assert (await call(port)).status == 200
    assert not backend().arriving
    await asyncio.sleep(0.1)
    assert backend()._sweep is None


@pytest.mark.usefixtures("soon")
@pytest.mark.gen_test
async def test_a_caller_that_leaves_its_body_is_forgotten(setup: Setup) -> None:
    """As is its place."""
    port, backend = serve(setup, await setup.upstream(must_not_be_called))
    caller = await Caller.open(port)
    caller.writer.write(head("content-length: 2"))
    await asyncio.sleep(0.05)
    assert (len(backend().arriving), backend().client.in_flight) == (1, 1)
    caller.leave()
    await asyncio.sleep(0.05)
    assert (len(backend().arriving), backend().client.in_flight) == (0, 0)


@pytest.mark.gen_test
async def test_a_token_that_is_too_large_is_refused_once(setup: Setup) -> None:
    """The rule for its content has nothing left to judge."""
    port, _ = serve(setup, await setup.upstream(must_not_be_called), allowed_endpoints=("a/b",), max_body_bytes=10)
    caller = await Caller.open(port)
    for _ in range(2):
        caller.writer.write(
            head("transfer-encoding: chunked", target=TOKENS) + b"14\r\n" + b" " * 20 + b"\r\n0\r\n\r\n"
        )
        assert (await caller.answer()).status == 413
    await caller.close()


@pytest.mark.gen_test
async def test_a_body_that_tornado_decodes(setup: Setup) -> None:
    """In an application with decompress_request max_body_bytes is a bound of what comes out."""
    upstream = await setup.upstream(fine)
    rule = (ROUTE, FalProxyHandler, {"config": setup.config(upstream, max_body_bytes=100_000)})
    application = Application([rule], log_function=lambda handler: None)
    port = setup.serve(application, decompress_request=True)
    for size, status in ((100_000, 200), (100_001, 413), (50_000_000, 413)):
        packed = gzip.compress(b" " * size)
        caller = await Caller.open(port)
        caller.writer.write(head("content-encoding: gzip", f"content-length: {len(packed)}") + packed)
        assert (await caller.answer()).status == status
        await caller.close()
    (exchange,) = upstream.exchanges
    assert (len(await exchange.body()), exchange.header("content-encoding")) == (100_000, None)


@pytest.mark.gen_test
async def test_a_preflight_has_no_endless_body(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is answered at once, and what comes behind it is read for LINGER_S only."""
    monkeypatch.setattr(tornado_fal_proxy.handler, "LINGER_S", 0.1)
    port, _ = serve(setup, "127.0.0.1:1", allowed_origins=("https://a.example",))
    preflight = ("origin: https://a.example", "access-control-request-method: POST")
    caller = await Caller.open(port)
    for lines in ((), ("content-length: 2",), ()):
        caller.writer.write(head(*preflight, *lines, method="OPTIONS") + (b"{}" if lines else b""))
        answer = await caller.head()
        assert (answer.status, answer.header("access-control-allow-origin")) == (204, "https://a.example")
    caller.writer.write(head(*preflight, "transfer-encoding: chunked", method="OPTIONS"))
    assert (await caller.head()).status == 204
    assert await caller.reader.read() == b""
    await caller.close()


# Heads.


@pytest.mark.gen_test
async def test_slow_heads(setup: Setup) -> None:
    """idle_connection_timeout bounds the time of a head, and that of no answer: what README.md says of HTTPServer."""

    async def slow(exchange: Exchange) -> None:
        await exchange.body()
        await asyncio.sleep(0.6)
        await exchange.respond(200, b"{}", JSON)

    rule = (ROUTE, FalProxyHandler, {"config": setup.config(await setup.upstream(slow))})
    application = Application([rule], log_function=lambda handler: None)
    port = setup.serve(application, idle_connection_timeout=0.3)
    for begin in (b"", b"GET /", request("GET")[:-2]):
        caller = await Caller.open(port)
        caller.writer.write(begin)
        assert await caller.reader.read() == b""
        await caller.close()
    assert (await call(port)).status == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_heads_beyond_64_kilobytes(setup: Setup, method: str) -> None:
    """The connection is closed, for Tornado reads no more of a head."""
    port, backend = serve(setup, await setup.upstream(fine))
    assert (await call(port, method, headers=[f"cookie: {'x' * 60_000}"])).status == 200
    for lines in ([f"cookie: {'x' * 70_000}"], ["a: b"] * 20_000):
        caller = await Caller.open(port)
        with contextlib.suppress(ConnectionError):
            await caller.send(method, headers=lines)
            assert await caller.reader.read() == b""
        await caller.close()
    assert backend().client.in_flight == 0


# The target, further lines of the head, and the answer's status.
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
async def test_a_large_head_breaks_nobodys_connection(setup: Setup) -> None:
    """Not of another caller either, with whom it shares the one to fal: a server may close that for one such head."""
    go_on = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        if exchange.header("x-fal-hold"):
            await go_on.wait()
        await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(answer, "h2")
    port, _ = serve(setup, upstream)
    held = asyncio.create_task(call(port, headers=["x-fal-hold: 1"]))
    while not upstream.exchanges:
        await asyncio.sleep(0.001)
    for target, lines, status in LARGE_HEADS:
        for method in ("GET", "POST"):
            answered = await call(port, method, target=target, headers=lines)
            assert answered.status == status
            assert status == 200 or answered.message
    go_on.set()
    assert (await held).status == 200
    assert upstream.connections == 1


@pytest.mark.gen_test
async def test_callers_that_do_not_read_stop_nobody(setup: Setup) -> None:
    """Who shares their connection to fal is served while each of them keeps its stream full."""
    stalled: set[Exchange] = set()

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        if exchange.target != b"/endless":
            return await exchange.respond(200, b"x" * 500_000, JSON)
        await exchange.start(200, [("content-type", "text/event-stream")])
        sent = 0
        while sent < 20_000_000:
            if sent == 200_000:
                stalled.add(exchange)
            await exchange.send(b"data: " + b"x" * 10_000 + b"\n\n")
            sent += 10_000
        raise AssertionError("20 MB went to a caller that does not read")

    upstream = await setup.upstream(answer, "h2")
    port, backend = serve(setup, upstream)
    callers = [await Caller.open(port, receive_buffer=4096) for _ in range(60)]
    for caller in callers:
        caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await caller.send(target="https://fal.run/endless")
    while len(stalled) < len(callers):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    for method in ("GET", "POST"):
        async with asyncio.timeout(2):
            assert (await call(port, method)).status == 200
    assert upstream.connections == 1
    for caller in callers:
        caller.leave()
    while backend().client.in_flight:
        await asyncio.sleep(0.01)


# Answers of fal's, or of somebody in its place.

EVIL = ("set-cookie", "evil=1")
LINE = f"{EVIL[0]}: {EVIL[1]}"
# For each the protocols over which it can come, and how a POST may be answered. Over HTTP/1.1 a line break begins
# another header of fal's, whoever put it there.
H1, H2, OVER_BOTH = ("http/1.1",), ("h2",), ("http/1.1", "h2")
ODD_HEADERS: dict[str, tuple[tuple[str, ...], list[tuple[str | bytes, str | bytes]], tuple[int, ...]]] = {
    "CR LF in a value": (H2, [("x-a", f"b\r\n{LINE}")], (200, 500)),
    "LF in a value": (H2, [("x-a", f"b\n{LINE}")], (200, 500)),
    "CR in a value": (OVER_BOTH, [("x-a", f"b\r{LINE}")], (200, 500)),
    "a second answer": (H2, [("x-a", f"b\r\n\r\nHTTP/1.1 200 OK\r\n{LINE}\r\n\r\n")], (200, 500)),
    "NUL in a value": (OVER_BOTH, [("x-a", "b\0c")], (200, 500)),
    "an escape in a value": (OVER_BOTH, [("x-a", "\x1b[0m")], (200, 500)),
    "CR LF in a name": (H2, [(f"x-a\r\n{LINE}\r\nx-b", "c")], (200, 500)),
    "CR in a name": (OVER_BOTH, [(f"x-a\r{LINE}\rx-b", "c")], (200, 500)),
    "a space in a name": (OVER_BOTH, [("x a", "b")], (200, 500)),
    "a colon in a name": (H2, [("x:a", "b")], (200, 500)),
    "no name": (OVER_BOTH, [("", "b")], (200, 500)),
    "upper case": (H2, [("X-A", "b")], (200, 500)),
    "a pseudo-header of requests": (OVER_BOTH, [(":path", "/x")], (200, 500)),
    "a second status": (OVER_BOTH, [(":status", "201")], (200, 500)),
    "hop-by-hop": (H2, [("connection", "close"), ("transfer-encoding", "chunked")], (500,)),
    "4,900 headers": (OVER_BOTH, [(f"x-{number}", "y") for number in range(4900)], (200,)),
    "6,000 headers": (OVER_BOTH, [(f"x-{number}", "y") for number in range(6000)], (500,)),
    "a header of 60 kB": (OVER_BOTH, [("x-a", "y" * 60_000)], (200,)),
    "a head of 1 MB": (H1, [("x-a", "y" * 10_000)] * 100, (500,)),
    "a header of 1 MB": (H1, [("x-a", "y" * 1_000_000)], (500,)),
}


@pytest.mark.parametrize("name", ODD_HEADERS)
@pytest.mark.gen_test
async def test_odd_headers(setup: Setup, logs: Logs, protocol: str, name: str) -> None:
    """None of fal's headers makes one of another, or another answer. What is too large is an error, and fal's alone."""
    protocols, headers, statuses = ODD_HEADERS[name]
    if protocol not in protocols:
        return
    go_on = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        if exchange.target == b"/held":
            await go_on.wait()
        await exchange.respond(200, b"{}", [*JSON, *headers] if exchange.target == b"/odd" else JSON)

    upstream = await setup.upstream(answer, protocol)
    port, backend = serve(setup, upstream)
    held = asyncio.create_task(call(port, target="https://fal.run/held"))
    while not upstream.exchanges:
        await asyncio.sleep(0.001)
    caller = await Caller.open(port)
    caller.reader._limit = 2_000_000  # type: ignore[attr-defined]
    await caller.send(target="https://fal.run/odd")
    odd = await caller.answer()
    assert odd.status in statuses
    assert not [header for header in odd.headers if EVIL[0] in header[0] or header[0] in ("x-b", ":status", "x a")]
    await caller.send()
    assert ((await caller.answer()).status, (await caller.answer_is_over())) == (200, True)
    go_on.set()
    assert (await held).status == 200
    assert backend().client.in_flight == 0
    if odd.status == 500:
        logs.expect("500 POST https://fal.run/odd: curl error .*; the job may have run")
    await caller.close()


ZEROS = 30_000_000
BOMBS: dict[str, bytes] = {
    "gzip": gzip.compress(bytes(ZEROS)),
    # As many of them in 39 bytes.
    "br": base64.b64decode("z///f/gnAOKxQCD3/j//hpPxTwDEYQGAzm4y"),
    "gzip, gzip": gzip.compress(gzip.compress(bytes(ZEROS))),
    ", ".join(["gzip"] * 6): b"passed on as it is",
}


def peak_kb(pid: int) -> int:
    """The most memory that the process ever had."""
    return int(re.findall(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0])


@pytest.mark.parametrize("coding", list(BOMBS))
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_bombs(setup: Setup, method: str, coding: str) -> None:
    """An answer that is small until it is decoded takes a bounded amount of memory while its caller does not read."""
    # hold_bytes, and as much again; what is in br may also ask for a window of 16 MB (RFC 7932 section 9.1).
    callers, most_kb = 2, 16_000 + (16 * 1024 if coding == "br" else 0)

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        if exchange.target == b"/bomb":
            await exchange.respond(200, BOMBS[coding], [*JSON, ("content-encoding", coding)])
        else:
            await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(answer)
    running = await Running.before(setup, upstream)
    for _ in range(4):
        assert (await call(running.port, method)).status == 200
    before = peak_kb(running.pid)
    stalled = [await Caller.open(running.port, receive_buffer=4096) for _ in range(callers)]
    for caller in stalled:
        caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await caller.send(method, target="https://fal.run/bomb")
    while len(upstream.exchanges) < 4 + callers:
        await asyncio.sleep(0.01)
    assert (await call(running.port, method)).status == 200  # what came before it has been decoded
    await asyncio.sleep(0.1)
    used = (peak_kb(running.pid) - before) // callers
    for caller in stalled:
        caller.leave()
    await running.end()
    assert used < most_kb


# Logs.

NASTY = [
    *(
        b"\x1b[31m",
        b"\x9b31m",
        b"\x85",
        "\u2028".encode(),
        b"\r\n2026-01-01 fake",
        b"\nfake",
        b"\rfake",
        b"\0",
        b"\x7f",
    ),
    *(b"%0d%0afake", b"\x07", "\u202e".encode()),
]
TEMPLATES = [
    b"GET%b /api/fal/proxy HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /api/fal/proxy%b HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /api/fal/proxy?%b HTTP/1.1\r\nhost: a\r\nx-fal-target-url: https://fal.run/a/b\r\n\r\n",
    b"GET /elsewhere/%b HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /api/fal/proxy HTTP/1.1%b\r\nhost: a\r\n\r\n",
    b"GET /api/fal/proxy HTTP/1.1\r\nhost: a%b\r\n\r\n",
    b"GET /api/fal/proxy HTTP/1.1\r\nhost: a\r\nx-fal-target-url: https://fal.run/a/b?%b\r\n\r\n",
    b"GET /api/fal/proxy HTTP/1.1\r\nhost: a\r\nx-fal-target-url: https://fal.run/a/b\r\nx-fal-a: %b\r\n\r\n",
    b"GET /api/fal/proxy HTTP/1.1\r\nhost: a\r\nx-forwarded-for: %b\r\norigin: %b\r\ncookie: %b\r\n\r\n",
    b"GET /api/fal/proxy HTTP/1.1\r\nhost: a\r\nx%b: b\r\n\r\n",
    b"POST /api/fal/proxy HTTP/1.1\r\nhost: a\r\ncontent-length: %b\r\n\r\n",
    b"POST /api/fal/proxy HTTP/1.1\r\nhost: a\r\ntransfer-encoding: %b\r\n\r\n",
    b"POST /api/fal/proxy HTTP/1.1\r\nhost: a\r\ncontent-type: %b\r\ncontent-length: 2\r\n\r\n{}",
]


@pytest.mark.gen_test
async def test_nobody_writes_to_the_log(setup: Setup) -> None:
    """No byte of a caller's is a control character there, or begins a line."""
    running = await Running.before(setup, "127.0.0.1:1", "--log-level=debug", "--allowed-origins=https://a.example")
    for template in TEMPLATES:
        for nasty in NASTY:
            caller = await Caller.open(running.port)
            caller.writer.write(template.replace(b"%b", nasty))
            caller.writer.write_eof()
            with contextlib.suppress(ConnectionError):
                await caller.reader.read()
            await caller.close()
    _, log = await running.end()
    assert len(log.splitlines()) == log.count("\n") > len(TEMPLATES) * len(NASTY) // 2
    for line in log.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [a-z._]+: ", line)
        assert not re.search("[\x00-\x1f\x7f-\x9f\u2028-\u202e]", line)


# The key. (What the command logs, its arguments and its answers: test_service.)

SECRET = KEY.partition(":")[2]


class Failing(FalProxyHandler):
    """With a bug that shows once fal has answered."""

    def _copy_head(self, head: Any) -> None:
        raise ZeroDivisionError("a bug")


@pytest.mark.gen_test
async def test_the_key_is_on_no_error_page_and_in_no_repr(setup: Setup, logs: Logs) -> None:
    """Whatever the application's settings say of tracebacks, and whoever prints what there is during a call."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        reached.set()
        await go_on.wait()
        await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(answer)
    rule = (ROUTE, Failing, {"config": setup.config(upstream)})
    port = setup.serve(Application([rule], serve_traceback=True, debug=False))
    calling = asyncio.create_task(call(port))
    await reached.wait()
    ours = [
        thing for thing in gc.get_objects() if str(type(thing).__module__).startswith(("tornado_fal_proxy", __name__))
    ]
    assert {type(thing).__name__ for thing in ours} >= {
        "ProxyConfig",
        "Failing",
        "UpstreamClient",
        "Transfer",
        "Target",
    }
    for thing in ours:
        assert SECRET not in f"{thing!r} {thing}"
    logs.expect("Uncaught exception|500 POST /api")
    go_on.set()
    broken = await calling
    assert (broken.status, broken.message) == (500, "Internal Server Error")
    assert [line for line in logs.lines if "ZeroDivisionError" in line]
    assert not [line for line in logs.lines if SECRET in line]


@pytest.mark.gen_test
async def test_a_key_from_a_file_is_in_no_environment(setup: Setup, tmp_path: Path) -> None:
    """Nor in the arguments; of several processes, in those of none."""
    upstream = await setup.upstream(fine)
    config = setup.config(upstream)
    (tmp_path / "key").write_text(f"{KEY}\n")
    running = await Running.start(
        "--processes=2",
        FAL_KEY_FILE=str(tmp_path / "key"),
        FAL_PROXY_CA_CERTS=str(config.ca_certs),
        FAL_PROXY_CONNECT_TO=str(config.connect_to),
    )
    assert (await call(running.port)).status == 200
    assert upstream.exchanges[0].header("authorization") == f"Key {KEY}".encode()
    for pid in (running.pid, *await eventually(running.workers)):
        for name in ("cmdline", "environ"):
            text = Path(f"/proc/{pid}/{name}").read_bytes()
            assert text
            assert SECRET.encode() not in text
    for said in await running.end():
        assert SECRET not in said
