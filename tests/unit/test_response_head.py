"""The head of fal's response: its status, the headers that the client gets, and its length, as tables."""

import pytest

from tornado_fal_proxy.errors import (
    MalformedResponse,
)
from tornado_fal_proxy.rules.headers import parse_response_head

OK = b"HTTP/1.1 200 OK\r\n"

# A status line, and its status and protocol.
STATUS_LINES = [
    (b"HTTP/1.1 200 OK\r\n", 200, "1.1"),
    (b"HTTP/1.1 200 OK\n", 200, "1.1"),
    (b"HTTP/1.1 200 OK", 200, "1.1"),
    (b"HTTP/1.1 200 \r\n", 200, "1.1"),
    (b"HTTP/1.1 200\r\n", 200, "1.1"),
    (b"HTTP/1.0 404 Not Found\r\n", 404, "1.0"),
    (b"HTTP/2 200 \r\n", 200, "2"),
    (b"HTTP/2 429\r\n", 429, "2"),
    (b"HTTP/1.1 422 caf\xe9 \xff\r\n", 422, "1.1"),
    (b"HTTP/1.1 200 a  b\tc\r\n", 200, "1.1"),
    (b"HTTP/1.1 100 Continue\r\n", 100, "1.1"),
    (b"HTTP/1.1 103 Early Hints\r\n", 103, "1.1"),
    (b"HTTP/1.1 599 Odd\r\n", 599, "1.1"),
    (b"HTTP/1.1 999 Odd\r\n", 999, "1.1"),
]
BAD_STATUS_LINES = [
    b"",
    b"\r\n",
    b"OK\r\n",
    b"200 OK\r\n",
    b"HTTP/1.1\r\n",
    b"HTTP/1.1 \r\n",
    b"HTTP/1.1  200 OK\r\n",
    b"HTTP/1.1 20 OK\r\n",
    b"HTTP/1.1 2000 OK\r\n",
    b"HTTP/1.1 099 OK\r\n",
    b"HTTP/1.1 000 OK\r\n",
    b"HTTP/1.1 -20 OK\r\n",
    b"HTTP/1.1 2x0 OK\r\n",
    b"HTTP/1.1 200OK\r\n",
    b"HTTP/11 200 OK\r\n",
    b"HTTP/1.10 200 OK\r\n",
    b"HTTP/ 200 OK\r\n",
    b"http/1.1 200 OK\r\n",
    b" HTTP/1.1 200 OK\r\n",
    b"HTTP/2.0 200 OK\r\n",
    b"HTTP/3 200 OK\r\n",
    b"ICY 200 OK\r\n",
    b"SSH-2.0-OpenSSH\r\n",
    b"\x00\xff\r\n",
    b"HTTP/1.1\t200 OK\r\n",
    b"content-type: application/json\r\n",
]


@pytest.mark.parametrize(("line", "status", "protocol"), STATUS_LINES)
def test_a_status_line_has_status_and_protocol(line: bytes, status: int, protocol: str) -> None:
    """The reason in a status line is ignored and may be anything."""
    head = parse_response_head([line])
    assert (head.status, head.protocol, head.headers, head.length) == (status, protocol, [], None)
    assert head.has_body is (status not in (204, 304))


@pytest.mark.parametrize("line", BAD_STATUS_LINES)
def test_anything_else_is_a_malformed_response(line: bytes) -> None:
    """Any other line is a 502 to the client, and the log gets at most 80 bytes of it."""
    with pytest.raises(MalformedResponse) as caught:
        parse_response_head([line, b"content-type: application/json\r\n"])
    assert caught.value.status == 502
    assert repr(line[:80]) in caught.value.detail


def test_no_head_at_all_is_a_malformed_response() -> None:
    """A missing head is malformed, and so is a very long line, which does not fill the log."""
    for lines in ([], [b"x" * 100_000]):
        with pytest.raises(MalformedResponse) as caught:
            parse_response_head(lines)
        assert len(caught.value.detail) < 200


@pytest.mark.parametrize("status", [204, 304])
def test_two_statuses_have_no_body(status: int) -> None:
    """A response with status 204 or 304 has no body (RFC 9110 sections 15.3.5 and 15.4.5)."""
    assert not parse_response_head([b"HTTP/1.1 %d \r\n" % status]).has_body


