"""The handler inside an application that is not its own, and what callers get whose calls never reach fal."""

import asyncio
import gzip
import logging
import os
from collections.abc import Awaitable
from typing import Any

import pytest
from caller import ROUTE, Answer, Caller, call, request
from conftest import KEY, Logs, Setup
from tornado.curl_httpclient import CurlAsyncHTTPClient
from tornado.httpclient import AsyncHTTPClient
from tornado.web import Application, HTTPError, RequestHandler, authenticated
from upstream import Exchange

import tornado_fal_proxy.handler
from tornado_fal_proxy import FalProxyHandler, close_upstreams

JSON = [("content-type", "application/json")]
EVENTS = [("content-type", "text/event-stream")]
LARGE = b'{"images": "' + b"x" * 20_000 + b'"}'


async def fine(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(200, LARGE, [*JSON, ("etag", '"1"')])


async def must_not_be_called(exchange: Exchange) -> None:
    raise AssertionError(f"{exchange} reached fal")


class Base(RequestHandler):
    """A base class as applications have one."""

    def set_default_headers(self) -> None:
        self.set_header("X-App", "1")

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.finish(f"<h1>{status_code}</h1>")


class Page(Base):
    async def get(self) -> None:
        if url := self.get_query_argument("fetch", ""):
            client = self.settings["own_client"]
            self.finish((await client.fetch(url)).body)
        else:
            self.finish("own page " + "x" * 2000)

    def post(self) -> None:
        self.finish("own form")


class OwnNotFound(Base):
    def prepare(self) -> None:
        raise HTTPError(404)


class Proxy(Base, FalProxyHandler):
    """The proxy below the application's base class."""


@pytest.mark.gen_test
async def test_embedded(setup: Setup, logs: Logs) -> None:
    """In an application with its own pages, settings and curl client both work, and neither sees the other."""
    logged: list[tuple[int, str]] = []
    own_client = CurlAsyncHTTPClient(force_instance=True)
    before = (AsyncHTTPClient.configured_class(), logging.root.handlers[:], dict(os.environ))
    upstream = await setup.upstream(fine)
    other = await setup.upstream(fine, "http/1.1")
    application = Application(
        [
            ("/", Page),
            (ROUTE, Proxy, {"config": setup.config(upstream, max_body_bytes=100)}),
            ("/other/(.*)", FalProxyHandler, {"config": setup.config(other, key="another-key")}),
        ],
        xsrf_cookies=True,
        cookie_secret="secret",
        compress_response=True,
        default_handler_class=OwnNotFound,
        log_function=lambda handler: logged.append((handler.get_status(), handler.request.path)),
        serve_traceback=True,
        own_client=own_client,
    )
    port = setup.serve(application, xheaders=True)

    answer = await call(port, "POST")
    assert (answer.status, answer.body, answer.header("etag")) == (200, LARGE, '"1"')
    assert answer.header("content-encoding") is None
    assert answer.header("x-app") == "1", "what the application adds to every answer is its own affair"
    packed = await call(port, "POST", headers=["Accept-Encoding: gzip"])
    assert packed.header("content-encoding") == "gzip"
    assert gzip.decompress(packed.body) == LARGE
    assert (await call(port, "POST", path="/other/thing")).body == LARGE
    keys = {exchange.header("authorization") for exchange in upstream.exchanges + other.exchanges}
    assert keys == {b"Key " + KEY.encode(), b"Key another-key"}
    too_large = await call(port, "POST", b"[" + b" " * 200 + b"]")
    assert (too_large.status, too_large.message) == (413, "The body is larger than this proxy accepts.")

    assert (await call(port, "GET", path="/")).body.startswith(b"own page")
    assert (await call(port, "GET", path="/", headers=['If-None-Match: "x"'])).header("etag") is not None
    logs.expect("'_xsrf' argument missing|403 POST /")
    forbidden = await call(port, "POST", path="/")
    assert (forbidden.status, forbidden.body) == (403, b"<h1>403</h1>")
    assert (await call(port, "GET", path="/nowhere")).body == b"<h1>404</h1>"
    fetched = await call(port, "GET", path=f"/?fetch=http://127.0.0.1:{port}/")
    assert fetched.body.startswith(b"own page")

    assert (AsyncHTTPClient.configured_class(), logging.root.handlers, dict(os.environ)) == before
    assert (200, ROUTE) in logged
    assert (413, ROUTE) in logged
    own_client.close()


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.gen_test
async def test_bodiless_answers_below_compression(setup: Setup, protocol: str, status: int) -> None:
    """compress_response adds no byte to an answer that has no body."""

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(status, JSON)
        await asyncio.sleep(0.02)  # over HTTP/2 the end may come after the head
        await exchange.end()

    upstream = await setup.upstream(answer, protocol)
    rule = (ROUTE, FalProxyHandler, {"config": setup.config(upstream)})
    port = setup.serve(Application([rule], compress_response=True, log_function=lambda handler: None))
    caller = await Caller.open(port)
    for method in ("POST", "GET", "GET"):
        await caller.send(method, headers=["Accept-Encoding: gzip"])
        received = await caller.head()
        assert (received.status, received.header("content-type")) == (status, "application/json")
    await caller.close()


@pytest.mark.gen_test
async def test_application_listen(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line is enough: the key comes from the environment at each call, as fal's tools read it."""
    port = setup.serve(Application([(ROUTE, FalProxyHandler)], log_function=lambda handler: None))
    authorizations: list[bytes] = []

    async def note(self: FalProxyHandler) -> None:
        authorizations.append(self._lines[0])

    monkeypatch.setattr(FalProxyHandler, "_relay", note)
    monkeypatch.setenv("FAL_KEY_ID", "id")
    monkeypatch.setenv("FAL_KEY_SECRET", "secret")
    await call(port, "POST")
    monkeypatch.setenv("FAL_KEY", "whole")
    await call(port, "POST")
    assert authorizations == [b"authorization: Key id:secret", b"authorization: Key whole"]
    application = Application([(ROUTE, FalProxyHandler)])
    server = application.listen(0, "127.0.0.1")
    server.stop()


@pytest.mark.gen_test
async def test_no_key(setup: Setup, logs: Logs) -> None:
    """Without a key the caller gets 500, the operator a line that says what to set, and fal nothing."""
    port = setup.serve(Application([(ROUTE, FalProxyHandler)], log_function=lambda handler: None))
    logs.expect("^ERROR tornado_fal_proxy: 500 POST: no key: set FAL_KEY")
    answer = await call(port, "POST")
    assert (answer.status, answer.message) == (500, "The proxy is not configured: it has no fal.ai key.")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"confg": None}, "not confg"), ({"config": {"key": KEY}}, "not dict"), ({"config": "x", "a": 1}, "not a")],
)
@pytest.mark.gen_test
async def test_wrong_arguments(setup: Setup, logs: Logs, arguments: dict[str, Any], named: str) -> None:
    """A misspelled keyword is an answer and a line in the log, not a connection that closes."""
    port = setup.serve(Application([(ROUTE, FalProxyHandler, arguments)], log_function=lambda handler: None))
    logs.expect(f"ERROR tornado_fal_proxy: 500 POST: FalProxyHandler.*{named}")
    answer = await call(port, "POST")
    assert (answer.status, answer.message) == (500, "The proxy is not configured correctly.")


