"""Responses that an attacker chooses, and the key, which is on no page and in no repr."""

import asyncio
import gc
from typing import Any

import pytest
from tornado.web import Application

from tests.support.bad_upstream import Do, response
from tests.support.bad_upstream.server import BadUpstream
from tests.support.certificates import Authority
from tests.support.logs import Logs
from tests.support.proxy import KEY, ROUTE, SECRET, Setup
from tests.support.raw_client import RawClient, call
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import JSON
from tornado_fal_proxy import FalProxyHandler

# Responses of fal's, or of an attacker in its place.

EVIL = ("set-cookie", "evil=1")
LINE = f"{EVIL[0]}: {EVIL[1]}"
# For each the protocols over which it can come, the headers, and the statuses that a POST may get. Over HTTP/1.1 a line
# break simply begins another header of fal's.
H1, H2, OVER_BOTH = ("http/1.1",), ("h2",), ("http/1.1", "h2")
ODD_HEADERS: dict[str, tuple[tuple[str, ...], list[tuple[str | bytes, str | bytes]], tuple[int, ...]]] = {
    "CR LF in a value": (H2, [("x-a", f"b\r\n{LINE}")], (200, 500)),
    "LF in a value": (H2, [("x-a", f"b\n{LINE}")], (200, 500)),
    "CR in a value": (OVER_BOTH, [("x-a", f"b\r{LINE}")], (200, 500)),
    "a second response": (H2, [("x-a", f"b\r\n\r\nHTTP/1.1 200 OK\r\n{LINE}\r\n\r\n")], (200, 500)),
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
    "980 headers": (OVER_BOTH, [(f"x-{number}", "y") for number in range(980)], (200,)),
    "1,001 headers": (OVER_BOTH, [(f"x-{number}", "y") for number in range(1001)], (500,)),
    "4,900 headers": (OVER_BOTH, [(f"x-{number}", "y") for number in range(4900)], (500,)),
    "6,000 headers": (OVER_BOTH, [(f"x-{number}", "y") for number in range(6000)], (500,)),
    "a header of 60 kB": (OVER_BOTH, [("x-a", "y" * 60_000)], (200,)),
    "a head of 1 MB": (H1, [("x-a", "y" * 10_000)] * 100, (500,)),
    "a header of 1 MB": (H1, [("x-a", "y" * 1_000_000)], (500,)),
}


@pytest.mark.parametrize("name", ODD_HEADERS)
@pytest.mark.gen_test
async def test_odd_headers(setup: Setup, logs: Logs, protocol: str, name: str) -> None:
    """No header of fal's becomes two, or a second response. A head that is too large is an error of its call alone."""
    protocols, headers, statuses = ODD_HEADERS[name]
    if protocol not in protocols:
        return
    go_on = asyncio.Event()

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        if exchange.target == b"/waiting":
            await go_on.wait()
        await exchange.respond(200, b"{}", [*JSON, *headers] if exchange.target == b"/odd" else JSON)

    upstream = await setup.upstream(respond, protocol)
    port, backend = setup.proxy_and_backend(upstream)
    waiting = asyncio.create_task(call(port, target="https://fal.run/waiting"))
    while not upstream.exchanges:
        await asyncio.sleep(0.001)
    client = await RawClient.open(port)
    client.reader._limit = 2_000_000  # type: ignore[attr-defined]
    await client.send(target="https://fal.run/odd")
    odd = await client.response()
    assert odd.status in statuses
    assert not [header for header in odd.headers if EVIL[0] in header[0] or header[0] in ("x-b", ":status", "x a")]
    await client.send()
    assert ((await client.response()).status, (await client.response_is_over())) == (200, True)
    go_on.set()
    assert (await waiting).status == 200
    assert backend().slots.in_use == 0
    if odd.status == 500:
        cause = "(curl error|a head of more than 1000 lines)"
        logs.expect(f"upstream error: 500 POST https://fal.run/odd: {cause}.*; the job may have run")
    await client.close()


# The key. (The command's log, arguments and responses are in service/test_service.py.)


class Failing(FalProxyHandler):
    """A handler with a bug that shows when fal has responded."""

    def _copy_head(self, head: Any) -> None:
        raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    ("key", "secret"),
    [(KEY, SECRET), ("id:short", "id:short"), ("a-key-without-a-colon", "a-key-without-a-colon"), ("tiny", "")],
)
@pytest.mark.gen_test
async def test_a_key_in_a_response(setup: Setup, logs: Logs, protocol: str, key: str, secret: str) -> None:
    """A header of fal's that has the key is dropped, in a response and before one. Other headers and the body pass."""

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        echo = [("x-echo", f"Key {key}"), ("x-a", "tiny"), ("x-part", f"a{secret}b"), (f"x-{secret}", "c")]
        await exchange.respond(401, b"{}", [*JSON, *echo])

    got = await call(setup.proxy(await setup.upstream(respond, protocol), key=key))
    names = {name.lower() for name, _ in got.headers}
    if len(secret) >= 16:
        logs.expect("^WARNING tornado_fal_proxy: key in a response: fal.run has sent it back, in 3 headers")
        assert not names & {"x-echo", "x-part", f"x-{secret}"}
        assert secret not in str(got.headers) + "".join(logs.lines)
    assert (got.status, got.body, got.header("x-a")) == (401, b"{}", "tiny")


KEY_LINES = {
    "reason": (response("content-length: 2", status=f"HTTP/1.1 401 Key {KEY}", body=b"{}"), 401),
    "bad status line": (response(status=f"HTTP/1.1 Key {KEY}"), 500),
    "length": (response(f"content-length: {SECRET}"), 500),
    "transfer-encoding": (response(f"transfer-encoding: {SECRET}"), 500),
    "header behind a fold": (response("content-length: 2", "x-a: b", f" Key {KEY}", body=b"{}"), 200),
    "interim": (response(f"x-a: {KEY}", status="HTTP/1.1 103 Hints") + response("content-length: 2", body=b"{}"), 200),
}


@pytest.mark.parametrize("name", KEY_LINES)
@pytest.mark.gen_test
async def test_a_key_in_a_line(setup: Setup, authority: Authority, logs: Logs, name: str) -> None:
    """The key is in no log line and no response either where fal has it in a line that the log quotes."""
    script, status = KEY_LINES[name]
    logs.expect("key in a response|upstream error")
    async with BadUpstream(authority.context(), "http/1.1") as upstream:
        upstream.script = (script, Do.CLOSE)
        got = await call(setup.proxy(upstream.address))
    assert got.status == status
    assert SECRET not in f"{got.headers}{got.body!r}{logs.lines}"


@pytest.mark.gen_test
async def test_the_key_is_on_no_error_page_and_in_no_repr(setup: Setup, logs: Logs) -> None:
    """The key is on no page of an application that shows tracebacks, and in no repr of our objects during a call."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        reached.set()
        await go_on.wait()
        await exchange.respond(200, b"{}", JSON)

    upstream = await setup.upstream(respond)
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
