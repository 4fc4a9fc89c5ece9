"""HTTP/1.1 as RFC 9112 and RFC 9110 have it, with the command's own server: one row for each requirement.

A row without ``closed`` shows that the connection can be used again. Tornado's own server, which an embedder has,
differs where docs/threat-model.md says so.
"""

import asyncio
import re
import socket
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import pytest

from tests.support.command_server import HEALTH, serve, serve_and_log
from tests.support.proxy import ROUTE, Setup
from tests.support.raw_client import RawClient, Response, request
from tests.support.scripted_upstream import Exchange
from tests.support.stub_handlers import EVENT_STREAM, JSON, fine, must_not_be_called
from tests.support.waiting import TIMEOUT_S
from tornado_fal_proxy.service import connection, server

TARGET = "x-fal-target-url: https://fal.run/a/b"


def post(*lines: str, body: str = "", line: str = f"POST {ROUTE} HTTP/1.1", host: str = "Host: a") -> bytes:
    head = [line, host, TARGET, "content-type: application/json", *lines]
    return ("\r\n".join(filter(None, head)) + "\r\n\r\n" + body).encode("latin-1")


def get(line: str, *lines: str) -> bytes:
    return "\r\n".join([line, *lines, "", ""]).encode("latin-1")


@dataclass(frozen=True)
class Row:
    """``error`` is the name that the access log has, None where there is no line, as for a health check."""

    section: str
    name: str
    sent: bytes
    status: int
    error: str | None = ""
    closed: bool = False


def bad(section: str, name: str, sent: bytes, status: int = 400, error: str = "MalformedRequest") -> Row:
    return Row(section, name, sent, status, error, closed=True)


def good(section: str, name: str, sent: bytes) -> Row:
    return Row(section, name, sent, 200)


def healthy(section: str, name: str, *lines: str, closed: bool = False) -> Row:
    return Row(section, name, get(*lines), 200, None, closed)


LARGE, UNSUPPORTED = "RequestTooLarge", "UnsupportedRequest"
CHUNKED = "transfer-encoding: chunked"
OK = "2\r\n{}\r\n0\r\n\r\n"
HEALTHZ = "GET /healthz HTTP/1.1"
HOST = "Host: a"


def host_rows() -> list[Row]:
    valid = ["a.example", "a.example:8080", "a:", "", "127.0.0.1", "[::1]", "[2001:db8::1]:443", "a_b", "%61", "a.b."]
    invalid = [
        *(
            "a b",
            "a/b",
            "a@b",
            "u:p@a",
            "a?b",
            "a#b",
            "a\\b",
            "a:b",
            "a:1:2",
            "a, b",
            "a,a",
            "<a>",
            '"a"',
            "a%2",
            "\xe4",
        ),
        *("::1", "[::1", "[::1]x", "[]", "[1.2.3.4]", "[::1:::]", "a" * 300),
    ]
    return [
        *(healthy("9112 3.2", f"Host {host!r}", HEALTHZ, f"Host: {host}") for host in valid),
        *(bad("9112 3.2", f"Host {host!r}", get(HEALTHZ, f"Host: {host}")) for host in invalid),
        bad("9112 3.2", "no Host", get(HEALTHZ)),
        bad("9112 3.2", "two", get(HEALTHZ, HOST, "host: b")),
        bad("9112 3.2", "one twice", get(HEALTHZ, HOST, HOST)),
        bad("9112 3.2", "no Host, but an absolute target", get("GET http://a/healthz HTTP/1.1")),
        healthy("9112 3.2", "no Host in HTTP/1.0", "GET /healthz HTTP/1.0", closed=True),
        bad("9112 3.2", "two in HTTP/1.0", get("GET /healthz HTTP/1.0", HOST, HOST)),
    ]