# Subclasses.


class Guarded(FalProxyHandler):
    async def prepare(self) -> None:
        if self.request.headers.get("X-Token") != "good":
            raise HTTPError(401, reason="Log in first")
        await super().prepare()


class Decorated(FalProxyHandler):
    def get_current_user(self) -> Any:
        return self.request.headers.get("X-Token")

    def get_login_url(self) -> str:
        return "/login"

    @authenticated
    async def post(self, *args: str, **kwargs: str) -> None:  # type: ignore[override]
        await super().post(*args, **kwargs)


class Broken(FalProxyHandler):
    async def post(self, *args: str, **kwargs: str) -> None:
        raise ZeroDivisionError("a bug")


class Forgetful(FalProxyHandler):
    async def prepare(self) -> None:
        pass


SUBCLASSES: list[tuple[type[FalProxyHandler], list[str], int, str, str]] = [
    (Guarded, [], 401, "Log in first", ""),
    (Guarded, ["X-Token: good"], 200, "", ""),
    (Decorated, [], 403, "Forbidden", ""),
    (Decorated, ["X-Token: good"], 200, "", ""),
    (Broken, [], 500, "Internal Server Error", "a bug"),
    (Forgetful, [], 500, "Internal Server Error", r"must await super\(\).prepare\(\)"),
]


