"""Heads of requests: those that are accepted are read as Tornado reads them."""

import inspect

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tornado.http1connection import HTTP1Connection
from tornado.httputil import HTTPHeaders, HTTPInputError, HTTPServerRequest, RequestStartLine, parse_request_start_line

from tornado_fal_proxy.service import request_head
from tornado_fal_proxy.service.request_head import RequestFault, parse_head

# Heads by their peculiarity. Those with False are refused.
HEADS = {
    "as clients send them": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n\r\n", True),
    "no header": (b"GET / HTTP/1.0\r\n\r\n", True),
    "a header twice": (b"GET / HTTP/1.1\r\nHost: a\r\nx-fal-a: 1\r\nX-Fal-A: 2\r\n\r\n", True),
    "an empty value": (b"GET / HTTP/1.1\r\nHost: a\r\nx-fal-a:\r\nx-fal-b: \r\n\r\n", True),
    "white space around a value": (b"GET / HTTP/1.1\r\nHost: a\r\nx-fal-a: \t 1 \t\r\n\r\n", True),
    "colons in a value": (b"GET / HTTP/1.1\r\nHost: a\r\nx-fal-target-url: https://fal.run:443/a?b:c\r\n\r\n", True),
    "bytes above ASCII": (b"GET / HTTP/1.1\r\nHost: a\r\nx-fal-a: \xe4\xff\x85\r\n\r\n", True),
    "a long value": (b"GET / HTTP/1.1\r\nHost: a\r\nx-fal-a: " + b"a" * 1000 + b"\r\n\r\n", True),
    "a long name": (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x-y" * 1000 + b": a\r\n\r\n", True),
    "a long first line": (b"GET /" + b"a" * 1000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", True),
    "all characters of a name": (b"GET / HTTP/1.1\r\nHost: a\r\n!#$%&'*+-.^_`|~0aZ: a\r\n\r\n", True),
    "bare LF": (b"GET / HTTP/1.1\nHost: a\n\n", True),
    "a bare LF among others": (b"GET / HTTP/1.1\r\nHost: a\nx-fal-a: 1\r\n\r\n", True),
    "a bare LF at its end": (b"GET / HTTP/1.1\r\nHost: a\n\r\n", True),
    "a bare CR": (b"GET / HTTP/1.1\r\nHost: a\rx-fal-a: 1\r\n\r\n", False),
    "a CR before the line end": (b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", False),
    "a folded line": (b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", False),
    "a folded line with a colon": (b"GET / HTTP/1.1\r\nHost: a\r\n\tx-fal-b: c\r\n\r\n", False),
    "a folded first line": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", False),
    "no colon": (b"GET / HTTP/1.1\r\nHost: a\r\nb\r\n\r\n", False),
    "no name": (b"GET / HTTP/1.1\r\nHost: a\r\n: a\r\n\r\n", False),
    "a space before the colon": (b"GET / HTTP/1.1\r\nHost: a\r\nb : a\r\n\r\n", False),
    "NUL": (b"GET / HTTP/1.1\r\nHost: a\r\nx-fal-a: \0\r\n\r\n", False),
    "DEL": (b"GET / HTTP/1.1\r\nHost: a\r\nx-fal-a: \x7f\r\n\r\n", False),
}
Read = tuple[RequestStartLine, list[tuple[str, str]], dict[str, str]]


def tornados(data: bytes) -> Read | None:
    """Return the start line, the headers one by one and combined, as Tornado reads them; None if it refuses."""
    try:
        line, headers = HTTP1Connection._parse_headers(None, data)  # type: ignore[arg-type]
        start_line = parse_request_start_line(line)
        HTTPServerRequest(start_line=start_line, headers=headers)
    except HTTPInputError:
        return None
    return start_line, list(headers.get_all()), dict(headers)


def ours(data: bytes) -> Read | None:
    try:
        start_line, headers, _ = parse_head(data)
    except RequestFault:
        return None
    return start_line, list(headers.get_all()), dict(headers)


@pytest.mark.parametrize("name", list(HEADS))
def test_a_head_is_read_as_tornado_reads_it(name: str) -> None:
    """A head gives the same headers as with Tornado's parser, also when its parts are in a cache."""
    data, accepted = HEADS[name]
    read = tornados(data)
    assert [ours(data) for _ in range(2)] == [read] * 2
    assert (read is not None) == accepted


LINES = st.lists(
    st.one_of(
        st.sampled_from([b"Host: a", b"host:b", b"x-fal-a: 1", b" folded", b"none", b"a\rb: c", b"a: b\nc: d", b"\n"]),
        st.sampled_from([b"content-length: 1", b"Content-Length: 1, 1", b"transfer-encoding: chunked", b"expect: x"]),
        st.binary(max_size=12).filter(lambda line: b"\n\n" not in line and b"\n\r\n" not in line),
    ),
    max_size=5,
)


@given(st.sampled_from([b"GET / HTTP/1.1", b"GET / HTTP/1.0"]), LINES, st.sampled_from([b"\r\n\r\n", b"\n\n"]))
@example(b"GET / HTTP/1.1", [b"Host: a"], b"\r\n\n")
def test_any_head_is_refused_or_read_as_tornado_reads_it(first: bytes, lines: list[bytes], end: bytes) -> None:
    """No head that Tornado refuses is accepted, and one that is accepted has the same headers."""
    data = b"\r\n".join([first, *filter(None, lines)]) + end
    if (read := ours(data)) is not None:
        other = tornados(data)
        assert other is not None
        lengths = dict.fromkeys(["Content-Length"], "1") if "Content-Length" in other[2] else {}
        assert read[2] == other[2] | lengths


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        ("/a?b", "/a?b", "given"),
        ("http://a.example/b?c", "/b?c", "a.example"),
        ("HTTPS://a.example:1?c", "/?c", "a.example:1"),
        ("http://[::1]:80", "/", "[::1]:80"),
    ],
)
def test_an_absolute_target(target: str, path: str, host: str) -> None:
    """A target in absolute form is read as its path, and its host replaces the header's (RFC 9112 section 3.2.2)."""
    start_line, headers, _ = parse_head(f"GET {target} HTTP/1.1\r\nHost: given\r\n\r\n".encode())
    assert (start_line.path, headers.get_list("Host")) == (path, [host])


def test_hostile_heads_fill_no_cache() -> None:
    """A cache has a bounded number of short names and lines, whatever clients send."""
    caches = (request_head._cached_name, request_head._cached_line, request_head._is_host)
    for cache in caches:
        cache.cache_clear()
    long = b"a" * 300
    parse_head(b"GET /" + long + b" HTTP/1.1\r\nHost: a\r\n" + long + b": b\r\nAuthorization: secret\r\n\r\n")
    assert [cache.cache_info().currsize for cache in caches] == [2, 0, 1]  # two short names, and the host
    for cache in caches:
        assert cache.cache_info().maxsize is not None


def test_private_names_of_tornado() -> None:
    """Headers are kept in these two dicts."""
    assert list(inspect.signature(HTTP1Connection._parse_headers).parameters) == ["self", "data"]
    headers = HTTPHeaders({"a": "1"})
    assert (headers._as_list, headers._combined_cache) == ({"A": ["1"]}, {"A": "1"})