def line_rows() -> list[Row]:
    malformed = [
        *("GET  /healthz HTTP/1.1", "GET /healthz  HTTP/1.1", " GET /healthz HTTP/1.1", "GET /healthz HTTP/1.1 "),
        *("GET\t/healthz HTTP/1.1", "GET /healthz\tHTTP/1.1", "GET /a b HTTP/1.1", "GET /healthz", "GET", "/healthz"),
        *(
            "GET /healthz http/1.1",
            "GET /healthz HTTP/1.10",
            "GET /healthz HTTP/11",
            "GET /healthz HTTP/1",
            "GET /a\rb H",
        ),
        *("G(T /healthz HTTP/1.1", "G\x00T /healthz HTTP/1.1", "GET /\x00 HTTP/1.1", "GET /healthz#a HTTP/1.1"),
        *("GET /\xe4 HTTP/1.1", "GET healthz HTTP/1.1", "GET * HTTP/1.1", "POST * HTTP/1.1", "GET a:80 HTTP/1.1"),
        *("GET http:/healthz HTTP/1.1", "GET http:///healthz HTTP/1.1", "GET http://u@a/healthz HTTP/1.1"),
        *("GET http://a b/healthz HTTP/1.1", "GET ftp://a/healthz HTTP/1.1", "GET http://[::1/healthz HTTP/1.1"),
    ]
    versions = ["HTTP/2.0", "HTTP/0.9", "HTTP/3.0"]
    return [
        *(bad("9112 3", line, get(line, HOST)) for line in malformed),
        *(bad("9110 2.5", v, get(f"GET /healthz {v}", HOST), 505, UNSUPPORTED) for v in versions),
        bad("9112 2.3", "the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, UNSUPPORTED),
        healthy("9110 2.5", "a higher minor version", "GET /healthz HTTP/1.2", HOST),
        good("9110 2.5", "a higher minor version, chunks", post(CHUNKED, body=OK, line=f"POST {ROUTE} HTTP/1.9")),
        good(
            "9112 3.2.2", "absolute form", post("content-length: 2", body="{}", line=f"POST http://a{ROUTE} HTTP/1.1")
        ),
        good("9112 3.2.2", "another host", post("content-length: 0", line=f"POST HTTPS://b.example:1{ROUTE} HTTP/1.1")),
        healthy("9112 3.2.2", "with a query", "GET http://a/healthz?a=b HTTP/1.1", HOST),
        Row("9112 3.2.2", "without a path", get("GET http://a HTTP/1.1", HOST), 404, "NotFound"),
        Row("9112 3.2.2", "a query without a path", get("GET http://a?b HTTP/1.1", HOST), 404, "NotFound"),
        Row("9112 3.2.4", "asterisk form", get("OPTIONS * HTTP/1.1", HOST), 204),
        bad("9112 3.2.3", "authority form", get("CONNECT a:443 HTTP/1.1", HOST), 501, UNSUPPORTED),
        bad("9112 3", "8 kB of URL", get(f"GET /{'a' * 8192} HTTP/1.1", HOST), 414, LARGE),
        bad("9112 3", "64 kB of URL", get(f"GET /{'a' * 70_000} HTTP/1.1", HOST), 414, LARGE),
        Row("9112 3", "8000 bytes of first line", get(f"GET /{'a' * 7986} HTTP/1.1", HOST), 404, "NotFound"),
        bad("9110 4.1", "a query of 1001 fields", get(f"GET /healthz?{'a=b&' * 1001} HTTP/1.1", HOST)),
        Row("9112 2.2", "an empty line first", b"\r\n" + HEALTH, 200, None),
        Row("9112 2.2", "many", b"\r\n" * 50 + b"\n" + HEALTH, 200, None),
        bad("9112 2.2", "a flood of empty lines", b"\r\n" * 100_000 + HEALTH),
        bad("9112 2.2", "513 empty lines", b"\r\n" * 513 + HEALTH),
        Row("9112 2.2", "512 empty lines", b"\r\n" * 512 + HEALTH, 200, None),
        Row("9112 2.2", "bare line feeds", HEALTH.replace(b"\r", b""), 200, None),
    ]


def field_rows() -> list[Row]:
    malformed = [
        "a : b",
        "a\t: b",
        " a: b",
        "\ta: b",
        ": b",
        "ab",
        "a b: c",
        "a\x00: b",
        "a: \x00b",
        "a: b\rc",
        "a: \x1bb",
    ]
    return [
        *(bad("9112 5", repr(line), get(HEALTHZ, HOST, line)) for line in malformed),
        bad("9112 2.2", "white space before the first header", get(HEALTHZ, " a: b", HOST)),
        bad("9112 5.2", "a folded line", get(HEALTHZ, HOST, "a: b", " c")),
        healthy("9110 5.5", "bytes above ASCII", HEALTHZ, HOST, "a: \xe4\x85"),
        healthy("9112 5", "no value", HEALTHZ, HOST, "a:", "b: \t "),
        healthy("9110 5.4", "100 lines", HEALTHZ, HOST, *(f"a{n}: b" for n in range(99))),
        bad("9110 5.4", "101 lines", get(HEALTHZ, HOST, *(f"a{n}: b" for n in range(100))), 431, LARGE),
        bad("9110 5.4", "one line, 101 times", get(HEALTHZ, *["a: b"] * 101), 431, LARGE),
        bad("9110 5.4", "64 kB of distinct names", get(HEALTHZ, *(f"a{n}: b" for n in range(7000))), 431, LARGE),
        bad("9110 5.4", "64 kB in a line", get(HEALTHZ, HOST, f"a: {'b' * 66_000}"), 431, LARGE),
        healthy("9110 5.4", "60 kB in a line", HEALTHZ, HOST, f"a: {'b' * 60_000}"),
        healthy("9110 7.8", "an upgrade is ignored", HEALTHZ, HOST, "connection: upgrade", "upgrade: h2c"),
    ]


def length_rows() -> list[Row]:
    lengths = ["-1", "+2", "0x2", "2.0", "2 2", "", "two", "2_0", "2, 3", "2,", ", 2", "02, 2", "\xb2", "1e1"]
    codings = [
        *(("gzip", 400), ("identity", 400), ("chunked, chunked", 400), ("chunked, gzip", 400), ("chunked;a=b", 400)),
        *(('"chunked"', 400), ("", 400), ("chunked,", 400), (",chunked", 400), ("chunked\xa0", 400)),
        *(("gzip, chunked", 501), ("identity, chunked", 501), ("xchunked", 501), ("foo", 501), ("foo, chunked", 501)),
    ]
    errors = {400: "MalformedRequest", 501: UNSUPPORTED}
    old = f"POST {ROUTE} HTTP/1.0"
    return [
        *(bad("9112 6.3", f"length {text!r}", post(f"content-length: {text}", body="{}")) for text in lengths),
        good("9112 6.3", "one length twice", post("content-length: 2", "content-length: 2", body="{}")),
        good("9112 6.3", "one length twice in a line", post("content-length: 2, 2", body="{}")),
        good("9112 6.3", "no length", post()),
        bad("9112 6.3", "two lengths", post("content-length: 2", "content-length: 3", body="{}")),
        bad("9112 6.2", "a length beyond 64 bits", post(f"content-length: {'9' * 30}"), 413, LARGE),
        bad("9112 6.2", "a length beyond Python's limit", post(f"content-length: {'9' * 5000}"), 413, LARGE),
        *(bad("9112 6.1", f"{c!r}", post(f"transfer-encoding: {c}", body=OK), s, errors[s]) for c, s in codings),
        bad("9112 6.1", "chunked twice", post(CHUNKED, CHUNKED, body=OK)),
        bad("9112 6.3", "length and chunks", post("content-length: 2", CHUNKED, body=OK)),
        bad("9112 6.3", "no length and chunks", post("content-length: 0", CHUNKED, body=OK)),
        bad("9112 6.1", "chunks in HTTP/1.0", post(CHUNKED, body=OK, line=old)),
        good("9112 6.1", "in capitals", post("Transfer-Encoding: Chunked", body=OK)),
    ]


def chunk_rows() -> list[Row]:
    extensions = [";a", ";a=b", ' ; a = "b;c\\"" ;d', "\t;a", ";a=b;" + "c" * 200, ';a="\xe4"']
    sizes = [
        "0x2",
        "+2",
        "-2",
        " 2",
        "2 ",
        "2_",
        "",
        "\x002",
        "g",
        "2;",
        "2;=a",
        "2;a=",
        '2;a="',
        "2;a b",
        "2;a\x00",
        "2,",
    ]
    trailers = ["a: b\r\n", "a: b\r\ncontent-length: 7\r\n", f"{TARGET}\r\n", "a:\r\n", "transfer-encoding: gzip\r\n"]
    return [
        good("9112 7.1", "two chunks", post(CHUNKED, body="1\r\n{\r\n1\r\n}\r\n0\r\n\r\n")),
        good("9112 7.1", "zeros before a size", post(CHUNKED, body="00002\r\n{}\r\n000\r\n\r\n")),
        good("9112 7.1", "a size in capitals", post(CHUNKED, body=f"A\r\n{'{}'.center(10)}\r\n0\r\n\r\n")),
        *(good("9112 7.1.1", repr(e), post(CHUNKED, body=f"2{e}\r\n{{}}\r\n0{e}\r\n\r\n")) for e in extensions),
        *(good("9112 7.1.2", repr(t), post(CHUNKED, body=f"2\r\n{{}}\r\n0\r\n{t}\r\n")) for t in trailers),
        *(bad("9112 7.1", repr(s), post(CHUNKED, body=f"{s}\r\n{{}}\r\n0\r\n\r\n")) for s in sizes),
        bad("9112 7.1", "a size of 16 digits", post(CHUNKED, body="f" * 16 + "\r\n{}")),
        bad("9112 7.1", "a size of 15 digits", post(CHUNKED, body="f" * 15 + "\r\n{}"), 413, "BodyTooLarge"),
        bad("9112 7.1", "a bare line feed", post(CHUNKED, body="2\n{}\r\n0\r\n\r\n")),
        bad("9112 7.1", "in an extension", post(CHUNKED, body="2;a\n{}\r\n0\r\n\r\n")),
        bad("9112 7.1", "behind a chunk", post(CHUNKED, body="2\r\n{}\n0\r\n\r\n")),
        bad("9112 7.1", "a bare CR in an extension", post(CHUNKED, body="2;a\rb\r\n{}\r\n0\r\n\r\n")),
        bad("9112 7.1", "a chunk that is too long", post(CHUNKED, body="1\r\n{}\r\n0\r\n\r\n")),
        bad("9112 7.1.2", "a trailer with a bare line feed", post(CHUNKED, body="2\r\n{}\r\n0\r\na: b\n\r\n")),
        bad("9112 7.1.2", "no trailer", post(CHUNKED, body="0\r\nGET / HTTP/1.1\r\n\r\n")),
        bad("9112 7.1.2", "a trailer with NUL", post(CHUNKED, body="0\r\na: \x00\r\n\r\n")),
        bad("9112 7.1.1", "a long extension", post(CHUNKED, body=f"2;{'a' * 9000}\r\n"), 413, "BodyTooLarge"),
        bad("9112 7.1.1", "many", post(CHUNKED, body=f"1;{'a' * 3000}\r\n \r\n" * 3), 413, "BodyTooLarge"),
        bad("9112 7.1.2", "many trailers", post(CHUNKED, body="0\r\n" + "a: b\r\n" * 200), 431, LARGE),
        bad("9112 7.1.2", "long trailers", post(CHUNKED, body="0\r\n" + f"a: {'b' * 4000}\r\n" * 3), 431, LARGE),
    ]


def connection_rows() -> list[Row]:
    old = "GET /healthz HTTP/1.0"
    return [
        healthy("9112 9.3", "kept", HEALTHZ, HOST),
        healthy("9112 9.6", "close", HEALTHZ, HOST, "connection: close", closed=True),
        healthy("9112 9.6", "close in a list", HEALTHZ, HOST, "connection: a, Close", closed=True),
        healthy(
            "9112 9.6", "close in two lines", HEALTHZ, HOST, "connection: keep-alive", "connection: close", closed=True
        ),
        healthy("9112 9.3", "HTTP/1.0", old, HOST, closed=True),
        healthy("9112 9.3", "HTTP/1.0, keep-alive", old, HOST, "connection: Keep-Alive"),
        healthy("9112 9.3", "HTTP/1.0, keep-alive in a list", old, HOST, "connection: a, keep-alive"),
        healthy("9112 9.3", "HTTP/1.0, both", old, HOST, "connection: keep-alive, close", closed=True),
        Row(
            "9112 9.3",
            "a POST of HTTP/1.0",
            post("content-length: 2", body="{}", line=f"POST {ROUTE} HTTP/1.0"),
            200,
            "",
            True,
        ),
        healthy("9110 10.1.1", "an expectation in HTTP/1.0", old, HOST, "expect: 200-ok", closed=True),
        bad("9110 10.1.1", "unknown", post("expect: a", "content-length: 2"), 417, UNSUPPORTED),
        bad("9110 10.1.1", "unknown too", post("expect: 100-continue, a", "content-length: 2"), 417, UNSUPPORTED),
        healthy("9110 10.1.1", "without a body", HEALTHZ, HOST, "expect: 100-continue"),
    ]


def method_rows() -> list[Row]:
    known, unknown = ["PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"], ["TRACE", "BREW", "get", "CONNECT"]
    errors = dict.fromkeys(known, "MethodNotAllowed") | dict.fromkeys(unknown, "HTTPError")
    return [
        *(Row("9110 9.1", f"{m} of the route", get(f"{m} {ROUTE} HTTP/1.1", HOST), 405, e) for m, e in errors.items()),
        Row("9110 9.1", "an unknown method", get("BREW /healthz HTTP/1.1", HOST), 501, "UnknownMethod"),
        Row("9110 15.5.6", "a method that is not allowed", get("PUT /healthz HTTP/1.1", HOST), 405, None),
        Row("9110 9.3.2", "HEAD", get("HEAD /healthz HTTP/1.1", HOST), 200, None),
        Row("9110 9.3.2", "HEAD of nothing", get("HEAD /x HTTP/1.1", HOST), 404, "NotFound"),
        bad("9110 9.3.2", "HEAD that is malformed", get("HEAD /x HTTP/1.1", HOST, HOST)),
        Row(
            "9110 9.3.2",
            "HEAD that is too large",
            get("HEAD /x HTTP/1.1", HOST, "content-length: 9"),
            404,
            "NotFound",
            True,
        ),
    ]


ROWS = [
    *(*host_rows(), *line_rows(), *field_rows(), *length_rows(), *chunk_rows()),
    *(*connection_rows(), *method_rows()),
]


async def response_to(client: RawClient, sent: bytes) -> Response:
    """Read the response to ``sent``, without a body where it has none."""
    head = await client.head()
    if not sent.lstrip().startswith(b"HEAD ") and head.status != 204:
        await client.rest(head)
    return head


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.section} {row.name[:40]}")
@pytest.mark.gen_test
async def test_requirement(setup: Setup, row: Row) -> None:
    """The response has that status and all that it must have, the connection is kept or closed, the log is right."""
    upstream = await setup.upstream(fine)
    port, entries = serve_and_log(setup, upstream)
    client = await RawClient.open(port)
    client.writer.write(row.sent)
    response = await response_to(client, row.sent)
    assert response.status == row.status
    parsedate_to_datetime(response.header("date") or "")  # RFC 9110 section 6.6.1
    if response.status == 405:
        assert response.header("allow")
    if response.status == 204:
        assert (response.header("content-length"), response.header("transfer-encoding")) == (None, None)
    if response.status >= 400:
        assert response.header("content-type") == "application/json"
        assert response.body == b"" if row.sent.startswith(b"HEAD ") else response.message
    said = (response.header("connection") or "").lower()
    assert (said == "close") == row.closed
    if row.closed:
        assert await client.reader.read() == b""
    else:
        client.writer.write(HEALTH)
        assert (await client.response()).status == 200
    lines = [] if row.error is None else [(row.status, row.error or None)]
    assert [(entry["status"], entry["error"]) for entry in entries] == lines
    assert len(upstream.exchanges) == (row.status == 200 and row.error is not None)
    await client.close()