@pytest.mark.parametrize(("handler", "headers", "status", "message", "logged"), SUBCLASSES)
@pytest.mark.gen_test
async def test_subclass(
    setup: Setup,
    logs: Logs,
    handler: type[FalProxyHandler],
    headers: list[str],
    status: int,
    message: str,
    logged: str,
) -> None:
    """Errors of subclasses are JSON too, come although the body is not read yet, and keep the connection in step."""
    upstream = await setup.upstream(fine if status == 200 else must_not_be_called)
    rule = (ROUTE, handler, {"config": setup.config(upstream)})
    port = setup.serve(Application([rule], serve_traceback=True, log_function=lambda handler: None))
    if logged:
        logs.expect(logged)
    caller = await Caller.open(port)
    for _ in range(2):
        await caller.send("POST", b"[" + b" " * 300_000 + b"]", headers=headers)
        answer = await caller.answer()
        assert answer.status == status
        assert status == 200 or answer.message == message
    await caller.close()


# Refusals: the formula over the wire. Each is answered before its body was read.

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
    caller = await Caller.open(await refusing(setup))
    caller.writer.write(head)
    answer = await caller.answer()
    assert answer.status == status
    assert answer.message
    assert answer.header("allow") == ("GET, POST" if status == 405 else None)
    await caller.close()


@pytest.mark.gen_test
async def test_head_is_refused_without_a_body(setup: Setup) -> None:
    """HEAD is 405 as well; its answer has no body, and the connection stays in step."""
    caller = await Caller.open(await refusing(setup))
    for _ in range(2):
        caller.writer.write(raw("HEAD"))
        answer = await caller.head()
        assert (answer.status, answer.header("allow")) == (405, "GET, POST")
    await caller.close()


@pytest.mark.parametrize("size", [1, 100_000, 20_000_000])
@pytest.mark.gen_test
async def test_answer_reaches_a_caller_that_still_sends(setup: Setup, size: int) -> None:
    """A caller that sends all of its refused body reads the answer, and may use the connection again."""
    caller = await Caller.open(await refusing(setup))
    for _ in range(2):
        await caller.send("POST", b" " * size, target="https://evil.example/")
        assert (await caller.answer()).status == 412
    await caller.close()


def chunked(size: int) -> bytes:
    return b"%x\r\n" % size + b" " * size + b"\r\n"


@pytest.mark.gen_test
async def test_size_found_out_while_reading(setup: Setup) -> None:
    """A chunked body that grows too large is 413 as soon as it does; one of just the limit passes."""
    upstream = await setup.upstream(fine)
    caller = await Caller.open(setup.proxy(upstream, max_body_bytes=1_000_000))
    for size in (500_001, 3_000_000):
        caller.writer.write(raw("POST", *POST_LINES, "transfer-encoding: chunked"))
        caller.writer.write(chunked(500_000) + chunked(size))
        assert (await caller.answer()).message == "The body is larger than this proxy accepts."
        caller.writer.write(chunked(3_000_000) + b"0\r\n\r\n")
    caller.writer.write(raw("POST", *POST_LINES, "transfer-encoding: chunked"))
    caller.writer.write(chunked(500_000) + chunked(500_000) + b"0\r\n\r\n")
    assert (await caller.answer()).status == 200
    assert len(await upstream.exchanges[0].body()) == 1_000_000
    await caller.close()


