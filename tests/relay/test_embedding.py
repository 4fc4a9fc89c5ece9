"""The handler inside an application that is not its own, and subclasses of it."""

import asyncio
import gzip
import logging
import os
from typing import Any

import pytest
from tornado.curl_httpclient import CurlAsyncHTTPClient
from tornado.httpclient import AsyncHTTPClient
from tornado.web import Application, HTTPError, RequestHandler, authenticated

from tests.support.logs import Logs
from tests.support.proxy import KEY, ROUTE, Setup
from tests.support.raw_client import RawClient, call
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import JSON, must_not_be_called
from tornado_fal_proxy import FalProxyHandler

LARGE = b'{"images": "' + b"x" * 20_000 + b'"}'


async def fine(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.respond(200, LARGE, [*JSON, ("etag", '"1"')])


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
    """The proxy and an application with its own pages, settings and curl client do not disturb each other."""
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

    response = await call(port, "POST")
    assert (response.status, response.body, response.header("etag")) == (200, LARGE, '"1"')
    assert response.header("content-encoding") is None
    assert response.header("x-app") == "1", "the application may add headers to every response"
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
async def test_bodiless_responses_with_compression(setup: Setup, protocol: str, status: int) -> None:
    """compress_response adds no byte to a response that has no body."""

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(status, JSON)
        await asyncio.sleep(0.02)  # over HTTP/2 the end may come after the head
        await exchange.end()

    upstream = await setup.upstream(respond, protocol)
    rule = (ROUTE, FalProxyHandler, {"config": setup.config(upstream)})
    port = setup.serve(Application([rule], compress_response=True, log_function=lambda handler: None))
    client = await RawClient.open(port)
    for method in ("POST", "GET", "GET"):
        await client.send(method, headers=["Accept-Encoding: gzip"])
        received = await client.head()
        assert (received.status, received.header("content-type")) == (status, "application/json")
    await client.close()


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
    """Without a key the client gets 500, fal gets nothing, and a line in the log names the variable to set."""
    port = setup.serve(Application([(ROUTE, FalProxyHandler)], log_function=lambda handler: None))
    logs.expect("^ERROR tornado_fal_proxy: refused: 500 POST: no key: set FAL_KEY")
    response = await call(port, "POST")
    assert (response.status, response.message) == (500, "The proxy is not configured: it has no fal.ai key.")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"confg": None}, "not confg"), ({"config": {"key": KEY}}, "not dict"), ({"config": "x", "a": 1}, "not a")],
)
@pytest.mark.gen_test
async def test_wrong_arguments(setup: Setup, logs: Logs, arguments: dict[str, Any], named: str) -> None:
    """A misspelled keyword gives a response and a line in the log, not a closed connection."""
    port = setup.serve(Application([(ROUTE, FalProxyHandler, arguments)], log_function=lambda handler: None))
    logs.expect(f"ERROR tornado_fal_proxy: refused: 500 POST: FalProxyHandler.*{named}")
    response = await call(port, "POST")
    assert (response.status, response.message) == (500, "The proxy is not configured correctly.")


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
    (Forgetful, [], 500, "The proxy is not configured correctly.", r"must await super\(\).prepare\(\)"),
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
    """Errors of subclasses are JSON too, leave before the body is read, and keep the connection in step."""
    upstream = await setup.upstream(fine if status == 200 else must_not_be_called)
    rule = (ROUTE, handler, {"config": setup.config(upstream)})
    port = setup.serve(Application([rule], serve_traceback=True, log_function=lambda handler: None))
    if logged:
        logs.expect(logged)
    client = await RawClient.open(port)
    for _ in range(2):
        await client.send("POST", b"[" + b" " * 300_000 + b"]", headers=headers)
        response = await client.response()
        assert response.status == status
        assert status == 200 or response.message == message
    await client.close()