def test_rows_differ() -> None:
    """Each row has bytes of its own."""
    assert len({row.sent for row in ROWS}) >= len(ROWS) - 2


@pytest.mark.gen_test
async def test_the_body_of_a_chunked_request_reaches_fal(setup: Setup) -> None:
    """fal gets the bytes of the chunks, and nothing of extensions and trailers, however the client cuts them."""
    upstream = await setup.upstream(fine)
    client = await RawClient.open(serve(setup, upstream))
    sent = post(CHUNKED, body='1;a=b\r\n{\r\n3;c="\\""\r\n"a"\r\n1\r\n:\r\n2 ;d\r\n1}\r\n0;e\r\nx-fal-a: b\r\n\r\n')
    for whole in (True, False):
        for part in [sent] if whole else [sent[n : n + 1] for n in range(len(sent))]:
            client.writer.write(part)
            await asyncio.sleep(0)
        assert (await client.response()).status == 200
        assert await upstream.exchanges[-1].body() == b'{"a":1}'
        assert upstream.exchanges[-1].header("x-fal-a") is None
    await client.close()


@pytest.mark.parametrize("spelling", ["100-continue", "100-Continue"])
@pytest.mark.gen_test
async def test_expectation(setup: Setup, spelling: str) -> None:
    """The client is told to go on before its body, if the body is wanted and only then (RFC 9110 section 10.1.1)."""
    upstream = await setup.upstream(fine)
    port = serve(setup, upstream)
    client = await RawClient.open(port)
    client.writer.write(post(f"expect: {spelling}", "content-length: 2"))
    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.writer.write(b"{}")
    assert (await client.response()).status == 200
    await client.close()
    for sent in (
        post(f"expect: {spelling}", "content-length: 2").replace(b"https://fal.run", b"https://evil.example"),
        get("POST /x HTTP/1.1", HOST, f"expect: {spelling}", "content-length: 2"),
        get("POST /healthz HTTP/1.1", HOST, f"expect: {spelling}", "content-length: 5000"),
    ):
        client = await RawClient.open(port)
        client.writer.write(sent)
        assert re.match(rb"HTTP/1.1 4\d\d ", await client.reader.read())
        await client.close()


