"""The private names of Tornado and the undocumented texts of libcurl that the proxy needs.

setup.cfg names the range of Tornado on which these tests pass. When one fails, ``upstream/``, ``relay/``, ``handler``
or ``service/`` must change.
"""

import asyncio
import dis
import inspect
import logging

import pycurl
import pytest
from tornado.curl_httpclient import CurlAsyncHTTPClient
from tornado.http1connection import HTTP1Connection, HTTP1ConnectionParameters
from tornado.httputil import HTTPConnection, HTTPMessageDelegate
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from tests.support.proxy import KEY, Setup
from tests.support.raw_client import RawClient, call
from tests.support.scripted_upstream import Exchange
from tornado_fal_proxy import FalProxyHandler
from tornado_fal_proxy.rules.target import parse_target
from tornado_fal_proxy.service.scoreboard import Scoreboard
from tornado_fal_proxy.service.server import Server
from tornado_fal_proxy.service.worker import SingleProcess
from tornado_fal_proxy.upstream.client import UpstreamClient

# Methods of the client that are called or overridden, with their parameters.
METHODS = {
    "_curl_create": ["self"],
    "_finish_pending_requests": ["self"],
    "_finish": ["self", "curl", "curl_error", "curl_message"],
    "_handle_timeout": ["self"],
    "_handle_socket": ["self", "event", "fd", "multi", "data"],
    "_set_timeout": ["self", "msecs"],
    "close": ["self"],
}


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_of_the_client(name: str) -> None:
    """The methods that the subclass calls or overrides exist, with these parameters."""
    assert list(inspect.signature(getattr(CurlAsyncHTTPClient, name)).parameters) == METHODS[name]


def test_nothing_else_is_overridden() -> None:
    """The table above is complete: no other private name of the base class is overridden."""
    inherited = {name for name in vars(CurlAsyncHTTPClient) if name.startswith("_") and not name.startswith("__")}
    assert inherited & set(vars(UpstreamClient)) <= set(METHODS)
    web = {name for base in RequestHandler.__mro__ for name in vars(base)}
    public_hooks = {"check_xsrf_cookie", "compute_etag", "check_etag_header", "send_error", "initialize", "prepare"}
    public_hooks |= {"data_received", "on_connection_close", "on_finish", "clear"}
    own = {name for name in vars(FalProxyHandler) if not name.startswith("__")}
    verbs = {name.lower() for name in RequestHandler.SUPPORTED_METHODS}
    assert own & web <= public_hooks | verbs | {"_stream_request_body", "_execute"}


def test_clear() -> None:
    """Tornado's ``clear`` resets exactly the attributes that the handler's own resets."""
    written = {
        instruction.argval
        for instruction in dis.get_instructions(RequestHandler.clear)
        if instruction.opname == "STORE_ATTR"
    }
    assert written == {"_headers", "_write_buffer", "_status_code", "_reason"}


@pytest.mark.gen_test
async def test_attributes_of_the_client(setup: Setup) -> None:
    """``_multi`` is the CurlMulti, driven by ``_set_timeout`` and ``_handle_socket``."""
    client = CurlAsyncHTTPClient(force_instance=True)
    assert isinstance(client._multi, pycurl.CurlMulti)
    client.close()