@pytest.mark.gen_test
async def test_lingering_ends(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused caller that never sends its body is closed after LINGER_S, and costs nothing meanwhile."""
    monkeypatch.setattr(tornado_fal_proxy.handler, "LINGER_S", 0.1)
    caller = await Caller.open(await refusing(setup))
    caller.writer.write(REFUSALS["form"][0])
    assert (await caller.answer()).status == 415
    assert await caller.reader.read() == b""
    await caller.close()


@pytest.mark.gen_test
async def test_interrupted_request(setup: Setup) -> None:
    """A caller that leaves in the middle of its body costs no call, and its place is free again."""
    upstream = await setup.upstream(must_not_be_called)
    port = setup.proxy(upstream, max_in_flight=1)
    for _ in range(3):
        caller = await Caller.open(port)
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
    caller = await Caller.open(setup.proxy(upstream))
    caller.writer.write(request("POST") + request("GET") + raw("PUT") + request("POST"))
    assert [(await caller.answer()).status for _ in range(4)] == [200, 200, 405, 200]
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
    caller = await Caller.open(setup.proxy(upstream))
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
    caller = await Caller.open(setup.proxy(upstream))
    for target, status in (("https://fal.run/x", 200), ("https://evil.example", 412)) * 2:
        await caller.send("POST", target=target, version="HTTP/1.0", headers=["Connection: keep-alive"])
        assert (await caller.answer()).status == status
    await caller.close()


@pytest.mark.gen_test
async def test_slow_reader_of_a_whole_answer(setup: Setup) -> None:
    """A caller that never takes its (held) answer is cut off after idle_timeout_s."""

    async def answer(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.respond(200, b" " * 7_900_000, JSON)

    upstream = await setup.upstream(answer)
    caller = await Caller.open(setup.proxy(upstream, idle_timeout_s=0.5), receive_buffer=4096)
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
    answers: dict[str, Answer] = {}
    for method in ("GET", "POST"):
        reached.clear()
        waiting: Awaitable[Answer] = asyncio.ensure_future(call(port, method))
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
            await exchange.start(200, EVENTS)
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
        caller = await Caller.open(port)
        await caller.send(("GET", "POST")[number % 2], target=target)
        if number % 5:
            assert (await caller.answer()).status == 200
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


SPLITS: list[tuple[bytes, bytes]] = [
    (b"", b""),
    (b"abc", b""),
    ("ü".encode(), b""),
    ("日".encode(), b""),
    ("🌊".encode(), b""),
    (b"a", "ü".encode()[:1]),
    (b"", "日".encode()[:1]),
    (b"a", "日".encode()[:2]),
    (b"a", "🌊".encode()[:1]),
    (b"a", "🌊".encode()[:2]),
    (b"", "🌊".encode()[:3]),
    (b"\xff", b""),
    (b"\x80\x80\x80\x80", b""),
    (b"a\x80", b""),
]


@pytest.mark.parametrize(("whole", "rest"), SPLITS)
def test_split_utf8(whole: bytes, rest: bytes) -> None:
    """What is held back is exactly a character's beginning at the end."""
    assert tornado_fal_proxy.handler.split_utf8(whole + rest) == (whole, rest)


@pytest.mark.gen_test
async def test_close_upstreams_while_a_body_arrives(setup: Setup, logs: Logs) -> None:
    """A call whose body was still arriving is told that nothing was sent."""
    upstream = await setup.upstream(must_not_be_called)
    application = Application(
        [(ROUTE, FalProxyHandler, {"config": setup.config(upstream)})], log_function=lambda handler: None
    )
    caller = await Caller.open(setup.serve(application))
    caller.writer.write(raw("POST", *POST_LINES, "content-length: 2") + b"[")
    while not tornado_fal_proxy.handler._backends.get(application):
        await asyncio.sleep(0.001)
    close_upstreams(application)
    logs.expect("502 POST .*: the proxy is closing")
    caller.writer.write(b"]")
    answer = await caller.answer()
    assert (answer.status, "may have run" in answer.message) == (502, False)
    await caller.close()
