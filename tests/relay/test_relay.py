"""The relay of a call: the request that fal gets, and the response that the client gets. Over both protocols."""

import asyncio
import gzip
import zlib

import pytest

from tests.support.logs import Logs
from tests.support.proxy import KEY, Setup
from tests.support.raw_client import RawClient, Response, call, request
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import EVENT_STREAM, JSON, responds
from tornado_fal_proxy import FalProxyHandler
from tornado_fal_proxy.rules.headers import CLIENT_PROXY


@pytest.mark.gen_test
async def test_request(setup: Setup, protocol: str) -> None:
    """Method, path, query and body reach fal byte for byte, with the headers of fal's proxy formula and no others."""
    upstream = await setup.upstream(responds(), protocol)
    port = setup.proxy(upstream)
    path = "/a//b/../c/%2F%e6/+;=,{}?x=&y=%20+z&&u=a?b/"
    body = '{"prompt": "ü \U0001f30a"}'.encode()
    relayed = {
        "accept": "application/json, text/event-stream",
        "content-type": "application/json; charset=utf-8",
        "user-agent": "fal/1.10.1 (client)",
        "x-fal-request-timeout": "30",
        "x-fal-queue-priority": "low",
        "x-fal-empty": "",
        "x-app-fal-disable-fallback": "true",
    }
    kept_back = [
        "Authorization: Key of-the-client",
        "Cookie: a=b",
        "Origin: https://evil.example",
        "Referer: https://evil.example/",
        "X-Forwarded-For: 1.2.3.4",
        "X-Fal-Client-Proxy: another proxy",
        "Connection: keep-alive, x-own",
        "X-Own: 1",
        "Accept-Language: de",
        "Accept-Encoding: identity",
        "If-None-Match: *",
        "Pragma: no-cache",
    ]
    lines = [f"{name.title()}: {value}" for name, value in relayed.items() if name != "content-type"]
    client = await RawClient.open(port)
    raw = request("POST", body, target=f"https://queue.fal.run:443{path}#fragment", headers=lines + kept_back)
    client.writer.write(raw.replace(b"application/json\r\n", b"application/json; charset=utf-8\r\n", 1))
    assert (await client.response()).status == 200
    await client.close()
    [exchange] = upstream.exchanges
    assert (exchange.protocol, exchange.method, exchange.target) == (protocol, "POST", path.encode())
    assert exchange.authority == "queue.fal.run"
    assert await exchange.body() == body
    sent = {name.lower().decode(): value.decode() for name, value in exchange.headers}
    own = {"authorization": f"Key {KEY}", "x-fal-client-proxy": CLIENT_PROXY, "content-length": str(len(body))}
    framing = {"accept-encoding": "deflate, gzip, br"} | ({"host": "queue.fal.run"} if protocol != "h2" else {})
    assert sent == relayed | own | framing
    assert len(sent) == len(exchange.headers)


@pytest.mark.gen_test
async def test_request_without_optional_headers(setup: Setup, protocol: str) -> None:
    """libcurl adds no accept, content-type, user-agent or expect of its own; a GET has no body."""
    upstream = await setup.upstream(responds(), protocol)
    port = setup.proxy(upstream)
    await call(port, "GET")
    big = b'"' + b"x" * 2_000_000 + b'"'
    assert (await call(port, "POST", big)).status == 200
    get, post = upstream.exchanges
    names = {name.lower() for name, _ in get.headers} - {b"host"}
    assert names == {b"authorization", b"x-fal-client-proxy", b"accept-encoding"}
    assert await post.body() == big
    assert post.header("expect") is None


@pytest.mark.gen_test
async def test_empty_post(setup: Setup, protocol: str) -> None:
    """A POST without a body reaches fal as one with content-length: 0."""
    upstream = await setup.upstream(responds(), protocol)
    assert (await call(setup.proxy(upstream), "POST", b"")).status == 200
    assert upstream.exchanges[0].header("content-length") == b"0"


@pytest.mark.gen_test
async def test_get_with_a_body(setup: Setup, protocol: str) -> None:
    """A GET with a JSON body is relayed as that."""
    upstream = await setup.upstream(responds(), protocol)
    client = await RawClient.open(setup.proxy(upstream))
    head = request("GET", headers=["content-type: application/json", "content-length: 2"])
    client.writer.write(head + b"[]")
    assert (await client.response()).status == 200
    assert upstream.exchanges[0].method == "GET"
    assert await upstream.exchanges[0].body() == b"[]"
    await client.close()


RESPONSE_HEADERS = [
    ("server", "fal"),
    ("date", "Thu, 01 Jan 1970 00:00:00 GMT"),
    ("content-type", "application/x-thing"),
    ("x-fal-request-id", "abc"),
    ("set-cookie", "a=1"),
    ("set-cookie", "b=2"),
    ("location", "https://evil.example/"),
    ("etag", '"1"'),
    ("x-empty", ""),
    ("x-latin", "caf\u00e9"),
    ("www-authenticate", "Key"),
    ("access-control-allow-origin", "*"),
]