@pytest.mark.gen_test
async def test_attributes_of_the_server(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request's connection is an HTTP1Connection with a stream and a limit of the body; its body is a future."""
    seen: list[bool] = []

    class Inspecting(FalProxyHandler):
        async def prepare(self) -> None:
            connection = self.request.connection
            assert isinstance(connection, HTTP1Connection)
            connection.set_max_body_size(10)
            seen.append(self.request._body_future.done())
            seen.append(self._finished)
            self.request._body_future.add_done_callback(lambda body: seen.append(body.exception() is None))
            await super().prepare()

    port = setup.serve(Application([("/api/fal/proxy", Inspecting)], log_function=lambda handler: None))
    assert (await call(port, "POST", target="https://evil.example/")).status == 412
    assert seen == [False, False, True]


@pytest.mark.gen_test
async def test_requests_of_a_connection(setup: Setup) -> None:
    """The start lines of a request and its response show which head has passed; a flag makes the request the last."""
    seen: list[HTTP1Connection] = []

    class Watching(Server):
        def start_request(self, server_conn: object, request_conn: HTTPConnection) -> HTTPMessageDelegate:
            assert isinstance(request_conn, HTTP1Connection)
            seen.append(request_conn)
            return super().start_request(server_conn, request_conn)

    class Responding(RequestHandler):
        def get(self) -> None:
            assert seen[-1]._request_start_line is not None
            assert seen[-1]._response_start_line is None
            seen[-1]._disconnect_on_finish = bool(self.get_argument("last", ""))
            self.finish("{}")
            assert seen[-1]._response_start_line is not None

    listener, port = bind_unused_port()
    server = Watching(Application([("/", Responding)], log_function=lambda handler: None))
    server.listen_on([listener], SingleProcess(0, Scoreboard(1), *[lambda: None] * 3), set())
    client = await RawClient.open(port)
    await client.send("GET", path="/")
    assert (await client.response()).header("connection") is None
    while len(seen) < 2:
        await asyncio.sleep(0)
    assert seen[-1]._request_start_line is None
    await client.send("GET", path="/?last=1")
    assert (await client.response()).header("connection") == "close"
    assert await client.reader.read() == b""
    assert isinstance(server.conn_params, HTTP1ConnectionParameters)
    assert server.conn_params.no_keep_alive is False
    await client.close()
    server.stop()
    await server.drain()


@pytest.mark.gen_test
async def test_fetch_still_works(setup: Setup, protocol: str) -> None:
    """``fetch()`` of the base class works on the subclass, beside the subclass's transfers."""

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.respond(200, exchange.target)

    upstream = await setup.upstream(respond, protocol)
    config = setup.config(upstream)
    client = UpstreamClient(force_instance=True, config=config)
    try:
        transfer = client.start("GET", parse_target("https://fal.run/own"), [b"a: b"])
        url = f"https://localhost:{upstream.port}/fetched"
        fetched = await client.fetch(url, ca_certs=config.ca_certs, validate_cert=False)
        assert fetched.body == b"/fetched"
        await transfer.read_head()
        assert await transfer.buffer_whole()
        assert transfer.take() == [b"/own"]
    finally:
        client.close()


@pytest.mark.gen_test
async def test_words_of_libcurl(setup: Setup, protocol: str) -> None:
    """The protocol of a connection is known before the first response."""
    reached = asyncio.Event()

    async def silent(exchange: Exchange) -> None:
        reached.set()

    upstream = await setup.upstream(silent, protocol)
    client = UpstreamClient(force_instance=True, config=setup.config(upstream))
    transfer = client.start("GET", parse_target("https://fal.run/x"), [])
    await reached.wait()
    assert client._hosts.speaks_http2("fal.run") is (protocol == "h2")
    transfer.cancel()
    client.close()


@pytest.mark.gen_test
async def test_curl_log_has_no_key(setup: Setup, protocol: str) -> None:
    """Tornado's curl log does not show the key, even at level DEBUG."""
    curl_log = logging.getLogger("tornado.curl_httpclient")
    lines: list[str] = []
    listener = logging.Handler(logging.DEBUG)
    listener.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    curl_log.addHandler(listener)
    curl_log.setLevel(logging.DEBUG)
    try:

        async def respond(exchange: Exchange) -> None:
            await exchange.body()
            await exchange.respond(200, b"{}")

        port = setup.proxy(await setup.upstream(respond, protocol))
        for _ in range(3):
            assert (await call(port, "POST")).status == 200
    finally:
        curl_log.removeHandler(listener)
        curl_log.setLevel(logging.NOTSET)
    assert not [line for line in lines if KEY in line]