@pytest.mark.gen_test
async def test_pipelined_requests_are_answered_in_order(setup: Setup) -> None:
    """Responses come in the order of the requests (RFC 9112 section 9.3.2), up to one that cannot be read."""

    async def slow_first(exchange: Exchange) -> None:
        await exchange.body()
        if exchange.target == b"/a/1":
            await asyncio.sleep(0.05)
        await exchange.respond(200, exchange.target, JSON)

    port = serve(setup, await setup.upstream(slow_first))
    client = await RawClient.open(port)
    calls = [request("GET", target=f"https://fal.run/a/{n}") for n in (1, 2)]
    client.writer.write(calls[0] + HEALTH + calls[1] + get("GET /x HTTP/1.1", HOST) + b"NONSENSE\r\n\r\n" + calls[0])
    bodies = [(await client.response()).body for _ in range(5)]
    assert [body for body in bodies if body.startswith(b"/")] == [b"/a/1", b"/a/2"]
    assert bodies[0] == b"/a/1"
    assert bodies[4] == b'{"message": "The first line of the request is malformed."}'
    assert await client.reader.read() == b""
    await client.close()


@pytest.mark.gen_test
async def test_a_response_without_length_ends_a_connection_of_http_1_0(setup: Setup) -> None:
    """HTTP/1.0 has no chunks: only the end of the connection ends such a response, whatever the client asked for."""

    async def stream(exchange: Exchange) -> None:
        await exchange.body()
        await exchange.start(200, EVENT_STREAM)
        await exchange.send(b"data: 1\n\n")
        await release.wait()
        await exchange.end()

    release = asyncio.Event()
    client = await RawClient.open(serve(setup, await setup.upstream(stream)))
    client.writer.write(request("GET", version="HTTP/1.0", headers=["connection: keep-alive"]))
    head = await client.head()
    assert (head.header("transfer-encoding"), head.header("connection")) == (None, "close")
    release.set()
    assert await client.reader.read() == b"data: 1\n\n"
    await client.close()