# The lines of a response, and the headers that the client gets.
HEADERS: list[tuple[list[bytes], list[tuple[str, str]]]] = [
    ([b"Content-Type: application/json\r\n"], [("content-type", "application/json")]),
    ([b"content-type:application/json\n"], [("content-type", "application/json")]),
    ([b"x-a: \t b c \t \r\n"], [("x-a", "b c")]),
    ([b"x-a:\r\n"], [("x-a", "")]),
    ([b"x-a:  \t\r\n"], [("x-a", "")]),
    ([b"x-a: b:c: d\r\n"], [("x-a", "b:c: d")]),
    ([b"x-a: caf\xc3\xa9 \xe9\xff\x80\r\n"], [("x-a", "caf\xc3\xa9 \xe9\xff\x80")]),
    (
        [b"x-fal-request-id: 1\r\n", b"x-fal-request-timeout-type: user\r\n"],
        [("x-fal-request-id", "1"), ("x-fal-request-timeout-type", "user")],
    ),
    # Duplicates and order.
    (
        [b"Set-Cookie: a=1\r\n", b"x-b: 1\r\n", b"Set-Cookie: c=2\r\n"],
        [("set-cookie", "a=1"), ("x-b", "1"), ("set-cookie", "c=2")],
    ),
    # Headers that the server sets itself.
    ([b"Content-Length: 5\r\n", b"Content-Encoding: gzip\r\n", b"x-a: 1\r\n"], [("x-a", "1")]),
    # Hop by hop.
    (
        [
            b"Connection: keep-alive\r\n",
            b"Keep-Alive: timeout=5\r\n",
            b"Proxy-Connection: close\r\n",
            b"Proxy-Authenticate: Basic\r\n",
            b"Proxy-Authentication-Info: a\r\n",
            b"Proxy-Anything: a\r\n",
            b"TE: trailers\r\n",
            b"Trailer: x-a\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Upgrade: h2c\r\n",
            b"x-a: 1\r\n",
        ],
        [("x-a", "1")],
    ),
    ([b"X-A: 1\r\n", b"connection: close, X-a\r\n", b"x-b: 2\r\n"], [("x-b", "2")]),
    (
        [
            b"connection: x-a\r\n",
            b"Connection:\tx-b ,, X-C\r\n",
            b"x-a: 1\r\n",
            b"x-b: 2\r\n",
            b"x-c: 3\r\n",
            b"x-d: 4\r\n",
        ],
        [("x-d", "4")],
    ),
    # Lines that are no field are left out, and their neighbours stay.
    ([b"x-a: 1\r\n", b"no colon\r\n", b"x-b: 2\r\n"], [("x-a", "1"), ("x-b", "2")]),
    ([b": 1\r\n", b"x b: 1\r\n", b"x(d): 1\r\n", b"x-\xe9: 1\r\n", b"x-f: 2\r\n"], [("x-f", "2")]),
    (
        [b"x-a: 1\x002\r\n", b"x-b: 1\r2\r\n", b"x-c: \x7f\r\n", b"x-d: \x1b\r\n", b"x-e: 1\n2\r\n", b"x-f: 2\r\n"],
        [("x-f", "2")],
    ),
    ([b"\r\n", b"x-a: 1\r\n"], [("x-a", "1")]),
    # Space before a colon is removed.
    ([b"x-a : 1\r\n", b"x-b \t: 2\r\n", b"te : 3\r\n"], [("x-a", "1"), ("x-b", "2")]),
    # Folds.
    ([b"x-a: 1\r\n", b"  2\r\n", b"\t3\r\n", b"x-b: 4\r\n"], [("x-a", "1 2 3"), ("x-b", "4")]),
    ([b"x-a:\r\n", b" 1\r\n"], [("x-a", "1")]),
    ([b" 1\r\n", b"x-a: 2\r\n"], [("x-a", "2")]),
    ([b"no colon\r\n", b" x-a: 1\r\n", b"x-b: 2\r\n"], [("x-b", "2")]),
    ([b"connection: x-a,\r\n", b" x-b\r\n", b"x-b: 1\r\n"], []),
]


@pytest.mark.parametrize(("lines", "headers"), HEADERS)
def test_the_clients_headers_are_the_targets(lines: list[bytes], headers: list[tuple[str, str]]) -> None:
    """The client gets all headers except those that HTTP forbids to forward and those that the server sets."""
    assert parse_response_head([OK, *lines]).headers == headers