@pytest.mark.parametrize(
    "status", [200, 201, 202, 204, 301, 302, 304, 307, 308, 400, 401, 404, 422, 429, 499, 500, 599]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_response(setup: Setup, protocol: str, method: str, status: int) -> None:
    """Status, headers (duplicates too) and body come back as fal sent them, with the id of the call added; no redirect
    is followed."""
    body = b"" if status in (204, 304) else b'{"detail": "as it is"}'
    upstream = await setup.upstream(responds(status, body, RESPONSE_HEADERS), protocol)
    response = await call(setup.proxy(upstream), method, headers=['If-None-Match: "1"'])
    assert (response.status, response.body) == (status, body)
    own = [] if status in (204, 304) else [("content-length", str(len(body)))]
    assert sorted(without_own(response)) == sorted(RESPONSE_HEADERS + own)
    assert len(upstream.exchanges) == 1


# The headers that every response of the route has, so that no cache gives it to another call and no browser makes a
# page of it.
OWN = [
    ("content-security-policy", "sandbox"),
    ("vary", "x-fal-target-url"),
    ("x-content-type-options", "nosniff"),
]


def without_own(response: Response) -> list[tuple[str, str]]:
    """Return the headers except those that the proxy adds."""
    assert response.header("x-request-id")
    own = [*OWN, ("x-request-id", response.header("x-request-id"))]
    assert not [pair for pair in own if pair not in response.headers]
    return [pair for pair in response.headers if pair not in own]


@pytest.mark.gen_test
async def test_response_without_headers(setup: Setup, protocol: str) -> None:
    """Tornado's own Server, Date and Content-Type do not replace those that fal did not send."""
    upstream = await setup.upstream(responds(200, b"x", []), protocol)
    assert without_own(await call(setup.proxy(upstream))) == [("content-length", "1")]


PLAIN = b'{"x":"' + b"y" * 200 + b'"}'
CODINGS = {
    "gzip": gzip.compress(PLAIN),
    "deflate": zlib.compress(PLAIN),
    "br": bytes.fromhex("1bcf00f88dd462cd19eed42278797b4ba7af24992d1038706104"),
}


@pytest.mark.parametrize("coding", list(CODINGS))
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_encoded_response(setup: Setup, protocol: str, coding: str, method: str) -> None:
    """An encoded response arrives decoded, without content-encoding and with its true length."""
    upstream = await setup.upstream(responds(200, CODINGS[coding], [*JSON, ("content-encoding", coding)]), protocol)
    response = await call(setup.proxy(upstream), method)
    assert response.body == PLAIN
    assert response.header("content-encoding") is None
    assert response.header("content-length") in (str(len(PLAIN)), None)


@pytest.mark.parametrize("coding", ["zstd", "gzip, gzip", "GZIP, br"])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.gen_test
async def test_a_coding_that_was_not_requested_passes(setup: Setup, protocol: str, method: str, coding: str) -> None:
    """A response in a coding that was not requested passes with its content-encoding, because it is paid for."""
    upstream = await setup.upstream(responds(200, b"\0encoded\xff", [*JSON, ("content-encoding", coding)]), protocol)
    response = await call(setup.proxy(upstream), method)
    assert response.body == b"\0encoded\xff"
    assert response.header("content-encoding") == coding.lower()


@pytest.mark.gen_test
async def test_early_response(setup: Setup, protocol: str) -> None:
    """A response that comes before fal has read the request's body is relayed."""

    async def respond(exchange: Exchange) -> None:
        await exchange.respond(413, b'{"detail": "too large"}', JSON)

    upstream = await setup.upstream(respond, protocol)
    response = await call(setup.proxy(upstream), "POST", b'"' + b"x" * 500_000 + b'"')
    assert (response.status, response.body) == (413, b'{"detail": "too large"}')


@pytest.mark.gen_test
async def test_interim_responses_and_trailers(setup: Setup, protocol: str) -> None:
    """Interim responses (1xx) and trailers are neither taken for the response's head nor passed on."""

    async def respond(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.informational(103, [("link", "</x>")])
        await exchange.start(200, JSON)
        await exchange.send(b"{}")
        await exchange.end([("x-checksum", "1")])

    upstream = await setup.upstream(respond, protocol)
    response = await call(setup.proxy(upstream))
    assert (response.status, response.body) == (200, b"{}")
    assert sorted(name for name, _ in without_own(response)) == ["content-length", "content-type"]


@pytest.mark.gen_test
async def test_http_1_0(setup: Setup, protocol: str) -> None:
    """A client that speaks HTTP/1.0 gets a stream that ends with the connection, keep-alive or not."""
    upstream = await setup.upstream(responds(200, b"data: 1\n\n", EVENT_STREAM), protocol)

    async def slow(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, EVENT_STREAM)
        await exchange.send(b"data: 1\n\n")
        await asyncio.sleep(0.02)
        await exchange.end()

    upstream.handler = slow
    port = setup.proxy(upstream)
    for headers in ([], ["Connection: keep-alive"]):
        response = await call(port, "POST", version="HTTP/1.0", headers=headers)
        assert (response.status, response.body) == (200, b"data: 1\n\n")
        assert response.header("transfer-encoding") is None


def test_handler_keeps_no_state_between_calls() -> None:
    """The class has no mutable state: it is all in the instance, and Tornado makes one for each call."""
    assert not [name for name, value in vars(FalProxyHandler).items() if isinstance(value, list | dict | set)]


def test_log_fixture_fails_on_the_unexpected(logs: Logs) -> None:
    """A line that no test expects fails the check of the log, which every test relies on."""
    import logging

    logging.getLogger("tornado_fal_proxy").warning("surprise")
    with pytest.raises(AssertionError):
        logs.check()
    logs.expect("surprise")