@pytest.mark.parametrize(("status", "headers"), [(204, []), (304, [("etag", '"a"')])])
@pytest.mark.gen_test
async def test_a_response_without_a_body(setup: Setup, status: int, headers: list[tuple[str, str]]) -> None:
    """204 and 304 have neither a length nor chunks (RFC 9110 section 8.6), and fal's or our date."""

    async def respond(exchange: Exchange) -> None:
        await exchange.respond(status, b"", headers)

    client = await RawClient.open(serve(setup, await setup.upstream(respond)))
    await client.send("GET")
    head = await client.head()
    assert (head.status, head.header("content-length"), head.header("transfer-encoding")) == (status, None, None)
    assert head.header("date")
    client.writer.write(HEALTH)
    assert (await client.response()).status == 200
    await client.close()


@pytest.mark.gen_test
async def test_a_client_that_is_not_let_in_is_challenged(setup: Setup) -> None:
    """A 401 has a challenge (RFC 9110 section 15.5.2)."""
    client = await RawClient.open(serve(setup, authorize=lambda handler, target: False))
    await client.send()
    head = await client.head()
    assert (head.status, head.header("www-authenticate")) == (401, "Bearer")
    await client.close()


# Bodies that nobody wants.


@pytest.mark.parametrize("lines", [["content-length: 95000000"], [CHUNKED]])
@pytest.mark.parametrize("path", ["/x", "/api", ROUTE + "/"])
@pytest.mark.gen_test
async def test_a_path_that_is_not_the_route_takes_no_body(setup: Setup, path: str, lines: list[str]) -> None:
    """The response leaves at the head, the body is not kept, and the connection ends after it."""
    port, entries = serve_and_log(setup, await setup.upstream(must_not_be_called))
    client = await RawClient.open(port)
    client.writer.write(get(f"POST {path} HTTP/1.1", HOST, *lines))
    response = await client.response()
    assert (response.status, response.message, response.header("connection")) == (404, "Not found.", "close")
    client.writer.write(b"x" * 200_000)
    assert await client.reader.read() == b""
    assert [(entry["status"], entry["error"]) for entry in entries] == [(404, "NotFound")]
    await client.close()