# The lines of a response, and the length that may be promised to the client.
LENGTHS: list[tuple[list[bytes], int | None]] = [
    ([], None),
    ([b"content-length: 0\r\n"], 0),
    ([b"Content-Length: 12345678901\r\n"], 12_345_678_901),
    ([b"content-length: 12\r\n", b"content-encoding: gzip\r\n"], None),
    ([b"content-encoding: br\r\n", b"content-length: 12\r\n"], None),
    ([b"content-length: 12\r\n", b"transfer-encoding: chunked\r\n"], None),
    ([b"content-length: 12\r\n", b"transfer-encoding: identity\r\n"], None),
    ([b"content-length: 12\r\n", b"content-length: 012\r\n"], 12),
    ([b"content-length: 5, 5 ,\t5\r\n"], 5),
    ([b"content-length:\r\n", b" 5\r\n"], 5),
    ([b"content-length: %b\r\n" % (b"9" * 18)], 10**18 - 1),
]


# The lines of a response, and whether a length or chunks mark the end of its body.
FRAMES: list[tuple[list[bytes], bool]] = [
    ([], False),
    ([b"content-length: 12\r\n"], True),
    ([b"content-length: 12\r\n", b"content-encoding: gzip\r\n"], True),
    ([b"transfer-encoding: chunked\r\n"], True),
    ([b"transfer-encoding: gzip, Chunked \r\n"], True),
    ([b"transfer-encoding: gzip\r\n", b"transfer-encoding: chunked\r\n"], True),
    ([b"transfer-encoding: identity\r\n"], False),
    ([b"transfer-encoding:\r\n"], False),
    ([b"transfer-encoding: ,\r\n"], False),
    ([b"transfer-encoding: chunked, identity\r\n"], False),
    ([b"content-length: 1000\r\n", b"transfer-encoding: identity\r\n"], True),
    ([b"content-length: -1\r\n", b"transfer-encoding: chunked\r\n"], True),
]

# Lines that tell no end of the body, or two. Those of NOWHERE make any response malformed.
NOWHERE = [
    [b"content-length : 5\r\n"],
    [b"Content-Length\t: 5\r\n"],
    [b"transfer-encoding : chunked\r\n"],
]
NO_END = [
    [b"content-length: -1\r\n"],
    [b"content-length: +1\r\n"],
    [b"content-length: 1_0\r\n"],
    [b"content-length: 0x1\r\n"],
    [b"content-length:\r\n"],
    [b"content-length: 5,\r\n"],
    [b"content-length: 5 5\r\n"],
    [b"content-length: 5, 6\r\n"],
    [b"content-length: 5\r\n", b"content-length: 6\r\n"],
    [b"content-length: %b\r\n" % (b"9" * 19)],
    [b"content-length: %b\r\n" % (b"9" * 9999)],
    [b"content-length: %b\r\n" % (b"9" * 20), b"content-length: 5\r\n"],
    [b"content-length: 5\r\n", b"content-length: %b\r\n" % (b"9" * 20)],
    [b"content-length: x\r\n", b"transfer-encoding: identity\r\n"],
]


@pytest.mark.parametrize(("lines", "framed"), FRAMES)
def test_a_body_is_framed_by_a_length_or_by_chunks(lines: list[bytes], framed: bool) -> None:
    """Any other transfer coding leaves the end of a body to the end of the connection (RFC 9112 section 6.3)."""
    assert parse_response_head([OK, *lines]).framed is framed


@pytest.mark.parametrize("lines", NOWHERE + NO_END)
def test_a_body_whose_end_cannot_be_told_is_malformed(lines: list[bytes]) -> None:
    """A number that libcurl takes for none would make a body that was cut pass for one that the connection ends."""
    with pytest.raises(MalformedResponse) as caught:
        parse_response_head([OK, *lines])
    assert len(caught.value.detail) < 120
    if lines in NO_END:
        for status in (b"103", b"204", b"304"):
            assert parse_response_head([b"HTTP/1.1 %b \r\n" % status, *lines]).length is None


@pytest.mark.parametrize(("lines", "length"), LENGTHS)
def test_a_length_counts_only_where_it_is_the_bodys(lines: list[bytes], length: int | None) -> None:
    """An encoded body reaches the client decoded. A transfer-encoding makes a length void (RFC 9112 section 6.3)."""
    assert parse_response_head([OK, *lines]).length == length


@pytest.mark.parametrize(
    ("value", "streams"),
    [
        (b"text/event-stream", True),
        (b"Text/Event-Stream; charset=utf-8", True),
        (b"application/json", False),
        (b"application/json; a=text/event-stream", False),
        (b"", False),
    ],
)
def test_an_event_stream_is_recognized_by_its_type(value: bytes, streams: bool) -> None:
    """An event stream is recognized as fal's SDKs do it, by how the content-type begins."""
    assert parse_response_head([OK, b"content-type: %b\r\n" % value]).streams is streams