def send_all_then_read(port: int, head: bytes) -> bytes:
    """Send a head and 3 MB without reading, as most clients do, then read to the end."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as client:
        client.sendall(head + bytes(3_000_000))
        client.shutdown(socket.SHUT_WR)
        received = b""
        while data := client.recv(65_536):
            received += data
        return received


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (get("POST /x HTTP/1.1", HOST, "content-length: 3000000"), b"404"),
        (get("POST /x HTTP/1.1", HOST, "content-length: 3000001"), b"404"),
        (get("POST /x HTTP/1.1", HOST, "content-length: 3000000", CHUNKED), b"400"),
        (get(HEALTHZ, *["a: b"] * 300), b"431"),
        (get("POST /healthz HTTP/1.1", HOST, "content-length: 3000000"), b"413"),
    ],
)
@pytest.mark.gen_test
async def test_a_client_that_still_sends_receives_the_response(setup: Setup, head: bytes, status: bytes) -> None:
    """All that comes behind a refused head is read and thrown away: a reset would take the response from the client."""
    received = await asyncio.to_thread(send_all_then_read, serve(setup), head)
    assert received.startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("held_back", [0, 1])
@pytest.mark.gen_test
async def test_nobody_lingers(setup: Setup, monkeypatch: pytest.MonkeyPatch, held_back: int) -> None:
    """A client that does not close its side is closed soon after the response, whether its body has come or not."""
    monkeypatch.setattr(connection, "LINGER_S", 0.05)
    client = await RawClient.open(serve(setup))
    client.writer.write(get("POST /x HTTP/1.1", HOST, "content-length: 10") + bytes(10 - held_back))
    assert (await client.response()).status == 404

    async def is_reset() -> bool:
        try:
            client.writer.write(b"a")
            await client.writer.drain()
            await asyncio.sleep(0.01)
        except ConnectionError:
            return True
        return False

    async with asyncio.timeout(10):
        while not await is_reset():
            pass
    client.leave()


@pytest.mark.parametrize(
    ("head", "status", "error"),
    [
        (get("POST /healthz HTTP/1.1", HOST, "content-length: 4097"), 413, LARGE),
        (get("POST /healthz HTTP/1.1", HOST, CHUNKED) + b"1001\r\n", 413, LARGE),
    ],
)
@pytest.mark.gen_test
async def test_a_body_beside_the_route_is_small(setup: Setup, head: bytes, status: int, error: str) -> None:
    """No handler beside the proxy's keeps more than 4 kB of a body."""
    port, entries = serve_and_log(setup)
    client = await RawClient.open(port)
    client.writer.write(head)
    response = await client.response()
    assert (response.status, response.message) == (status, "The body of the request is too large.")
    assert [(entry["status"], entry["error"]) for entry in entries] == [(status, error)]
    await client.close()


@pytest.mark.gen_test
async def test_a_slow_body_beside_the_route(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that does not come is not waited for, on any path."""
    monkeypatch.setattr(server, "SWEEP_INTERVAL_S", 0.01)
    monkeypatch.setattr(server, "BODY_WINDOW_S", 0.05)
    port, entries = serve_and_log(setup)
    client = await RawClient.open(port)
    client.writer.write(get("POST /healthz HTTP/1.1", HOST, "content-length: 10") + b"123456789")
    response = await client.response()
    assert (response.status, response.header("connection")) == (408, "close")
    assert response.message == "The body of the request took too long to arrive."
    assert await client.reader.read() == b""
    assert [(entry["status"], entry["error"]) for entry in entries] == [(408, "RequestTooSlow")]
    await client.close()


@pytest.mark.gen_test
async def test_a_fault_in_a_body_releases_the_slot(setup: Setup) -> None:
    """A call whose body cannot be read is refused as a call is, with its headers, and leaves room for another."""
    upstream = await setup.upstream(fine)
    port, entries = serve_and_log(setup, upstream, max_in_flight=1, allowed_origins=("https://a.example",))
    for _ in range(3):
        client = await RawClient.open(port)
        client.writer.write(post(CHUNKED, "origin: https://a.example", body="zz\r\n"))
        response = await client.response()
        assert (response.status, response.header("access-control-allow-origin")) == (400, "https://a.example")
        assert response.message == "A chunk of the request's body is malformed."
        assert await client.reader.read() == b""
        await client.close()
    client = await RawClient.open(port)
    client.writer.write(post("content-length: 2", body="{}"))
    assert (await client.response()).status == 200
    await client.close()
    assert [(entry["status"], entry["outcome"]) for entry in entries] == [(400, "refused")] * 3 + [(200, "ok")]
